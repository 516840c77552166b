"""Learning to write hidden organs into the output (methods/context_reconstruction.md)."""
