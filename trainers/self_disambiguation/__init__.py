"""Self-disambiguation: one model from sources that annotate different classes."""
