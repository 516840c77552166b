"""A progress bar with the remaining time on a terminal, plain lines everywhere else."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yield a function that is called with the name of each finished item."""
    start = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total)
            yield lambda _: bar.advance(task)
    else:
        yield _line_writer(title, total, start)
    logger.info("%s: done in %.1f s", title, time.monotonic() - start)


def _line_writer(title: str, total: int, start: float) -> Callable[[str], None]:
    state = {"done": 0.0, "written": start}

    def advance(item: str) -> None:
        state["done"] += 1
        now = time.monotonic()
        if now - state["written"] >= SECONDS_BETWEEN_LINES:
            state["written"] = now
            left = (now - start) / state["done"] * (total - state["done"])
            logger.info(
                "%s: %d of %d, about %.0f s left (%s)", title, state["done"], total, left, item
            )

    return advance
