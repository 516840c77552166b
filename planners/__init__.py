"""Fingerprint, plans, preprocessing and folds: from a raw dataset to data a trainer can read."""

NUM_FOLDS = 5
