"""Memory that was freed is used again."""

import platform
import subprocess
import sys

import pytest

PAGES_OF_STEPS = """
import resource
import numpy as np
from nnmosaic.trainers.heap import keep_freed_memory

def step():
    activations = [np.ones(2**17, "f8") for _ in range(64)]  # 64 MB

if KEEP:
    keep_freed_memory()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _fresh_pages(*, keep: bool) -> int:
    code = PAGES_OF_STEPS.replace("KEEP", str(keep))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="left as it is"
)
def test_freed_memory_is_not_cleared_by_the_system_again() -> None:
    assert _fresh_pages(keep=True) < _fresh_pages(keep=False) / 4


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnmosaic.trainers import heap

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(heap.ctypes, "CDLL", None)
    heap.keep_freed_memory()


def test_a_c_library_that_refuses_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnmosaic.trainers import heap

    calls = []

    class Library:
        def mallopt(self, name: int, value: int) -> int:
            calls.append(name)
            return 0

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.17"))
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: Library())
    heap.keep_freed_memory()
    assert calls == [heap.M_MMAP_THRESHOLD] * 2
