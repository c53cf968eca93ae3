import jaxtyping
import pytest

from bridges.training.config import CotrainConfig, LossWeights
from sparse.training.config import TrainConfig


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(warmup=1.0), r"warmup=1.0 must be in \[0, 1\)"),
        (dict(lr=0.0), "lr=0.0 must be above 0"),
        (dict(bridge_lr=-1.0), "bridge_lr"),
        (dict(calibration_tokens=-1), "calibration_tokens=-1 must not be below 0"),
        (dict(sites_per_sequence=0), "sites_per_sequence=0 must be above 0"),
        (dict(hybrid_tokens=0.0), r"hybrid_tokens=0.0 must be in \(0, 1\]"),
        (dict(hybrid_tokens=1.5), "hybrid_tokens=1.5"),
        (dict(weights=LossWeights(nmse=0.0, hybrid=0.0)), "weights=.* leave the bridges untrained"),
        (
            dict(weights=LossWeights(ce=0.0, kl=0.0, hybrid=0.0)),
            "weights=.* leave the twin untrained",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, fields, words):
    with pytest.raises(ValueError, match=f"CotrainConfig.{words}"):
        CotrainConfig(train=TrainConfig(steps=1, folder=str(tmp_path)), **fields)


def test_a_name_that_is_none_of_the_choices_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks
    train = TrainConfig(steps=1, folder=str(tmp_path))
    with pytest.raises(ValueError, match="nmse='FVU' must be one of .'fvu', 'per_token', 'unc"):
        CotrainConfig(train=train, nmse="FVU")
    with pytest.raises(ValueError, match="hybrid_sites='one' must be one of .'sampled', 'all'"):
        CotrainConfig(train=train, hybrid_sites="one")


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="LossWeights.kl=-1.0 must not be below 0"):
        LossWeights(kl=-1.0)
