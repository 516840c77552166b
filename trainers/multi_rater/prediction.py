"""Prediction with one opinion for a whole case (multi_rater spec, 7.6).

The prior depends on what it sees: a code drawn for every tile would leave seams. So a first pass
over the tiles finds one distribution of codes for the case, and all tiles, slices and mirrored
copies are predicted with the same codes.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor

from nnmosaic.planners.plans_section import rater_plan
from nnmosaic.trainers.multi_rater.network import MultiRaterNet, attend
from nnmosaic.trainers.multi_rater.wanted_masks import RATERS, SAMPLES, WantedMasks
from nnmosaic.trainers.resumable import plain_network

MOST_VALUES = 2**27
"""Logits that may be held at once; more codes are predicted in several passes."""


@dataclass(frozen=True)
class _Opinion:
    """What one network of the ensemble says for a case.

    Attributes
    ----------
    mean, sigma : Tensor, shape (latent,)
    samples, raters : Tensor, shape (number, latent)
        Codes.
    """

    mean: Tensor
    sigma: Tensor
    samples: Tensor
    raters: Tensor


class RaterPredictor:
    """Predicts masks of raters, and samples, with nnU-Net's sliding window.

    Parameters
    ----------
    predictor : nnUNetPredictor
        Initialised with a model for several raters.
    wanted : WantedMasks

    Raises
    ------
    InputError
        If the model cannot predict what is wanted.
    """

    def __init__(self, predictor: Any, wanted: WantedMasks) -> None:
        self.predictor = predictor
        self.plan = rater_plan(predictor.plans_manager.plans)
        self.wanted = wanted.of(self.plan, predictor.trainer_name)
        self.network: MultiRaterNet = plain_network(predictor.network)
        self.latents: dict[str, Any] = {}

    def logits(self, data: Tensor, case: str) -> Iterator[tuple[str, str, Tensor]]:
        """Yield `RATERS` or `SAMPLES`, rater or number ("000", ...), and logits, (C, Z, Y, X).

        Masks of raters are averaged over the networks of the ensemble, whose codes mean different
        things: each sample comes from one of them. ``latents`` then holds the seed, and mean, sigma
        and codes of each network.

        Parameters
        ----------
        data : Tensor, shape (channels, Z, Y, X)
            Preprocessed.
        case : str
            Its name.
        """
        opinions = [self._opinion(fold, data, case) for fold in range(self._networks)]
        wanted = self.wanted
        self.latents = {
            "seed": wanted.seed,
            "raters": list(wanted.raters),
            "networks": [
                {name: value.tolist() for name, value in vars(opinion).items()}
                for opinion in opinions
            ],
        }
        for names in self._chunks(wanted.raters, data):
            rows = [wanted.raters.index(name) for name in names]
            total: Any = 0
            for fold, opinion in enumerate(opinions):
                total = total + self._predict(fold, data, opinion.raters[rows]) / len(opinions)
            yield from ((RATERS, name, one) for name, one in zip(names, total, strict=True))
        first = 0
        for fold, opinion in enumerate(opinions):
            names = [f"{first + i:03d}" for i in range(len(opinion.samples))]
            first += len(names)
            for chunk in self._chunks(names, data):
                rows = [names.index(name) for name in chunk]
                found = self._predict(fold, data, opinion.samples[rows])
                yield from ((SAMPLES, name, one) for name, one in zip(chunk, found, strict=True))

    @property
    def _networks(self) -> int:
        return len(self.predictor.list_of_parameters or [None])

    def _load(self, fold: int) -> None:
        if self.predictor.list_of_parameters is not None:
            self.network.load_state_dict(self.predictor.list_of_parameters[fold])

    def _chunks(self, names: Sequence[str], data: Tensor) -> Iterator[Sequence[str]]:
        """Yield as many names at a time as there is room for."""
        patch = np.prod(self.predictor.configuration_manager.patch_size)
        values = self.network.classes * max(data[0].numel(), 8 * int(patch))
        size = max(1, MOST_VALUES // values)
        for i in range(0, len(names), size):
            yield names[i : i + size]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _opinion(self, fold: int, data: Tensor, case: str) -> _Opinion:
        """Return the codes of a network; every tile counts the same, with the fewest tiles."""
        self._load(fold)
        device = self.predictor.device
        network = self.network.to(device).eval()
        patch_size = self.predictor.configuration_manager.patch_size
        padded = pad_nd_image(data, patch_size, "constant", {"value": 0}, False, None)
        means, variances, queries = [], [], []
        for tile in self._tiles_side_by_side(padded.shape[1:]):
            x = padded[tile][None].to(device)
            with torch.autocast("cuda") if device.type == "cuda" else nullcontext():
                prior = network.prior(x)
                if self.wanted.raters:
                    queries.append(network.queries(network.features(x)[0])[:, 0].cpu())
            means.append(prior.mean[0].cpu())
            variances.append((2 * prior.log_sigma[0]).exp().cpu())
        mean, sigma = torch.stack(means).mean(0), torch.stack(variances).mean(0).sqrt()
        share = len(np.array_split(range(self.wanted.samples), self._networks)[fold])
        samples = mean + sigma * self._noise(share, case, fold, 0)
        raters = torch.zeros(0, len(mean))
        if self.wanted.raters:
            bank = mean + sigma * self._noise(self.plan.bank_at_inference, case, fold, 1)
            own = attend(torch.stack(queries).mean(0)[:, None], bank[:, None])[:, 0]
            raters = own[[self.plan.raters.index(name) for name in self.wanted.raters]]
        return _Opinion(mean, sigma, samples, raters)

    def _tiles_side_by_side(self, size: tuple[int, ...]) -> Sequence[tuple[Any, ...]]:
        step, self.predictor.tile_step_size = self.predictor.tile_step_size, 1
        try:
            tiles: list[Any] = self.predictor._internal_get_sliding_window_slicers(size)
        finally:
            self.predictor.tile_step_size = step
        return tiles

    def _noise(self, number: int, case: str, fold: int, stream: int) -> Tensor:
        entropy = (self.wanted.seed, zlib.crc32(case.encode()), fold, stream)
        noise = np.random.default_rng(entropy).standard_normal((number, self.plan.latent))
        return torch.from_numpy(noise.astype(np.float32))

    def _predict(self, fold: int, data: Tensor, codes: Tensor) -> Tensor:
        """Return logits of the codes, shape (number, C, Z, Y, X)."""
        self._load(fold)
        with self._answering(codes):
            logits = self.predictor.predict_sliding_window_return_logits(data)
        answers: Tensor = logits.cpu().unflatten(0, (len(codes), self.network.classes))
        return answers

    @contextmanager
    def _answering(self, codes: Tensor) -> Iterator[None]:
        """Let nnU-Net's predictor see one output channel for each code and class."""
        predictor = self.predictor
        labels, network = predictor.label_manager, predictor.network
        channels = len(codes) * self.network.classes
        predictor.label_manager = SimpleNamespace(num_segmentation_heads=channels)
        predictor.network = self.network
        self.network.set_latent(codes.to(predictor.device))
        try:
            yield
        finally:
            self.network.set_latent(None)
            predictor.label_manager, predictor.network = labels, network
