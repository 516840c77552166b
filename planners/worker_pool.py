"""Worker processes that start in milliseconds, and whose death is reported instead of waited for.

nnU-Net's spawned workers each import torch; on a small machine that takes longer than the work.
Here one server process imports it once, and workers are forked from that.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import forkserver
from typing import Any

WORKER_MODULE = "nnmosaic.planners.planning_worker"
MAX_SUSPECTS = 8
"""Cases named when a worker dies: it was one of the first that are not done."""


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a process pool whose workers have `WORKER_MODULE` imported.

    The server begins to import as soon as the pool exists, beside whatever the caller does next.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([WORKER_MODULE])
        forkserver.ensure_running()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _die_with_parent() -> None:
    """End this worker when the command is killed; it would wait for work for ever."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def call(function: str, *arguments: Any, **options: Any) -> Any:
    """Call a function of `WORKER_MODULE` by name; runs in a worker."""
    return getattr(import_module(WORKER_MODULE), function)(*arguments, **options)


def run_cases(
    pool: ProcessPoolExecutor, function: str, arguments: Mapping[str, tuple[Any, ...]]
) -> Iterator[tuple[str, Any]]:
    """Yield (case, result) as workers finish; the first exception of a worker is raised here.

    Parameters
    ----------
    function : str
        Name of a function of `WORKER_MODULE`.
    arguments : mapping of str to tuple
        Case -> positional arguments.

    Raises
    ------
    RuntimeError
        If a worker process dies, with the cases that it may have been working on.
    """
    futures: dict[Future[Any], str] = {
        pool.submit(call, function, *values): case for case, values in arguments.items()
    }
    unfinished = dict.fromkeys(futures.values())
    try:
        for future in as_completed(list(futures)):
            result = future.result()
            unfinished.pop(futures[future])
            yield futures.pop(future), result
    except BrokenProcessPool:
        suspects = ", ".join(list(unfinished)[:MAX_SUSPECTS])
        raise RuntimeError(
            f"A worker process died while it worked on one of: {suspects}. Most often the memory "
            "was full. Run the same command again with fewer workers (-np); finished cases are "
            "kept."
        ) from None
    finally:
        for future in futures:
            future.cancel()
