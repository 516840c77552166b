"""The network with a latent opinion (spec 7.8, invariants 1, 2, 9 and 10)."""

import copy
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from torch import Tensor, nn

from nnmosaic.trainers.multi_rater.combiner import Combiner
from nnmosaic.trainers.multi_rater.loss import bound_loss, posterior_input
from nnmosaic.trainers.multi_rater.network import (
    Diversified,
    MultiRaterNet,
    codes_of_raters,
)
from nnmosaic.trainers.multi_rater.new_rater import with_head

CLASSES, RATERS, LATENT = 3, 4, 6
SIZES = {2: (16, 24), 3: (8, 16, 16)}


def unet(cls: type, dimensions: int) -> nn.Module:
    conv, norm = {
        2: (nn.Conv2d, nn.InstanceNorm2d),
        3: (nn.Conv3d, nn.InstanceNorm3d),
    }[dimensions]
    first = (1,) * dimensions
    flat = (1, *(2,) * (dimensions - 1)) if dimensions == 3 else (2, 2)
    blocks = "n_blocks_per_stage" if cls is ResidualEncoderUNet else "n_conv_per_stage"
    return cls(
        2, 3, (4, 8, 8), conv, 3, [first, flat, (2,) * dimensions], num_classes=CLASSES,
        n_conv_per_stage_decoder=1, deep_supervision=True, norm_op=norm,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, **{blocks: 1},
    )  # fmt: skip


@pytest.fixture(params=[(PlainConvUNet, 2), (PlainConvUNet, 3), (ResidualEncoderUNet, 3)])
def base(request: pytest.FixtureRequest) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    cls, dimensions = request.param
    return unet(cls, dimensions), dimensions


@pytest.fixture
def network(base: tuple[nn.Module, int]) -> MultiRaterNet:
    return MultiRaterNet(base[0], channels=2, classes=CLASSES, raters=RATERS, latent=LATENT).eval()


@pytest.fixture
def image(base: tuple[nn.Module, int]) -> Tensor:
    return torch.randn(2, 2, *SIZES[base[1]])


def test_heads_learn_and_statistics_of_batch_normalisation_stay() -> None:
    torch.manual_seed(0)
    net = PlainConvUNet(
        2, 3, (4, 8, 8), nn.Conv2d, 3, [1, 2, 2], num_classes=CLASSES, n_conv_per_stage=1,
        n_conv_per_stage_decoder=1, norm_op=nn.BatchNorm2d, nonlin=nn.LeakyReLU,
    )  # fmt: skip
    network = MultiRaterNet(net, channels=2, classes=CLASSES, raters=RATERS, latent=LATENT)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith("heads."))
    before = copy.deepcopy(network.train().state_dict())
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
    network(torch.randn(2, 2, 16, 24), of_raters=True).square().mean().backward()
    optimizer.step()
    after = network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("running_mean" in name for name in before)
    assert changed
    assert all(name.startswith("heads.") for name in changed)


def test_it_answers_as_nnunets_networks_do(network: MultiRaterNet, image: Tensor) -> None:
    for mode in (network.train(), network.eval()):
        levels = mode(image)
        assert [level.shape[:2] for level in levels] == [(2, CLASSES)] * 2
        assert levels[0].shape[2:] == image.shape[2:]
    network.decoder.deep_supervision = False
    with torch.no_grad():
        assert torch.equal(network(image), levels[0])


def test_weights_of_nnunet_transfer(
    base: tuple[nn.Module, int], network: MultiRaterNet, tmp_path: Path
) -> None:
    stock = unet(type(base[0]), base[1])
    torch.save({"network_weights": stock.state_dict()}, tmp_path / "plain.pth")
    parts = nn.ModuleDict({"encoder": network.encoder, "decoder": network.decoder})
    load_pretrained_weights(parts, str(tmp_path / "plain.pth"))
    own = network.state_dict()
    for key, value in stock.state_dict().items():
        assert ".seg_layers." in key or torch.equal(own[key], value)
    network.take_output_layers(stock.state_dict())
    for layer, taken in zip(stock.decoder.seg_layers, network.decoder.seg_layers, strict=True):
        assert torch.equal(taken.plain.weight, layer.weight)
        assert torch.equal(taken.plain.bias, layer.bias)
    again = MultiRaterNet(
        unet(type(base[0]), base[1]), channels=2, classes=CLASSES, raters=1, latent=LATENT
    )
    again.take_output_layers(network.state_dict())
    assert torch.equal(again.decoder.seg_layers[0].plain.weight, stock.decoder.seg_layers[0].weight)


def test_the_features_are_those_of_the_stock_decoder(
    base: tuple[nn.Module, int], network: MultiRaterNet, image: Tensor
) -> None:
    seen: list[Tensor] = []
    for layer in network.decoder.seg_layers:
        layer.forward = lambda x: seen.append(x) or x  # type: ignore[func-returns-value]
    with torch.no_grad():
        network.decoder(network.encoder(image))
        features = network.features(image)
    for one, other in zip(features, seen[::-1], strict=True):
        assert torch.equal(one, other)


def test_one_code_one_answer(network: MultiRaterNet, image: Tensor) -> None:
    code, other = torch.randn(2, 2, LATENT)
    with torch.no_grad():
        features, mean = network.features(image), network.prior(image).mean
        first, again = (network.logits(features, code, mean)[0] for _ in range(2))
        assert (first - network.logits(features, other, mean)[0]).abs().max() > 1e-3
    assert torch.equal(first, again)
    for layer in network.decoder.seg_layers:
        nn.init.zeros_(layer.of_code.weight)
    with torch.no_grad():
        deaf = network.logits(features, code, mean)[0]
        assert torch.equal(deaf, network.logits(features, other, mean)[0])


def test_the_mean_opinion_is_the_plain_network(
    base: tuple[nn.Module, int], network: MultiRaterNet, image: Tensor
) -> None:
    stock = unet(type(base[0]), base[1])
    network.encoder.load_state_dict(stock.encoder.state_dict())
    network.decoder.load_state_dict(stock.decoder.state_dict(), strict=False)
    network.take_output_layers(stock.state_dict())
    with torch.no_grad():
        expected = stock.eval()(image)
        mean = network.prior(image).mean
        at_mean = network.logits(network.features(image), mean, mean)
        for one, answer, other in zip(expected, network(image), at_mean, strict=True):
            assert torch.equal(answer, one)
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_a_case_is_finished_code_by_code(
    network: MultiRaterNet, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnmosaic.trainers.multi_rater.combiner.VOXELS_AT_ONCE", 100)
    code, mean = torch.randn(2, LATENT)
    layer = network.decoder.seg_layers[-1]
    with torch.no_grad():
        network.shared_only = True
        shared = network(image)
        network.shared_only = False
        both = (one.expand(2, -1) for one in (code, mean))
        expected = network.logits(network.features(image), *both)[0]
        for one, logits in zip(shared, expected, strict=True):
            plain, inside = one.tensor_split([CLASSES])
            before, centre = plain.clone(), torch.empty_like(plain)
            layer.add_f_of_case(plain, inside, mean, factor=-1, out=centre)
            assert torch.equal(plain, before)
            found = layer.add_f_of_case(centre, inside, code, factor=1, out=centre)
            torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conv_op", [nn.Conv2d, nn.Conv3d])
def test_the_split_layer_is_the_concatenation(conv_op: type[nn.Module]) -> None:
    size = SIZES[2 if conv_op is nn.Conv2d else 3]
    combiner = Combiner(conv_op(5, CLASSES, 1), LATENT, 16)
    features, codes, mean = torch.randn(2, 5, *size), torch.randn(3, 2, LATENT), torch.zeros(2, 6)
    tiled = codes.view(*codes.shape, *[1] * len(size)).expand(*codes.shape, *size)
    joined = conv_op(5 + LATENT, 16, 1)
    ones = [1] * len(size)
    with torch.no_grad():
        weight = torch.cat(
            [combiner.of_features.weight, combiner.of_code.weight.view(16, LATENT, *ones)], 1
        )
        joined.weight.copy_(weight)
        joined.bias.copy_(combiner.of_features.bias)
        at_mean, *others = (
            combiner.rest(joined(torch.cat([features, one], 1))) for one in (0 * tiled[0], *tiled)
        )
        expected = combiner.plain(features) + torch.stack(others) - at_mean
        for some in ((), (1,)):
            found = combiner(features, codes[some], mean)
            torch.testing.assert_close(found, expected[some], rtol=1e-5, atol=1e-5)


def test_a_posterior_does_not_look_at_an_added_rater(network: MultiRaterNet, image: Tensor) -> None:
    labels = torch.randint(0, CLASSES, (2, RATERS + 1, *image.shape[2:]))
    available = torch.ones(2, RATERS + 1, dtype=torch.bool)
    weights = with_head(network.state_dict(), network.heads[1], raters=RATERS, classes=CLASSES)
    wider = copy.deepcopy(network.posterior)
    layer = wider.features[0]
    layer.weight = nn.Parameter(weights["posterior.features.0.weight"])
    with torch.no_grad():
        with_new = wider(posterior_input(image, labels, available, CLASSES))
        seen = posterior_input(image, labels[:, :RATERS], available[:, :RATERS], CLASSES)
        torch.testing.assert_close(with_new.mean, network.posterior(seen).mean)


def test_first_stage(network: MultiRaterNet, image: Tensor) -> None:
    labels = torch.randint(0, CLASSES, (2, RATERS, *image.shape[2:]))
    available = torch.tensor([[True, True, False, True], [True, False, False, False]])
    seen = posterior_input(image, labels, available, CLASSES)
    noise = torch.randn(6, 2, LATENT)
    found = network(image, annotated=seen, noise=noise)
    assert isinstance(found, Diversified)
    assert found.samples.shape == (5, 2, CLASSES, *image.shape[2:])
    assert found.logits[0].shape == (2, CLASSES, *image.shape[2:])
    codes = found.prior.mean + found.prior.log_sigma.exp() * noise[3]
    with torch.no_grad():
        answers = network.logits(network.features(image), codes, found.prior.mean)[0]
    torch.testing.assert_close(answers, found.samples[2], rtol=1e-5, atol=1e-5)
    sum(level.sum() for level in [*found.logits, found.samples]).backward()
    grads = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None}
    assert grads == {"encoder", "decoder", "prior", "posterior"}


def test_second_stage_trains_its_heads_only_where_asked(
    network: MultiRaterNet, image: Tensor
) -> None:
    network.requires_grad_(False)
    network.heads.requires_grad_(True)
    before = deepcopy(network.state_dict())
    logits = network(image, of_raters=True)
    assert logits.shape == (RATERS, 2, CLASSES, *image.shape[2:])
    optimizer = torch.optim.SGD(network.heads.parameters(), 1.0)
    logits[1].square().sum().backward()
    for r, head in enumerate(network.heads):
        moved = any(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())
        assert moved == (r == 1)
    optimizer.step()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) or name.startswith("heads.1.")


def attend(queries: Tensor, bank: Tensor) -> Tensor:
    """Return the codes of a bank (N, B, latent), weighted as the released code does (3.1, 4)."""
    weights = torch.einsum("rbd,nbd->rnb", queries, bank).softmax(1)
    return torch.einsum("rnb,nbd->rbd", weights, bank)


def test_the_code_of_a_rater_is_the_limit_of_a_large_bank() -> None:
    torch.manual_seed(1)
    queries, mean = 0.4 * torch.randn(RATERS, 2, LATENT), torch.randn(2, LATENT)
    sigma = torch.rand(2, LATENT) + 0.5
    own = codes_of_raters(queries, mean, sigma)
    assert own.shape == queries.shape
    banks = [mean + sigma * torch.randn(number, 2, LATENT) for number in (500, 50000)]
    far, near = ((attend(queries, bank) - own).abs().max() for bank in banks)
    assert near < 0.06
    assert near < far
    torch.testing.assert_close(codes_of_raters(0 * queries, mean, sigma)[0], mean)
    torch.testing.assert_close(codes_of_raters(queries, mean, 0 * sigma)[1], mean)


def test_queries_may_move_the_opinion_either_way(network: MultiRaterNet, image: Tensor) -> None:
    with torch.no_grad():
        queries = network.queries(network.features(image)[0])
    assert queries.shape == (RATERS, 2, LATENT)
    assert (queries > 0).any()
    assert (queries < 0).any()


def test_one_rater(base: tuple[nn.Module, int], image: Tensor) -> None:
    network = MultiRaterNet(base[0], channels=2, classes=CLASSES, raters=1, latent=LATENT).eval()
    labels, available = torch.ones(2, 1, *image.shape[2:]).long(), torch.ones(2, 1).bool()
    noise = torch.randn(5, 2, LATENT)
    with torch.no_grad():
        found = network(
            image, annotated=posterior_input(image, labels, available, CLASSES), noise=noise
        )
        own = network(image, of_raters=True)
    assert bound_loss(found.samples.softmax(2), labels, available) == 0
    assert len(network.heads) == len(own) == 1
