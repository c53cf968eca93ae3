"""What figures are drawn from survives JSON, is finite, and names what is wrong with it."""

import json
import math
from dataclasses import replace

import jaxtyping
import pytest

from evals.scores.curve import Curve
from evals.scores.pictures import Example, Matrix, Pictures, Point, Scatter

CLAIM = Point(label="the circuit", kind="claim", effect=0.68, collateral=0.235, detail={"site": 3})
RIVAL = Point(label="all nodes", kind="rival", effect=0.68, collateral=0.262)
SCATTER = Scatter(
    name="quotes: carried", effect_label="share", collateral_label="nats", points=(CLAIM, RIVAL)
)
MATRIX = Matrix(
    name="harm", unit="fraction", rows=("quotes",), columns=("quotes", "while"),
    values=((0.75, None),),
)  # fmt: skip
EXAMPLE = Example(
    task="quotes", prompt='print("a', answer='"', other="'", dense=0.99, twin=0.9, circuit=0.8
)
CURVE = Curve(
    name="quotes: steering", x_label="strength", y_label="P", x=(0.0, 1.0), value=(0.1, 0.9),
    controls={"random": ((0.1, 0.2),)},
)  # fmt: skip
PICTURES = Pictures(scatters=(SCATTER,), curves=(CURVE,), matrices=(MATRIX,), examples=(EXAMPLE,))


@pytest.mark.parametrize("picture", [CLAIM, SCATTER, MATRIX, EXAMPLE, PICTURES])
def test_a_picture_survives_json_and_no_other_key_does(picture):
    values = json.loads(json.dumps(picture.to_dict(), allow_nan=False))
    assert type(picture).from_dict(values) == picture
    with pytest.raises(ValueError, match="unknown keys .'surprise'"):
        type(picture).from_dict(values | {"surprise": 1})
    first = next(iter(values))
    with pytest.raises(ValueError, match=f"{first}.* missing"):
        type(picture).from_dict({k: v for k, v in values.items() if k != first})


@pytest.mark.parametrize(
    ("picture", "change", "says"),
    [
        (CLAIM, {"effect": math.nan}, "'the circuit' holds NaN"),
        (CLAIM, {"collateral": math.inf}, "holds NaN or infinity"),
        (CLAIM, {"kind": "friend"}, "kind is 'friend'"),
        (CLAIM, {"detail": {"x": math.nan}}, "JSON"),
        (SCATTER, {"points": (RIVAL,)}, "0 points of the kind 'claim'"),
        (SCATTER, {"points": (CLAIM, CLAIM)}, "2 points of the kind 'claim'"),
        (MATRIX, {"values": ((0.7,),)}, "1 rows and 2 columns"),
        (MATRIX, {"values": ((0.7, math.nan),)}, "holds NaN"),
        (MATRIX, {"unit": "inches"}, "unit is 'inches'"),
        (EXAMPLE, {"twin": 1.5}, "P in the twin is 1.5"),
        (EXAMPLE, {"circuit": math.nan}, "P in the circuit is nan"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(picture, change, says, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the errors of a user
    with pytest.raises(ValueError, match=says):
        replace(picture, **change)


def test_pictures_are_counted():
    assert len(PICTURES) == 4 and len(Pictures()) == 0
