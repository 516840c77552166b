"""Class centres that travel from slice to slice (methods/clustering_propagation.md)."""
