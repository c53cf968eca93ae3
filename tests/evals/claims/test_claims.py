"""All four claims in one call: what is missing cannot be told, and bad inputs are named."""

from dataclasses import replace

import pytest

from evals import evaluate_transfer, judge_circuit
from sparse.circuits.graph import nodes_of

FEW = {"draws": 1, "max_pairs": 6}


def states(claim):
    return {c.key: c.state for c in claim.conditions}


def test_without_a_namesake_no_claim_can_be_told(tiny, quotes, nonsense):
    for kind in ("sufficient", "necessary", "carries"):
        (bare,) = judge_circuit(tiny, quotes, {}, kinds=[kind], **FEW)
        assert states(bare)["namesakes"] == "open" and bare.outcome != "positive"
        (given,) = judge_circuit(tiny, quotes, {"nonsense": nonsense}, kinds=[kind], **FEW)
        assert "namesakes" not in states(given)


def test_without_other_tasks_one_cannot_tell_that_it_is_for_this_one(tiny, quotes, nonsense, found):
    beside = {"nonsense": nonsense}
    (bare,) = judge_circuit(tiny, quotes, beside, kinds=["needed"], **FEW)
    assert states(bare)["others"] == "open"
    other = [found["else_elif"].task]
    (given,) = judge_circuit(tiny, quotes, beside, other, kinds=["needed"], **FEW)
    assert "others" not in states(given) and "specific.else_elif" in states(given)


def test_a_circuit_of_all_nodes_leaves_none_for_a_control(tiny, quotes, nonsense):
    everything = quotes.with_nodes(nodes_of(quotes.ablation), "all")
    for kind in ("necessary", "carries"):
        (claim,) = judge_circuit(
            tiny, everything, {"nonsense": nonsense}, kinds=[kind], stop_early=True, **FEW
        )
        assert states(claim)["room"] == "open" and claim.outcome != "positive"


def test_a_namesake_of_another_model_is_refused_everywhere(tiny, quotes, nonsense, mapped):
    stranger = {"x": replace(quotes, model_fingerprint="0")}
    with pytest.raises(ValueError, match="fingerprint"):
        judge_circuit(tiny, quotes, stranger)
    with pytest.raises(ValueError, match="fingerprint"):
        evaluate_transfer(mapped(quotes), nonsense=nonsense, namesakes=stranger)


def test_a_circuit_whose_values_are_no_numbers_is_refused(quotes):
    """The model would hide them: AbsTopK turns NaN into 0."""
    at = next(at for at in quotes.nodes if quotes.nodes[at])
    with pytest.raises(ValueError, match="NaN or infinity"):
        replace(quotes, ablation={**quotes.ablation, at: quotes.ablation[at] * float("nan")})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kinds": "carries"}, r"kinds=\['carries'\]"),
        ({"kinds": ["nothing"]}, "no claim is called"),
        ({"draws": 0}, "draws=0"),
        ({"max_pairs": -1}, "max_pairs=-1"),
    ],
)
def test_bad_inputs_are_named(tiny, quotes, options, words):
    with pytest.raises(ValueError, match=words):
        judge_circuit(tiny, quotes, {}, **options)
