"""Where a latent opinion comes into the logits (multi_rater_personalization.md, 2.1)."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

VOXELS_AT_ONCE = 2**16


class Combiner(nn.Module):
    """From features and a code to logits, voxel by voxel (2.1).

    The logits are those of nnU-Net's output layer, which the released code does not have, and what
    a code changes: f(features, code) - f(features, mean code). So the mean opinion is a plain
    nnU-Net, which can be taken over whole, and f learns only how opinions differ from it. With
    nnU-Net's leaky units: of few others so many may die that the code has no effect.

    The first layer of the concatenation, W [h; z], is W_h h + W_z z: for a further code only the
    second part is new.

    Parameters
    ----------
    plain : nn.Conv2d or nn.Conv3d
        nnU-Net's output layer, from features to classes.
    latent, width : int
        Channels of the code, and inside.
    """

    def __init__(self, plain: nn.Conv2d | nn.Conv3d, latent: int, width: int) -> None:
        super().__init__()
        conv_op, classes = type(plain), plain.out_channels
        self.plain = plain
        self.of_features = conv_op(plain.in_channels, width, 1)
        self.of_code = nn.Linear(latent, width, bias=False)
        self.rest = nn.Sequential(
            nn.LeakyReLU(),
            conv_op(width, width, 1),
            nn.LeakyReLU(),
            conv_op(width, width, 1),
            nn.LeakyReLU(),
            conv_op(width, classes, 1, bias=False),  # it would cancel out
        )
        for module in (self.of_features, self.of_code, *self.rest):
            if isinstance(module, nn.Linear | conv_op):
                nn.init.orthogonal_(module.weight)
                if module.bias is not None:
                    nn.init.trunc_normal_(module.bias, std=1e-3)

    def shared(self, features: Tensor) -> Tensor:
        """Return what all codes share: first the logits of `plain`, then `of_features`."""
        return torch.cat([self.plain(features), self.of_features(features)], 1)

    def forward(self, features: Tensor, codes: Tensor, mean: Tensor) -> Tensor:
        """Return logits (B, C, *spatial) of codes (B, latent), or (M, B, C, *spatial) of many.

        ``mean`` is the mean code, (B, latent).
        """
        inside = self.of_features(features)
        # What is inside is computed again for the gradient, and not kept for every code.
        again = partial(checkpoint, self._f, use_reentrant=False, preserve_rng_state=False)
        f = again if torch.is_grad_enabled() else self._f
        centre = self.plain(features) - f(inside, mean)
        if codes.dim() == 2:
            return centre + f(inside, codes)
        # One by one, so that a mask does not depend on how many there are: a product of more rows
        # is rounded otherwise.
        return torch.stack([centre + f(inside, one) for one in codes])

    def _f(self, inside: Tensor, codes: Tensor) -> Tensor:
        """Return f of (B, width, *spatial) and codes (B, latent), as products of matrices.

        On one core a convolution of single voxels takes a fifth longer.
        """
        x = inside.flatten(2) + self.of_code(codes)[:, :, None]
        for layer in self.rest:
            if isinstance(layer, nn.LeakyReLU):
                x = functional.leaky_relu_(x, layer.negative_slope)
                continue
            weight = layer.weight.flatten(1).expand(len(x), -1, -1)
            x = (
                torch.bmm(weight, x)
                if layer.bias is None
                else torch.baddbmm(layer.bias[:, None], weight, x)
            )
        return x.unflatten(2, inside.shape[2:])

    def add_f_of_case(
        self, logits: Tensor, inside: Tensor, code: Tensor, *, factor: float, out: Tensor
    ) -> Tensor:
        """Return logits + factor * f(features, code) for a whole case.

        The same f as in `forward`, a few voxels at a time: they stay in the cache, and memory
        holds little more than the result. Sums are single precision, and stored as ``out`` is.

        Parameters
        ----------
        logits, out : Tensor, shape (C, *spatial)
            ``out`` is overwritten, and may be ``logits``; any precision, on the device of
            ``logits``.
        inside : Tensor, shape (width, *spatial)
            What `of_features` makes of the features; any precision and device.
        code : Tensor, shape (latent,)
        """
        device = self.of_code.weight.device
        codes = code[None].to(device)
        voxels, before, after = (t.flatten(1) for t in (inside, logits, out))
        for first in range(0, voxels.shape[1], VOXELS_AT_ONCE):
            part = slice(first, first + VOXELS_AT_ONCE)
            f = self._f(voxels[None, :, part].to(device).float(), codes)[0].to(logits.device)
            after[:, part] = before[:, part].float() + factor * f
        return out
