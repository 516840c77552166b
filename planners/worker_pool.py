"""Worker processes that start in milliseconds, and whose death is reported instead of waited for.

nnU-Net's spawned workers each import torch; on a small machine that takes longer than the work.
Here one server process imports it once, and workers are forked from that.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

WORKER_MODULE = "nnmosaic.planners.planning_worker"
MAX_SUSPECTS = 8
"""Cases named when a worker dies and nobody knows on which: one of the first that are not done."""


def start_server() -> BaseContext:
    """Let the server process begin to import, beside whatever the caller does next."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([WORKER_MODULE])
    forkserver.ensure_running()
    return context


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a process pool whose workers have `WORKER_MODULE` imported."""
    context = start_server()
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


def call_one(pool: Executor, function: str, *arguments: Any, **options: Any) -> Any:
    """Call a function of `WORKER_MODULE` in a worker of ``pool`` and return its result.

    Raises
    ------
    RuntimeError
        If the worker process dies.
    """
    try:
        return pool.submit(call, function, *arguments, **options).result()
    except BrokenProcessPool:
        raise RuntimeError(
            f"The worker process that ran {function!r} died; most often the memory was full. Run "
            "the same command again."
        ) from None


def call(function: str, *arguments: Any, **options: Any) -> Any:
    """Call a function of `WORKER_MODULE` by name; runs in a worker."""
    return getattr(import_module(WORKER_MODULE), function)(*arguments, **options)


def run_cases(
    pool: Executor,
    function: Callable[..., Any],
    arguments: Mapping[str, tuple[Any, ...]],
    *,
    case_of: Callable[[int], str | None] = lambda _: None,
) -> Iterator[tuple[str, Any]]:
    """Yield (case, result) as workers finish; the first exception of a worker is raised here.

    Parameters
    ----------
    function : callable
        For processes, of `WORKER_MODULE` by way of `call`.
    arguments : mapping of str to tuple
        Case -> positional arguments.
    case_of : callable
        Process id of a worker -> the case it was last working on, where that is known.

    Raises
    ------
    RuntimeError
        If a worker process dies, with its case and cause.
    """
    futures: dict[Future[Any], str] = {}
    workers: list[BaseProcess] = []
    unfinished = dict.fromkeys(arguments)
    try:
        for case, values in arguments.items():
            futures[pool.submit(function, *values)] = case
        workers = multiprocessing.active_children()
        for future in as_completed(list(futures)):
            result = future.result()
            unfinished.pop(futures[future])
            yield futures.pop(future), result
    except BrokenProcessPool:
        pool.shutdown()  # only then all exit codes are known
        raise RuntimeError(_cause_of_death(workers, case_of, list(unfinished))) from None
    finally:
        for future in futures:
            future.cancel()


def _cause_of_death(
    workers: list[BaseProcess], case_of: Callable[[int], str | None], unfinished: list[str]
) -> str:
    cure = "Run the same command again; finished cases are kept."
    # The pool ends the other workers with SIGTERM.
    for worker in workers:
        code = worker.exitcode
        if code in (None, 0, -signal.SIGTERM) or worker.pid is None:
            continue
        case = case_of(worker.pid) or f"one of {', '.join(unfinished[:MAX_SUSPECTS])}"
        if code == -getattr(signal, "SIGKILL", 0):  # Windows has none
            cure = f"Most often the memory was full: use fewer workers (-np). {cure}"
        cause = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"The worker process of {case} was ended {cause}. {cure}"
    suspects = ", ".join(unfinished[:MAX_SUSPECTS])
    return f"A worker process died while it worked on one of {suspects}. {cure}"
