"""Everything that learns. This list is pure data: reading it imports no torch."""

TRAINERS = {
    "nnUNetTrainerMosaic": "nnmosaic.trainers.base",
    "nnUNetTrainerSelfDisambiguation": "nnmosaic.trainers.self_disambiguation.trainer",
    "nnUNetTrainerContextReconstruction": "nnmosaic.trainers.context_reconstruction.trainer",
    "nnUNetTrainerSelfDisambiguationContext": "nnmosaic.trainers.self_disambiguation_context",
    "nnUNetTrainerMultiRaterDiversified": "nnmosaic.trainers.multi_rater.diversified",
    "nnUNetTrainerMultiRaterPersonalized": "nnmosaic.trainers.multi_rater.personalized",
    "nnUNetTrainerClusteringPropagation": "nnmosaic.trainers.clustering_propagation.trainer",
}
"""Trainer class -> module. The names are in results folders and checkpoints: do not change them."""

RATER_TRAINERS = ("nnUNetTrainerMultiRaterDiversified", "nnUNetTrainerMultiRaterPersonalized")
"""Those that learn from the label maps of several raters."""

FIRST_STAGE = {"nnUNetTrainerMultiRaterPersonalized": "nnUNetTrainerMultiRaterDiversified"}
"""Trainer class -> the one whose trained fold it starts from."""

WARM_START = {
    "nnUNetTrainerMultiRaterDiversified": "nnUNetTrainerMosaic",
    "nnUNetTrainerClusteringPropagation": "nnUNetTrainerMosaic",
}
"""Trainer class -> the one that ``run`` trains before it, for its pretrained weights."""
