"""Names of before answer with the new ones, or say what they are called now."""

import pytest

import bridges
from bridges.transfer.dense_circuit import MOVED, DenseCircuit
from sparse import Circuit, get_task


@pytest.mark.parametrize(
    ("old", "new"), [("Weights", "LossWeights"), ("Probe", "StepTime"), ("probe", "time_steps")]
)
def test_a_face_answers_an_old_name_with_the_new_one(old, new):
    with pytest.warns(DeprecationWarning, match=f"bridges.{old} is now bridges.{new}"):
        assert getattr(bridges, old) is getattr(bridges, new)
    assert old not in bridges.__all__ and new in bridges.__all__


def test_control_a_name_that_never_was_is_refused_with_those_there_are():
    with pytest.raises(AttributeError, match="'Wieghts'; it has .*'LossWeights'"):
        _ = bridges.Wieghts


def test_a_circuit_says_what_became_of_compile_and_of_nothing_else():
    circuit = Circuit(
        task=get_task("single_double_quote"),
        nodes={},
        ablation={},
        ablation_kind="zero",
        model_fingerprint="0",
        d_head=1,
        target_loss=0.15,
    )
    with pytest.raises(
        AttributeError, match=r"'compile'; it is now sparse.extract\(circuit, model"
    ):
        _ = circuit.compile
    with pytest.raises(AttributeError, match="no attribute 'compiel'$"):
        _ = circuit.compiel
    assert not hasattr(circuit, "compile")


def test_an_error_inside_a_property_is_not_hidden(monkeypatch):
    """A class that answers missing names must not answer for a property that failed."""

    def broken(self):
        raise AttributeError("the cause")

    for kind, name in ((Circuit, "n_total"), (DenseCircuit, "tokenizer")):
        monkeypatch.setattr(kind, name, property(broken))
        with pytest.raises(AttributeError, match="the cause"):
            getattr(object.__new__(kind), name)


@pytest.mark.parametrize("old", MOVED)
def test_a_dense_circuit_says_which_value_an_old_method_is_now(old):
    mapped = object.__new__(DenseCircuit)
    with pytest.raises(AttributeError, match="it is now (edits_of|delta)"):
        getattr(mapped, old)
    with pytest.raises(AttributeError, match="no attribute 'ablaet'$"):
        _ = mapped.ablaet
