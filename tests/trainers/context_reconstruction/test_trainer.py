"""The masked pass in training: what it sees, what it adds, and that it can stop and go on."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.predict import predict
from nnmosaic.planners.plans_section import RunSettings
from nnmosaic.trainers.base import nnUNetTrainerMosaic
from nnmosaic.trainers.checkpoint import EXTRA, read_checkpoint
from nnmosaic.trainers.context_reconstruction import trainer as module
from nnmosaic.trainers.context_reconstruction.loss import reconstruction_loss
from nnmosaic.trainers.context_reconstruction.trainer import nnUNetTrainerContextReconstruction
from nnmosaic.trainers.ema_teacher import EXPORTED
from nnmosaic.trainers.self_disambiguation_context import nnUNetTrainerSelfDisambiguationContext

Ours = nnUNetTrainerContextReconstruction
Make = Callable[..., Any]
FULL_FORM = {
    "every_k": "1", "few_cases": "1000", "mask_fill": "zero", "mask_min_cells": "6",
    "reconstruction_weight": "0.5",
}  # fmt: skip
"""A masked pass in every step, with a teacher, and with holes that can be told from the image."""
IMAGE = "imagesTr/case00_0000.nii.gz"


def scripted(trainer: Any, seed: int, *, samples: int = 2) -> dict[str, Any]:
    """Return a batch that depends on the seed only: noise, brighter in a box that is class 1."""
    generator = torch.Generator().manual_seed(seed)
    patch = trainer.configuration_manager.patch_size
    channels = 1 + (len(trainer.label_manager.foreground_labels) if trainer.is_cascaded else 0)
    data = torch.randn(samples, channels, *patch, generator=generator)
    regions = trainer.label_manager.has_regions
    target = torch.zeros(samples, 2 if regions else 1, *patch)
    for i in range(samples):
        corner = [int(torch.randint(n // 2, (), generator=generator)) for n in patch]
        box = (slice(None), *(slice(c, c + n // 2) for c, n in zip(corner, patch, strict=True)))
        target[i][box] = 1
    data[:, :1] += 2 * target[:, :1]
    if channels > 1:
        data[:, 1:] = 1
    if trainer.label_manager.has_ignore_label:
        ignored = trainer.label_manager.ignore_label
        if regions:
            target = torch.cat([target, torch.zeros_like(target[:, :1])], 1)
            target[:, -1, :3] = 1
        else:
            target[:, :, :3] = ignored
    levels: Any = target
    if trainer.enable_deep_supervision:
        scales = trainer._get_deep_supervision_scales()
        levels = [
            functional.interpolate(
                target, [round(n * s) for n, s in zip(patch, scale, strict=True)]
            )
            for scale in scales
        ]
    return {"data": data, "target": levels, "keys": ["Bright_case00"] * samples}


def unchanged(plans: dict[str, Any], dataset: dict[str, Any]) -> None:
    pass


@pytest.fixture
def started(make_trainer: Make, plans_of: Make) -> Callable[..., Any]:
    """Return a function that makes a small network's trainer, with its teacher, for scripts.

    ``change`` alters plans and dataset.json; further keywords are options, besides `FULL_FORM`.
    ``inputs`` of the trainer collects what its network is given.
    """

    def start(
        change: Callable[..., None] = unchanged,
        *,
        cls: Any = Ours,
        dataset: str = "Dataset004_Balls",
        deep_supervision: bool = True,
        settings: dict[str, Any] | None = None,
        script: Callable[[Any], Any] = lambda _: (None, None),
        begin: bool = True,
        **options: str,
    ) -> Any:
        template = make_trainer(cls, dataset)
        plans, content = plans_of(dataset, plain=True), dict(template.dataset_json)
        configuration = plans["configurations"]["3d_fullres"]
        configuration["patch_size"] = [16, 24, 16]
        configuration["architecture"]["arch_kwargs"] |= {
            "n_stages": 3,
            "features_per_stage": [4, 8, 16],
            "kernel_sizes": [[3, 3, 3]] * 3,
            "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
        }
        change(plans, content)
        trainer: Any = cls(plans, "3d_fullres", 0, content, torch.device("cpu"))
        trainer.enable_deep_supervision = deep_supervision
        full_form = FULL_FORM if issubclass(cls, Ours) else {}
        wanted = {"seed": 1, **(settings or {}), "options": {**full_form, **options} or None}
        trainer.request_settings(RunSettings(**wanted).over(template.run_settings))
        trainer.get_dataloaders = lambda: script(trainer)
        if begin:
            trainer.on_train_start()
            trainer.inputs = []
            trainer.network.register_forward_pre_hook(
                lambda _, inputs: trainer.inputs.append(inputs[0].clone())
            )
        return trainer

    return start


def test_the_masked_pass_sees_the_image_with_holes(started: Make) -> None:
    trainer = started()
    batch = scripted(trainer, 0)
    before = batch["data"].clone()
    trainer.train_step(batch)
    clean, masked = trainer.inputs
    assert torch.equal(clean, before)
    assert torch.equal(batch["data"], before)
    hidden = masked == 0
    assert torch.equal(masked[~hidden], before[~hidden])
    cells = np.prod(trainer._grid)
    assert hidden.float().mean((1, 2, 3, 4)).tolist() == pytest.approx(
        [int(0.4 * cells) / cells] * 2
    )
    assert not torch.equal(hidden[0], hidden[1])
    trainer.train_step(batch)
    assert not torch.equal(trainer.inputs[3] == 0, hidden)


def test_masks_depend_on_seed_process_and_iteration_only(started: Make) -> None:
    hidden = {}
    for name, seed, rank, iteration in (
        ("one", 1, 0, 0), ("same", 1, 0, 0), ("seed", 2, 0, 0), ("rank", 1, 1, 0), ("step", 1, 0, 1)
    ):  # fmt: skip
        trainer = started(settings={"seed": seed}, mask_fill="noise")
        batch = scripted(trainer, 0)
        trainer.local_rank, trainer.iteration = rank, iteration
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        trainer.further_passes(batch)[0]()
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.array_equal(np.random.get_state()[1], states[1])
        hidden[name] = trainer.inputs[0] != batch["data"]
    assert [name for name in hidden if torch.equal(hidden[name], hidden["one"])] == ["one", "same"]


def test_one_mask_for_the_batch(started: Make) -> None:
    trainer = started(mask_per_sample="false")
    trainer.train_step(scripted(trainer, 0))
    hidden = trainer.inputs[1] == 0
    assert torch.equal(hidden[0], hidden[1])


def test_cost_is_cut_by_every_k_and_by_a_part_of_the_batch(started: Make) -> None:
    trainer = started(every_k="2", masked_fraction="0.5")
    calls = []
    for seed in range(4):
        trainer.train_step(scripted(trainer, seed))
        calls.append([len(data) for data in trainer.inputs])
        trainer.inputs.clear()
    assert calls == [[2, 1], [2], [2, 1], [2]]


def test_a_masked_sample_keeps_its_label_and_its_case(started: Make) -> None:
    trainer = started(masked_fraction="0.5", mask_fill="foreign")
    batch = {**scripted(trainer, 0), "keys": ["first", "second"]}
    seen = []

    def loss(logits: Any, target: Any, samples: dict[str, Any]) -> Tensor:
        seen.append((samples["keys"], samples["data"], target))
        return logits[0].mean()

    trainer.segmentation_loss = loss
    for iteration in range(12):
        trainer.iteration = iteration
        trainer.further_passes(batch)[0]()
    for keys, data, target in seen:
        i = batch["keys"].index(keys[0])
        assert torch.equal(data[0], batch["data"][i])
        assert all(torch.equal(t[0], b[i]) for t, b in zip(target, batch["target"], strict=True))
    assert {keys[0] for keys, *_ in seen} == {"first", "second"}
    masked, i = trainer.inputs[0], batch["keys"].index(seen[0][0][0])
    foreign = masked[0] != batch["data"][i]
    assert torch.equal(masked[0][foreign], batch["data"][1 - i][foreign])


def test_terms_are_logged_where_some_steps_lack_them(started: Make) -> None:
    trainer = started(every_k="2")
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(scripted(trainer, seed)) for seed in range(3)]
    assert ["masked" in output for output in outputs] == [True, False, True]
    for order in (outputs, outputs[::-1], outputs[1:]):
        trainer.on_train_epoch_end(order)
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    mean = np.round((outputs[0]["masked"] + outputs[2]["masked"]) / 2, 4)
    assert f"masked {mean}" in log
    assert log.count("masked ") == 3
    assert log.count("segmentation ") == 3


def test_complementary_pairs_show_every_sample(started: Make) -> None:
    trainer = started(reconstruction_goal="complement")
    seen = set()
    for n in range(40):
        batch = {**scripted(trainer, 0, samples=4), "keys": list("abcd")}
        chosen = trainer._some_samples(batch, torch.Generator().manual_seed(n))["keys"]
        assert chosen[:2] == chosen[2:]
        seen |= set(chosen)
    assert seen == set("abcd")


def test_complementary_pairs_agree_without_a_teacher(started: Make) -> None:
    options = {"mask_ratio": "0.5", "reconstruction_ramp": "0", "reconstruction_weight": "1"}
    trainer = started(reconstruction_goal="complement", **options)
    assert trainer.teacher is None
    batch = scripted(trainer, 0)
    outputs = trainer.train_step(batch)
    first, second = trainer.inputs[1]
    hidden = first == 0
    assert torch.equal(second == 0, ~hidden)
    image = next(x for x in batch["data"] if torch.equal(x[~hidden], first[~hidden]))
    assert torch.equal(second[hidden], image[hidden])
    assert outputs["reconstruction"] > 0
    trainer.network.train()
    logits = torch.stack(list(trainer.network(trainer.inputs[1])[0]))
    one, other = (reconstruction_loss(logits[[i]], logits[[1 - i]], form="kl") for i in (0, 1))
    trainer._hidden = lambda target, _: torch.stack([hidden, hidden])
    trainer._some_samples = lambda batch, _: {**batch, "data": torch.stack([image, image])}
    value = trainer._masked_pass({**batch, "others": batch["data"]})["reconstruction"]
    assert value.item() == pytest.approx((one + other).item() / 2, rel=1e-4)


def test_the_ratio_rises_with_the_curriculum(started: Make) -> None:
    trainer = started(mask_curriculum="true", mask_ratio="0.6")
    shares = []
    for trainer.iteration in range(9):
        hidden = trainer._hidden(torch.zeros(1, 1, 16, 24, 16), torch.Generator())
        shares.append(hidden.float().mean().item())
    expected = [0.2 + 0.4 * (n + 1) / 9 for n in range(9)]
    assert shares == pytest.approx(expected, abs=0.002)


def test_terms_are_weighted_and_switched_off_by_0(started: Make) -> None:
    weights = {"reconstruction_ramp": "0", "masked_weight": "1", "reconstruction_weight": "1"}
    terms = {}
    for factor in ("1", "3"):
        trainer = started(**{**weights, "masked_weight": factor, "reconstruction_weight": factor})
        (masked,) = trainer.further_passes(scripted(trainer, 0))
        terms[factor] = {name: value.item() for name, value in masked().items()}
    assert set(terms["1"]) == {"masked", "reconstruction"}
    for name, value in terms["1"].items():
        assert terms["3"][name] == pytest.approx(3 * value)
    trainer = started(reconstruction_weight="0")
    assert trainer.teacher is None
    assert set(trainer.further_passes(scripted(trainer, 0))[0]()) == {"masked"}
    trainer = started(masked_weight="0")
    assert set(trainer.further_passes(scripted(trainer, 0))[0]()) == {"reconstruction"}
    trainer = started(masked_weight="0", reconstruction_weight="0")
    trainer.train_step(scripted(trainer, 0))
    assert len(trainer.inputs) == 1


def test_the_teachers_weight_rises(started: Make) -> None:
    trainer = started(reconstruction_ramp="0.5", momentum="mean_teacher")
    batch = scripted(trainer, 0)
    values = []
    for iteration in (0, 1, 4, 8):  # of 9
        trainer.iteration = iteration
        mask = trainer._hidden
        trainer._hidden = lambda target, _, mask=mask: mask(
            target, torch.Generator().manual_seed(0)
        )
        values.append(trainer.further_passes(batch)[0]()["reconstruction"].item())
    assert values[1] == pytest.approx(2 * values[0])
    assert values[2] == pytest.approx(values[0] * 4.5)
    assert values[3] == pytest.approx(values[2])


def test_gradients_are_those_of_the_sum(started: Make) -> None:
    trainer = started(reconstruction_ramp="0")
    batch = scripted(trainer, 0)
    trainer._step = lambda: None
    trainer.train_step(batch)
    sequential = [p.grad.clone() for p in trainer.network.parameters() if p.grad is not None]
    trainer.network.zero_grad()
    trainer.iteration = 0
    first, second = trainer._first_pass(batch), trainer.further_passes(batch)[0]()
    sum([*first.values(), *second.values()]).backward()
    joint = [p.grad for p in trainer.network.parameters() if p.grad is not None]
    for one, other in zip(sequential, joint, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def norm(trainer: Any, loss: Tensor) -> float:
    trainer.network.zero_grad()
    loss.backward()
    grads = [p.grad.norm() for p in trainer.network.parameters() if p.grad is not None]
    return float(torch.stack(grads).norm())


@pytest.mark.slow
def test_the_released_scale_is_inert_and_ours_are_not(started: Make) -> None:
    trainer = started(reconstruction_ramp="0", masked_weight="0", reconstruction_weight="1")
    for step in range(51):
        if step in (0, 50):
            batch = scripted(trainer, 0)
            supervised = norm(trainer, trainer._first_pass(batch)["segmentation"])
            for form in ("kl", "rel_mse", "mse_over_norm"):
                trainer.reconstruction = form
                value = trainer.further_passes(batch)[0]()["reconstruction"]
                share = norm(trainer, value) / supervised
                if form == "mse_over_norm":  # as with the released patch, batch and classes
                    share *= (batch["data"].numel() * 3 / (4 * 14 * 96**3)) ** 0.5
                low, high = (0, 1e-3) if form == "mse_over_norm" else (1e-3, 10)
                assert low < share < high, (step, form, share)
            trainer.reconstruction = "kl"
        trainer.train_step(scripted(trainer, step))


def test_the_teacher_is_apart_from_optimiser_and_exported_network(started: Make) -> None:
    trainer = started()
    assert trainer._do_i_compile() is False
    trainer.train_step(scripted(trainer, 0))
    parameters = list(trainer.teacher.network.parameters())
    assert all(p.grad is None and not p.requires_grad for p in parameters)
    known = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not known & {id(p) for p in parameters}
    assert not trainer.teacher.network.training
    trainer.set_deep_supervision_enabled(True)
    assert isinstance(trainer.network(scripted(trainer, 0)["data"]), list)
    assert isinstance(trainer.teacher(scripted(trainer, 0)["data"]), Tensor)
    path = f"{trainer.output_folder}/checkpoint_latest.pth"
    trainer.save_checkpoint(path)
    assert set(read_checkpoint(Path(path))["network_weights"]) == set(trainer.network.state_dict())


@pytest.mark.parametrize("momentum", ["cosine", "mean_teacher", "released"])
def test_momentum_follows_the_iteration(started: Make, momentum: str) -> None:
    trainer = started(momentum=momentum, momentum_warmup="0.5", momentum_base="0.9")
    got = []
    for trainer.iteration in range(9):  # 3 epochs of 3
        got.append(trainer.teacher_momentum())
    if momentum == "cosine":
        assert got[:4] == pytest.approx([0, 0.3, 0.6, 0.9])
        assert got[4:] == sorted(got[4:])
        assert 0.98 < got[-1] < 1
    elif momentum == "mean_teacher":
        assert got == pytest.approx([min(0.9, n / (n + 1)) for n in range(9)])
    else:
        assert got == pytest.approx([0, 0.9 / 59, 1.8 / 59] * 3)
        trainer.momentum_base, trainer.num_iterations_per_epoch = 0.996, 250
        trainer.iteration = 7 * 250 + 249
        assert trainer.teacher_momentum() == pytest.approx(0.049611, abs=1e-6)


def test_weights_that_were_loaded_before_training_are_the_teachers(started: Make) -> None:
    trainer = started(begin=False)
    trainer.initialize()
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.fill_(0.25)
    trainer.on_train_start()
    assert all((p == 0.25).all() for p in trainer.teacher.network.parameters())


# -------------------------------------------------------------------- stop, go on, predict


def script(trainer: Any, first: int = 0) -> tuple[Iterator[dict[str, Any]], ...]:
    """Return endless batches first, first + 1, ... of a script, and others for validation."""
    return tuple((scripted(trainer, n) for n in count(start)) for start in (first, 1000))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(started: Make, scaled: bool) -> None:
    def make(**keywords: Any) -> Any:
        common = {"settings": {"epochs": 4}, "begin": False, "mask_kind": "random_tube"}
        trainer = started(**{"script": script, **common, **keywords})
        if scaled:  # as with AMP, where losses are multiplied by a factor that grows
            trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=256, growth_interval=2)
        return trainer

    whole = make()
    whole.run_training()
    half = make()
    half.save_every = 1
    end_of_epoch = half.on_epoch_end

    def stop_after_two() -> None:
        end_of_epoch()
        if half.current_epoch == 2:
            raise KeyboardInterrupt

    half.on_epoch_end = stop_after_two
    with pytest.raises(KeyboardInterrupt):
        half.run_training()
    other = make(script=lambda trainer: script(trainer, first=6))
    other.load_checkpoint(f"{half.output_folder}/checkpoint_latest.pth")
    other.run_training()
    for one, two in (
        (whole.network, other.network),
        (whole.teacher.network, other.teacher.network),
    ):
        for name, weight in one.state_dict().items():
            assert torch.equal(weight, two.state_dict()[name]), name
    moments = [list(t.optimizer.state_dict()["state"].values()) for t in (whole, other)]
    for one, two in zip(*moments, strict=True):
        assert torch.equal(one["momentum_buffer"], two["momentum_buffer"])
    first, second = (next(iter(t.network.parameters())) for t in (whole, half))
    assert not torch.equal(first, second)
    if scaled:
        assert whole.grad_scaler.state_dict() == other.grad_scaler.state_dict()
        assert whole.grad_scaler.get_scale() > half.grad_scaler.get_scale() > 256


def test_a_plain_checkpoint_starts_a_teacher_and_says_so(started: Make) -> None:
    plain = started(cls=nnUNetTrainerMosaic)
    path = f"{plain.output_folder}/checkpoint_latest.pth"
    plain.save_checkpoint(path)
    content = torch.load(path, weights_only=False)
    del content[EXTRA]  # as stock nnU-Net writes it
    torch.save(content, path)
    trainer = started(begin=False)
    trainer.load_checkpoint(path)
    trainer.on_train_start()
    weights = plain.network.state_dict()
    assert all(torch.equal(w, weights[n]) for n, w in trainer.teacher.network.state_dict().items())
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert "holds no teacher" in log


@pytest.mark.slow
def test_the_teacher_is_exported_and_predicts(make_trainer: Make, prepared: Path) -> None:
    options = {"momentum": "mean_teacher", "reconstruction_weight": "0.5"}
    trainer = make_trainer(Ours, epochs=1, seed=0, options=options, optimizer="adamw")
    trainer.run_training()
    folder = Path(trainer.output_folder)
    student = read_checkpoint(folder / "checkpoint_final.pth")
    teacher = read_checkpoint(folder / EXPORTED)
    assert set(teacher["network_weights"]) == set(student["network_weights"])
    assert (folder / EXPORTED).stat().st_size < 0.6 * (
        folder / "checkpoint_final.pth"
    ).stat().st_size
    for name, weight in teacher["network_weights"].items():
        assert torch.equal(weight, trainer.teacher.network.state_dict()[name])
    assert any(
        not torch.equal(weight, student["network_weights"][name])
        for name, weight in teacher["network_weights"].items()
    )
    assert not list(folder.glob("*.tmp*"))
    images = prepared / "images"
    images.mkdir()
    raw = prepared / "nnUNet_raw" / "Dataset004_Balls" / IMAGE
    (images / raw.name).symlink_to(raw)
    found = {}
    for checkpoint in ("checkpoint_final.pth", EXPORTED):
        output = prepared / checkpoint
        failures = predict(
            images, output, folder.parent, folds=[0], checkpoint=checkpoint, mirroring=False,
            save_probabilities=True, device="cpu", workers=1,
        )  # fmt: skip
        assert not failures
        found[checkpoint] = np.load(output / "case00.npz")["probabilities"]
    assert not np.allclose(found["checkpoint_final.pth"], found[EXPORTED])


# -------------------------------------------------------------------- plans and labels of all kinds


def two_dimensional(plans: dict[str, Any], dataset: dict[str, Any]) -> None:
    configuration = plans["configurations"]["3d_fullres"]
    for key in ("patch_size", "spacing", "median_image_size_in_voxels"):
        configuration[key] = configuration[key][1:]
    arguments = configuration["architecture"]["arch_kwargs"]
    for key in ("kernel_sizes", "strides"):
        arguments[key] = [row[1:] for row in arguments[key]]
    for key in ("conv_op", "norm_op"):
        arguments[key] = arguments[key].replace("3d", "2d")


def anisotropic(plans: dict[str, Any], dataset: dict[str, Any]) -> None:
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"][0] = 6
    arguments = configuration["architecture"]["arch_kwargs"]
    arguments["strides"] = [[1, *row[1:]] for row in arguments["strides"]]


def regions(plans: dict[str, Any], dataset: dict[str, Any]) -> None:
    dataset["labels"] = {"background": 0, "whole": [1, 2], "core": 2}
    dataset["regions_class_order"] = [1, 2]


def ignored(plans: dict[str, Any], dataset: dict[str, Any]) -> None:
    dataset["labels"] = {**dataset["labels"], "ignore": 3}


def ignored_regions(plans: dict[str, Any], dataset: dict[str, Any]) -> None:
    regions(plans, dataset)
    ignored(plans, dataset)


def cascade(plans: dict[str, Any], dataset: dict[str, Any]) -> None:
    plans["configurations"]["3d_lowres"] = {
        **plans["configurations"]["3d_fullres"], "next_stage": "3d_fullres"
    }  # fmt: skip
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"


def batch_normalised(plans: dict[str, Any], dataset: dict[str, Any]) -> None:
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm3d"


VARIANTS = (
    two_dimensional, anisotropic, regions, ignored, ignored_regions, cascade, batch_normalised
)  # fmt: skip


@pytest.mark.parametrize("change", [*VARIANTS, unchanged])
def test_a_step_of_training_and_validation(started: Make, change: Callable[..., None]) -> None:
    trainer = started(change, deep_supervision=change is not unchanged, reconstruction_ramp="0")
    batch = scripted(trainer, 0)
    outputs = [trainer.train_step(scripted(trainer, seed)) for seed in range(2)]
    assert set(outputs[0]) == {"loss", "segmentation", "masked", "reconstruction"}
    assert np.isfinite([list(output.values()) for output in outputs]).all()
    assert outputs[1]["reconstruction"] > 0
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        counts = trainer.validation_step(batch)
    assert counts["tp_hard"].shape == (2,)
    assert np.isfinite(counts["loss"])


@pytest.mark.parametrize(
    ("change", "options", "function", "keyword", "expected"),
    [
        (unchanged, {}, "reconstruction_loss", "regions", False),
        (regions, {}, "reconstruction_loss", "regions", True),
        (unchanged, {"temperature": "2"}, "reconstruction_loss", "temperature", 2.0),
        (unchanged, {"reconstruction": "rel_mse"}, "reconstruction_loss", "form", "rel_mse"),
        (unchanged, {"mask_kind": "random_tube"}, "draw_mask", "kind", "random_tube"),
        (unchanged, {"mask_ratio": "0.3"}, "draw_mask", "ratio", 0.3),
    ],
)
def test_options_and_labels_reach_mask_and_loss(
    started: Make,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[..., None],
    options: dict[str, str],
    function: str,
    keyword: str,
    expected: object,
) -> None:
    trainer = started(change, **options)
    seen = []
    real = getattr(module, function)
    monkeypatch.setattr(
        module, function, lambda *args, **given: seen.append(given) or real(*args, **given)
    )
    trainer.train_step(scripted(trainer, 0))
    assert [given[keyword] for given in seen] == [expected]


@pytest.mark.parametrize("region", ["all", "hidden"])
def test_the_goal_counts_everywhere_or_where_it_is_hidden(
    started: Make, monkeypatch: pytest.MonkeyPatch, region: str
) -> None:
    trainer = started(reconstruction_region=region)
    seen = []
    monkeypatch.setattr(
        module,
        "reconstruction_loss",
        lambda *args, where, **given: (
            seen.append(where) or reconstruction_loss(*args, where=where, **given)
        ),
    )
    trainer.train_step(scripted(trainer, 0))
    clean, masked = trainer.inputs
    if region == "all":
        assert seen == [None]
    else:
        assert torch.equal(seen[0], masked != clean)


def test_a_compiled_network_learns_the_same_and_is_saved_as_plain_weights(
    started: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = [started(momentum="mean_teacher")]
    monkeypatch.setattr(Ours, "_do_i_compile", lambda _: True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    trainers.append(started(momentum="mean_teacher"))
    assert hasattr(trainers[1].network, "_orig_mod")
    losses = [
        [trainer.train_step(scripted(trainer, seed))["loss"] for seed in range(2)]
        for trainer in trainers
    ]
    assert losses[0] == losses[1]
    for trainer in trainers:
        trainer.save_checkpoint(str(Path(trainer.output_folder) / f"{id(trainer)}.pth"))
    plain, compiled = (
        read_checkpoint(Path(trainer.output_folder) / f"{id(trainer)}.pth") for trainer in trainers
    )
    for of in (lambda c: c["network_weights"], lambda c: c[EXTRA]["teacher"]):
        assert set(of(compiled)) == set(of(plain))
        assert all(torch.equal(weight, of(plain)[name]) for name, weight in of(compiled).items())
    again = started(momentum="mean_teacher", begin=False)
    again.load_checkpoint(str(Path(trainers[1].output_folder) / f"{id(trainers[1])}.pth"))
    teacher = again.teacher.network.state_dict()
    assert all(
        torch.equal(weight, teacher[name]) for name, weight in plain[EXTRA]["teacher"].items()
    )


def test_half_precision_inside_and_losses_in_full(
    started: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = started(reconstruction_ramp="0")
    monkeypatch.setattr(trainer, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    kinds = []
    trainer.network.register_forward_hook(lambda *call: kinds.append(call[2][0].dtype))
    results = [trainer.train_step(scripted(trainer, seed)) for seed in range(2)]
    assert kinds == [torch.bfloat16] * 4
    assert np.isfinite([list(result.values()) for result in results]).all()
    assert results[1]["reconstruction"] > 0
    with trainer.autocast():
        terms = trainer.further_passes(scripted(trainer, 2))[0]()
    assert {name: value.dtype for name, value in terms.items()} == {
        "masked": torch.float32, "reconstruction": torch.float32
    }  # fmt: skip


def test_ignored_voxels_of_regions_do_not_attract_masks(started: Make) -> None:
    trainer = started(ignored_regions, mask_foreground="true")
    target = torch.zeros(200, 3, 16, 24, 16)
    target[:, 0, 8:] = 1
    target[:, -1, :8] = 1
    hidden = trainer._hidden(target, torch.Generator().manual_seed(0)).float().mean((0, 1, 3, 4))
    assert hidden[8:].mean() > 2 * hidden[:8].mean()


def test_labels_of_the_previous_stage_are_hidden_too(started: Make) -> None:
    trainer = started(cascade, mask_fill="noise")
    batch = scripted(trainer, 0)
    trainer.train_step(batch)
    hidden = trainer.inputs[1][:, 1:] == 0
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    assert 0.3 < hidden.float().mean() < 0.4001
    assert torch.equal(trainer.inputs[1][:, :1] != batch["data"][:, :1], hidden[:, :1])


def test_without_deep_supervision_all_samples_are_compared(started: Make) -> None:
    trainer = started(unchanged, deep_supervision=False, reconstruction_ramp="0")
    batch = scripted(trainer, 0)
    seen = []
    loss = trainer.teacher
    trainer.teacher = lambda data: seen.append(data) or loss(data)
    value = trainer.further_passes(batch)[0]()["reconstruction"]
    value.backward()
    assert torch.equal(seen[0], batch["data"])
    single = {k: v[1:] for k, v in batch.items()}
    hidden = trainer._hidden
    trainer._hidden = lambda target, generator: hidden(batch["target"], generator)[1:]
    other = trainer.further_passes(single)[0]()["reconstruction"]
    trainer._hidden = lambda target, generator: hidden(batch["target"], generator)[:1]
    single = {k: v[:1] for k, v in batch.items()}
    first = trainer.further_passes(single)[0]()["reconstruction"]
    assert value.item() == pytest.approx((first.item() + other.item()) / 2, rel=1e-4)


def test_masked_patches_leave_running_statistics_alone(started: Make) -> None:
    trainer = started(batch_normalised)
    batch = scripted(trainer, 0)
    layer = next(m for m in trainer.network.modules() if isinstance(m, torch.nn.BatchNorm3d))
    before, momentum = layer.running_mean.clone(), layer.momentum
    trainer.further_passes(batch)[0]()
    assert torch.equal(layer.running_mean, before)
    assert layer.momentum == momentum
    trainer._first_pass(batch)
    assert not torch.equal(layer.running_mean, before)
    trainer.after_step()
    twin = next(m for m in trainer.teacher.network.modules() if isinstance(m, torch.nn.BatchNorm3d))
    assert torch.equal(twin.running_mean, layer.running_mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": "1"}, r"--set mask_ratio=1: A ratio of 1 hides"),
        ({"mask_ratio": "1", "mask_curriculum": "true"}, "hides"),
        ({"mask_ratio": "0.0001"}, "hides 0 of"),
        ({"every_k": "0"}, "--set every_k=0: expected a whole number from 1"),
    ],
)
def test_options_that_cannot_work_are_refused(
    make_trainer: Make, options: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_trainer(Ours, options=options).initialize()


def test_pairs_need_another_sample(make_trainer: Make) -> None:
    options = {"reconstruction_goal": "complement", "reconstruction_weight": "0.5"}
    trainer = make_trainer(Ours, batch_size=1, options=options)
    with pytest.raises(InputError, match="needs a batch of at least 2"):
        trainer.initialize()


def test_options_of_a_teacher_need_one(make_trainer: Make) -> None:
    trainer = make_trainer(Ours, options={"reconstruction": "rel_mse"})
    with pytest.raises(InputError, match=r"reconstruction=rel_mse changes nothing without a teach"):
        trainer.initialize()


def test_one_sample_has_holes_of_zero(started: Make) -> None:
    trainer = started(settings={"batch_size": 1}, mask_fill="foreign")
    batch = scripted(trainer, 0, samples=1)
    trainer.train_step(batch)
    clean, masked = trainer.inputs
    assert set(masked[masked != clean].tolist()) == {0}
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert "hidden voxels are 0, not foreign tissue" in log


def test_the_default_is_the_recipe_that_was_chosen(make_trainer: Make) -> None:
    """By benchmarks/context_reconstruction.py; each of it is a choice that costs or saves time."""
    trainer = make_trainer(Ours)
    trainer.initialize()
    assert (trainer.every_k, trainer.mask_fill, trainer.mask_min_cells) == (2, "foreign", 5)
    assert (trainer.mask_kind, trainer.mask_ratio, trainer.reconstruction) == ("block", 0.4, "kl")
    assert trainer.teacher_momentum() is None
    passes = []
    for trainer.iteration in range(4):
        passes.append(len(trainer.further_passes({})))
    assert passes == [1, 0, 1, 0]


@pytest.mark.parametrize(("few", "expected"), [("3", [0, 0, 0]), ("4", [1, 0, 1])])
def test_there_is_no_masked_pass_with_more_than_few_training_cases(
    make_trainer: Make, few: str, expected: list[int]
) -> None:
    options = {"few_cases": few, "reconstruction_weight": "0.5"}
    trainer = make_trainer(Ours, options=options)
    trainer.initialize()
    assert len(trainer.do_split()[0]) == 4
    passes = []
    for trainer.iteration in range(3):
        passes.append(len(trainer.further_passes({})))
    assert passes == expected
    assert (trainer.teacher_momentum() is None) == (few == "3")
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert ("--set few_cases=4 turns it on" in log) == (few == "3")


# -------------------------------------------------------------------- several processes, sources


PROCESS = """
import os, sys, torch
from unittest import mock
from nnmosaic.planners.plans_section import RunSettings
from nnmosaic.trainers.context_reconstruction.trainer import nnUNetTrainerContextReconstruction
rank, folder, world = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
plans, dataset, batches, hidden = torch.load(f"{folder}/inputs.pt")
states = []
if world > 1:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
LOGITS = {"reconstruction": "rel_mse", "masked_weight": "0", "reconstruction_region": "hidden"}
for batch_dice, options in ((True, {}), (False, {}), (False, LOGITS)):
    plans["configurations"]["3d_fullres"]["batch_dice"] = batch_dice
    with mock.patch("torch.distributed.is_initialized", lambda: False):  # nnU-Net: CUDA only
        trainer = nnUNetTrainerContextReconstruction(
            {**plans, "continue_training": False}, "3d_fullres", 0, dataset, torch.device("cpu"))
        trainer.output_folder = f"{folder}/{world}_{rank}"
        trainer.disable_checkpointing = True
        trainer.request_settings(RunSettings(
            seed=5, epochs=1,
            options={"reconstruction_ramp": "0", "momentum_warmup": "0.9", "every_k": "1",
                     "mask_fill": "zero", "mask_min_cells": "6", "reconstruction_weight": "0.5",
                     **options}))
        trainer.initialize()
    mine = slice(rank * 2, rank * 2 + 2) if world > 1 else slice(0, 4)
    if world > 1:
        trainer.is_ddp, trainer.local_rank = True, rank
        trainer.loss = trainer._build_loss()
        trainer.network = torch.nn.parallel.DistributedDataParallel(trainer.network)
    trainer.teacher = trainer._new_teacher()
    trainer._hidden = lambda target, generator: hidden[mine]
    for batch in batches:
        trainer.train_step({
            "data": batch["data"][mine], "target": [t[mine] for t in batch["target"]],
            "keys": batch["keys"][mine]})
    network = trainer.network.module if world > 1 else trainer.network
    states.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    states.append(dict(trainer.teacher.network.named_parameters()))
torch.save(states, f"{folder}/{world}_{rank}.pt")
if world > 1:
    torch.distributed.barrier()
    os._exit(0)  # all is written; taking gloo's threads down aborts the process now and then
"""


@pytest.mark.slow
def test_two_processes_have_the_gradients_and_the_teacher_of_one(
    started: Make, tmp_path: Path
) -> None:
    """Two gloo processes with two samples each, against one with all four."""
    trainer = started()
    batches = [scripted(trainer, seed, samples=4) for seed in range(3)]
    hidden = trainer._hidden(batches[0]["target"][0], torch.Generator().manual_seed(0))
    hidden[0, :, :8] = False  # unequal numbers of hidden voxels
    plans = {**trainer.my_init_kwargs["plans"], "continue_training": False}
    torch.save((plans, trainer.dataset_json, batches, hidden), tmp_path / "inputs.pt")
    command = [sys.executable, "-c", PROCESS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([*command, str(rank), str(tmp_path), str(world)], env=environment)
        for rank, world in ((0, 2), (1, 2), (0, 1))
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0, 0]
    one = torch.load(tmp_path / "1_0.pt")
    both = [torch.load(tmp_path / f"2_{rank}.pt") for rank in (0, 1)]
    for part, expected in enumerate(one):
        for got in both:
            for name, value in expected.items():
                torch.testing.assert_close(got[part][name], value, rtol=1e-3, atol=1e-5)
        for name, value in both[0][part].items():
            assert torch.equal(value, both[1][part][name]), name


@pytest.mark.parametrize("teacher_option", ["false", "true"])
def test_with_partial_labels_the_masked_pass_has_their_loss(
    started: Make, teacher_option: str
) -> None:
    trainer = started(
        cls=nnUNetTrainerSelfDisambiguationContext,
        dataset="Dataset007_Merged",
        ema_teacher=teacher_option,
        source_heads="true",
        ramp="0",
    )
    batch = scripted(trainer, 0)
    losses = []
    own_loss = trainer.segmentation_loss

    def recorded(*arguments: Any) -> Tensor:
        losses.append(own_loss(*arguments))
        return losses[-1]

    trainer.segmentation_loss = recorded
    outputs = trainer.train_step(batch)
    names = {"segmentation", "source_heads", "consistency", "masked", "reconstruction"}
    assert set(outputs) == {"loss", *names, *(["teacher"] if teacher_option == "true" else [])}
    assert outputs["masked"] == pytest.approx(losses[1].item())
    # "dark" is not annotated in this source: what is not bright may be either, and costs nothing.
    logits = [
        torch.stack([-50.0 * t[:, 0], 50 * t[:, 0], 20 * (1 - t[:, 0])], 1) for t in batch["target"]
    ]
    assert own_loss(logits, batch["target"], batch).item() < -0.4  # nnU-Net's Dice is negative
    assert trainer._features is None
    trainer.iteration = 5
    expected = 5 / 6 if teacher_option == "true" else trainer.momentum_base
    assert trainer.teacher_momentum() == pytest.approx(expected, abs=0.003)


# -------------------------------------------------------------------- it learns what it claims


@pytest.mark.slow
def test_a_hidden_structure_is_written_into_the_output(started: Make) -> None:
    """The box always spans the same planes, so what is hidden follows from what is seen."""
    dice = {}
    for cls in (Ours, nnUNetTrainerMosaic):
        options = {"mask_min_cells": "4"} if cls is Ours else {}
        settings = {"optimizer": "adamw", "initial_lr": 1e-2}
        trainer = started(cls=cls, settings=settings, **options)
        batch = scripted(trainer, 0)
        for _ in range(80):
            trainer.train_step(batch)
        trainer.network.eval()
        if cls is Ours:
            hidden = trainer._hidden(batch["target"][0], torch.Generator().manual_seed(9))
        truth = batch["target"][0] == 1
        for name, data in (
            ("clean", batch["data"]),
            ("masked", batch["data"].masked_fill(hidden, 0)),
        ):
            with torch.no_grad():
                found = trainer.network(data)[0].argmax(1, keepdim=True) == 1
            overlap = 2 * (found & truth).sum() / (found.sum() + truth.sum())
            dice[cls.__name__, name] = overlap.item()
    ours, plain = Ours.__name__, nnUNetTrainerMosaic.__name__
    assert dice[ours, "masked"] > dice[plain, "masked"] + 0.1, dice
    assert dice[ours, "clean"] > dice[plain, "clean"] - 0.01, dice
