"""Partial labels and context reconstruction together."""

from nnmosaic.trainers.context_reconstruction.trainer import nnUNetTrainerContextReconstruction
from nnmosaic.trainers.self_disambiguation.trainer import nnUNetTrainerSelfDisambiguation


class nnUNetTrainerSelfDisambiguationContext(
    nnUNetTrainerSelfDisambiguation, nnUNetTrainerContextReconstruction
):
    """Self-disambiguation that also learns, with its own loss, from masked patches.

    There is one teacher; where the option ``ema_teacher`` is on, its momentum is that option's.
    """
