"""A head for one more rater, learnt from few cases on a trained model (multi_rater spec, 8, 7)."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from nnmosaic.planners.plans_section import RaterPlan
from nnmosaic.trainers.multi_rater.network import MultiRaterNet, RaterHead
from nnmosaic.trainers.resumable import plain_network

COMPARED_BATCHES = 4
"""On which the known raters are held against the new one."""
LEARNING_RATE = 3e-3
FOREGROUND = 0.33
"""Share of the samples of a batch that are centred on a structure; nnU-Net's."""


@dataclass(frozen=True)
class PreprocessedCases:
    """A few cases in memory, as nnU-Net's data loader asks for them.

    Attributes
    ----------
    cases : mapping of str to tuple
        Name -> image, shape (channels, Z, Y, X); label map, (1, Z, Y, X), where -1 is cropped
        background; and nnU-Net's properties, with "class_locations".
    """

    cases: Mapping[str, tuple[np.ndarray, np.ndarray, dict[str, Any]]]

    @property
    def identifiers(self) -> list[str]:
        """Names of the cases."""
        return list(self.cases)

    def load_case(self, identifier: str) -> tuple[Any, Any, None, dict[str, Any]]:
        """Return image, label map, no label map of a previous stage, and properties."""
        data, label, properties = self.cases[identifier]
        return data, label, None, properties


def with_head(
    weights: Mapping[str, Tensor], head: RaterHead, *, raters: int, classes: int
) -> dict[str, Tensor]:
    """Return the weights of a `MultiRaterNet` that has one more head, after those of ``raters``.

    The posterior's encoder, which only training needs, gets channels for the new rater that it
    does not look at.
    """
    first = "posterior.features.0.weight"
    old = weights[first]  # (width, channels + classes * raters, *kernel), see `posterior_input`
    image, drawn = old.tensor_split([old.shape[1] - classes * raters], 1)
    drawn = drawn.unflatten(1, (classes, raters))
    wider = torch.cat([drawn, torch.zeros_like(drawn[:, :, :1])], 2).flatten(1, 2)
    new = {f"heads.{raters}.{name}": value for name, value in head.state_dict().items()}
    return {**weights, **new, first: torch.cat([image, wider], 1)}


@dataclass(frozen=True)
class NewHead:
    """What was learnt.

    Attributes
    ----------
    weights : mapping
        Of the network with the head, as `with_head` returns them.
    nearest : str
        The known rater whose head it started from.
    before, after : float
        Loss of that rater's masks, and of the new ones, on the same patches of the cases.
    """

    weights: Mapping[str, Tensor]
    nearest: str
    before: float
    after: float


class HeadLearner:
    """Learns heads for one rater; the networks of an ensemble get one each.

    Parameters
    ----------
    predictor : nnUNetPredictor
        Initialised with a model of the second stage: for its managers and its device.
    plan : RaterPlan
        Of the model.
    cases : PreprocessedCases
    """

    def __init__(self, predictor: Any, plan: RaterPlan, cases: PreprocessedCases) -> None:
        configuration = predictor.configuration_manager
        self.plan, self.cases, self.device = plan, cases, predictor.device
        self.network: MultiRaterNet = plain_network(predictor.network)
        self.patch_size: Sequence[int] = configuration.patch_size
        self.batch_size: int = configuration.batch_size
        self.labels = predictor.label_manager
        self.mirror_axes: Sequence[int] = predictor.allowed_mirroring_axes or ()
        self.loss = DC_and_CE_loss(
            {"batch_dice": configuration.batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False},
            {},
            dice_class=MemoryEfficientSoftDiceLoss,
        )

    def learn(self, weights: Mapping[str, Tensor], *, steps: int, seed: int) -> NewHead:
        """Return weights with a head for the rater who drew the cases.

        It starts as the head of the known rater who is nearest to the new one, and the rest of the
        network, whose heads are left as they were, does not change.

        Parameters
        ----------
        weights : mapping
            Of the network of the model's fold.
        seed : int
            Seeds NumPy's and torch's global generators: nnU-Net's data loader draws from the first.
        """
        np.random.seed(seed)
        torch.manual_seed(seed)
        network = self.network
        network.load_state_dict(weights)
        network.to(self.device).eval().requires_grad_(False)
        known = network.heads
        compared = list(islice(self._batches(), COMPARED_BATCHES))
        try:
            losses = self._mean_losses(network, compared)
            nearest = int(losses.argmin())
            network.heads = nn.ModuleList([copy.deepcopy(known[nearest])])
            self._descend(network, steps)
            after = self._mean_losses(network, compared)[0]
            (head,) = network.heads
        finally:
            network.heads = known
        raters = self.plan.raters
        wider = with_head(weights, head.cpu(), raters=len(raters), classes=network.classes)
        return NewHead(wider, raters[nearest], float(losses[nearest]), float(after))

    def _descend(self, network: MultiRaterNet, steps: int) -> None:
        (head,) = network.heads
        head.requires_grad_(True).train()
        optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
        for data, target in islice(self._batches(), steps):
            optimizer.zero_grad()
            self._losses(network, data, target)[0].backward()
            optimizer.step()
            schedule.step()
        head.requires_grad_(False).eval()

    def _mean_losses(self, network: MultiRaterNet, batches: Any) -> Tensor:
        """Return the loss of each head, shape (R,)."""
        with torch.no_grad():
            losses = [self._losses(network, data, target) for data, target in batches]
        return torch.stack(losses).mean(0)

    def _losses(self, network: MultiRaterNet, data: Tensor, target: Tensor) -> Tensor:
        logits = network(data, of_raters=True)
        return torch.stack([self.loss(one, target) for one in logits])

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B, channels, *spatial) and label maps (B, 1, *spatial), mirrored."""
        loader = nnUNetDataLoader(
            self.cases, self.batch_size, self.patch_size, self.patch_size, self.labels, FOREGROUND
        )
        for batch in loader:
            axes = [2 + axis for axis in self.mirror_axes if np.random.random() < 0.5]
            data, target = (torch.as_tensor(batch[key]).flip(axes) for key in ("data", "target"))
            yield data.to(self.device), target.clamp_min(0).to(self.device)
