"""Threads of the CPU: all cores, unless the user says otherwise."""

import pytest
import torch

from nnmosaic.pipeline import device


@pytest.mark.parametrize(("said", "expected"), [(None, [6]), ("1", [])])
def test_the_users_number_of_threads_is_kept(
    said: str | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(device.os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert device.choose_device("cpu").type == "cpu"
    assert asked == expected
