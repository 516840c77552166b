"""The trainer (spec 2 and 5.1, invariants 13, 15 and 17)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.train import load_pretrained
from nnmosaic.planners.plans_section import ClusteringPlan, RunSettings, read_section
from nnmosaic.trainers.base import nnUNetTrainerMosaic
from nnmosaic.trainers.clustering_propagation.trainer import nnUNetTrainerClusteringPropagation
from nnmosaic.trainers.predictor import MosaicPredictor, load_predictor

Trainer = nnUNetTrainerClusteringPropagation
TERMS = {"loss", "segmentation", "layers", "plain", "presence", "user"}


@pytest.fixture
def make(make_trainer: Callable[..., Any]) -> Callable[..., Any]:
    def make(**settings: Any) -> Any:
        return make_trainer(Trainer, configuration="2d", seed=1, **settings)

    return make


@pytest.fixture
def make_other(prepared: Path, plans_of: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes a trainer for other labels than the stored ones."""

    def make(**changes: Any) -> Any:
        folder = prepared / "nnUNet_preprocessed" / "Dataset004_Balls"
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        plans = plans_of("Dataset004_Balls", plain=True)
        trainer = Trainer(plans, "2d", 0, {**content, **changes}, torch.device("cpu"))
        trainer.request_settings(RunSettings(epochs=3, iterations_per_epoch=3))
        trainer.initialize()
        return trainer

    return make


def batch_of(trainer: Any, target: torch.Tensor) -> dict[str, Any]:
    patch = trainer.configuration_manager.patch_size
    return {
        "data": torch.randn(2, 1, 4, *patch),
        "target": target.expand(2, -1, 4, *patch).clone(),
        "positions": torch.arange(4.0).expand(2, -1).clone(),
        "keys": ["a", "b"],
    }


# -------------------------------------------------------------------- set-up


def test_only_slices_are_accepted_and_before_data_are_read(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(Trainer, configuration="3d_fullres")
    monkeypatch.setattr(trainer, "get_dataloaders", pytest.fail)
    with pytest.raises(InputError, match=r"not with 3d_fullres\. Choose the configuration 2d"):
        trainer.on_train_start()


def test_a_network_without_a_unets_decoder_is_refused(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = staticmethod(lambda *_: torch.nn.Identity())
    monkeypatch.setattr(nnUNetTrainerMosaic, "build_network_architecture", build)
    with pytest.raises(InputError, match=r"PlainConvUNet is no U-Net"):
        make().initialize()


def test_only_the_encoder_is_compiled(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make()
    plain.initialize()
    monkeypatch.setattr(nnUNetTrainerMosaic, "_do_i_compile", lambda _: True)
    trainer = make()
    trainer.initialize()
    assert trainer.network.encoder._compiled_call_impl is not None
    assert trainer.network.decoder._compiled_call_impl is None
    assert list(trainer.network.state_dict()) == list(plain.network.state_dict())


def test_the_model_keeps_what_the_network_is_built_from(make: Callable[..., Any]) -> None:
    trainer = make(options={"memory": "window"})
    trainer.on_train_start()
    folder = Path(trainer.output_folder_base)
    stored = json.loads((folder / "plans.json").read_text())
    assert read_section(stored).clustering == ClusteringPlan("window", regions=False)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    with pytest.raises(InputError, match=r"holds folds of ClusteringPlan\(memory='window'"):
        make(options={"memory": "last"}).initialize()
    make(options={"memory": "window"}).initialize()


def test_a_batch_holds_about_as_many_slices_as_planned(make: Callable[..., Any]) -> None:
    sizes = {}
    for slices, batch_size in ((4, 2), (4, 13), (2, 13), (1, 5)):
        trainer = make(options={"clip_slices": str(slices)}, batch_size=batch_size)
        trainer.initialize()
        sizes[slices, batch_size] = trainer.batch_size
    assert sizes == {(4, 2): 2, (4, 13): 3, (2, 13): 6, (1, 5): 5}


def test_single_slices_make_the_shortest_clips(make: Callable[..., Any]) -> None:
    for depth, slices in ((1, 2), (3, 3), (40, 4)):
        trainer = make()
        trainer.plans_manager.plans["original_median_shape_after_transp"] = [depth, 20, 20]
        trainer.initialize()
        assert trainer.slices == slices


def test_rates_and_decay_follow_the_role_of_a_weight(make: Callable[..., Any]) -> None:
    trainer = make(epochs=200, options={"unet_lr_factor": "0.1"})
    trainer.initialize()
    names = {id(p): name for name, p in trainer.network.named_parameters()}
    roles = {
        names[id(p)]: (group["factor"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert len(roles) == len(names)
    head = "decoder.seg_layers."
    assert roles[f"{head}queries"] == roles[f"{head}bias"] == roles[f"{head}user"] == (1, 0)
    assert roles[f"{head}layers.0.0.gates.1"] == roles[f"{head}presence.0.weight"] == (1, 0)
    assert roles[f"{head}from_user.weight"] == (1, 0.05)
    convolution = "encoder.stages.0.0.convs.0.conv"
    assert roles[f"{convolution}.weight"] == (0.1, 3e-5)
    assert roles[f"{convolution}.bias"] == (0.1, 0)
    rates = []
    for epoch in range(200):
        trainer.lr_scheduler.step(epoch)
        first, *_, last = trainer.optimizer.param_groups
        assert last["lr"] == pytest.approx(0.1 * first["lr"])
        rates.append(first["lr"])
    assert int(np.argmax(rates)) == 10
    assert rates[0] == pytest.approx(3e-4 / 11)
    assert rates[100] == pytest.approx(3e-4 * 0.5**0.9)


def test_a_command_chooses_optimizer_and_rate(make: Callable[..., Any]) -> None:
    for settings, kind, rate in (
        ({"optimizer": "sgd"}, torch.optim.SGD, 1e-2),
        ({"optimizer": "adamw", "initial_lr": 2e-3}, torch.optim.AdamW, 2e-3),
        ({"initial_lr": 1e-3}, torch.optim.AdamW, 1e-3),
    ):
        trainer = make(**settings)
        trainer.initialize()
        assert isinstance(trainer.optimizer, kind)
        assert trainer.initial_lr == rate


@pytest.mark.parametrize(("optimizer", "bound"), [("sgd", 12.0), (None, 1.0)])
def test_sgd_bounds_gradients_as_nnunet_does(
    make: Callable[..., Any], optimizer: str | None, bound: float
) -> None:
    trainer = make(optimizer=optimizer)
    trainer.initialize()
    for parameter in trainer.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.clip_gradients()
    norm = torch.cat([p.grad.flatten() for p in trainer.network.parameters()]).norm()
    assert norm == pytest.approx(bound, rel=1e-3)


def test_sgd_has_one_rate(make: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="with --optimizer sgd only 0 and 1 have a meaning"):
        make(optimizer="sgd", options={"unet_lr_factor": "0.1"}).initialize()


@pytest.fixture
def plain(make_trainer: Callable[..., Any]) -> Any:
    """Return a plain 2D model that has left a checkpoint."""
    plain = make_trainer(nnUNetTrainerMosaic, configuration="2d")
    plain.initialize()
    plain.save_checkpoint(checkpoint_of(plain))
    return plain


def one_step(trainer: Any) -> None:
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))


def checkpoint_of(trainer: Any) -> str:
    return str(Path(trainer.output_folder) / "checkpoint_latest.pth")


@pytest.mark.parametrize("optimizer", ["sgd", None])
def test_a_plain_2d_unet_stays_as_it_was(
    make: Callable[..., Any], plain: Any, optimizer: str | None
) -> None:
    trainer = make(optimizer=optimizer, epochs=2)
    load_pretrained(trainer, Path(checkpoint_of(plain)))
    layer = plain.network.decoder.seg_layers[-1]
    assert torch.equal(trainer.network.head.features.plain.weight, layer.weight)
    weights = plain.network.state_dict()
    unet = [name for name in weights if ".seg_layers." not in name]
    assert len(unet) > 10
    one_step(trainer)
    trainer.save_checkpoint(checkpoint_of(trainer))
    again = make(optimizer=optimizer, epochs=2)
    again.load_checkpoint(checkpoint_of(trainer))
    one_step(again)
    for state in (trainer.network.state_dict(), again.network.state_dict()):
        assert all(torch.equal(state[name], weights[name]) for name in unet)
    assert not torch.equal(again.network.head.queries, trainer.network.head.queries)


def test_another_unet_learns_slowly(make: Callable[..., Any], plain: Any, tmp_path: Path) -> None:
    given = make(options={"unet_lr_factor": "0.5"})
    load_pretrained(given, Path(checkpoint_of(plain)))
    content = torch.load(checkpoint_of(plain), weights_only=False)
    content["init_args"]["dataset_json"]["labels"] = {"background": 0, "other": 1, "labels": 2}
    content["init_args"]["fold"] = 3
    torch.save(content, tmp_path / "other.pth")
    other = make()
    load_pretrained(other, tmp_path / "other.pth")
    for trainer, factor in ((given, 0.5), (other, 0.1)):
        assert [group["factor"] for group in trainer.optimizer.param_groups] == [
            1,
            1,
            factor,
            factor,
        ]
        assert all(parameter.requires_grad for parameter in trainer.network.parameters())
    layer = plain.network.decoder.seg_layers[-1]
    assert not torch.equal(other.network.head.features.plain.weight, layer.weight)
    log = "".join(p.read_text() for p in Path(other.output_folder).glob("training_log_*.txt"))
    assert "other.pth was trained on fold 3, not 0: the validation is not on unseen" in log
    assert "Pretrained for other labels: unet_lr_factor is 0.1" in log


# -------------------------------------------------------------------- steps


def test_a_step_has_all_terms_and_repeats_with_its_seed(make: Callable[..., Any]) -> None:
    found = []
    for _ in range(2):
        trainer = make(options={"interactive_fraction": "1"})
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        found.append(trainer.train_step(next(trainer.dataloader_train)))
    assert set(found[0]) == TERMS
    assert found[0]["user"] > 0
    assert found[0]["loss"] == pytest.approx(sum(found[0][name] for name in TERMS - {"loss"}))
    assert found[0] == found[1]


def test_without_a_user_there_are_no_prompts(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(options={"interactive_fraction": "0"})
    trainer.on_train_start()
    clips = []
    forward = trainer.network.forward

    def note(x: Any, clip: Any, corrections: Any) -> Any:
        clips.append((clip, corrections))
        return forward(x, clip, corrections)

    monkeypatch.setattr(trainer.network, "forward", note)
    for _ in range(2):
        assert trainer.train_step(next(trainer.dataloader_train))["user"] == 0
    for clip, corrections in clips:
        assert not clip.prompts.any()
        assert not clip.start.any()
        assert corrections == []


def test_regions_and_ignored_pixels_are_learnt(make_other: Callable[..., Any]) -> None:
    regions = {"background": 0, "both": [1, 2], "dark": 2, "ignore": 3}
    trainer = make_other(labels=regions, regions_class_order=[1, 2])
    assert trainer.network.layout.regions
    target = torch.zeros(1, 3, 1, *trainer.configuration_manager.patch_size, dtype=torch.bool)
    target[:, :2, :, 2:8, 2:8], target[:, 1, :, 4:], target[:, 2, :, 9:12] = True, False, True
    trainer.interactive_fraction = 1.0
    for _ in range(3):
        terms = trainer.train_step(batch_of(trainer, target))
        assert all(np.isfinite(value) for value in terms.values())
        trainer.iteration += 1
    with torch.no_grad():
        counts = trainer.validation_step(batch_of(trainer, target))
    assert counts["tp_hard"].shape == counts["tp_clicked"].shape == (2,)
    annotated = target[:, :2] & ~target[:, 2:]
    expected = 8 * annotated.flatten(2).sum(2)[0].numpy()
    np.testing.assert_array_equal(counts["tp_hard"] + counts["fn_hard"], expected)


def test_an_image_of_nothing_but_ignored_pixels_is_no_trouble(
    make_other: Callable[..., Any],
) -> None:
    trainer = make_other(labels={"background": 0, "bright": 1, "ignore": 2})
    trainer.interactive_fraction = 1.0
    batch = batch_of(trainer, torch.full((1, 1, 1, 1, 1), 2, dtype=torch.int16))
    terms = trainer.train_step(batch)
    assert terms["user"] == terms["presence"] == 0
    assert all(np.isfinite(value) for value in terms.values())


def test_validation_counts_all_pixels_with_and_without_clicks(make: Callable[..., Any]) -> None:
    trainer = make()
    trainer.on_train_start()
    batch = next(trainer.dataloader_val)
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        found = trainer.validation_step(batch)
    drawn = [(batch["target"] == k).sum().item() for k in (1, 2)]
    for name in ("hard", "clicked"):
        assert (found[f"tp_{name}"] + found[f"fn_{name}"]).tolist() == drawn
    assert np.isfinite(found["loss"])


def test_labels_write_the_memory_only_early(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(epochs=100, iterations_per_epoch=10)
    trainer.initialize()
    target = torch.ones(1, 1, 1, 1, 1, dtype=torch.int16)
    given: list[bool] = []
    real = trainer.network.forward

    def note(x: Any, clip: Any, corrections: Any) -> Any:
        given.append(clip.gate is not None)
        if clip.gate is not None:
            assert clip.gate.tolist() == [[[False, True, False]] * 4] * 2
        return real(x, clip, corrections)

    monkeypatch.setattr(trainer.network, "forward", note)
    with torch.no_grad():
        for trainer.iteration in (*range(0, 99, 4), *range(100, 110)):
            trainer._first_pass(batch_of(trainer, target))
    assert 0 < sum(given[:25]) < 15
    assert not any(given[25:])


# -------------------------------------------------------------------- a whole training


@pytest.mark.slow
def test_a_training_ends_resumes_and_predicts_as_nnunet_does(
    make: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(epochs=2)
    trainer.run_training()
    log = capsys.readouterr().out
    assert log.count("Pseudo dice, one click per class") == 2
    assert log.count("Reach of clicks") == 1
    reach = trainer.network.head.reach
    assert reach[0] == reach[1:].min()
    assert (reach > 0.3).all()  # balls, of one intensity each
    final = Path(trainer.output_folder) / "checkpoint_final.pth"
    trainer.perform_actual_validation()
    summary = json.loads((final.parent / "validation" / "summary.json").read_text())
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1

    again = make(epochs=2)
    again.load_checkpoint(str(final))
    assert again.current_epoch == 2
    assert len(again.optimizer.state) == len(trainer.optimizer.state)
    assert torch.equal(again.network.head.reach, reach)

    predictor = load_predictor(
        final.parents[1], folds=[0], checkpoint=final.name, device=torch.device("cpu"),
        step_size=0.5, mirroring=False,
    )  # fmt: skip
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    volume = torch.randn(1, 3, *trainer.configuration_manager.patch_size)
    nnunets = MosaicPredictor.predict_sliding_window_return_logits(predictor, volume)
    predictor.sweep = "none"  # a slice fits into the patch
    found = predictor.predict_sliding_window_return_logits(volume)
    torch.testing.assert_close(found, nnunets, atol=2e-2, rtol=1e-2)
    network = trainer.network.eval()
    with torch.no_grad():
        expected = network(volume.movedim(1, 0)).movedim(0, 1)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=1e-2)
