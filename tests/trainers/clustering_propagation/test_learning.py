"""It learns on toy data (spec invariants 5 and 18)."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from nnmosaic.trainers.clustering_propagation.loss import clip_losses
from nnmosaic.trainers.clustering_propagation.network import ClusteringPropagationNet
from nnmosaic.trainers.clustering_propagation.simulated_user import SimulatedUser
from nnmosaic.trainers.clustering_propagation.truth import Truth, masks_of

SIZE = 32
Draw = Callable[[np.random.Generator, int, int], tuple[Tensor, Tensor]]


def moving_discs(
    generator: np.random.Generator, clips: int, slices: int, left: float, right: float
) -> tuple[Tensor, Tensor]:
    """Return noisy images (B, T, 1, H, W) of two discs, and labels 1 = left, 2 = right."""
    grid = np.stack(np.mgrid[:SIZE, :SIZE], -1)
    images = 0.2 * generator.standard_normal((clips, slices, 1, SIZE, SIZE))
    labels = np.zeros((clips, slices, 1, SIZE, SIZE), np.int64)
    for b in range(clips):
        for k, (column, value) in enumerate(((8, left), (24, right)), 1):
            place = np.array([generator.uniform(8, 24), column + generator.uniform(-1.5, 1.5)])
            velocity, radius = generator.uniform(-1, 1, 2), generator.uniform(4, 5.5)
            for t in range(slices):
                disc = ((grid - place - t * velocity) ** 2).sum(-1) < radius**2
                images[b, t, 0][disc] += value
                labels[b, t, 0][disc] = k
    return torch.from_numpy(images).float(), torch.from_numpy(labels)


def twins(generator: np.random.Generator, clips: int, slices: int) -> tuple[Tensor, Tensor]:
    """Return discs that look alike: only their side tells them apart."""
    return moving_discs(generator, clips, slices, 1.0, 1.0)


def one_of_two(
    generator: np.random.Generator, clips: int, slices: int, lowest: float = 0.5,
    highest: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return a bright and a dark disc, one of which is the object: only the user knows which."""
    parts = []
    for _ in range(clips):
        value = generator.choice([-1, 1]) * generator.uniform(lowest, highest)
        image, label = moving_discs(generator, 1, slices, value, -value)
        parts.append((image, (label == generator.integers(1, 3)).long()))
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def user_of(
    labels: Tensor, network: ClusteringPropagationNet, generator: np.random.Generator
) -> SimulatedUser:
    truth = Truth.of(labels, network.layout.classes, regions=False, ignore_label=None)
    positions = torch.arange(labels.shape[1]).float().expand(len(labels), -1)
    return SimulatedUser(truth, positions, network.layout, generator)


def train(draw: Draw, classes: int, *, steps: int, interactive: float) -> ClusteringPropagationNet:
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    unet = PlainConvUNet(
        1, 3, (8, 16, 32), nn.Conv2d, 3, [(1, 1), (2, 2), (2, 2)], 1, classes, 1,
        norm_op=nn.InstanceNorm2d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
    )  # fmt: skip
    network = ClusteringPropagationNet(unet, classes=classes, regions=False, memory="gru")
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, 0.9)
    for _ in range(steps):
        images, labels = draw(generator, 2, 3)
        user = user_of(labels, network, generator)
        clips = [b for b in range(2) if generator.uniform() < interactive]
        result = network(images, user.begin(user.silent(), clips))
        terms = clip_losses(result, labels, user.truth, loss, regions=False)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def dice_of(found: Tensor, masks: Tensor) -> Tensor:
    """Return Dice of each foreground class over (B, T, K, H, W)."""
    axes = (0, 1, 3, 4)
    return (2 * (found & masks).sum(axes) / (found.sum(axes) + masks.sum(axes)))[1:]


@pytest.mark.slow
@torch.no_grad()
def test_twins_are_told_apart_and_equal_slices_get_equal_masks() -> None:
    with torch.enable_grad():
        network = train(twins, 3, steps=60, interactive=0.3)
    images, labels = twins(np.random.default_rng(1), 8, 4)
    user = user_of(labels, network, np.random.default_rng(1))
    found = masks_of(network(images, user.silent()).logits, regions=False)
    assert dice_of(found, user.truth.masks).min() > 0.9
    again = network(images[:, :1].expand(-1, 4, -1, -1, -1))
    masks = masks_of(again.logits, regions=False)
    assert dice_of(masks[:, :1], masks[:, 1:2]).min() >= 0.98
    # The memory's first word moves a centre away from its query; from then on it stays.
    change = (again.centres[:, 3] - again.centres[:, 2]).norm() / again.centres[:, 2].norm()
    assert change <= 0.05


@pytest.mark.slow
@torch.no_grad()
def test_a_click_says_which_disc_also_at_an_unseen_intensity() -> None:
    with torch.enable_grad():
        network = train(one_of_two, 2, steps=100, interactive=0.7)
    generator = np.random.default_rng(1)
    images, labels = one_of_two(generator, 16, 4, lowest=1.2, highest=1.5)
    user = user_of(labels, network, generator)
    automatic = network(images, user.silent())
    clicked = network(images, user.click_each_class(user.silent()))
    before, after = (
        dice_of(masks_of(result.logits, regions=False), user.truth.masks).item()
        for result in (automatic, clicked)
    )
    assert before < 0.75
    assert after > before + 0.2
    said = clicked.clip.prompts > 0  # (B, T, slots, H, W); slots of plain labels are the classes
    found = (clicked.logits.argmax(2, keepdim=True) == torch.arange(said.shape[2]).view(-1, 1, 1))[
        said
    ]
    assert found.float().mean() >= 0.9  # nothing but the network makes it so
