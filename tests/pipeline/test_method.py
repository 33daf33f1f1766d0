"""`sssd fit --method`: the paper's method or anchored self distillation, by the weight of the anchor."""

import pytest

from sssd_zoo.configs import AnchoredConfig, FitArgs
from sssd_zoo.errors import UserError
from sssd_zoo.pipeline.fit import with_anchor


def weight(method, anchor=None, features=None):
    """The anchor's weight of a run with these arguments."""
    distill = AnchoredConfig(anchor=anchor)
    return with_anchor(FitArgs(data="d", out="o", method=method, features=features, distill=distill)).anchor


@pytest.mark.parametrize(
    ("method", "anchor", "features", "expected"),
    [
        (None, None, None, 0),
        (None, None, "resnet18", 4),
        (None, 2.5, None, 2.5),
        ("sssd", None, None, 0),
        ("sssd", None, "resnet18", 0),
        ("sssd", 0, "resnet18", 0),
        ("anchored", None, None, 1),
        ("anchored", None, "resnet18", 4),
        ("anchored", 3, None, 3),
    ],
)
def test_weight_of_the_anchor(method, anchor, features, expected):
    assert weight(method, anchor, features) == expected


@pytest.mark.parametrize(("method", "anchor"), [("sssd", 1), ("anchored", 0)])
def test_contradictions(method, anchor):
    with pytest.raises(UserError, match=f"--method {method} and --distill.anchor {anchor} contradict"):
        weight(method, anchor)
