"""Which outputs of the network an interaction speaks for, and which against.

methods/clustering_propagation.md, 1.6 and 5.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nnmosaic.data_conversion.prompts import Label


@dataclass(frozen=True)
class PromptClasses:
    """Output channels that an interaction concerns.

    Attributes
    ----------
    positive : tuple of int
        The channels are on at its pixels.
    negative : tuple of int
        The channels are off at its pixels. Only of datasets with regions: exclusive labels have a
        background channel to be positive for. Whoever uses them may leave out regions whose current
        mask does not cover the pixels.
    """

    positive: tuple[int, ...]
    negative: tuple[int, ...] = ()


def label_classes(label: Label, *, positive: bool, all_labels: Sequence[int]) -> PromptClasses:
    """Return the channel of an exclusive label; "it is not here" is a click on the background.

    Parameters
    ----------
    all_labels : sequence of int
        Of nnU-Net's label manager, in the order of the output channels, background first.
    """
    if isinstance(label, tuple):
        raise ValueError(f"label must be an integer where labels are exclusive, got {label}.")
    return PromptClasses((list(all_labels).index(label if positive else 0),))


def region_classes(
    label: Label, *, positive: bool, regions: Sequence[int | Sequence[int]]
) -> PromptClasses:
    """Return the channels of overlapping regions that a label, or a region, decides.

    An integer says which label a pixel has: it is in the regions that hold the label, and in no
    other. A region's name only says that it is in this region and those around it, and "not
    here" that it is in none of those within it. An integer that is not here means background.

    Parameters
    ----------
    regions : sequence
        ``foreground_regions`` of nnU-Net's label manager, in the order of the output channels.
    """
    members = [{region} if isinstance(region, int) else set(region) for region in regions]
    if isinstance(label, int):
        held = [c for c, region in enumerate(members) if positive and label in region]
        return PromptClasses(tuple(held), tuple(c for c in range(len(members)) if c not in held))
    if positive:
        return PromptClasses(tuple(c for c, r in enumerate(members) if r >= set(label)))
    return PromptClasses((), tuple(c for c, r in enumerate(members) if r <= set(label)))
