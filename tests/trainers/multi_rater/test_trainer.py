"""The two stages for many raters (spec 7.5 and 7.8, invariants 3, 10, 11)."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.train import load_pretrained
from nnmosaic.trainers.base import nnUNetTrainerMosaic
from nnmosaic.trainers.multi_rater.dataset import RaterDataset
from nnmosaic.trainers.multi_rater.diversified import nnUNetTrainerMultiRaterDiversified
from nnmosaic.trainers.multi_rater.personalized import (
    nnUNetTrainerMultiRaterPersonalized,
    read_first_stage,
    stage1_checkpoint,
)

DATASET = "Dataset008_Raters"


@pytest.fixture
def first(make_trainer: Callable[..., Any]) -> Any:
    """Return a first stage before its first step."""
    trainer = make_trainer(nnUNetTrainerMultiRaterDiversified, DATASET, seed=1)
    trainer.on_train_start()
    return trainer


@pytest.fixture
def second(make_trainer: Callable[..., Any], first: Any) -> Any:
    """Return a second stage on the saved, untrained first one."""
    first.save_checkpoint(str(Path(first.output_folder) / "checkpoint_final.pth"))
    trainer = make_trainer(nnUNetTrainerMultiRaterPersonalized, DATASET, seed=1)
    trainer.on_train_start()
    return trainer


def absent_filled(batch: dict[str, Any], available: torch.Tensor, value: int) -> dict[str, Any]:
    """Return the batch with a value wherever a rater is absent."""
    target = batch["target"]
    levels = [level.clone() for level in target] if isinstance(target, list) else [target.clone()]
    for level in levels:
        for b, r in (~available).nonzero().tolist():
            level[b, 1 + r] = value
    return {**batch, "target": levels if isinstance(target, list) else levels[0]}


def gradients(trainer: Any, batch: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Return the gradients of a step that changes nothing."""
    torch.manual_seed(seed)
    trainer.optimizer.step = lambda: None
    trainer.train_step(batch)
    return {n: p.grad for n, p in trainer.network.named_parameters() if p.grad is not None}


def batch_with_an_absent_rater(trainer: Any) -> tuple[dict[str, Any], torch.Tensor]:
    for _ in range(50):
        batch = trainer.on_device(next(trainer.dataloader_train))
        available = trainer._annotations(batch)[1]
        if not available.all():
            return batch, available
    raise AssertionError("case01 is never drawn")


def test_a_step_of_the_first_stage_has_all_terms(first: Any) -> None:
    batch = next(first.dataloader_train)
    assert batch["target"][0].shape[1] == 4
    terms = first.train_step(batch)
    assert set(terms) == {"loss", "segmentation", "kl", "mean_opinion", "bound", "energy"}
    assert terms["loss"] == pytest.approx(sum(v for k, v in terms.items() if k != "loss"))
    assert not any(p.requires_grad for p in first.network.heads.parameters())
    first.bound_cross_entropy, first.rater_draw = 1.0, "balanced"
    assert first.train_step(batch)["bound"] > 0
    first.bound_weight = 0.0
    assert set(first.train_step(batch)) == {"loss", "segmentation", "kl", "mean_opinion", "energy"}
    first.energy_weight = 0.0
    first.posterior = "all"
    assert set(first.train_step(batch)) == {"loss", "segmentation", "kl", "mean_opinion"}


def test_the_mean_opinion_learns_the_fused_labels(first: Any) -> None:
    batch = next(first.dataloader_train)
    first.mean_opinion_weight = 2.0
    terms, _ = first._terms(batch)
    answer = first.network(batch["data"])
    loss = first.loss(answer, [level[:, :1] for level in batch["target"]])
    torch.testing.assert_close(terms["mean_opinion"], 2 * loss)
    first.mean_opinion_weight = 0.0
    assert "mean_opinion" not in first._terms(batch)[0]


def test_what_stands_where_a_rater_is_absent_changes_nothing(first: Any, second: Any) -> None:
    for trainer in (first, second):
        batch, available = batch_with_an_absent_rater(trainer)
        one, other = (
            gradients(trainer, absent_filled(batch, available, v), 5) for v in (-2, 1)
        )  # fmt: skip
        assert one.keys() == other.keys()
        assert one
        for name, gradient in one.items():
            assert torch.equal(gradient, other[name])
        losses = []
        for value in (-2, 1, 2):
            torch.manual_seed(5)
            filled = absent_filled(batch, available, value)
            with torch.no_grad():
                losses.append(sum(trainer._terms(filled)[0].values()).item())
        assert losses[0] == losses[1] == losses[2]


def test_a_case_trains_only_the_heads_of_its_raters(second: Any) -> None:
    batch = second.on_device(next(second.dataloader_train))
    alone = torch.zeros(3, dtype=torch.bool)
    alone[1] = True
    second._available = dict.fromkeys(second._available, alone)
    found = gradients(second, batch, 0)
    assert found
    assert all(name.startswith("heads.1.") for name in found)


def test_the_second_stage_leaves_the_first_as_it_was(first: Any, second: Any) -> None:
    before = {name: value.clone() for name, value in first.network.state_dict().items()}
    for name, value in second.network.state_dict().items():
        assert torch.equal(value, before[name])
    for _ in range(2):
        second.on_train_epoch_start()  # as nnU-Net does: all to training mode
        second.train_step(next(second.dataloader_train))
    assert not second.network.encoder.training
    changed = {
        name for name, value in second.network.state_dict().items()
        if not torch.equal(value, before[name])
    }  # fmt: skip
    assert changed
    assert all(name.startswith("heads.") for name in changed)


def test_validation_counts_every_pair_once(first: Any, second: Any) -> None:
    for trainer in (first, second):
        batch = next(trainer.dataloader_val)
        labels, available = trainer._annotations(trainer.on_device(batch))
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            found = trainer.validation_step(batch)
        drawn = [(labels[available] == k).sum().item() for k in (1, 2)]
        assert (found["tp_hard"] + found["fn_hard"]).tolist() == drawn
        assert np.isfinite(found["loss"])


def test_the_second_stage_goes_on_without_the_first(
    make_trainer: Callable[..., Any], second: Any
) -> None:
    path = Path(second.output_folder) / "checkpoint_latest.pth"
    second.save_checkpoint(str(path))
    first_stage = stage1_checkpoint(Path(second.output_folder))
    first_stage.unlink()
    again = make_trainer(nnUNetTrainerMultiRaterPersonalized, DATASET)
    again.load_checkpoint(str(path))
    again.on_train_start()
    assert again.method_state()["stage1"]["file"] == str(first_stage)
    assert len(again.method_state()["stage1"]["sha256"]) == 64


def test_a_missing_first_stage_is_named(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(nnUNetTrainerMultiRaterPersonalized, DATASET)
    with pytest.raises(
        InputError, match=r"Diversified.*fold_0.checkpoint_final.pth does not exist"
    ):
        trainer.on_train_start()
    assert trainer.dataloader_train is None


ARGUMENTS, PLANS = ("init_args",), ("init_args", "plans")
CONFIGURATION = (*PLANS, "configurations", "3d_fullres")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("trainer_name",), "nnUNetTrainer", "was trained by nnUNetTrainer"),
        ((*PLANS, "nnmosaic", "multirater", "raters"), ["small", "exact", "other"], "other raters"),
        ((*PLANS, "nnmosaic", "multirater", "latent"), 3, "other size of the code: 3, not"),
        ((*ARGUMENTS, "dataset_json", "labels"), {"background": 0, "b": 1}, "other classes"),
        ((*ARGUMENTS, "dataset_json", "channel_names"), {"0": "CT"}, "other channels"),
        ((*CONFIGURATION, "architecture", "network_class_name"), "a.b.OtherUNet", "other network"),
        ((*CONFIGURATION, "spacing"), [9.0, 9.0, 9.0], "other spacing"),
        ((*CONFIGURATION, "normalization_schemes"), ["CTNormalization"], "other normalisation"),
    ],
)
def test_another_first_stage_is_refused(
    make_trainer: Callable[..., Any], first: Any, keys: tuple[str, ...], value: Any, message: str
) -> None:
    path = Path(first.output_folder) / "checkpoint_final.pth"
    first.save_checkpoint(str(path))
    content = torch.load(path, weights_only=False)
    place = content
    for key in keys[:-1]:
        place = place[key]
    assert place[keys[-1]] != value
    place[keys[-1]] = value
    torch.save(content, path)
    trainer = make_trainer(nnUNetTrainerMultiRaterPersonalized, DATASET)
    with pytest.raises(InputError, match=message):
        trainer.on_train_start()
    assert trainer.dataloader_train is None


def test_a_first_stage_of_other_intensities_fits_unless_they_normalise(
    make_trainer: Callable[..., Any], first: Any
) -> None:
    path = Path(first.output_folder) / "checkpoint_final.pth"
    first.save_checkpoint(str(path))
    content = torch.load(path, weights_only=False)
    plans = content["init_args"]["plans"]
    plans["foreground_intensity_properties_per_channel"]["0"]["mean"] += 1
    torch.save(content, path)
    now = make_trainer(nnUNetTrainerMultiRaterPersonalized, DATASET).my_init_kwargs
    assert read_first_stage(path, now)["trainer_name"] == type(first).__name__
    for made in (plans, now["plans"]):
        made["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    torch.save(content, path)
    with pytest.raises(InputError, match="other normalisation"):
        read_first_stage(path, now)


def test_the_first_stage_may_begin_as_a_plain_model(make_trainer: Callable[..., Any]) -> None:
    plain = make_trainer(nnUNetTrainerMosaic, DATASET)
    plain.initialize()
    path = Path(plain.output_folder) / "plain.pth"
    plain.save_checkpoint(str(path))
    trainer = make_trainer(nnUNetTrainerMultiRaterDiversified, DATASET)
    load_pretrained(trainer, path)
    own = trainer.network.state_dict()
    for name, value in plain.network.state_dict().items():
        if not name.startswith("decoder.encoder."):  # the encoder, twice
            layers = r"(seg_layers\.\d+\.)"
            assert torch.equal(own[re.sub(layers, r"\1plain.", name)], value)


def test_output_layers_of_other_labels_stay_and_other_layers_are_refused(
    make_trainer: Callable[..., Any],
) -> None:
    plain = make_trainer(nnUNetTrainerMosaic, DATASET)
    plain.initialize()
    path = Path(plain.output_folder) / "plain.pth"
    plain.save_checkpoint(str(path))
    content = torch.load(path, weights_only=False)
    layer = "decoder.seg_layers.0.weight"
    value = content["network_weights"].pop(layer)
    torch.save(content, path)
    with pytest.raises(InputError, match=r"plain.pth does not fit this network: .*seg_layers"):
        load_pretrained(make_trainer(nnUNetTrainerMultiRaterDiversified, DATASET), path)
    content["network_weights"][layer] = value
    content["init_args"]["dataset_json"]["labels"] = {"background": 0, "other": 1}
    torch.save(content, path)
    trainer = make_trainer(nnUNetTrainerMultiRaterDiversified, DATASET)
    load_pretrained(trainer, path)
    assert not torch.equal(trainer.network.decoder.seg_layers[0].plain.weight, value)


def test_datasets_without_raters_are_refused(
    make_trainer: Callable[..., Any], prepared: Path
) -> None:
    with pytest.raises(InputError, match="name no raters"):
        make_trainer(nnUNetTrainerMultiRaterDiversified).initialize()
    path = prepared / "nnUNet_preprocessed" / DATASET / "dataset.json"
    content = json.loads(path.read_text())
    content["multirater"]["raters"] = ["small", "exact"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="declares the raters small, exact"):
        make_trainer(nnUNetTrainerMultiRaterDiversified, DATASET).initialize()


def test_a_fold_warns_of_a_rater_without_a_training_case(
    make_trainer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = make_trainer(nnUNetTrainerMultiRaterDiversified, DATASET)
    learnt, _ = trainer.do_split()
    monkeypatch.setattr(
        RaterDataset, "available", lambda _, name: np.array([True, name not in learnt, True])
    )
    trainer.on_train_start()
    warnings = [line for line in capsys.readouterr().out.splitlines() if "Warning" in line]
    assert len(warnings) == 1
    assert "the rater exact annotated no training case of fold 0" in warnings[0]


STAGES = (nnUNetTrainerMultiRaterDiversified, nnUNetTrainerMultiRaterPersonalized)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"labels": {"background": 0, "both": [1, 2], "dark": 2}, "regions_class_order": [1, 2]},
            "with regions",
        ),
        (
            {"labels": {"background": 0, "bright": 1, "dark": 2, "ignore": 3}},
            "with an ignore label",
        ),
        (
            {"partial_labels": {"sources": {"all": {"pattern": ".*", "annotated": "all"}}}},
            "with partial_labels",
        ),
    ],
)
def test_what_raters_cannot_have_is_refused(
    make_trainer: Callable[..., Any],
    prepared: Path,
    stage: type,
    changed: dict[str, Any],
    message: str,
) -> None:
    path = prepared / "nnUNet_preprocessed" / DATASET / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    trainer = make_trainer(stage, DATASET)
    with pytest.raises(InputError, match=f"{stage.__name__} cannot train {message}"):
        trainer.initialize()
    assert trainer.network is None


@pytest.mark.parametrize("stage", STAGES)
def test_a_cascade_is_refused(make_trainer: Callable[..., Any], stage: type) -> None:
    trainer = make_trainer(stage, DATASET)
    trainer.is_cascaded = True
    with pytest.raises(InputError, match=f"{stage.__name__} cannot train with a cascade"):
        trainer.initialize()
    assert trainer.network is None
