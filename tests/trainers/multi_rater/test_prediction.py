"""One opinion per case (spec 7.8, invariants 12 - 14)."""

import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
)
from scipy.stats import entropy
from skimage import io
from torch.utils._python_dispatch import TorchDispatchMode

from nnmosaic.trainers.multi_rater.export import CaseWriter, SpreadOfMasks
from nnmosaic.trainers.multi_rater.network import codes_of_raters
from nnmosaic.trainers.multi_rater.personalized import nnUNetTrainerMultiRaterPersonalized
from nnmosaic.trainers.multi_rater.prediction import RaterPredictor
from nnmosaic.trainers.multi_rater.wanted_masks import WantedMasks
from nnmosaic.trainers.predictor import MosaicPredictor


def untrained(make_trainer: Callable[..., Any], configuration: str) -> Any:
    """Return a predictor without mirroring, with an untrained network."""
    torch.manual_seed(0)
    trainer = make_trainer(nnUNetTrainerMultiRaterPersonalized, "Dataset008_Raters", configuration)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(False)
    made = MosaicPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"),
        allow_tqdm=False,
    )  # fmt: skip
    made.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, None,
        trainer.dataset_json, type(trainer).__name__, None,
    )  # fmt: skip
    return made


@pytest.fixture
def predictor(make_trainer: Callable[..., Any]) -> Any:
    """Return a predictor of volumes."""
    return untrained(make_trainer, "3d_fullres")


def all_masks(predictor: Any, image: torch.Tensor, **wanted: Any) -> dict[str, torch.Tensor]:
    raters = RaterPredictor(predictor, WantedMasks(**wanted))
    return {f"{kind}/{name}": logits for kind, name, logits in raters.logits(image, "case")}


def test_one_tile_is_the_direct_forward(predictor: Any) -> None:
    image = torch.randn(1, *predictor.configuration_manager.patch_size)
    raters = RaterPredictor(predictor, WantedMasks(("large", "small"), samples=2))
    found = {name: logits for _, name, logits in raters.logits(image, "case")}
    network = predictor.network.eval()
    (latents,) = raters.latents["networks"]
    with torch.no_grad():
        prior = network.prior(image[None])
        torch.testing.assert_close(torch.tensor(latents["mean"]), prior.mean[0])
        torch.testing.assert_close(torch.tensor(latents["sigma"]), prior.log_sigma[0].exp())
        features = network.features(image[None])
        codes = [*latents["raters"], *latents["samples"]]
        for name, code in zip(("large", "small", "000", "001"), codes, strict=True):
            direct = network.logits(features, torch.tensor([code]), prior.mean)[0]
            # Not in the corners, where nnU-Net's weights of a tile vanish in half precision.
            inside = (..., *(slice(n // 4, -(n // 4)) for n in image.shape[1:]))
            one = found[name].float()[inside]
            torch.testing.assert_close(one, direct[inside], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(("configuration", "axes"), [("3d_fullres", (0, 2)), ("2d", (0, 1))])
def test_without_doubt_a_mask_is_what_nnunet_averages_over_mirrored_copies(
    make_trainer: Callable[..., Any], configuration: str, axes: tuple[int, ...]
) -> None:
    predictor = untrained(make_trainer, configuration)
    predictor.use_mirroring, predictor.allowed_mirroring_axes = True, axes
    with torch.no_grad():
        predictor.network.prior.code.weight.zero_()
        predictor.network.prior.code.bias.chunk(2)[1].fill_(-100)
    image = torch.randn(1, 30, 34, 28)  # several tiles
    nnunet = predictor.predict_sliding_window_return_logits(image).float()
    (mask,) = all_masks(predictor, image, samples=1).values()
    torch.testing.assert_close(mask.float(), nnunet, rtol=1e-2, atol=2e-2)
    predictor.allowed_mirroring_axes = axes[:1]
    other = predictor.predict_sliding_window_return_logits(image).float()
    assert (other - nnunet).abs().max() > 0.1  # the copies differ


@pytest.mark.parametrize("mirroring", [False, True])
def test_raters_are_asked_of_the_copy_that_is_not_mirrored(predictor: Any, mirroring: bool) -> None:
    predictor.use_mirroring, predictor.allowed_mirroring_axes = mirroring, (0, 1, 2)
    image = torch.randn(1, *predictor.configuration_manager.patch_size)
    raters = RaterPredictor(predictor, WantedMasks(("large", "small")))
    assert len(list(raters.logits(image, "case"))) == 2
    network = predictor.network.eval()
    with torch.no_grad():
        prior = network.prior(image[None])
        queries = network.queries(network.features(image[None])[0])
        small, _, large = codes_of_raters(queries, prior.mean, prior.sigma)[:, 0]
    (latents,) = raters.latents["networks"]
    torch.testing.assert_close(torch.tensor(latents["raters"]), torch.stack([large, small]))


def test_a_2d_model_has_one_opinion_for_all_slices(make_trainer: Callable[..., Any]) -> None:
    predictor = untrained(make_trainer, "2d")
    image = torch.randn(1, 5, *predictor.configuration_manager.patch_size)
    raters = RaterPredictor(predictor, WantedMasks(("small", "large"), samples=1))
    found = {name: logits.float() for _, name, logits in raters.logits(image, "case")}
    (latents,) = raters.latents["networks"]
    network, slices = predictor.network.eval(), image.swapaxes(0, 1)
    codes = dict(zip(found, [*latents["samples"], *latents["raters"]], strict=True))
    with torch.no_grad():
        prior = network.prior(slices)
        torch.testing.assert_close(torch.tensor(latents["mean"]), prior.mean.mean(0))
        variance = prior.sigma.square().mean(0)
        torch.testing.assert_close(torch.tensor(latents["sigma"]), variance.sqrt())
        features = network.features(slices)
        mean = torch.tensor([latents["mean"]]).expand(5, -1)
        for name, code in codes.items():
            direct = network.logits(features, torch.tensor([code]).expand(5, -1), mean)
            inside = (..., *(slice(n // 4, -(n // 4)) for n in image.shape[2:]))
            torch.testing.assert_close(
                found[name][inside], direct.swapaxes(0, 1)[inside], rtol=2e-3, atol=1e-3
            )


def test_tiles_share_one_opinion_however_they_overlap(predictor: Any) -> None:
    image = torch.randn(1, 30, 34, 28, generator=torch.Generator().manual_seed(3))
    # What nnU-Net's own layer says has seams as in nnU-Net; here it is about what codes add.
    plain = predictor.network.decoder.seg_layers[-1].plain
    for parameter in plain.parameters():
        torch.nn.init.zeros_(parameter)
    found, latents = [], []
    for predictor.tile_step_size in (0.5, 0.25):
        raters = RaterPredictor(predictor, WantedMasks(samples=2))
        found.append({name: logits.float() for _, name, logits in raters.logits(image, "case")})
        latents.append(raters.latents)
    assert latents[0] == latents[1]
    seam, opinions = (
        (one - other).abs().mean()
        for one, other in ((found[0]["000"], found[1]["000"]), (found[0]["000"], found[0]["001"]))
    )
    assert 0 < seam < opinions / 4


def test_order_and_number_of_masks_change_nothing(
    predictor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "half", torch.float32)  # nnU-Net adds tiles in it, and rounds
    image = torch.randn(1, 30, 34, 28)  # several tiles
    many = all_masks(predictor, image, raters=("all",), samples=3)
    assert [*many] == [
        "samples/000", "samples/001", "samples/002", "raters/small", "raters/exact", "raters/large"
    ]  # fmt: skip
    few = all_masks(predictor, image, raters=("large", "small", "large"), samples=1)
    for name, logits in few.items():
        assert torch.equal(logits, many[name])
    forwards = predictor._internal_get_sliding_window_slicers
    predictor._internal_get_sliding_window_slicers = lambda size: forwards(size)[::-1]
    for name, logits in all_masks(predictor, image, raters=("all",), samples=3).items():
        torch.testing.assert_close(logits, many[name], rtol=1e-4, atol=1e-5)


def test_folds_share_the_samples_and_average_the_raters(predictor: Any) -> None:
    image = torch.randn(1, *predictor.configuration_manager.patch_size)
    weights = [
        {name: factor * value for name, value in predictor.network.state_dict().items()}
        for factor in (1, 1.1)
    ]
    alone = []
    for one in weights:
        predictor.list_of_parameters = [one]
        alone.append(all_masks(predictor, image, raters=("exact",), samples=2))
    predictor.list_of_parameters = weights
    raters = RaterPredictor(predictor, WantedMasks(("exact",), samples=3))
    together = {name: logits for _, name, logits in raters.logits(image, "case")}
    assert list(together) == ["000", "001", "002", "exact"]
    assert [len(latents["samples"]) for latents in raters.latents["networks"]] == [2, 1]
    torch.testing.assert_close(together["000"], alone[0]["samples/000"])
    torch.testing.assert_close(together["001"], alone[0]["samples/001"])
    both = [one["raters/exact"] for one in alone]
    assert not torch.equal(*both)
    torch.testing.assert_close(together["exact"], (both[0] + both[1]) / 2, rtol=1e-2, atol=1e-3)


class PeakOfTensors(TorchDispatchMode):
    """Notes how many bytes of tensors, made by operations within it, live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self._note(one.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self.known:
            self.known.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def test_a_case_is_kept_in_half_precision_and_once(
    predictor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnmosaic.trainers.multi_rater.combiner.VOXELS_AT_ONCE", 2**12)
    predictor.tile_step_size = 1
    image = torch.randn(1, 96, 80, 96)
    layer = predictor.network.decoder.seg_layers[-1]
    shared = 2 * (layer.plain.out_channels + layer.of_features.out_channels)  # bytes of a voxel
    one_mask = 2 * layer.plain.out_channels
    raters = RaterPredictor(predictor, WantedMasks(("all",), samples=3))
    with PeakOfTensors() as found:
        for _, _, logits in raters.logits(image, "case"):
            assert logits.dtype == torch.half
    # Besides: the weights of tiles, the last mask, and what a tile takes.
    assert found.peak / image.numel() < shared + 2 * one_mask + 12


def write_map(path: Path, properties: dict[str, Any], values: np.ndarray) -> None:
    writer = CaseWriter.__new__(CaseWriter)
    writer.properties, writer.ending = properties, "".join(path.suffixes)
    writer.case = path.name.removesuffix(writer.ending)
    writer._write_map(values, path.parent)


@pytest.mark.parametrize(
    "reader", [SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient]
)
def test_a_map_lies_on_its_image(reader: type, tmp_path: Path) -> None:
    direction = SimpleITK.DICOMOrientImageFilter.GetDirectionCosinesFromOrientation("PIR")
    values = np.random.default_rng(0).random((7, 6, 5), np.float32)
    image = SimpleITK.GetImageFromArray(values)
    image.SetDirection(direction)
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((4.0, -5.0, 6.0))
    SimpleITK.WriteImage(image, str(tmp_path / "image.nii.gz"))
    array, properties = reader().read_images([str(tmp_path / "image.nii.gz")])
    write_map(tmp_path / "map.nii.gz", properties, array[0])
    found = SimpleITK.ReadImage(str(tmp_path / "map.nii.gz"))
    np.testing.assert_allclose(SimpleITK.GetArrayFromImage(found), values, rtol=1e-6)
    for one, other in (
        (found.GetSpacing(), image.GetSpacing()),
        (found.GetOrigin(), image.GetOrigin()),
        (found.GetDirection(), image.GetDirection()),
    ):
        assert one == pytest.approx(other, abs=1e-5)


def test_the_map_of_a_photograph_is_a_tiff(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((1, 6, 5), np.float32)
    write_map(tmp_path / "photo.png", {"spacing": (999, 1, 1)}, values)
    np.testing.assert_array_equal(io.imread(tmp_path / "photo.tif"), values[0])


def test_the_spread_is_that_of_the_samples() -> None:
    rng = np.random.default_rng(0)
    samples = rng.dirichlet(np.ones(3), (5, 4, 6)).transpose(0, 3, 1, 2)  # (S, K, 4, 6)
    spread = SpreadOfMasks(with_maps=True)
    for one in samples:
        spread.add(one.transpose(1, 0, 2)[..., None])  # slices, (K, 6, 1)
    mean = samples.mean(0)
    np.testing.assert_allclose(spread.mean[..., 0], mean)
    maps = {name: values[..., 0] for name, values in spread.maps().items()}
    np.testing.assert_allclose(maps["entropy"], entropy(mean), rtol=1e-5)
    expected = entropy(mean) - np.mean([entropy(one) for one in samples], 0)
    np.testing.assert_allclose(maps["mutual_information"], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(maps["variance"], samples[:, 1:].var(0).sum(0), rtol=1e-4)
    assert all(values.dtype == np.float32 for values in maps.values())


@pytest.mark.parametrize("finer", [1, 1.5])
def test_masks_and_mean_are_those_of_the_export_of_nnunet(
    predictor: Any, tmp_path: Path, finer: float
) -> None:
    manager, plans = predictor.label_manager, predictor.plans_manager
    configuration = predictor.configuration_manager
    size, corner, whole = np.array([9, 7, 8]), (1, 0, 2), (20, 18, 16)
    cropped = np.ceil(size * finer).astype(int).tolist()
    spacing = np.array(configuration.spacing) * size / cropped
    properties = {
        "spacing": spacing[plans.transpose_backward].tolist(),
        "shape_after_cropping_and_before_resampling": cropped,
        "shape_before_cropping": whole,
        "bbox_used_for_cropping": [[a, a + n] for a, n in zip(corner, cropped, strict=True)],
        "sitk_stuff": {
            "spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).flat),
        },
    }  # fmt: skip
    writer = CaseWriter(tmp_path, "a", predictor, properties, mean_of="samples", uncertainty=True)
    means = []
    for seed, kind in enumerate(("samples", "samples", "raters")):
        logits = torch.randn(3, *size, generator=torch.Generator().manual_seed(seed)).half()
        writer.add(kind, str(seed), logits)
        labels, probabilities = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits.numpy(), plans, configuration, manager, properties, return_probabilities=True
        )
        found = SimpleITK.ReadImage(str(tmp_path / kind / str(seed) / "a.nii.gz"))
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(found), labels)
        means += [probabilities] if kind == "samples" else []
    writer.finish({}, save_probabilities=True)
    mean = np.mean(means, 0)
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_allclose(file["probabilities"], mean, rtol=1e-5, atol=1e-7)
    found = SimpleITK.ReadImage(str(tmp_path / "entropy" / "a.nii.gz"))
    map_ = SimpleITK.GetArrayFromImage(found)
    np.testing.assert_allclose(map_, entropy(mean), rtol=1e-4, atol=1e-5)


def test_the_spread_needs_little_more_than_its_result() -> None:
    probabilities = np.full((3, 40, 40, 40), 1 / 3, np.float32)
    spread = SpreadOfMasks(with_maps=True)
    slices = probabilities.swapaxes(0, 1)
    spread.add(slices)
    for work, kept in ((lambda: spread.add(slices), 0), (spread.maps, 3)):
        tracemalloc.start()
        result = work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert result is None or len(result) == kept
        assert peak < (kept + 0.5) * probabilities[0].nbytes
