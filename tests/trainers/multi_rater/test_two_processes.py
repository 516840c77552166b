"""The second stage in two processes whose samples have different raters (spec 7.5, DDP)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TWO_PROCESSES = """
import os, sys, torch
from types import SimpleNamespace
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch.nn.functional import cross_entropy
from nnmosaic.trainers.multi_rater.network import MultiRaterNet
from nnmosaic.trainers.multi_rater.personalized import nnUNetTrainerMultiRaterPersonalized as Stage
rank, folder, ddp = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "ddp"
data, labels, available = torch.load(f"{folder}/inputs.pt")
mine = slice(2 * rank, 2 * rank + 2)
torch.manual_seed(0)
unet = PlainConvUNet(1, 2, [8, 8], torch.nn.Conv2d, 3, [1, 2], 1, 2, 1, conv_bias=True)
model = MultiRaterNet(unet, channels=1, classes=2, raters=3, latent=4).eval()
for name, parameter in model.named_parameters():
    parameter.requires_grad_(name.startswith("heads."))
wrapped = model
if ddp:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
stage = SimpleNamespace(
    network=wrapped,
    _annotations=lambda batch: (labels[mine], available[mine]),
    segmentation_loss=lambda logits, drawn, batch: cross_entropy(logits, drawn[:, 0]),
)
for _ in range(2):  # DDP says in the second step that a weight was not used in the first
    model.zero_grad()
    Stage._terms(stage, {"data": data[mine]})[0]["segmentation"].backward()
gradients = [p.grad for p in model.heads.parameters()]
torch.save(gradients, f"{folder}/{sys.argv[3]}_{rank}.pt")
if ddp:
    torch.distributed.barrier()
    os._exit(0)  # all is written; taking gloo's threads down aborts the process now and then
"""


@pytest.mark.slow
def test_heads_that_are_absent_in_one_process_learn_from_the_other(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(4, 1, 16, 16, generator=generator)
    labels = torch.randint(0, 2, (4, 3, 16, 16), generator=generator)
    available = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]]).bool()
    torch.save((data, labels, available), tmp_path / "inputs.pt")
    command = [sys.executable, "-c", TWO_PROCESSES]
    runs = [
        subprocess.Popen([*command, str(rank), str(tmp_path), how])
        for rank in (0, 1)
        for how in ("ddp", "alone")
    ]
    assert [run.wait(timeout=300) for run in runs] == [0] * 4
    found = [torch.load(tmp_path / f"ddp_{rank}.pt") for rank in (0, 1)]
    alone = [torch.load(tmp_path / f"alone_{rank}.pt") for rank in (0, 1)]
    for first, second, *own in zip(*found, *alone, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, (own[0] + own[1]) / 2, rtol=1e-4, atol=1e-7)
    heads = [gradients[: len(gradients) // 3] for gradients in alone]  # of the first rater
    assert any(gradient.any() for gradient in heads[0])
    assert not any(gradient.any() for gradient in heads[1])
