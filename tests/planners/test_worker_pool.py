import os
import signal
from functools import partial

import pytest

from nnmosaic.planners.worker_pool import call, run_cases, worker_pool

preprocess = partial(call, "preprocess_case")


def test_an_error_of_a_worker_is_raised_here() -> None:
    with worker_pool(1) as pool, pytest.raises(TypeError, match="missing"):
        list(run_cases(pool, preprocess, {"some_case": ()}))


def test_a_dead_worker_is_reported_with_its_case() -> None:
    with worker_pool(1) as pool:
        pid = pool.submit(os.getpid).result()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(
            RuntimeError,
            match=r"one of some_case was ended by SIGKILL|died while it worked on one of some_case",
        ):
            list(run_cases(pool, preprocess, {"some_case": ()}))
