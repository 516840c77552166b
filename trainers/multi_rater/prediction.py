"""Prediction with one opinion for a whole case (multi_rater spec, 7.6).

The prior depends on what it sees: a code drawn for every tile would leave seams. So a first pass
over the tiles finds one distribution of codes for the case. A second one, with nnU-Net's overlap
and mirrored copies, makes what all codes share; each code then adds the last layers, once.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor

from nnmosaic.planners.plans_section import rater_plan
from nnmosaic.trainers.multi_rater.network import MultiRaterNet, codes_of_raters
from nnmosaic.trainers.multi_rater.wanted_masks import RATERS, SAMPLES, WantedMasks
from nnmosaic.trainers.resumable import plain_network


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
        self.wanted = wanted.of(predictor.plans_manager.plans, predictor.trainer_name)
        self.plan = rater_plan(predictor.plans_manager.plans)
        self.network: MultiRaterNet = plain_network(predictor.network)
        self.latents: dict[str, Any] = {}

    def logits(self, data: Tensor, case: str) -> Iterator[tuple[str, str, Tensor]]:
        """Yield `SAMPLES` or `RATERS`, number ("000", ...) or rater, and logits, (C, Z, Y, X).

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
        wanted = self.wanted
        self.latents = {"seed": wanted.seed, "raters": list(wanted.raters), "networks": []}
        raters: dict[str, Any] = dict.fromkeys(wanted.raters, 0)
        number = 0
        for fold in range(self._networks):
            if self.predictor.list_of_parameters is not None:
                self.network.load_state_dict(self.predictor.list_of_parameters[fold])
            opinion = self._opinion(fold, data, case)
            self.latents["networks"].append({k: v.tolist() for k, v in vars(opinion).items()})
            plain, inside = self._shared(data)
            centre = plain.cpu() - self._f(inside, opinion.mean)
            for code in opinion.samples:
                yield SAMPLES, f"{number:03d}", centre + self._f(inside, code)
                number += 1
            for name, code in zip(wanted.raters, opinion.raters, strict=True):
                logits = centre + self._f(inside, code)
                raters[name] = raters[name] + logits / self._networks
        yield from ((RATERS, name, logits) for name, logits in raters.items())

    @property
    def _networks(self) -> int:
        return len(self.predictor.list_of_parameters or [None])

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _opinion(self, fold: int, data: Tensor, case: str) -> _Opinion:
        """Return the codes of a network; every tile counts the same, with the fewest tiles."""
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
            variances.append(prior.sigma[0].square().cpu())
        mean, sigma = torch.stack(means).mean(0), torch.stack(variances).mean(0).sqrt()
        share = len(np.array_split(range(self.wanted.samples), self._networks)[fold])
        samples = mean + sigma * self._noise(share, case, fold)
        raters = torch.zeros(0, len(mean))
        if self.wanted.raters:
            own = codes_of_raters(torch.stack(queries).mean(0), mean, sigma)
            raters = own[[self.plan.raters.index(name) for name in self.wanted.raters]]
        return _Opinion(mean, sigma, samples, raters)

    def _tiles_side_by_side(self, size: tuple[int, ...]) -> Sequence[tuple[Any, ...]]:
        step, self.predictor.tile_step_size = self.predictor.tile_step_size, 1
        try:
            tiles: list[Any] = self.predictor._internal_get_sliding_window_slicers(size)
        finally:
            self.predictor.tile_step_size = step
        return tiles

    def _noise(self, number: int, case: str, fold: int) -> Tensor:
        entropy = (self.wanted.seed, zlib.crc32(case.encode()), fold)
        noise = np.random.default_rng(entropy).standard_normal((number, self.plan.latent))
        return torch.from_numpy(noise.astype(np.float32))

    def _shared(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the combiner makes of the features whatever the code, see `Combiner.shared`.

        Tiles and mirrored copies are averaged here and not in the logits, so that each further
        code costs four products at every voxel of the case, and not of every tile.
        """
        predictor = self.predictor
        labels, network = predictor.label_manager, predictor.network
        layer = self.network.decoder.seg_layers[-1]
        width = layer.plain.out_channels + layer.of_features.out_channels
        # nnU-Net's predictor asks how many output channels there are.
        predictor.label_manager = SimpleNamespace(num_segmentation_heads=width)
        predictor.network, self.network.shared_only = self.network, True
        try:
            shared: Tensor = predictor.predict_sliding_window_return_logits(data)
        finally:
            self.network.shared_only = False
            predictor.label_manager, predictor.network = labels, network
        plain, inside = shared.tensor_split([layer.plain.out_channels])
        return plain, inside

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _f(self, inside: Tensor, code: Tensor) -> Tensor:
        return self.network.decoder.seg_layers[-1].f_of_case(inside, code).cpu()
