"""What a click says of every output (spec 5.5)."""

import pytest

from nnmosaic.trainers.clustering_propagation.prompt_classes import (
    PromptClasses,
    label_classes,
    region_classes,
)

WHOLE, CORE, ENHANCING = 0, 1, 2
REGIONS = [(1, 2, 3), (2, 3), 3]


def test_a_label_has_its_channel_and_not_here_is_background() -> None:
    labels = [0, 2, 5]
    assert label_classes(5, positive=True, all_labels=labels) == PromptClasses((2,))
    assert label_classes(0, positive=True, all_labels=labels) == PromptClasses((0,))
    assert label_classes(5, positive=False, all_labels=labels) == PromptClasses((0,))
    with pytest.raises(ValueError, match=r"must be an integer where labels are exclusive"):
        label_classes((1, 2), positive=True, all_labels=labels)


@pytest.mark.parametrize(
    ("label", "positive", "expected"),
    [
        (1, True, ((WHOLE,), (CORE, ENHANCING))),
        (2, True, ((WHOLE, CORE), (ENHANCING,))),
        (3, True, ((WHOLE, CORE, ENHANCING), ())),
        (0, True, ((), (WHOLE, CORE, ENHANCING))),
        (2, False, ((), (WHOLE, CORE, ENHANCING))),
        ((1, 2, 3), True, ((WHOLE,), ())),
        ((2, 3), True, ((WHOLE, CORE), ())),
        ((2, 3), False, ((), (CORE, ENHANCING))),
        ((1, 2, 3), False, ((), (WHOLE, CORE, ENHANCING))),
        ((3,), True, ((WHOLE, CORE, ENHANCING), ())),
        ((3,), False, ((), (ENHANCING,))),
    ],
)
def test_a_click_decides_what_it_implies(label: int, positive: bool, expected: tuple) -> None:
    found = region_classes(label, positive=positive, regions=REGIONS)
    assert found == PromptClasses(*expected)
