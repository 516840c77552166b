"""Random numbers that are the same when an interrupted epoch is repeated."""

import numpy as np
import torch


def generator_of(*counter: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that depends on these numbers only, say seed, process and iteration."""
    state = np.random.SeedSequence(counter).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
