"""What a click says of the pixels around it that look alike.

Centres carry what a class looks like; that a few pixels in one place are wrong is beyond them
(clustering_propagation.md, 1.6). So a click also counts for its neighbours, on its own slice and on
those next to it: fully at the clicked pixel, less with the length of the way to it, on which
intensities other than the click's are long. So it fills an organ and ends at its edge. What the
network is sure of withstands. How far it counts is measured on the training cases, see `reach`. A
design of our own; geodesic distances to clicks are known from Wang et al. (DeepIGeoS, IEEE TPAMI
2019) and Luo et al. (MIDeepSeg, Medical Image Analysis 2021).
"""

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from skimage.graph import MCP_Geometric
from torch import Tensor

FARTHEST = 3.0
"""A click does not count farther than so many times its reach."""
ALIKE, UNLIKE = 0.08, 1.0
"""Length of a pixel that has the intensity of the click, and what a difference of one standard
deviation of the image adds to it. On CHAOS T2, 0.15 and 2 were worse."""
ACROSS = 0.25
"""Part of the distance between slices that counts: an organ goes on from slice to slice. On CHAOS
T2, with 1 one click per class changed next to nothing."""
SMOOTHING = 1.0
"""Standard deviation, in pixels, of the filter that takes noise out of intensities."""
LOOKS = 16
"""Clicked pixels, at most, whose intensities are looked at."""
HONOURED = 5.0
"""By which the logit of a clicked class exceeds all others at the clicked pixel."""


def smooth(image: np.ndarray) -> Tensor:
    """Return a slice (channels, H, W) without its noise."""
    return torch.from_numpy(gaussian_filter(image.astype(np.float32), (0, SMOOTHING, SMOOTHING)))


def lengths_of_ways(
    clicked: Tensor, there: Tensor, here: Tensor, *, longest: float
) -> tuple[tuple[slice, slice], Tensor]:
    """Return the lengths of the shortest ways from clicked pixels.

    Parameters
    ----------
    clicked : Tensor, shape (H, W), bool
        On the slice of the click; at least one pixel.
    there, here : Tensor, shape (channels, H, W)
        Intensities of that slice, and of the one that is asked about, in standard deviations.
    longest : float
        Pixels that only longer ways lead to may be left out.

    Returns
    -------
    window : tuple of slice
        Rows and columns outside of which all ways are longer.
    lengths : Tensor, shape of the window, float
    """
    places = clicked.nonzero()
    margin = int(longest / ALIKE)
    low, high = (places.min(0).values - margin).clamp_min(0), places.max(0).values + margin + 1
    rows, columns = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    looks = there[:, clicked][:, _some(len(places))]  # (channels, P)
    difference = looks[:, :, None, None] - here[:, rows, columns][:, None]
    unlike = difference.square().mean(0).sqrt().amin(0).numpy()
    ways = MCP_Geometric(ALIKE + UNLIKE * unlike)
    lengths, _ = ways.find_costs(clicked[rows, columns].nonzero().tolist())
    return (rows, columns), torch.from_numpy(lengths).float()


def share_of_clicks(
    clicked: Tensor, there: Tensor, here: Tensor, *, across: float, reach: float
) -> Tensor:
    """Return to which part pixels share what the clicked ones were said to be.

    Parameters
    ----------
    clicked, there, here
        See `lengths_of_ways`.
    across : float
        Length of the way from that slice to this one.
    reach : float
        Length of a way, positive, at which a click counts for exp(-1/2).

    Returns
    -------
    Tensor, shape (H, W), float
        In [0, 1]; on the slice of the click itself 1 at clicked pixels.
    """
    share = torch.zeros(clicked.shape)
    farthest = FARTHEST * reach
    window, lengths = lengths_of_ways(clicked, there, here, longest=farthest)
    far = lengths**2 + across**2
    share[window] = torch.exp(-far / (2 * reach**2)) * (far <= farthest**2)
    return share


def _some(number: int) -> np.ndarray:
    """Return up to `LOOKS` indices below a number, evenly spread."""
    evenly = np.linspace(0, number - 1, min(number, LOOKS))
    return np.asarray(evenly.round(), dtype=int)


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
