"""The network with travelling centres (spec 1, invariants 1 - 7, 9, 13, 15 and 17)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from torch import Tensor, nn

from nnmosaic.trainers.clustering_propagation.clip import Clip, visiting_order
from nnmosaic.trainers.clustering_propagation.features import choose_levels, pool, widths
from nnmosaic.trainers.clustering_propagation.memory import MEMORIES
from nnmosaic.trainers.clustering_propagation.network import ClusteringPropagationNet, SliceBefore

CLASSES, HEIGHT, WIDTH = 3, 24, 16
SHAPE = (HEIGHT, WIDTH)


def unet(cls: type = PlainConvUNet, features: tuple[int, ...] = (4, 8, 8, 16)) -> nn.Module:
    blocks = "n_blocks_per_stage" if cls is ResidualEncoderUNet else "n_conv_per_stage"
    strides = [(1, 1), (2, 2), (2, 1), (2, 2)][: len(features)]
    return cls(
        2, len(features), features, nn.Conv2d, 3, strides, num_classes=CLASSES,
        n_conv_per_stage_decoder=1, deep_supervision=False, norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, **{blocks: 1},
    )  # fmt: skip


def make(
    *, cls: type = PlainConvUNet, regions: bool = False, memory: str = "gru", trained: bool = True
) -> ClusteringPropagationNet:
    """Return a network; ``trained``: in which nothing that begins at zero is zero any more."""
    torch.manual_seed(0)
    network = ClusteringPropagationNet(unet(cls), classes=CLASSES, regions=regions, memory=memory)
    for parameter in network.head.parameters() if trained else ():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.3)
    return network.eval()


@pytest.fixture(params=["gru", "last", "window"])
def memory(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["labels", "regions"])
def regions(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 4, 2, *SHAPE, generator=torch.Generator().manual_seed(1))


def weights_at(*places: tuple[int, int, int, int], slots: int = CLASSES) -> Tensor:
    """Return weights of 2 slices, 1 at places (slice, slot, row, column), added up."""
    weights = torch.zeros(2, slots, *SHAPE)
    for place in places:
        weights[place] += 1
    return weights


def automatic(images: Tensor, slots: int, start: int = 0) -> Clip:
    batch, slices = images.shape[:2]
    positions = 2.5 * torch.arange(slices).expand(batch, -1)
    prompts = torch.zeros(batch, slices, slots, *SHAPE)
    return Clip(positions, torch.full((batch,), start), prompts)


def sweep(network: ClusteringPropagationNet, slices: Tensor) -> Tensor:
    """Propagate through (B, T, C, H, W) by the public steps, one slice after another."""
    state = network.initial_state(len(slices))
    distance = torch.full((len(slices),), 2.5)
    logits: list[Tensor] = []
    for x in slices.unbind(1):
        before = SliceBefore(logits[-1], distance) if logits else None
        result = network.decode(network.encode(x), network.initial_centres(state), before)
        state = network.update_state(state, result, distance)
        logits.append(result.logits)
    return torch.stack(logits, 1)


# -------------------------------------------------------------------- shapes, levels, weights


@pytest.mark.parametrize("cls", [PlainConvUNet, ResidualEncoderUNet])
@torch.no_grad()
def test_it_answers_as_nnunets_networks_do(cls: type, regions: bool, images: Tensor) -> None:
    network = make(cls=cls, regions=regions)
    for mode in (network.train(), network.eval()):
        assert mode(images[0]).shape == (4, CLASSES, *SHAPE)
    result = network(images)
    assert result.logits.shape == result.plain_logits.shape == (2, 4, CLASSES, *SHAPE)
    assert result.presence.shape == (2, 4, CLASSES)
    centres = 2 * CLASSES if regions else CLASSES + 3
    assert result.centres.shape == (2, 4, centres, network.head.queries.shape[1])
    assert [level.shape[3:] for level in result.layer_logits] == [(6, 8)] * 2 + [(12, 8)] * 2


@pytest.mark.parametrize(
    ("strides", "levels"),
    [
        ([(1, 1), *[(2, 2)] * 7], [2, 3, 4]),  # decoder: 64 32 16 8 4 2 1
        ([(1, 1), *[(2, 2)] * 3], [0, 1]),  # 4 2 1
        ([(1, 1), (2, 2), (2, 1), (2, 2)], [0, 1]),
        ([(1, 1), (2, 2), (2, 2)], [0]),
        ([(1, 1), (2, 2)], [0]),  # only the full resolution
        ([(1, 1), (2, 1), (2, 2), (2, 2), (2, 2), (2, 2)], [0, 1, 2]),  # 11.3 5.7 2.8 1.4 1
    ],
)
def test_levels_are_those_nearest_to_strides_16_8_4(strides: Any, levels: list[int]) -> None:
    assert choose_levels(strides) == levels


def test_widths_grow_with_the_unet() -> None:
    assert widths(32) == widths(64) == (256, 64)
    assert widths(8) == (64, 16)
    assert widths(1) == (32, 16)


def test_weights_of_a_plain_nnunet_are_a_warm_start(tmp_path: Path) -> None:
    plain, network = unet(), make(trained=False)
    torch.save({"network_weights": plain.state_dict()}, tmp_path / "plain.pth")
    queries = network.head.queries.clone()
    load_pretrained_weights(network, str(tmp_path / "plain.pth"))
    for name, value in plain.state_dict().items():
        if ".seg_layers." not in name:
            assert torch.equal(network.state_dict()[name], value)
    assert torch.equal(network.head.queries, queries)


@torch.no_grad()
def test_the_output_layer_of_a_plain_nnunet_is_taken_over(images: Tensor) -> None:
    plain, network = unet(), make(trained=False)
    network.load_state_dict(plain.state_dict(), strict=False)
    network.take_output_layer(plain.state_dict())
    torch.testing.assert_close(network.encode(images[0]).plain, plain(images[0]))
    other = make().state_dict()
    network.take_output_layer(other)
    mine = network.head.features.plain.weight
    assert torch.equal(mine, other["decoder.seg_layers.features.plain.weight"])


# -------------------------------------------------------------------- prompts (invariants 1, 2)


@torch.no_grad()
def test_order_and_equal_repetition_of_interactions_do_not_matter(
    regions: bool, images: Tensor
) -> None:
    network = make(regions=regions)
    slots = len(network.layout.slots)
    features = network.encode(images[:, 0])
    places = [(0, 1, 3, 4), (0, 1, 9, 2), (0, 2, 5, 5), (1, 0, 7, 7)]

    def centres(*chosen: tuple[int, int, int, int]) -> Tensor:
        prompts = network.pool_prompts(features, weights_at(*chosen, slots=slots))
        return network.initial_centres(network.initial_state(2), prompts)

    expected = centres(*places)
    torch.testing.assert_close(centres(*places[::-1]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(centres(*places, *places), expected, atol=1e-5, rtol=0)
    changed = (centres(places[0]) != network.initial_centres(network.initial_state(2))).any(2)
    assert changed.nonzero().tolist() == [[0, network.layout.slots[1]]]


@torch.no_grad()
def test_no_prompts_are_the_automatic_path_bit_for_bit(memory: str, images: Tensor) -> None:
    network = make(memory=memory)
    features = network.encode(images[:, 0])
    state = network.initial_state(2)
    for _ in range(2):
        plain = network.initial_centres(state)
        empty = network.pool_prompts(features, weights_at())
        assert torch.equal(network.initial_centres(state, empty), plain)
        assert torch.equal(network.initial_centres(state, None, base=plain), plain)
        state = network.update_state(state, network.decode(features, plain), torch.zeros(2))


@torch.no_grad()
def test_prompts_are_means_of_interpolated_features() -> None:
    generator = torch.Generator().manual_seed(3)
    levels = [torch.randn(2, *size, 8, generator=generator) for size in ((3, 2), (12, 8))]
    weights = torch.rand(2, CLASSES, *SHAPE, generator=generator)
    weights[0, 1] = 0
    full = [
        nn.functional.interpolate(level.movedim(3, 1), SHAPE, mode="bilinear") for level in levels
    ]
    found = pool(levels, weights)
    for b, k in ((0, 0), (0, 2), (1, 1)):
        at_pixels = (full[0][b] + full[1][b]) / 2
        expected = (at_pixels * weights[b, k]).sum((1, 2)) / weights[b, k].sum()
        torch.testing.assert_close(found[b, k], expected, atol=1e-5, rtol=1e-4)
    assert not found[0, 1].any()


# -------------------------------------------------------------------- slices (invariants 3 - 6)


@torch.no_grad()
def test_a_slice_alone_a_clip_of_one_and_a_fresh_state_agree(
    memory: str, regions: bool, images: Tensor
) -> None:
    network = make(memory=memory, regions=regions)
    x = images[:, 0]
    memoryless = network(x)
    decoded = network.decode(network.encode(x), network.initial_centres(network.initial_state(2)))
    assert torch.equal(decoded.logits, memoryless)
    torch.testing.assert_close(network(images[:, :1]).logits[:, 0], memoryless)


@torch.no_grad()
def test_features_of_a_slice_do_not_depend_on_others(images: Tensor) -> None:
    network = make()
    together = network.encode(images[0])
    for t in range(4):
        alone = network.encode(images[0, t : t + 1])
        chosen = together.select(slice(t, t + 1))
        for one, other in zip(alone[:3], chosen[:3], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
        torch.testing.assert_close(alone.mask_map, chosen.mask_map, atol=1e-4, rtol=0)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(
        network(images[0, order]), network(images[0])[order], atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_untrained_centres_stay_and_equal_slices_get_equal_masks(
    memory: str, images: Tensor
) -> None:
    network = make(memory=memory, trained=False)
    same = images[:, :1].expand(-1, 3, -1, -1, -1)
    result = network(same)
    queries = network.head.queries.expand(2, 3, -1, -1)
    assert torch.equal(result.centres, queries)
    assert torch.equal(result.logits[:, 0], result.logits[:, 2])


@torch.no_grad()
def test_a_clip_is_a_sweep_from_its_start_to_both_ends(memory: str, images: Tensor) -> None:
    network = make(memory=memory)
    torch.testing.assert_close(
        network(images, automatic(images, CLASSES)).logits, sweep(network, images)
    )
    found = network(images, automatic(images, CLASSES, start=2)).logits
    upwards, downwards = images[:, 2:], images[:, :3].flip(1)
    torch.testing.assert_close(found[:, 2:], sweep(network, upwards))
    torch.testing.assert_close(found[:, :3], sweep(network, downwards).flip(1))


def test_slices_are_visited_up_and_then_down() -> None:
    expected = [[0, 1, 2, 3], [2, 3, 1, 0], [3, 2, 1, 0]]
    assert visiting_order(torch.tensor([0, 2, 3]), 4).tolist() == expected


@torch.no_grad()
def test_a_flipped_volume_gets_the_flipped_result(images: Tensor) -> None:
    network = make()

    def both(slices: Tensor) -> Tensor:
        return (sweep(network, slices) + sweep(network, slices.flip(1)).flip(1)) / 2

    torch.testing.assert_close(both(images.flip(1)), both(images).flip(1), atol=1e-4, rtol=0)


# -------------------------------------------------------------------- memory (invariant 9)


@torch.no_grad()
def test_the_memory_of_an_absent_class_is_unchanged(memory: str, images: Tensor) -> None:
    network = make(memory=memory)
    results = [
        network.decode(network.encode(x), network.initial_centres(network.initial_state(2)))
        for x in images.unbind(1)
    ]
    state = network.initial_state(2)
    everything = torch.ones(2, CLASSES, dtype=torch.bool)
    step = torch.full((2,), 3.0)
    seen = network.update_state(state, results[0], step, everything)
    without = everything.clone()
    without[0, 1] = False
    later = network.update_state(seen, results[1], step, without)
    later = network.update_state(later, results[2], step, without)
    owner = network.layout.owners.index(1)
    assert torch.equal(later.kept[0, owner], seen.kept[0, owner])
    assert torch.equal(network.initial_centres(later)[0, owner],
                       network.initial_centres(seen)[0, owner])  # fmt: skip
    assert later.distance[0, owner] == 6
    assert not later.distance[1].any()
    assert not torch.equal(later.kept[0, owner + 1], seen.kept[0, owner + 1])


@torch.no_grad()
def test_an_unseen_class_keeps_its_query(memory: str, images: Tensor) -> None:
    network = make(memory=memory)
    features = network.encode(images[:, 0])
    state = network.initial_state(2)
    result = network.decode(features, network.initial_centres(state))
    gate = torch.tensor([[True, False, True]] * 2)
    centres = network.initial_centres(network.update_state(state, result, torch.zeros(2), gate))
    owner = network.layout.owners.index(1)
    assert torch.equal(centres[:, owner], network.head.queries[owner].expand(2, -1))
    assert not torch.equal(centres[:, 0], network.head.queries[0].expand(2, -1))


@torch.no_grad()
def test_the_state_of_a_volume_does_not_grow(memory: str, images: Tensor) -> None:
    network = make(memory=memory)
    state = network.initial_state(2)
    sizes = [value.shape for value in state]
    assert sizes[0][2] == MEMORIES[memory].length
    features = network.encode(images[:, 0])
    for _ in range(7):
        result = network.decode(features, network.initial_centres(state))
        state = network.update_state(state, result, torch.ones(2))
    assert [value.shape for value in state] == sizes
    assert state.written.max() <= MEMORIES[memory].length


@torch.no_grad()
def test_classes_are_found_by_pixels_and_presence(regions: bool, images: Tensor) -> None:
    network = make(regions=regions)
    result = network.decode(
        network.encode(images[:, 0]), network.initial_centres(network.initial_state(2))
    )
    logits = torch.full((2, CLASSES, *SHAPE), -1.0)
    logits[:, 0], logits[1, 2, 3, 3] = (-1.0 if regions else 0.0), 5.0
    for presence, expected in ((2.0, [[1, 2]]), (-2.0, [])):
        given = result._replace(logits=logits, presence=torch.full((2, CLASSES), presence))
        found = network.found_classes(given).nonzero().tolist()
        background = [[0, 0], [1, 0]] if presence > 0 and not regions else []
        assert sorted(found) == sorted(expected + background)


# -------------------------------------------------------------------- training (invariant 17)


@pytest.mark.parametrize("regions", [False, True])
def test_all_parameters_learn_after_one_step(memory: str, regions: bool, images: Tensor) -> None:
    network = make(memory=memory, regions=regions, trained=False).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    slots = len(network.layout.slots)
    clip = automatic(images, slots)
    clip.prompts[0, 0, 1, 4, 4] = 1  # the other clip is automatic
    seen = torch.ones(2, 4, CLASSES, dtype=torch.bool)
    target = torch.randn(2, 4, CLASSES, *SHAPE)
    for _ in range(2):
        optimizer.zero_grad()
        result = network(images, clip._replace(gate=seen))
        layers = sum((level**2).mean() for level in result.layer_logits)
        loss = ((result.logits - target) ** 2).mean() + layers
        (loss + result.presence.mean() + result.plain_logits.mean()).backward()
        optimizer.step()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # A softmax over one key, or a bias added to all keys alike, changes nothing.
    assert [n for n in silent if "key.bias" not in n and "in_proj_bias" not in n] == []


def test_all_parameters_take_part_in_every_step(memory: str, images: Tensor) -> None:
    # As DDP demands: here no class is found and nobody clicks.
    network = make(memory=memory).train()
    clip = automatic(images[:, :2], CLASSES)
    result = network(images[:, :2], clip._replace(gate=torch.zeros(2, 2, CLASSES).bool()))
    parts = (result.logits, result.presence, result.plain_logits, *result.layer_logits)
    sum(part.sum() for part in parts).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []


def test_earlier_rounds_carry_no_gradient(images: Tensor) -> None:
    network = make().train()
    clip = automatic(images, CLASSES)
    seen: list[Any] = []

    def correct(result: Any) -> Clip:
        seen.append(result)
        prompts = result.clip.prompts.clone()
        prompts[:, 2, 1, 5, 5] = 1
        base = result.centres[:, 2]
        chosen = torch.tensor([True, False])
        start = torch.where(chosen, 2, result.clip.start)
        return result.clip._replace(prompts=prompts, start=start, base=base, corrected=chosen)

    result = network(images, clip, [correct])
    assert not seen[0].logits.requires_grad
    assert not seen[0].centres.requires_grad
    assert result.logits.requires_grad
    assert result.clip.start.tolist() == [2, 0]
    # The corrected clip begins where the round before ended; the other one anew.
    with torch.no_grad():
        features = network.encode(images[:, 2])
        prompts = network.pool_prompts(features, result.clip.prompts[:, 2])
        state = network.initial_state(2)
        begun = network.initial_centres(state, prompts, base=seen[0].centres[:, 2])
        expected = network.decode(features, begun).logits[0]
    torch.testing.assert_close(result.logits[0, 2], expected)
    first = network.decode(network.encode(images[:, 0]), network.initial_centres(state)).logits[1]
    torch.testing.assert_close(result.logits[1, 0], first)


def test_it_stays_finite_in_half_precision(memory: str, images: Tensor) -> None:
    network = make(memory=memory).train()
    clip = automatic(images, CLASSES)
    clip.prompts[0, 1, 1, 4, 4] = 1

    def correct(result: Any) -> Clip:
        chosen = torch.tensor([True, False])
        return result.clip._replace(base=result.centres[:, 0], corrected=chosen)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = network(1e3 * images, clip, [correct])
        result.logits.mean().backward()
    assert result.logits.isfinite().all()
    assert result.centres.isfinite().all()
    assert result.centres.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
