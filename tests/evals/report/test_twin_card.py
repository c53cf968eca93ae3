"""After a report the twin's model card has the report's numbers, each with its control."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard

from bridges import BridgeConfig, BridgeSet, load_run, save_run
from evals.__main__ import main
from evals.evaluate import evaluate_run, write_report
from evals.report.report import Report
from evals.report.twin_card import TOLD, twin_card
from evals.scores.verdict import Claim, threshold
from sparse.circuits.pruning.config import PruneConfig
from sparse.circuits.pruning.prune import prune
from sparse.model.gpt import SparseGPT
from sparse.storage.card import OURS, Card
from sparse.tasks.own import SPLITS
from sparse.tasks.suite import get_task

TASK = "single_double_quote"
FACTS = {
    "data": {"name": "noise", "fingerprint": "0123456789abcdef0123", "tokens": 99},
    "command": "python examples/train_bridge.py --dense tiny",
    "arguments": {"steps": 1000, "batch": 16, "length": 128, "seed": 3},
}


@pytest.fixture(scope="module")
def run(dense, sparse, tmp_path_factory):
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=12)).eval()
    blocks = torch.randint(dense.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0))
    bridges.calibrate(dense.residuals(blocks))
    folder, kept = tmp_path_factory.mktemp("run"), dict(heldout=blocks, means_from=blocks)
    own = deepcopy(sparse)  # a save is remembered, and the fixture is everybody's
    run = save_run(folder, dense, own, bridges, **kept, facts=FACTS)
    config = PruneConfig(n_steps=30, lr=5e-2, clean_up=0.0, target_loss=0.3)
    for name in (TASK, f"{TASK}:nonsense"):
        task = get_task(name)
        few = {split: task.pairs(split)[:20] for split in SPLITS}
        prune(run.sparse, replace(task, **few), config, force=True).save(run.circuit_folder(name))
    return run


@pytest.fixture(scope="module")
def report(run):
    return evaluate_run(run, draws=3, quick=True)


def readme(run):
    return (run.folder / "sparse" / "README.md").read_text(encoding="utf-8")


def table(text):
    """The rows of what was measured: (metric, control) to (value, unit, control's value)."""
    part = text.partition("## What was measured")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")][2:]
    cells = [[x.strip() for x in line[2:-2].replace("\\|", "/").split(" | ")] for line in lines]
    return {(name, control): (value, unit, at) for name, value, unit, control, at in cells}


def shown(row):
    return f"{row.value:.6g}", row.unit, f"{row.control:.6g}"


def test_every_number_of_the_twin_is_in_its_readme_beside_its_control(run, report):
    assert "Nothing was measured for this card" in readme(run)  # before any report
    paths = write_report(run, report)
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    text, rows = readme(run), {row.name: row for _, row in report}
    assert "Nothing was measured" not in text and "Measured on the weights in this folder" in text
    found = table(text)
    own, dense = rows["cross entropy, sparse"], rows["cross entropy, dense"]
    name, unigram = "held-out cross entropy, mean over 8 blocks", own.control_name
    assert found[name, unigram] == shown(own)
    assert found[name, "the dense model"] == (*shown(own)[:2], f"{dense.value:.6g}")
    kl = rows["KL(dense || sparse)"]
    assert found["held-out KL(dense // sparse), mean over 8 blocks", unigram] == shown(kl)
    circuit = [
        row for heading, row in report if heading == f"{TASK}: the circuit in the sparse model"
    ]
    said = {row.key: row for row in circuit if row.key.startswith(TOLD)}
    assert {"circuit.sufficiency", "circuit.necessity", "circuit.nodes"} <= said.keys()
    assert {row.key for row in circuit} - said.keys() >= {"circuit.edges"}  # a control
    for row in said.values():
        over = f", mean over {row.n} pairs" if row.n > 1 else ""
        many = f"mean of {row.n_draws} " if row.n_draws > 1 else ""
        key = f"{TASK}: {row.name}, {row.better} is better{over}", f"{many}{row.control_name}"
        assert found.pop(key) == shown(row)
    assert len(found) == 3, "and no other number"
    for claim in report.claims:
        assert f"- {TASK}: {claim.statement}: **{claim.outcome}**, " in text
    assert {claim.kind for claim in report.claims} >= {"sufficient", "necessary"}


def test_the_readme_says_how_the_twin_was_made_and_the_hub_reads_it(run, report):
    write_report(run, report)
    text = readme(run)
    assert f"```bash\n{FACTS['command']}\n```" in text
    for fact in ("noise, sha256 0123456789abcdef |", "2,048,000", "1,000", "| seed | 3 |"):
        assert fact in text
    assert "| sparse twin of | tiny |" in text and "every row beside its control" in text
    assert "a quick one" in text
    assert ModelCard(text).data.tags[0] == "sparse-bridges"


def test_the_card_is_the_models_own_and_is_exported_with_it(run, report, tmp_path):
    write_report(run, report)
    opened = load_run(run.folder, run.dense)
    assert opened.sparse.card == twin_card(report) == run.sparse.card
    opened.export(tmp_path / "small")
    text = (tmp_path / "small" / "sparse" / "README.md").read_text()
    assert "Measured on the weights in this folder" in text and "indices and values" in text
    weights = (tmp_path / "small" / "sparse" / "model.safetensors").read_bytes()
    small = load_run(tmp_path / "small", run.dense)
    write_report(small, report)  # a compressed file is still described as one, and not written
    assert (tmp_path / "small" / "sparse" / "README.md").read_text() == text
    assert (tmp_path / "small" / "sparse" / "model.safetensors").read_bytes() == weights


def test_evaluating_again_refreshes_the_card_and_keeps_its_licence(run, report, capsys):
    write_report(run, report)
    before, card = readme(run), run.folder / "sparse" / "card.json"
    values = json.loads(card.read_text()) | {"license": "apache-2.0"}
    card.write_text(json.dumps(values | {"metrics": []}))
    assert main([str(run.folder), "--draws", "3", "--quick", "--seed", "1"]) == 0
    capsys.readouterr()
    after, seeded = readme(run), Report.load(run.folder)
    assert after != before and table(after).keys() == table(before).keys()
    assert SparseGPT.from_pretrained(run.folder / "sparse").card == twin_card(seeded, "apache-2.0")


def test_a_readme_of_somebody_else_stays(run, report):
    path = run.folder / "sparse" / "README.md"
    path.write_text("# Mine\n")
    write_report(run, report)
    assert readme(run) == "# Mine\n"
    path.unlink()
    write_report(run, report)
    assert OURS in readme(run)


def test_what_a_run_does_not_say_is_not_recorded(report):
    bare = dict(schema_version=1, sparse={"fingerprint": "f"}, dense={"name": "d"})
    card = twin_card(replace(report, provenance={"run": bare}))
    assert (card.tokens, card.steps, card.seed) == (None, None, None)
    assert (card.data, card.command, card.twin_of) == ("not recorded", "# not recorded", "d")
    assert Card.from_json(card.to_json()) == card
    assert twin_card(replace(report, sections={}, provenance={})).metrics == ()


def test_the_card_repeats_every_claim_with_its_number_and_its_outcome():
    met = threshold("harm", "harm", 0.6, 0.25, "fraction", "higher")
    given = {"task": "quotes", "value": 0.6, "unit": "fraction"}
    claims = (
        Claim(kind="necessary", **given, conditions=(met,)),
        Claim(kind="carries", **given, conditions=(replace(met, value=0.1),)),
    )
    notes = twin_card(Report(title="t", claims=claims, sections={})).notes
    assert "- quotes: the sparse model needs the circuit for the task: **positive**" in notes
    assert "and little else: **negative**, share 0.6\n" in notes
    assert "What was claimed" not in twin_card(Report(title="t", sections={})).notes


def test_the_built_in_run_is_only_read(run, report, tmp_path):
    before = readme(run)
    write_report(replace(run, output=tmp_path), report)
    assert (tmp_path / "report.json").is_file() and readme(run) == before


@pytest.mark.parametrize(
    "facts",
    [
        {"command": ["python", "x.py"]},
        {"command": None},
        {"data": {"name": None}},
        {"data": "my text"},
        {"arguments": {"steps": 6.0, "batch": 2, "length": 3}},
        {"arguments": ["--steps", "6"]},
    ],
    ids=str,
)
def test_a_manifest_written_in_another_way_is_not_recorded_rather_than_refused(facts):
    card = twin_card(Report(title="t", sections={}, provenance={"run": facts}))
    assert card.tokens is None and "not recorded" in f"{card.command} {card.data}"
