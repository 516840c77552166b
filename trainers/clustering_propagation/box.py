"""What a box around an object says of a slice, to a user and to the simulated one alike.

clustering_propagation.md, 1.6: the interior counts, most of all its middle, and a ring outside,
where the object is not. The numbers are ours.
"""

import numpy as np

RING_GAP = 1
"""Pixels between a box and the ring around it: an object may reach out of its box a little."""
RING_WIDTH = 2


def box_pixels(
    lower: np.ndarray, upper: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of the interior of a box, and the ring around it.

    Parameters
    ----------
    lower, upper : ndarray, shape (2,)
        Edges of the box along rows and columns; a pixel centre is a whole number.
    shape : tuple of int
        Rows and columns of the slice.

    Returns
    -------
    weights : ndarray of float, shape (H, W)
        Above 0 inside. A box that holds no pixel centre has that of the pixel next to its middle.
    ring : ndarray of bool, shape (H, W)
    """
    rows, columns = np.meshgrid(*(np.arange(n, dtype=float) for n in shape), indexing="ij")
    grid = np.stack((rows, columns), -1)
    inside = ((grid >= lower) & (grid <= upper)).all(-1)
    middle = (lower + upper) / 2
    if inside.any():
        off_centre = (grid - middle) / ((upper - lower) / 2)
        weights = np.exp(-2 * (off_centre**2).sum(-1)) * inside
    else:
        nearest = np.clip(np.floor(middle + 0.5), 0, np.array(shape) - 1).astype(int)
        weights = np.zeros(shape)
        weights[tuple(nearest)] = 1
    beyond = np.maximum(lower - grid, grid - upper).max(-1)
    return weights, (beyond > RING_GAP) & (beyond <= RING_GAP + RING_WIDTH)
