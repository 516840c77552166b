"""A 2D U-Net of nnU-Net that clusters the pixels of a slice around travelling class centres.

The design of clustering_propagation.md, 1, in the spirit of Ding et al. (CVPR 2024), whose code is
not public and whose paper could not be read in full: it claims no reproduction.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnmosaic.trainers.clustering_propagation.clip import (
    Clip,
    ClipResult,
    Correction,
    in_order,
    visiting_order,
)
from nnmosaic.trainers.clustering_propagation.clustering_layer import ClusteringLayer, CosineLogits
from nnmosaic.trainers.clustering_propagation.features import (
    FeatureHeads,
    SliceFeatures,
    choose_levels,
    pool,
    widths,
)
from nnmosaic.trainers.clustering_propagation.hint import SliceHint
from nnmosaic.trainers.clustering_propagation.memory import MEMORIES, State
from nnmosaic.trainers.clustering_propagation.nearby import ALIKE
from nnmosaic.trainers.clustering_propagation.readout import CentreLayout
from nnmosaic.trainers.decoder_stages import decoder_stages

LAYERS_PER_LEVEL = 2
PROMPT_STRENGTH = 2.0
"""Of what the user points at, relative to its features, before training: weaker, a network first
learns to do without (seen on toy data)."""
PRESENT = 0.5
"""Probability above which a class counts as seen."""


class PromptCentres(NamedTuple):
    """What interactions on B slices say of the centres.

    Attributes
    ----------
    features : Tensor, shape (B, slots, D)
        Means of the features at the pixels of each kind of prompt.
    given : Tensor, shape (B, slots), bool
        Whether there are any.
    """

    features: Tensor
    given: Tensor


class SliceBefore(NamedTuple):
    """The slices that were visited before B slices.

    Attributes
    ----------
    logits : Tensor, shape (B, heads, H, W)
        What was found on them.
    distance_mm : Tensor, shape (B,)
    """

    logits: Tensor
    distance_mm: Tensor


class SliceResult(NamedTuple):
    """What clustering finds on B slices.

    Attributes
    ----------
    logits : Tensor, shape (B, heads, H, W)
    layer_logits : list of Tensor, each (B, heads, h, w)
        Of every layer, at its level.
    presence : Tensor, shape (B, heads)
        Logits of "this class is on this slice".
    centres : Tensor, shape (B, N, D)
    """

    logits: Tensor
    layer_logits: list[Tensor]
    presence: Tensor
    centres: Tensor


class _ClusteringHead(nn.Module):
    """All that is not the U-Net's."""

    def __init__(
        self, features: Sequence[int], levels: Sequence[int], layout: CentreLayout, memory: str
    ) -> None:
        super().__init__()
        width, embedding = widths(features[-1])
        self.features = FeatureHeads(features, levels, width, embedding, layout.classes)
        self.queries = nn.Parameter(torch.empty(len(layout.owners), width))
        nn.init.trunc_normal_(self.queries)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                ClusteringLayer(layout, width, embedding) for _ in range(LAYERS_PER_LEVEL)
            )
            for _ in levels
        )
        self.mask = CosineLogits(width, embedding)
        self.bias = nn.Parameter(torch.zeros(len(layout.owners)))
        self.presence = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.memory = MEMORIES[memory](width)
        self.hint = SliceHint(layout.classes)
        self.from_user = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.from_user.weight)
        self.from_user.weight.data *= PROMPT_STRENGTH
        self.user = nn.Parameter(torch.zeros(width))
        self.register_buffer("reach", torch.full((layout.classes,), ALIKE))


class ClusteringPropagationNet(nn.Module):
    """A U-Net, and centres that its pixels cluster around.

    The logits of a pixel are the sum of what a 1 x 1 convolution says, as in nnU-Net, and of its
    likeness to the centres. The design (2) has no such sum, for fear that the centres would be left
    unused; clicks move them all the same (benchmarks/results/clustering_propagation.md).

    All new parts are in ``decoder.seg_layers``, which nnU-Net leaves alone when it transfers
    weights, so that a trained 2D nnU-Net is a warm start by ``-pretrained_weights``.

    Parameters
    ----------
    unet : nn.Module
        With ``encoder`` and ``decoder`` as dynamic_network_architectures makes them, 2D.
    classes : int
        Output channels; channel k is class k.
    regions : bool
        Whether these are regions, which may overlap.
    memory : {"gru", "last", "window"}
    """

    def __init__(self, unet: Any, *, classes: int, regions: bool, memory: str) -> None:
        super().__init__()
        self.encoder, self.decoder = unet.encoder, unet.decoder
        self.layout = CentreLayout(classes, regions)
        features = [layer.in_channels for layer in self.decoder.seg_layers]
        levels = choose_levels(self.encoder.strides)
        self.decoder.seg_layers = _ClusteringHead(features, levels, self.layout, memory)
        for name, centres in (("_slots", self.layout.slots), ("_first", self.layout.first)):
            self.register_buffer(name, torch.tensor(centres), persistent=False)
        self.register_buffer("_owners", torch.tensor(self.layout.owners), persistent=False)

    @property
    def head(self) -> Any:
        """All that is not the U-Net's."""
        return self.decoder.seg_layers

    def take_output_layer(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with the output layer of a plain nnU-Net or of a network like this.

        Parameters
        ----------
        weights : mapping
            The state of that network, which has the same outputs.
        """
        last = "decoder.seg_layers.features.plain."
        if f"{last}weight" not in weights:
            layers = (re.match(r"decoder\.seg_layers\.(\d+)\.", name) for name in weights)
            number = max(int(layer[1]) for layer in layers if layer)  # of the full resolution
            last = f"decoder.seg_layers.{number}."
        found = {name: weights[last + name] for name in ("weight", "bias")}
        self.head.features.plain.load_state_dict(found)

    # ---------------------------------------------------------------- one slice

    def encode(self, x: Tensor) -> SliceFeatures:
        """Return the features of slices (N, channels, H, W); no centres are needed for them."""
        features: SliceFeatures = self.head.features(self._stages(x))
        return features

    def _stages(self, x: Tensor) -> list[Tensor]:
        return decoder_stages(self.encoder, self.decoder, x)

    def initial_state(self, batch: int) -> State:
        """Return an empty memory for so many volumes."""
        state: State = self.head.memory.empty(batch, self.head.queries)
        return state

    def initial_centres(
        self, state: State, prompts: PromptCentres | None = None, *, base: Tensor | None = None
    ) -> Tensor:
        """Return the centres to begin a slice with, shape (B, N, D) (1.5, 1.6).

        Parameters
        ----------
        state : State
        prompts : PromptCentres, optional
            Centres without any are bit for bit those of the automatic path.
        base : Tensor, optional, shape (B, N, D)
            What prompts correct; default: what the memory says, or the query of an unseen class.
        """
        centres: Tensor = self.head.memory.read(state, self.head.queries) if base is None else base
        if prompts is None:
            return centres
        before = centres[:, self._slots]
        moved = before + self.head.from_user(prompts.features) + self.head.user
        return centres.index_copy(
            1, self._slots, torch.where(prompts.given[..., None], moved, before)
        )

    def pool_prompts(self, features: SliceFeatures, weights: Tensor) -> PromptCentres:
        """Return what prompts say, from weights of pixels (1.6).

        Parameters
        ----------
        features : SliceFeatures
            Of B slices.
        weights : Tensor, shape (B, slots, H, W)
            Not negative. Slots: with plain labels the classes, a negative click being one of the
            background; with regions inside each region, then outside of each.
        """
        given = (weights > 0).flatten(2).any(2)
        if not given.any():
            width = self.head.queries.shape[1]
            return PromptCentres(weights.new_zeros(*given.shape, width), given)
        return PromptCentres(pool(features.inputs, weights), given)

    def decode(
        self, features: SliceFeatures, centres: Tensor, before: SliceBefore | None = None
    ) -> SliceResult:
        """Cluster B slices around centres (B, N, D), and look at those before (1.3, 1.4)."""
        layer_logits = []
        for layers, values, embeddings in zip(
            self.head.layers, features.values, features.embeddings, strict=True
        ):
            for layer in layers:
                centres, similarity = layer(centres, values.flatten(1, 2), embeddings.flatten(1, 2))
                found = similarity.unflatten(2, embeddings.shape[1:3])
                layer_logits.append(self.layout.class_logits(found))
        found = self.head.mask(centres, features.mask_map.flatten(2)) + self.head.bias[:, None]
        found = found.unflatten(2, features.mask_map.shape[2:])
        logits = features.plain + self.layout.class_logits(found)
        if before is not None:
            logits = self.head.hint(logits, *before)
        presence = self.head.presence(centres[:, self._first])[..., 0]
        return SliceResult(logits, layer_logits, presence, centres)

    def found_classes(self, result: SliceResult) -> Tensor:
        """Return which classes a slice shows, (B, heads), bool, by their pixels and presence."""
        likely = result.presence.sigmoid() > PRESENT
        return (self.layout.areas(result.logits) > 0) & likely

    def update_state(
        self, state: State, result: SliceResult, distance_mm: Tensor, gate: Tensor | None = None
    ) -> State:
        """Return the memory after a slice (1.5).

        Parameters
        ----------
        state : State
            Before it; not changed.
        result : SliceResult
        distance_mm : Tensor, shape (B,)
            From the slice before to this one; of no matter for the first.
        gate : Tensor, optional, shape (B, heads), bool
            Classes that are written; default: `found_classes`.
        """
        gate = self.found_classes(result) if gate is None else gate
        written: State = self.head.memory.write(
            state, result.centres, distance_mm, gate[:, self._owners]
        )
        return written

    # ---------------------------------------------------------------- clips

    def forward(
        self, x: Tensor, clip: Clip | None = None, corrections: Sequence[Correction] = ()
    ) -> Any:
        """Return logits of single slices, or what is found on clips.

        Parameters
        ----------
        x : Tensor
            Shape (B, channels, H, W): each slice for itself, without memory, as nnU-Net predicts.
            Shape (B, T, channels, H, W): clips.
        clip : Clip, optional
            Default: no prompts, from the first slice on, distances unknown (0).
        corrections : sequence of Correction
            Applied one after the other to what was found. Only the last result has gradients.

        Returns
        -------
        Tensor, shape (B, heads, H, W)
            For single slices.
        ClipResult
            For clips.
        """
        if x.dim() == 4:
            centres = self.initial_centres(self.initial_state(len(x)))
            return self.decode(self.encode(x), centres).logits
        features = self.encode(x.flatten(0, 1))
        clip = self._unprompted(x) if clip is None else clip
        for correct in corrections:
            with torch.no_grad():
                clip = correct(self._propagate(features, clip))
        return self._propagate(features, clip)

    def _unprompted(self, x: Tensor) -> Clip:
        batch, slices, _, height, width = x.shape
        return Clip(
            x.new_zeros(batch, slices),
            torch.zeros(batch, dtype=torch.long, device=x.device),
            x.new_zeros(batch, slices, len(self.layout.slots), height, width),
        )

    def _propagate(self, features: SliceFeatures, clip: Clip) -> ClipResult:
        """Carry the centres from the start slice to both ends (1.5)."""
        batch, slices = clip.positions.shape
        lanes = torch.arange(batch, device=clip.start.device)
        order = visiting_order(clip.start, slices)
        state = after_start = self.initial_state(batch)
        found: list[SliceResult] = []
        in_turn = features.select((lanes * slices + order.T).flatten()).chunk(slices)
        for step, (here, current) in enumerate(zip(order.T, in_turn, strict=True)):
            turned = here == clip.start - 1
            before = torch.where(turned, clip.start, order[:, max(step - 1, 0)])
            state = after_start.where(turned, state)
            distance = (clip.positions[lanes, here] - clip.positions[lanes, before]).abs()
            neighbours = None
            if found:
                last, first = found[-1].logits.detach(), found[0].logits.detach()
                seen = torch.where(turned[:, None, None, None], first, last)
                neighbours = SliceBefore(seen, distance)
            prompts = self.pool_prompts(current, clip.prompts[lanes, here])
            base = self._base(clip, state) if step == 0 else None
            centres = self.initial_centres(state, prompts, base=base)
            result = self.decode(current, centres, neighbours)
            gate = self.found_classes(result) if clip.gate is None else clip.gate[lanes, here]
            gate = gate | prompts.given[:, : self.layout.classes]  # the user points at these
            state = self.update_state(state, result, distance, gate)
            after_start = state if step == 0 else after_start
            found.append(result)
        back = order.argsort(1)
        logits, layers, presence, centres = zip(*found, strict=True)
        return ClipResult(
            in_order(logits, back),
            [in_order(of_layer, back) for of_layer in zip(*layers, strict=True)],
            in_order(presence, back),
            in_order(centres, back),
            features.plain.unflatten(0, (batch, slices)),
            clip,
        )

    def _base(self, clip: Clip, state: State) -> Tensor | None:
        """Return what the prompts of the start slices correct."""
        if clip.base is None or clip.corrected is None:
            return None
        return torch.where(clip.corrected[:, None, None], clip.base, self.initial_centres(state))
