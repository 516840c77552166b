"""The teacher's momentum over the training (context_reconstruction.md, 1.5)."""

from math import cos, pi


def cosine_momentum(n: float, total: int, *, base: float, warmup: int) -> float:
    """Return the momentum at iteration ``n``: from 0 to ``base`` linearly, then to 1 as a cosine.

    Parameters
    ----------
    n : float
        Iteration since the start of the training, from 0.
    total, warmup : int
        Iterations of the training, and of the linear part.
    """
    if n < warmup:
        return warmup_momentum(n, base=base, warmup=warmup)
    return 1 - (1 - base) / 2 * (1 + cos(pi * (n - warmup) / (total - warmup)))


def warmup_momentum(n: float, *, base: float, warmup: int) -> float:
    """Return the linear part, ``base`` at its last iteration.

    The released code takes the number of the batch within its epoch for ``n``, and so never leaves
    the first values: its teacher is nearly the student (1.5).
    """
    return base * min(1.0, n / max(1, warmup - 1))
