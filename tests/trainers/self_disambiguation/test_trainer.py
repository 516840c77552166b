"""The trainer for partial labels: its loss, what it counts, and that it learns both classes."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers.base import nnUNetTrainerMosaic
from nnmosaic.trainers.dataloading import make_loaders
from nnmosaic.trainers.self_disambiguation.authors_loss import authors_terms, full_entropy
from nnmosaic.trainers.self_disambiguation.loss import GroupedDiceCELoss
from nnmosaic.trainers.self_disambiguation.sampling import SourceAwareDataLoader
from nnmosaic.trainers.self_disambiguation.trainer import nnUNetTrainerSelfDisambiguation

PARTIAL = "Dataset007_Merged"
Make = Callable[..., Any]


@pytest.fixture
def started(make_trainer: Make) -> Any:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL)
    trainer.on_train_start()
    return trainer


def test_the_loss_of_a_batch_is_the_weighted_grouped_loss(started: Any) -> None:
    batch = next(started.dataloader_train)
    logits = started.network(batch["data"])
    grouped = started.loss.loss
    assert isinstance(grouped, GroupedDiceCELoss)
    table = torch.tensor(
        [[0, 1, 0] if key.startswith("Bright") else [0, 0, 2] for key in batch["keys"]]
    )
    levels = len(logits)
    weights = np.array([0.5**i for i in range(levels)])
    weights[-1] = 0  # nnU-Net leaves out the lowest resolution
    weights /= weights.sum()
    expected = sum(
        w * grouped(level, target, table)
        for w, level, target in zip(weights, logits, batch["target"], strict=True)
        if w
    )
    got = started.segmentation_loss(logits, batch["target"], batch)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    stock = nnUNetTrainerMosaic._build_loss(started)(logits, batch["target"])
    assert abs(stock.item() - got.item()) > 0.01


def test_online_dice_counts_a_class_only_in_its_source(started: Any) -> None:
    batch = next(started.dataloader_train)
    keys = [f"{source}_case00" for source in ("Bright", "Dark")]
    target = [level.clone().zero_() for level in batch["target"]]
    target[0][0, 0, :3], target[0][1, 0, :3] = 1, 2
    logits = torch.zeros(2, 3, *target[0].shape[2:])
    logits[:, 1, 3:6], logits[:, 2, 6:9], logits[:, 0, 9:] = 1, 1, 1
    logits[0, 1, :3], logits[1, 2, :3] = 1, 1
    started.network = lambda _: [logits, *([logits[..., ::2, ::2, ::2]] * (len(target) - 1))]
    started.segmentation_loss = lambda *_: torch.zeros(())
    counts = started.validation_step({"data": batch["data"], "target": target, "keys": keys})
    plane = target[0][0, 0, 0].numel()
    # Planes 3-5 say "bright", 6-8 "dark"; each is wrong only where that class was looked for.
    assert counts["tp_hard"].tolist() == [3 * plane, 3 * plane]
    assert counts["fp_hard"].tolist() == [3 * plane, 3 * plane]
    assert counts["fn_hard"].tolist() == [0, 0]


def test_conditional_entropy_is_a_term_only_when_switched_on(started: Any) -> None:
    batch = next(started.dataloader_train)
    logits = [level.detach().requires_grad_() for level in started.network(batch["data"])]
    assert started.auxiliary_losses(batch, logits) == {}
    started.entropy, started.entropy_weight, started.ramp = "conditional", 2.0, 1.0
    first = started.auxiliary_losses(batch, logits)["conditional_entropy"]
    steps = started.num_epochs * started.num_iterations_per_epoch
    started.iteration = steps - 1
    last = started.auxiliary_losses(batch, logits)["conditional_entropy"]
    assert 0 < first.item() < last.item() <= 2 * np.log(2) + 1e-6
    assert last.item() == pytest.approx(first.item() * steps)


def test_full_entropy_and_the_authors_loss_take_the_place_of_ours(make_trainer: Make) -> None:
    options = {"loss_form": "authors", "entropy": "full", "entropy_weight": "1", "ramp": "0"}
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL, options=options)
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    logits = trainer.network(batch["data"])
    table = trainer._representatives(batch)
    value = trainer.loss.loss(logits[0], batch["target"][0], table)
    focal, dice = authors_terms(logits[0], batch["target"][0], table)
    assert value.item() == pytest.approx((focal + dice).item())
    term = trainer.auxiliary_losses(batch, logits)["full_entropy"]
    assert term.item() == pytest.approx(full_entropy(logits[0], batch["target"][0]).item())


EVERYTHING = {
    "entropy": "conditional", "ema_teacher": "true", "teacher_threshold": "0",
    "teacher_foreground_threshold": "0", "source_heads": "true", "ramp": "0",
}  # fmt: skip


MORE = {"loss_form": "authors", "random_contrast": "1", "sampling": "class_first"}


@pytest.mark.slow
def test_teacher_and_heads_learn_and_go_on_from_a_checkpoint(make_trainer: Make) -> None:
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL, options=EVERYTHING)
    trainer.on_train_start()
    before = [p.detach().clone() for p in trainer._heads.parameters()]
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(4)]
    assert set(outputs[0]) == {
        "loss", "segmentation", "conditional_entropy", "teacher", "source_heads", "consistency"
    }  # fmt: skip
    assert all(np.isfinite(list(output.values())).all() for output in outputs)
    assert outputs[0]["consistency"] > 0
    assert outputs[0]["teacher"] > 0
    for old, new in zip(before, trainer._heads.parameters(), strict=True):
        assert not torch.equal(old, new)
    path = f"{trainer.output_folder}/checkpoint_latest.pth"
    trainer.save_checkpoint(path)
    stored = torch.load(path, weights_only=False)
    assert set(stored["network_weights"]) == set(trainer.network.state_dict())

    resumed = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL)
    resumed.load_checkpoint(path)
    options = resumed.run_settings.options
    assert options["sampling"] == "sqrt"  # all are kept, should a default ever change
    assert options["entropy_weight"] == "0.1"
    assert (resumed.ramp, resumed.source_heads, resumed.entropy) == (0, True, "conditional")
    resumed.on_train_start()
    for mine, theirs in (
        (resumed.teacher.network, trainer.teacher.network),
        (resumed._heads, trainer._heads),
    ):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
    assert len(resumed.optimizer.param_groups) == 2
    resumed.train_step(next(resumed.dataloader_train))


def test_heads_learn_from_every_second_plane_in_turn(make_trainer: Make) -> None:
    options = {"source_heads": "true", "ramp": "0"}
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL, options=options)
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    for iteration in (4, 5):
        trainer.iteration = iteration
        logits = trainer.network(batch["data"])[0].detach().requires_grad_()
        trainer._features.retain_grad()
        features = trainer._features
        terms = trainer.auxiliary_losses(batch, [logits])
        sum(terms.values()).backward()
        for gradient in (features.grad, logits.grad):
            planes = gradient.abs().sum((0, 1, 3, 4)) > 0
            assert planes[iteration % 2 :: 2].all()
            assert not planes[1 - iteration % 2 :: 2].any()


def test_a_checkpoint_refuses_other_options(make_trainer: Make) -> None:
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL, options={"ramp": "0.5"})
    trainer.initialize()
    path = f"{trainer.output_folder}/checkpoint_latest.pth"
    trainer.save_checkpoint(path)
    other = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL, options={"ramp": "0.1"})
    with pytest.raises(InputError, match=r"was trained with --set ramp=0\.5, not 0\.1"):
        other.load_checkpoint(path)
    spelt_out = {"ramp": "0.50", "sampling": "sqrt", "ema_teacher": "false"}
    same = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL, options=spelt_out)
    same.load_checkpoint(path)
    assert same.ramp == 0.5


@pytest.mark.slow
def test_without_declared_sources_every_option_leaves_nnunet_as_it_is(make_trainer: Make) -> None:
    weights = []
    for cls, settings in (
        (nnUNetTrainerMosaic, {}),
        (nnUNetTrainerSelfDisambiguation, {"options": {**EVERYTHING, **MORE}}),
    ):
        trainer = make_trainer(cls, seed=1, **settings)
        trainer.on_train_start()
        trainer.train_step(next(trainer.dataloader_train))
        weights.append(trainer.network.state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_sources_share_the_batches_as_the_log_says(started: Any) -> None:
    loader = started.dataloader_train.data_loader
    assert isinstance(loader, SourceAwareDataLoader)
    log = Path(started.log_file).read_text()
    # Four training cases of each source, of different size; one of the two samples of a batch
    # shows foreground for certain, the other one as often the background.
    assert "Sampling (sqrt): Bright, 4 cases, share 0.500 (background 0.125, bright 0.375)" in log
    assert "Sampling (sqrt): Dark, 4 cases, share 0.500 (background 0.125, dark 0.375)" in log
    drawn = [[key.split("_")[0] for key in loader.get_indices()] for _ in range(20)]
    assert all(sorted(pair) == ["Bright", "Dark"] for pair in drawn)


@pytest.mark.slow
def test_merged_and_sparse_sources_are_learnt_together_in_3d(make_trainer: Make) -> None:
    """Bright: both balls as one label; dark: every second plane. Ignored voxels have no pull."""
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL, options={"entropy": "off"})
    content = json.loads(json.dumps(trainer.dataset_json))
    content["labels"]["ignore"] = 3
    sources = content["partial_labels"]["sources"]
    sources["Bright"]["annotated"], sources["Bright"]["merged"] = [], {"bright": ["bright", "dark"]}
    sources["Dark"]["annotated"] = ["bright", "dark"]
    plans = trainer.my_init_kwargs["plans"]
    trainer = nnUNetTrainerSelfDisambiguation(
        {**plans, "continue_training": False}, "3d_fullres", 0, content, torch.device("cpu")
    )
    trainer.initialize()
    size = trainer.configuration_manager.patch_size
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (2, 1, *size), generator=generator).float()
    target[0].clamp_(max=1)
    target[1, :, 1::2] = 3
    levels = [target[..., ::s, ::s, ::s] for s in (1, 2, 4)][
        : len(trainer._get_deep_supervision_scales())
    ]
    levels[-1] = torch.full_like(levels[-1], 3)  # planes vanish at low resolutions
    batch = {
        "data": torch.randn(2, 1, *size, generator=generator),
        "target": levels,
        "keys": ["Bright_case00", "Dark_case00"],
    }
    logits = [level.detach().requires_grad_() for level in trainer.network(batch["data"])]
    loss = trainer.segmentation_loss(logits, levels, batch)
    loss.backward()
    full = logits[0].grad
    assert full[1, :, 1::2].abs().max() == 0 < full[1, :, ::2].abs().max()
    # Inside the merged label no class is preferred to the other.
    ratio = full[0, 1:] / torch.softmax(logits[0], 1)[0, 1:]
    torch.testing.assert_close(ratio[0], ratio[1], rtol=1e-3, atol=1e-7)
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(10)]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_loaders_with_nnunets_own_class_give_nnunets_batches(make_trainer: Make) -> None:
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL, options={"sampling": "nnunet"})
    trainer.initialize()
    batches = []
    for make in (trainer.get_dataloaders, lambda: make_loaders(trainer, nnUNetDataLoader)):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(2)
        training, validation = make()
        batches.append([next(training), next(validation)])
    for ours, theirs in zip(*batches, strict=True):
        assert torch.equal(ours["data"], theirs["data"])
        assert all(map(torch.equal, ours["target"], theirs["target"]))
        assert list(ours["keys"]) == list(theirs["keys"])


TWO_PROCESSES = """
import os, sys, torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnmosaic.trainers.self_disambiguation.authors_loss import AuthorsLoss
from nnmosaic.trainers.self_disambiguation.loss import GroupedDiceCELoss
from nnmosaic.trainers.self_disambiguation.ambiguity import OpenVoxels
from nnmosaic.trainers.self_disambiguation.source_heads import (
    SourceHeads, consistency_loss, own_label_loss)
rank, folder, world = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ddp = world > 1
data, target, table, tables, sparse, mixed = torch.load(f"{folder}/inputs.pt")
torch.manual_seed(0)
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Conv3d(1, 6, 3, padding=1), torch.nn.Conv3d(6, 4, 1)
        self.heads = SourceHeads(6, tables.tolist())
    def forward(self, x, own, others):
        features = torch.relu(self.first(x))
        return self.last(features), self.heads(features, own, others)
model = Model().double()
wrapped = model
if ddp:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
mine = slice(rank * 2, rank * 2 + 2) if ddp else slice(0, 4)
y, t, options = target[mine], table[mine], {"ignore_label": 4, "ddp": ddp}
sources = [0, 1, 1, 0][mine]
gradients = []
for batch_dice in (True, False):
    others = [1 - s for s in sources]
    logits, (own, asked) = wrapped(data[mine], sources, others)
    loss = GroupedDiceCELoss(None, batch_dice=batch_dice, **options)(logits, y, t)
    inside = OpenVoxels(logits, y, t, **options)
    loss = loss + inside.conditional_entropy()
    loss = loss + inside.teacher_cross_entropy(
        logits.flip(1), threshold=0.3, foreground_threshold=0.3)
    loss = loss + own_label_loss(own, model.heads.groups, y, sources, ddp=ddp)
    loss = loss + consistency_loss(asked, logits, tables, y, t, others, **options)
    model.zero_grad()
    loss.backward()
    gradients.append([p.grad.clone() for p in model.parameters()])
every = torch.arange(4).expand(len(y), 4)  # of a source that annotates all
for loss_of in ("nnunet", "batch", "authors", "of which one process knows less"):
    logits, (own, _) = wrapped(data[mine], sources, sources)
    if loss_of.startswith("of which"):
        tables_of = torch.cat([torch.arange(4).expand(2, 4), tables[[1, 1]]])
        loss = GroupedDiceCELoss(None, batch_dice=False, **options)(
            logits, mixed[mine], tables_of[mine])
    elif loss_of == "authors":
        loss = AuthorsLoss(**options)(logits, sparse[mine], every)
    else:
        how = {"batch_dice": loss_of == "batch", "smooth": 1e-5, "do_bg": False, "ddp": False}
        stock = DC_and_CE_loss(how, {}, ignore_label=4, dice_class=MemoryEfficientSoftDiceLoss)
        ours = GroupedDiceCELoss(stock, batch_dice=how["batch_dice"], **options)
        loss = ours(logits, sparse[mine], every)
    loss = loss + 0 * sum(head.sum() for head in own)  # DDP wants every weight used
    model.zero_grad()
    loss.backward()
    gradients.append([p.grad.clone() for p in model.parameters()])
torch.save(gradients, f"{folder}/{world}_{rank}.pt")
if ddp:
    torch.distributed.barrier()
    os._exit(0)  # all is written; taking gloo's threads down aborts the process now and then
"""


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    """Two gloo processes with two samples each, against one with all four; sources are mixed."""
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(4, 1, 6, 6, 6, generator=generator, dtype=torch.float64)
    tables = torch.tensor([[0, 1, 0, 3], [0, 1, 1, 0]])
    table = tables[[0, 1, 1, 0]]
    raw = torch.randint(0, 4, (4, 1, 6, 6, 6), generator=generator)
    target = torch.stack([row[labels] for row, labels in zip(table, raw, strict=True)])
    target[0, :, :3] = 4  # unequal numbers of annotated voxels
    sparse = raw.clone()
    sparse[0] = sparse[2, :, 1:] = 4  # the first process has one sample that says something
    mixed = sparse.clone()
    mixed[2:] = torch.where(mixed[2:] < 4, tables[1][mixed[2:] % 4], 4)
    mixed[3] = 4  # in each process a sample is ignored, but only one is complete
    inputs = (data, target, table, tables, sparse, mixed)
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", TWO_PROCESSES]
    runs = [
        subprocess.Popen([*command, str(rank), str(tmp_path), str(world)])
        for rank, world in ((0, 2), (1, 2), (0, 1))
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0, 0]
    one = torch.load(tmp_path / "1_0.pt")
    for rank in (0, 1):
        for got, expected in zip(torch.load(tmp_path / f"2_{rank}.pt"), one, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_both_classes_are_learnt_from_two_half_labelled_sources(make_trainer: Make) -> None:
    """T21: the argmax holds both classes on both sources; plain nnU-Net loses them."""
    dice = {}
    for cls in (nnUNetTrainerSelfDisambiguation, nnUNetTrainerMosaic):
        trainer = make_trainer(
            cls,
            PARTIAL,
            epochs=3,
            iterations_per_epoch=30,
            optimizer="adamw",
            initial_lr=1e-2,
            seed=4,
        )
        trainer.run_training()
        trainer.set_deep_supervision_enabled(False)
        trainer.network.eval()
        dice[cls] = full_dice(trainer)
    assert dice[nnUNetTrainerSelfDisambiguation].min() > 0.6
    assert dice[nnUNetTrainerMosaic].min() < 0.4


def full_dice(trainer: Any) -> np.ndarray:
    """Return Dice of (source, class) against what can be seen: bright > 150, dark < 70."""
    batches: dict[str, list[torch.Tensor]] = {"Bright": [], "Dark": []}
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder)
    for key in dataset.identifiers:
        data, _, _, _ = dataset.load_case(key)
        batches[key.split("_")[0]].append(torch.from_numpy(data[:].astype(np.float32))[None])
    scores = np.zeros((2, 2))
    for row, images in enumerate(batches.values()):
        for image in images:
            size = [16 * (n // 16) for n in image.shape[2:]]
            image = image[..., : size[0], : size[1], : size[2]]
            with torch.no_grad():
                found = trainer.network(image).argmax(1)[0]
            values = image[0, 0]
            for column, truth in enumerate((values > 1.5, values < -1.5)):
                hit = found == column + 1
                overlap = (hit & truth).sum().item()
                scores[row, column] += 2 * overlap / (hit.sum() + truth.sum()).item() / len(images)
    return scores
