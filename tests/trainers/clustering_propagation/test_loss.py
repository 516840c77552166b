"""Terms of the loss on clips, and the masks they read (spec 2 and 5.5)."""

from typing import Any

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.clip import Clip, ClipResult
from nnmosaic.trainers.clustering_propagation.loss import (
    clip_losses,
    nearest,
    presence_loss,
    user_loss,
)
from nnmosaic.trainers.clustering_propagation.truth import Truth, masks_of

B, T, K, H, W = 2, 3, 3, 12, 10
IGNORE = 3


@pytest.fixture
def target() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 4, (B, T, 1, H, W), generator=generator).to(torch.int16)


def truth_of(target: Tensor) -> Truth:
    return Truth.of(target, K, regions=False, ignore_label=IGNORE)


def test_masks_are_those_of_the_labels(target: Tensor) -> None:
    truth = truth_of(target)
    for k in range(K):
        assert torch.equal(truth.masks[:, :, k], target[:, :, 0] == k)
    assert torch.equal(truth.annotated, target != IGNORE)
    regions = torch.stack([target[:, :, 0] > 0, target[:, :, 0] == 2, target[:, :, 0] == 3], 2)
    of_regions = Truth.of(regions, 2, regions=True, ignore_label=IGNORE)
    assert torch.equal(of_regions.annotated, target != IGNORE)
    assert torch.equal(of_regions.masks[:, :, 0], (target[:, :, 0] > 0) & (target[:, :, 0] < 3))
    assert Truth.of(regions[:, :, :2], 2, regions=True, ignore_label=None).annotated.all()


def test_predicted_masks() -> None:
    logits = torch.tensor([0.5, 2.0, 1.0]).view(1, 3, 1, 1)
    assert masks_of(logits, regions=False).flatten().tolist() == [False, True, False]
    assert masks_of(logits - 0.7, regions=True).flatten().tolist() == [False, True, True]


def test_smaller_targets_show_the_label_at_the_middle() -> None:
    target = torch.arange(12).view(1, 1, 3, 4)
    assert nearest(target, (1, 2)).tolist() == [[[[5, 7]]]]
    assert torch.equal(nearest(target, (3, 4)), target)


def test_presence_leaves_out_what_ignored_pixels_may_hide() -> None:
    target = torch.zeros(1, 2, 1, 2, 2, dtype=torch.long)
    target[0, 0, 0, 0] = torch.tensor([1, IGNORE])
    target[0, 1, 0, 0] = torch.tensor([1, 2])
    logits = torch.tensor([[[0.5, -1.0, 4.0], [1.5, 2.0, -0.5]]])
    # Slice 0: 0 and 1 are seen, 2 may be hidden. Slice 1: all are seen.
    known = torch.tensor([0.5, -1.0, 1.5, 2.0, -0.5])
    expected = torch.log1p(torch.exp(-known)).mean()
    torch.testing.assert_close(presence_loss(logits, truth_of(target)), expected)


@pytest.mark.parametrize("regions", [False, True])
def test_the_loss_at_clicks_is_that_of_the_disc_around_them(regions: bool, target: Tensor) -> None:
    truth = truth_of(target)
    logits = torch.randn(B, T, K, H, W)
    clicked = torch.zeros(B, T, H, W)
    assert user_loss(logits, truth, clicked, regions=regions) == 0
    clicked[1, 2, 5, 9] = 0.25
    total, number = torch.zeros(()), 0
    for y in range(H):
        for x in range(W):
            near = (y - 5) ** 2 + (x - 9) ** 2 <= 4
            label = int(target[1, 2, 0, y, x])
            if near and label != IGNORE:
                one = logits[1, 2, :, y, x]
                if regions:
                    signs = 2 * torch.nn.functional.one_hot(torch.tensor(label), K) - 1
                    total = total + torch.log1p(torch.exp(-signs * one)).mean()
                else:
                    total = total - one.log_softmax(0)[label]
                number += 1
    found = user_loss(logits, truth, clicked, regions=regions)
    torch.testing.assert_close(found, total / number)


def result_of(logits: Tensor, **changes: Any) -> ClipResult:
    clip = Clip(torch.zeros(B, T), torch.zeros(B, dtype=torch.long), torch.zeros(B, T, K, H, W))
    small = logits[..., ::2, ::2]
    result = ClipResult(logits, [small, small], torch.zeros(B, T, K), logits, logits, clip)
    return result._replace(**changes)


def test_terms_are_nnunets_loss_on_slices_and_finite_without_labels(target: Tensor) -> None:
    loss = DC_and_CE_loss(
        {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {},
        ignore_label=IGNORE, dice_class=MemoryEfficientSoftDiceLoss,
    )  # fmt: skip
    logits = torch.randn(B, T, K, H, W, requires_grad=True)
    terms = clip_losses(result_of(logits), target, truth_of(target), loss, regions=False)
    folded = loss(logits.flatten(0, 1), target.flatten(0, 1))
    torch.testing.assert_close(terms["segmentation"], folded)
    torch.testing.assert_close(terms["plain"], 0.3 * folded)
    level = loss(logits[..., ::2, ::2].flatten(0, 1), nearest(target.flatten(0, 1), (6, 5)))
    torch.testing.assert_close(terms["layers"], 0.5 * level)
    nothing = torch.full_like(target, IGNORE)
    terms = clip_losses(result_of(logits), nothing, truth_of(nothing), loss, regions=False)
    assert all(term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
