"""Any U-Net of nnU-Net with a latent opinion (multi_rater_personalization.md, 2.1, 3.1 and 7.4).

The layers that make logits, ``decoder.seg_layers``, take the latent code as well; encoder and
decoder keep nnU-Net's keys, so that weights transfer. Both stages have the same parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnmosaic.trainers.decoder_stages import decoder_stages
from nnmosaic.trainers.multi_rater.combiner import Combiner

NARROWEST = 8
"""Channels of the new parts at least."""
LEVELS = 5
"""Of the encoders of the latent; each has twice the channels of the one before."""
LOG_SIGMA_RANGE = (-7.0, 5.0)


class Gaussian(NamedTuple):
    """Axis-parallel normal distributions, each of shape (B, latent), single precision."""

    mean: Tensor
    log_sigma: Tensor

    @property
    def sigma(self) -> Tensor:
        """Standard deviations."""
        return self.log_sigma.exp()

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + sigma * noise, shape (..., B, latent), of standard normal noise."""
        return self.mean + self.sigma * noise


class Diversified(NamedTuple):
    """What the first stage learns from.

    Attributes
    ----------
    logits : Tensor or list of Tensor
        With the posterior's code: (B, C, *spatial), with deep supervision every resolution.
    samples : Tensor, shape (M, B, C, *spatial)
        Logits with codes from the prior.
    mean_opinion : Tensor or list of Tensor
        With the prior's mean code, as ``logits``.
    posterior, prior : Gaussian
    """

    logits: Tensor | list[Tensor]
    samples: Tensor
    mean_opinion: Tensor | list[Tensor]
    posterior: Gaussian
    prior: Gaussian


class LatentEncoder(nn.Module):
    """From images to a distribution of codes: convolutions, average pooling, a global mean (2.1).

    The pooled features are divided by their length, which the released code does not: with the
    learning rates of a short training, codes ran away in the first epoch otherwise.

    Parameters
    ----------
    conv_op : type
        ``nn.Conv2d`` or ``nn.Conv3d``.
    channels, latent : int
        Of the input, and of the code.
    width : int
        Channels of the first level.
    strides : sequence of sequence of int
        Of the plan's stages: it pools by the first four, so that thick slices are not pooled early.
    """

    def __init__(
        self,
        conv_op: type[nn.Module],
        channels: int,
        latent: int,
        width: int,
        strides: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        pool = nn.AvgPool2d if conv_op is nn.Conv2d else nn.AvgPool3d
        layers: list[nn.Module] = []
        before = channels
        for level in range(min(LEVELS, len(strides))):
            if level:
                width *= 2
                size = tuple(strides[level])
                layers.append(pool(size, size, ceil_mode=True))
            for _ in range(3):
                layers += [conv_op(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
        self.features = nn.Sequential(*layers)
        self.code = nn.Linear(before, 2 * latent)
        for module in self.features:
            if isinstance(module, conv_op):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.trunc_normal_(module.bias, std=1e-3)

    def forward(self, x: Tensor) -> Gaussian:
        """Return the distribution for images of shape (B, channels, *spatial), of any size."""
        pooled = self.features(x).flatten(2).mean(2)
        mean, log_sigma = self.code(functional.normalize(pooled)).float().chunk(2, 1)
        return Gaussian(mean, log_sigma.clamp(*LOG_SIGMA_RANGE))


class RaterHead(nn.Module):
    """From features to a rater's query, shape (B, latent) (3.1, 3).

    It pools before each part, by the plan's strides: at full resolution the heads of many raters
    would cost more than the U-Net (3.3). The released code ends in a ReLU: a query that cannot be
    negative can move the opinion only one way along each axis of the code, and raters on the other
    side stay out of reach. Ours has none at the end.
    """

    def __init__(
        self,
        conv_op: type[nn.Module],
        features: int,
        latent: int,
        strides: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        pool = nn.AvgPool2d if conv_op is nn.Conv2d else nn.AvgPool3d
        dropout = nn.Dropout2d if conv_op is nn.Conv2d else nn.Dropout3d
        layers: list[nn.Module] = []
        before = features
        for part, width in enumerate((features, max(NARROWEST, features // 2), latent)):
            if part + 1 < len(strides):
                size = tuple(strides[part + 1])
                layers.append(pool(size, size, ceil_mode=True))
            layers += [
                conv_op(before, width, 3, padding=1),
                nn.ReLU(),
                dropout(0.1),
                conv_op(width, width, 3, padding=1),
                nn.ReLU(),
            ]
            before = width
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, features: Tensor) -> Tensor:
        """Return the query for features of shape (B, channels, *spatial)."""
        query: Tensor = self.layers(features).flatten(2).mean(2).float()
        return query


def codes_of_raters(queries: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Return, for each query, the mean of the prior's codes weighted by exp(query . code) (3.1, 4).

    The released code draws a bank of codes and weighs them by softmax. Of a normal distribution the
    weighted mean is known, mean + sigma^2 * query: this is the limit of a large bank. A bank of 100
    or 500 codes ends soon in the direction of a query, and each draw elsewhere.

    Parameters
    ----------
    queries : Tensor, shape (R, ..., latent)
    mean, sigma : Tensor, shape (..., latent)
        Of the prior.

    Returns
    -------
    Tensor, shape (R, ..., latent)
    """
    return mean + sigma.square() * queries


class MultiRaterNet(nn.Module):
    """A U-Net, encoders of the latent, and a head for each rater.

    The new parts grow with the U-Net; nnU-Net's 32 features of the first stage give the widths of
    the released code (2.1, 3.1).

    Parameters
    ----------
    unet : nn.Module
        With ``encoder`` and ``decoder`` as dynamic_network_architectures makes them.
    channels, classes, raters, latent : int
        Image channels; classes with background; raters; size of the code.
    """

    def __init__(self, unet: Any, *, channels: int, classes: int, raters: int, latent: int) -> None:
        super().__init__()
        self.encoder, self.decoder = unet.encoder, unet.decoder
        self.classes, self.latent = classes, latent
        conv_op, strides = self.encoder.conv_op, self.encoder.strides
        features = [layer.in_channels for layer in self.decoder.seg_layers]
        width = max(NARROWEST, features[-1] // 2)
        self.decoder.seg_layers = nn.ModuleList(
            Combiner(layer, latent, width) for layer in self.decoder.seg_layers
        )
        self.prior = LatentEncoder(conv_op, channels, latent, width, strides)
        seen = channels + raters * classes  # masks of the foreground classes, and who is there
        self.posterior = LatentEncoder(conv_op, seen, latent, width, strides)
        self.heads = nn.ModuleList(
            RaterHead(conv_op, features[-1], latent, strides) for _ in range(raters)
        )
        self.shared_only = False
        """Whether `forward` stops where the code comes in: at `Combiner.shared`."""

    def take_output_layers(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with the output layers of a plain nnU-Net or of a network like this.

        Parameters
        ----------
        weights : mapping
            The state of that network, which has the same resolutions and classes.
        """
        for number, layer in enumerate(self.decoder.seg_layers):
            own = f"decoder.seg_layers.{number}."
            if f"{own}plain.weight" in weights:
                own += "plain."
            layer.plain.load_state_dict({key: weights[own + key] for key in ("weight", "bias")})

    def train(self, mode: bool = True) -> "MultiRaterNet":
        """Change the mode of all parts but the frozen ones, which stay as at inference."""
        super().train(mode)
        for part in self.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the features of the decoder, full resolution first; all with deep supervision."""
        found = decoder_stages(self.encoder, self.decoder, x)
        return found[::-1] if self.decoder.deep_supervision else found[-1:]

    def logits(
        self, features: Sequence[Tensor], codes: Tensor, mean: Tensor
    ) -> Tensor | list[Tensor]:
        """Return logits of codes at each resolution of the features.

        Codes and mean code are (B, latent); at the mean code they are the plain logits.
        """
        return self._at_each(features, lambda layer, level: layer(level, codes, mean))

    def _at_each(
        self, features: Sequence[Tensor], answer: Callable[[Combiner, Tensor], Tensor]
    ) -> Tensor | list[Tensor]:
        layers = reversed(self.decoder.seg_layers)
        levels = [answer(layer, level) for level, layer in zip(features, layers, strict=False)]
        return levels if self.decoder.deep_supervision else levels[0]

    def forward(
        self,
        x: Tensor,
        *,
        annotated: Tensor | None = None,
        noise: Tensor | None = None,
        of_raters: bool = False,
    ) -> Any:
        """Return nnU-Net's own logits, the mean opinion; or what a stage learns from.

        Parameters
        ----------
        x : Tensor, shape (B, channels, *spatial)
        annotated : Tensor, optional
            What the posterior sees, `posterior_input`; with ``noise``, the first stage.
        noise : Tensor, optional, shape (1 + M, B, latent)
            Standard normal: first for the posterior, the rest for samples from the prior.
        of_raters : bool
            Whether the second stage answers.

        Returns
        -------
        Tensor or list of Tensor
            As nnU-Net's networks.
        Diversified
            With ``annotated``.
        Tensor, shape (R, B, C, *spatial)
            With ``of_raters``: logits of each rater.
        """
        if of_raters:
            with torch.no_grad():
                features, prior = self.features(x), self.prior(x)
            own = codes_of_raters(self.queries(features[0]), prior.mean, prior.sigma)
            return self.decoder.seg_layers[-1](features[0], own, prior.mean)
        features = self.features(x)
        if self.shared_only:
            return self.decoder.seg_layers[-1].shared(features[0])
        if annotated is not None and noise is not None:
            prior, posterior = self.prior(x), self.posterior(annotated)
            return Diversified(
                self.logits(features, posterior.sample(noise[0]), prior.mean),
                self.decoder.seg_layers[-1](features[0], prior.sample(noise[1:]), prior.mean),
                self._mean_opinion(features),
                posterior,
                prior,
            )
        return self._mean_opinion(features)

    def _mean_opinion(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:
        return self._at_each(features, lambda layer, level: layer.plain(level))

    def queries(self, features: Tensor) -> Tensor:
        """Return the query of each rater, shape (R, B, latent), from full-resolution features."""
        return torch.stack([head(features) for head in self.heads])
