"""Everything that learns. This list is pure data: reading it imports no torch."""

TRAINERS = {
    "nnUNetTrainerMosaic": "nnmosaic.trainers.base",
    "nnUNetTrainerSelfDisambiguation": "nnmosaic.trainers.self_disambiguation.trainer",
    "nnUNetTrainerContextReconstruction": "nnmosaic.trainers.context_reconstruction.trainer",
    "nnUNetTrainerSelfDisambiguationContext": "nnmosaic.trainers.self_disambiguation_context",
}
"""Trainer class -> module. The names are in results folders and checkpoints: do not change them."""
