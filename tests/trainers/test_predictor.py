"""Prediction of mirrored tiles, against nnU-Net's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers.base import nnUNetTrainerMosaic
from nnmosaic.trainers.predictor import MosaicPredictor, available_folds, load_predictor

OPTIONS: dict[str, Any] = {
    "checkpoint": "checkpoint_final.pth",
    "device": torch.device("cpu"),
    "step_size": 0.5,
    "mirroring": True,
}


class Asymmetric(torch.nn.Module):
    """Every voxel's output depends on its place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x[0, 0].numel(), dtype=x.dtype).reshape(x.shape[2:])
        return torch.cat((x * places, x + places), 1)


@pytest.mark.parametrize("axes", [(0, 1, 2), (1,), (0, 2), None])
def test_mirrored_pairs_give_nnunets_average(axes: tuple[int, ...] | None) -> None:
    x = torch.randn(1, 1, 3, 4, 5, dtype=torch.float64)
    results = []
    for cls in (nnUNetPredictor, MosaicPredictor):
        predictor = cls(device=torch.device("cpu"), use_mirroring=True)
        predictor.network, predictor.allowed_mirroring_axes = Asymmetric(), axes
        results.append(predictor._internal_maybe_mirror_and_predict(x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(results[0], Asymmetric()(x)) or axes is None


def test_folds_are_found_and_all_only_where_it_is_alone(tmp_path: Path) -> None:
    for fold in ("fold_10", "fold_2", "fold_all"):
        (tmp_path / fold).mkdir()
        (tmp_path / fold / "checkpoint_final.pth").touch()
    (tmp_path / "fold_3").mkdir()
    assert available_folds(tmp_path, "checkpoint_final.pth") == [2, 10]
    for fold in ("fold_10", "fold_2"):
        (tmp_path / fold / "checkpoint_final.pth").unlink()
    assert available_folds(tmp_path, "checkpoint_final.pth") == ["all"]


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no trained model"):
        load_predictor(tmp_path, folds=None, **OPTIONS)
    (tmp_path / "plans.json").write_text("{}")
    with pytest.raises(InputError, match=r"has no fold with checkpoint_final\.pth"):
        load_predictor(tmp_path, folds=None, **OPTIONS)


@pytest.mark.slow
def test_every_fold_gets_its_own_weights(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(nnUNetTrainerMosaic, epochs=1)
    trainer.run_training()
    model = Path(trainer.output_folder_base)
    torch.nn.init.zeros_(trainer.network.decoder.seg_layers[-1].weight)
    (model / "fold_1").mkdir()
    trainer.save_checkpoint(str(model / "fold_1" / "checkpoint_final.pth"))
    predictor = load_predictor(model, folds=None, **OPTIONS)
    assert predictor.allowed_mirroring_axes == (0, 1, 2)
    name = f"decoder.seg_layers.{len(trainer.network.decoder.seg_layers) - 1}.weight"
    largest = [weights[name].abs().max().item() for weights in predictor.list_of_parameters]
    assert largest[0] > 0
    assert largest[1] == 0
    path = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    del content["network_weights"][name]
    torch.save(content, path)
    with pytest.raises(InputError, match=r"do not fit the network of its plans\.json"):
        load_predictor(model, folds=None, **OPTIONS)
