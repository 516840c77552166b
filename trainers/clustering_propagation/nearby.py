"""What a click says of the pixels around it that look alike.

Centres carry what a class looks like; that a few pixels in one place are wrong is beyond them
(clustering_propagation.md, 1.6). So a click also counts for its neighbours, on its own slice and on
those next to it: fully at the clicked pixel, less with the distance and with the angle between the
embeddings. What the network is sure of withstands. A design of our own.
"""

import torch
from scipy import ndimage
from torch import Tensor

REACH = 4.0
"""Distance, in pixels, at which a click counts for exp(-1/2). On twelve cases of the hippocampus, 3
and 5 were alike."""
FARTHEST = 3 * REACH
"""Pixels beyond which it does not count."""
HONOURED = 1.0
"""By which the logit of a clicked class exceeds all others at the clicked pixel."""


def share_of_clicks(clicked: Tensor, looks: Tensor, here: Tensor, *, steps: float) -> Tensor:
    """Return to which part pixels share what the nearest clicked pixel was said to be.

    Parameters
    ----------
    clicked : Tensor, shape (H, W), bool
        On the slice of the click; at least one pixel.
    looks : Tensor, shape (P, E)
        Unit vectors of the clicked pixels, in the order of ``nonzero``.
    here : Tensor, shape (E, H, W)
        Unit vectors of the slice that is asked about.
    steps : float
        Distance between the two slices, in pixels.

    Returns
    -------
    Tensor, shape (H, W), float
        In [0, 1]; on the slice of the click itself 1 at clicked pixels.
    """
    share = torch.zeros(clicked.shape)
    margin = int(FARTHEST)
    places = clicked.nonzero()
    low, high = (places.min(0).values - margin).clamp_min(0), places.max(0).values + margin + 1
    window = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    number = torch.zeros(clicked.shape, dtype=torch.long)
    number[clicked] = torch.arange(len(places))
    distance, nearest = ndimage.distance_transform_edt(
        ~clicked[window].numpy(), return_indices=True
    )
    rows, columns = (torch.from_numpy(index).long() for index in nearest)
    said = looks[number[window][rows, columns]].movedim(2, 0)  # (E, h, w)
    everything = slice(None), *window
    alike = (said * here[everything]).sum(0).clamp(0, 1)
    far = torch.from_numpy(distance).float() ** 2 + steps**2
    share[window] = alike * torch.exp(-far / (2 * REACH**2)) * (far <= FARTHEST**2)
    return share


def told(logits: Tensor, on: Tensor, off: Tensor, *, regions: bool) -> Tensor:
    """Return logits that follow what a person said, as far as it counts.

    Parameters
    ----------
    logits : Tensor, shape (K, H, W)
    on, off : Tensor, shape (K, H, W)
        To which part, in [0, 1], a class is known to be there, or not to be there. Without regions
        ``off`` has no meaning: that a class is not there is said by another one that is.
    regions : bool
        Whether classes overlap.

    Returns
    -------
    Tensor, shape (K, H, W), half precision
    """
    found = logits.float()
    if regions:
        enough = found.abs().clamp_min(HONOURED)
        sign = torch.where(on >= off, 1, -1)
        return found.lerp(sign * enough, torch.maximum(on, off)).half()
    share, k = on.max(0, keepdim=True)
    goal = found.max(0, keepdim=True).values + HONOURED
    return found.scatter(0, k, found.gather(0, k).lerp(goal, share)).half()
