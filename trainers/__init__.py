"""Everything that learns. This list is pure data: reading it imports no torch."""

TRAINERS = {
    "nnUNetTrainerMosaic": "nnmosaic.trainers.base",
    "nnUNetTrainerSelfDisambiguation": "nnmosaic.trainers.self_disambiguation.trainer",
    "nnUNetTrainerContextReconstruction": "nnmosaic.trainers.context_reconstruction.trainer",
    "nnUNetTrainerSelfDisambiguationContext": "nnmosaic.trainers.self_disambiguation_context",
    "nnUNetTrainerMultiRaterDiversified": "nnmosaic.trainers.multi_rater.trainer",
    "nnUNetTrainerMultiRaterPersonalized": "nnmosaic.trainers.multi_rater.trainer",
}
"""Trainer class -> module. The names are in results folders and checkpoints: do not change them."""

FIRST_STAGE = {"nnUNetTrainerMultiRaterPersonalized": "nnUNetTrainerMultiRaterDiversified"}
"""Trainer class -> the one whose trained fold it starts from."""
