"""Everything that learns. This list is pure data: reading it imports no torch."""

TRAINERS = {
    "nnUNetTrainerMosaic": "nnmosaic.trainers.base",
    "nnUNetTrainerSelfDisambiguation": "nnmosaic.trainers.self_disambiguation.trainer",
}
"""Trainer class -> module. Names are an on-disk interface: results folders and checkpoints hold them."""
