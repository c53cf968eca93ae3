import json

import pytest

from evals.scores.curve import Curve


def test_a_curve_needs_controls_of_its_own_length_and_survives_json():
    given = {"name": "steer", "x_label": "strength", "y_label": "P"}
    given |= {"x": (0.0, 1.0), "value": (0.1, 0.9)}
    curve = Curve(**given, controls={"random": ((0.1, 0.1), (0.1, 0.2))})
    assert Curve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve
    with pytest.raises(ValueError, match="2 places"):
        Curve(**given, controls={"random": ((0.1,),)})
    with pytest.raises(ValueError, match="control"):
        Curve(**given, controls={})
