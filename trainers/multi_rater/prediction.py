"""Prediction with one opinion for a whole case (multi_rater spec, 7.6).

The prior depends on what it sees: a code drawn for every tile would leave seams. So the prior sees
the tiles first, and one distribution of codes is found for the case. A pass of the U-Net, with
nnU-Net's overlap and mirrored copies, makes the raters' queries and what all codes share; each code
then adds the last layers, once.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
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
        """Yield `SAMPLES` or `RATERS`, number ("000", ...) or rater, and logits.

        The logits have the shape (C, Z, Y, X) and half precision, as nnU-Net's.

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
        raters: dict[str, Tensor] = {}
        number = 0
        for fold in range(self._networks):
            if self.predictor.list_of_parameters is not None:
                self.network.load_state_dict(self.predictor.list_of_parameters[fold])
            prior = self._prior(data)
            shared, queries = self._shared(data)
            opinion = self._opinion(prior, queries, case, fold)
            self.latents["networks"].append({k: v.tolist() for k, v in vars(opinion).items()})
            centre, inside = self._centre(shared, opinion.mean)
            for code in opinion.samples:
                yield SAMPLES, f"{number:03d}", self._logits(centre, inside, code)
                number += 1
            for name, code in zip(wanted.raters, opinion.raters, strict=True):
                mean = self._mean(raters.pop(name, None), self._logits(centre, inside, code))
                if fold + 1 < self._networks:
                    raters[name] = mean
                else:
                    yield RATERS, name, mean
            del shared, centre, inside  # before the next network makes its own

    @property
    def _networks(self) -> int:
        return len(self.predictor.list_of_parameters or [None])

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _prior(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and sigma, shape (latent,); every tile counts the same, with the fewest."""
        device = self.predictor.device
        network = self.network.to(device).eval()
        patch_size = self.predictor.configuration_manager.patch_size
        padded = pad_nd_image(data, patch_size, "constant", {"value": 0}, False, None)
        means, variances = [], []
        for tile in self._tiles_side_by_side(padded.shape[1:]):
            x = _efficient_batch(padded[tile][None].to(device))
            with torch.autocast("cuda") if device.type == "cuda" else nullcontext():
                prior = network.prior(x)
            means.append(prior.mean[0].cpu())
            variances.append(prior.sigma[0].square().cpu())
        return torch.stack(means).mean(0), torch.stack(variances).mean(0).sqrt()

    def _opinion(
        self, prior: tuple[Tensor, Tensor], queries: Sequence[Tensor], case: str, fold: int
    ) -> _Opinion:
        """Return the codes of a network, of the queries (R, latent) of each tile."""
        mean, sigma = prior
        share = len(np.array_split(range(self.wanted.samples), self._networks)[fold])
        samples = mean + sigma * self._noise(share, case, fold)
        raters = torch.zeros(0, len(mean))
        if self.wanted.raters:
            own = codes_of_raters(torch.stack(list(queries)).mean(0), mean, sigma)
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

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _centre(self, shared: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of a code but for its own f, and what `Combiner` needs for that."""
        layer = self.network.decoder.seg_layers[-1]
        plain, inside = shared.tensor_split([layer.plain.out_channels])
        return layer.add_f_of_case(plain, inside, mean, factor=-1, out=plain), inside

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _shared(self, data: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what the combiner makes of the features whatever the code, and all queries.

        See `Combiner.shared`. Tiles and mirrored copies are averaged here and not in the logits,
        so that each further code costs four products at every voxel of the case, and not of every
        tile.
        """
        predictor = self.predictor
        network = predictor.network
        predictor.network, self.network.shared_only = self.network, True
        cuda = predictor.device.type == "cuda"
        try:
            with torch.autocast("cuda") if cuda else nullcontext():
                if not (cuda and predictor.perform_everything_on_device):
                    return self._averaged(data, torch.device("cpu"))
                try:
                    return self._averaged(data, predictor.device)
                except torch.cuda.OutOfMemoryError:
                    torch.cuda.empty_cache()
                return self._averaged(data, torch.device("cpu"))
        finally:
            self.network.shared_only = False
            predictor.network = network

    def _averaged(self, data: Tensor, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """Return what the network says, half precision, averaged over tiles as nnU-Net does.

        With it, if raters are wanted, the queries of each tile, shape (R, latent), from the copy
        that is not mirrored.

        nnU-Net's own loop looks for infinity in all channels at once, which takes three times the
        memory of its result: of the many channels here, most of what a prediction would take.
        """
        predictor = self.predictor
        patch_size = predictor.configuration_manager.patch_size
        padded, inner = pad_nd_image(data, patch_size, "constant", {"value": 0}, True, None)
        layer = self.network.decoder.seg_layers[-1]
        width = layer.plain.out_channels + layer.of_features.out_channels
        size = padded.shape[1:]
        total = torch.zeros((width, *size), dtype=torch.half, device=device)
        weights = torch.zeros(size, dtype=torch.half, device=device)
        weight: Any = 1
        if predictor.use_gaussian:
            weight = compute_gaussian(
                tuple(patch_size), sigma_scale=1 / 8, value_scaling_factor=10, device=device
            )
        last_stage = self.network.decoder.stages[-1]
        queries: list[Tensor] = []

        def ask_heads(_stage: Any, _inputs: Any, features: Tensor) -> None:
            hook.remove()  # nnU-Net's first copy is the one that is not mirrored
            queries.append(self.network.queries(_efficient_batch(features[:1]))[:, 0].cpu())

        for tile in predictor._internal_get_sliding_window_slicers(size):
            if self.wanted.raters:
                hook = last_stage.register_forward_hook(ask_heads)
            x = padded[tile][None].to(predictor.device)
            total[tile] += predictor._internal_maybe_mirror_and_predict(x)[0].to(device) * weight
            weights[tile[1:]] += weight
        for channel in total:
            channel /= weights
            if channel.isinf().any():
                raise RuntimeError("The network's features are too large for half precision.")
        there = (slice(None), *inner[1:])
        return total[there].contiguous(), queries

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _logits(self, centre: Tensor, inside: Tensor, code: Tensor) -> Tensor:
        layer, out = self.network.decoder.seg_layers[-1], torch.empty_like(centre)
        logits: Tensor = layer.add_f_of_case(centre, inside, code, factor=1, out=out)
        return logits.cpu()

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _mean(self, before: Tensor | None, logits: Tensor) -> Tensor:
        """Add the share of one network, in place."""
        share = logits.div_(self._networks)
        return share if before is None else before.add_(share)


def _efficient_batch(x: Tensor) -> Tensor:
    """Return one volume on a CPU twice, shape (2, channels, *spatial); anything else as it is.

    PyTorch gives single small volumes to a convolution that takes 5 to 12 times as long: two are
    faster than one.
    """
    return x.expand(2, *x.shape[1:]) if x.device.type == "cpu" and x.dim() == 5 else x
