"""Hard assignment and cluster means (spec 1.3, invariant 6), and what is read out (1.4)."""

from math import log

import pytest
import torch
from torch import Tensor

from nnmosaic.trainers.clustering_propagation.clustering_layer import ClusteringLayer, cluster_means
from nnmosaic.trainers.clustering_propagation.positional_encoding import sine_encoding
from nnmosaic.trainers.clustering_propagation.readout import CentreLayout


@pytest.fixture
def similarity() -> Tensor:
    return torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(0), requires_grad=True)


def test_a_pixel_belongs_to_one_centre(similarity: Tensor) -> None:
    found = CentreLayout(3, regions=False).assign(similarity)
    assert torch.equal(found.sum(1), torch.ones(2, 50))
    assert torch.equal(found.argmax(1), similarity.argmax(1))
    equal = CentreLayout(3, regions=False).assign(torch.zeros(1, 6, 4))
    assert torch.equal(equal.sum(1), torch.ones(1, 4))
    assert found.sum() == 2 * 50
    assert not found.requires_grad


def test_a_pixel_is_inside_or_outside_of_each_region(similarity: Tensor) -> None:
    found = CentreLayout(3, regions=True).assign(similarity)
    for b in range(2):
        for p in range(50):
            for r in range(3):
                inside = similarity[b, r, p] > similarity[b, 3 + r, p]
                assert found[b, r, p] == inside
                assert found[b, 3 + r, p] == ~inside


def test_means_of_clusters_are_those_of_a_loop(similarity: Tensor) -> None:
    assignment = CentreLayout(3, regions=False).assign(similarity)
    assignment[0, 2] = 0  # an empty cluster
    values = torch.randn(2, 50, 4)
    found = cluster_means(assignment, values)
    for b in range(2):
        for n in range(6):
            members = values[b, assignment[b, n] == 1]
            expected = members.mean(0) if len(members) else torch.zeros(4)
            torch.testing.assert_close(found[b, n], expected)


def test_a_cluster_of_very_many_pixels_stays_finite_in_half_precision() -> None:
    pixels = 70_000  # a sum of ones over so many is infinite in half precision
    layer = ClusteringLayer(CentreLayout(2, regions=False), 32, 16)
    for gate in layer.gates:
        torch.nn.init.ones_(gate)
    centres = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    embeddings = torch.nn.functional.normalize(torch.ones(1, pixels, 16), dim=2)
    few, many = (layer(centres, torch.ones(1, n, 32), embeddings[:, :n])[0] for n in (100, pixels))
    with torch.autocast("cpu", dtype=torch.float16):
        half = layer(centres, torch.ones(1, pixels, 32).half(), embeddings.half())[0]
    torch.testing.assert_close(many, few, rtol=1e-4, atol=1e-4)
    assert half.isfinite().all()
    torch.testing.assert_close(half.float(), few, rtol=2e-2, atol=2e-2)


def test_a_layer_without_gates_leaves_the_centres() -> None:
    layout = CentreLayout(3, regions=False)
    layer = ClusteringLayer(layout, 32, 16)
    centres = torch.randn(2, len(layout.owners), 32)
    pixels = torch.nn.functional.normalize(torch.randn(2, 50, 16), dim=2)
    moved, similarity = layer(centres, torch.randn(2, 50, 32), pixels)
    assert torch.equal(moved, centres)
    assert similarity.shape == (2, 6, 50)
    assert similarity.abs().max() <= 10.001


def test_an_empty_cluster_is_not_moved_by_the_mean() -> None:
    layout = CentreLayout(3, regions=False)
    layer = ClusteringLayer(layout, 32, 16)
    torch.nn.init.ones_(layer.gates[0])
    centres = torch.randn(1, len(layout.owners), 32, generator=torch.Generator().manual_seed(0))
    pixel = torch.nn.functional.normalize(torch.ones(1, 1, 16), dim=2)
    moved, similarity = layer(centres, torch.randn(1, 1, 32), pixel)
    nearest = int(similarity[0, :, 0].argmax())
    changed = (moved != centres).any(2)[0].nonzero().flatten().tolist()
    assert changed == [nearest]


def test_equal_likeness_to_all_centres_says_nothing_of_the_class() -> None:
    equal = torch.full((1, 6, 2, 2), 1.5)
    torch.testing.assert_close(
        CentreLayout(3, regions=False).class_logits(equal), torch.full((1, 3, 2, 2), 1.5)
    )
    assert not CentreLayout(3, regions=True).class_logits(equal).any()


def test_the_background_is_as_likely_as_its_centres_together() -> None:
    likeness = torch.tensor([1.0, 2.0, -1.0, 0.0, 0.5, 0.25]).view(1, 6, 1, 1)
    background = torch.tensor([1.0, 2.0, -1.0, 0.0]).exp().sum().log() - log(4)
    found = CentreLayout(3, regions=False).class_logits(likeness).flatten()
    torch.testing.assert_close(found, torch.stack((background, *likeness.flatten()[4:])))


def test_nested_regions_can_both_hold_a_pixel() -> None:
    likeness = torch.tensor([2.0, 1.0, -3.0, 0.0, 0.0, 0.0]).view(1, 6, 1, 1)
    layout = CentreLayout(3, regions=True)
    assert (layout.class_logits(likeness) > 0).flatten().tolist() == [True, True, False]
    assert (layout.areas(layout.class_logits(likeness)) > 0).tolist() == [[True, True, False]]


@pytest.mark.parametrize("regions", [False, True])
def test_every_class_has_a_centre_and_a_slot(regions: bool) -> None:
    layout = CentreLayout(4, regions)
    assert [layout.owners[n] for n in layout.first] == [0, 1, 2, 3]
    assert [layout.owners[n] for n in layout.slots[:4]] == [0, 1, 2, 3]
    assert len(set(layout.slots)) == len(layout.slots)
    assert len(layout.owners) == (8 if regions else 7)


def test_the_position_is_that_in_the_field_of_view() -> None:
    like = torch.zeros(())
    fine, coarse = (sine_encoding(*size, 16, like=like) for size in ((30, 12), (10, 12)))
    assert fine.shape == (30, 12, 16)
    torch.testing.assert_close(fine[1::3], coarse)  # the middle one of three pixels
    distances = torch.cdist(coarse.flatten(0, 1), coarse.flatten(0, 1))
    distances.fill_diagonal_(1)
    assert distances.min() > 0.1
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sine_encoding(2, 2, 6, like=like)
