"""Several annotations per case (methods/multi_rater_personalization.md)."""
