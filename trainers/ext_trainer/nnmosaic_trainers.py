"""Re-exports for nnU-Net's own trainer lookup, and nothing else."""

from nnmosaic.trainers.base import nnUNetTrainerMosaic
from nnmosaic.trainers.self_disambiguation.trainer import nnUNetTrainerSelfDisambiguation

__all__ = ["nnUNetTrainerMosaic", "nnUNetTrainerSelfDisambiguation"]
