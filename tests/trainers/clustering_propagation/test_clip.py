"""What goes from slice to slice of a clip, and back in training (spec 1.5, 2; invariant 5)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnmosaic.trainers.clustering_propagation.clip import Clip
from nnmosaic.trainers.clustering_propagation.network import ClusteringPropagationNet

SLICES, SIZE = 4, (16, 12)
DISTANCE = 2.5


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, SLICES, 2, *SIZE, generator=torch.Generator().manual_seed(1))


def automatic(network: ClusteringPropagationNet, *, start: int = 0, seen: bool = True) -> Clip:
    """Return a clip without prompts; ``seen``: all classes are written to the memory, or none."""
    slots, classes = len(network.layout.slots), network.layout.classes
    return Clip(
        DISTANCE * torch.arange(SLICES).expand(2, -1),
        torch.full((2,), start),
        torch.zeros(2, SLICES, slots, *SIZE),
        torch.full((2, SLICES, classes), seen),
    )


# -------------------------------------------------------------------- equal slices (invariant 5)


def without(network: ClusteringPropagationNet, *names: str) -> ClusteringPropagationNet:
    """Return the network with parameters of its head at 0, as they are before training."""
    parameters = [p for name, p in network.head.named_parameters() if any(n in name for n in names)]
    assert len(parameters) >= len(names)
    for parameter in parameters:
        nn.init.zeros_(parameter)
    return network


@torch.no_grad()
def test_closed_gates_let_centres_out_as_they_came_in(
    kind: dict[str, Any], make_network: Callable[..., ClusteringPropagationNet], images: Tensor
) -> None:
    network = make_network(**kind)
    features = network.encode(images[:, 0])
    centres = torch.randn(2, *network.head.queries.shape)
    assert not torch.equal(network.decode(features, centres).centres, centres)
    assert torch.equal(without(network, "gates").decode(features, centres).centres, centres)


@torch.no_grad()
def test_before_training_equal_slices_get_the_same_whatever_came_before(
    kind: dict[str, Any], make_network: Callable[..., ClusteringPropagationNet], images: Tensor
) -> None:
    network = without(make_network(**kind), "gates", "hint.change")
    if kind["memory"] != "last":  # its answer is what was written, here the query
        without(network, "memory.offset.linear")
    same = images[:, :1].expand(-1, SLICES, -1, -1, -1)
    result = network(same, automatic(network))
    for t in range(SLICES):
        assert torch.equal(result.centres[:, t], network.head.queries.expand(2, -1, -1))
        assert torch.equal(result.logits[:, t], result.logits[:, 0])


@torch.no_grad()
def test_with_closed_gates_only_the_hint_tells_equal_slices_apart(
    make_network: Callable[..., ClusteringPropagationNet], images: Tensor
) -> None:
    network = without(make_network(memory="last"), "gates")
    same = images[:, :1].expand(-1, SLICES, -1, -1, -1)
    result = network(same, automatic(network))
    first, second = result.logits[:, 0], result.logits[:, 1]
    assert torch.equal(result.centres[:, 1], result.centres[:, 0])
    assert torch.equal(second, network.head.hint(first, first, torch.full((2,), DISTANCE)))
    assert (second.argmax(1) != first.argmax(1)).any()


# -------------------------------------------------------------------- gradients between slices


def reached(network: ClusteringPropagationNet, images: Tensor, clip: Clip) -> list[bool]:
    """Return into which slices the gradient of the last one's logits goes."""
    images = images.clone().requires_grad_()
    last = network(images, clip).logits[:, -1]
    (gradient,) = torch.autograd.grad((last * torch.randn_like(last)).sum(), images)
    assert gradient.isfinite().all()
    return gradient.transpose(0, 1).flatten(1).any(1).tolist()


def test_gradients_go_back_through_the_memory_to_the_first_slice(
    kind: dict[str, Any], make_network: Callable[..., ClusteringPropagationNet], images: Tensor
) -> None:
    network = make_network(**kind).train()
    assert reached(network, images, automatic(network)) == [True] * SLICES
    # From the third slice on, the first two are seen after the last one.
    assert reached(network, images, automatic(network, start=2)) == [False, False, True, True]


def test_gradients_do_not_go_back_without_the_memory(
    kind: dict[str, Any], make_network: Callable[..., ClusteringPropagationNet], images: Tensor
) -> None:
    network = make_network(**kind).train()
    cut = automatic(network, seen=False)
    assert reached(network, images, cut) == [False, False, False, True]
    before = network(images, cut).logits
    # The logits of the slice before are an input all the same, only without a gradient.
    changed = torch.cat((images[:, :-2], 2 * images[:, -2:-1], images[:, -1:]), 1)
    assert not torch.equal(network(changed, cut).logits[:, -1], before[:, -1])


def test_one_step_opens_the_way_back(
    kind: dict[str, Any], make_network: Callable[..., ClusteringPropagationNet], images: Tensor
) -> None:
    network = without(make_network(**kind), "gates", "hint.change").train()
    if kind["memory"] != "last":
        without(network, "memory.offset.linear")
    clip = automatic(network)
    assert reached(network, images, clip) == [False, False, False, True]
    network(images, clip).logits.square().mean().backward()
    torch.optim.AdamW(network.parameters(), 1e-2).step()
    assert reached(network, images, clip) == [True] * SLICES
