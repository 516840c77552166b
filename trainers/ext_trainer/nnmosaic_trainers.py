"""Re-exports for nnU-Net's own trainer lookup, and nothing else."""

from nnmosaic.trainers.base import nnUNetTrainerMosaic
from nnmosaic.trainers.clustering_propagation.trainer import nnUNetTrainerClusteringPropagation
from nnmosaic.trainers.context_reconstruction.trainer import nnUNetTrainerContextReconstruction
from nnmosaic.trainers.multi_rater.diversified import nnUNetTrainerMultiRaterDiversified
from nnmosaic.trainers.multi_rater.personalized import nnUNetTrainerMultiRaterPersonalized
from nnmosaic.trainers.self_disambiguation.trainer import nnUNetTrainerSelfDisambiguation
from nnmosaic.trainers.self_disambiguation_context import nnUNetTrainerSelfDisambiguationContext

__all__ = [
    "nnUNetTrainerClusteringPropagation",
    "nnUNetTrainerContextReconstruction",
    "nnUNetTrainerMosaic",
    "nnUNetTrainerMultiRaterDiversified",
    "nnUNetTrainerMultiRaterPersonalized",
    "nnUNetTrainerSelfDisambiguation",
    "nnUNetTrainerSelfDisambiguationContext",
]
