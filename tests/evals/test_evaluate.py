"""A whole run folder, evaluated from the command line."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import evals
from bridges import BridgeConfig, BridgeSet, save_run
from evals.__main__ import main
from evals.claims.bridge import affordable
from evals.evaluate import evaluate_run, write_report
from evals.report.replay import differences
from evals.report.report import Report
from evals.trials.matched import ranked_nodes
from sparse.circuits.pruning.config import PruneConfig
from sparse.circuits.pruning.prune import prune
from sparse.circuits.view.graph import graph
from sparse.tasks.own import SPLITS
from sparse.tasks.suite import get_task

QUICK = PruneConfig(n_steps=30, lr=5e-2, clean_up=0.0, target_loss=0.3)


@pytest.fixture(scope="module")
def run(dense, sparse, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run with a space")
    bridges = BridgeSet(BridgeConfig.between(dense, sparse, k=12)).eval()
    blocks = torch.randint(dense.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0))
    bridges.calibrate(dense.residuals(blocks))
    facts = {"data": {"name": "noise"}}
    run = save_run(folder, dense, sparse, bridges, heldout=blocks, means_from=blocks, facts=facts)
    for name in ("single_double_quote", "single_double_quote:nonsense"):
        task = get_task(name)
        few = {split: task.pairs(split)[:20] for split in SPLITS}
        prune(run.sparse, replace(task, **few), QUICK, force=True).save(run.circuit_folder(name))
    (folder / "log.jsonl").write_text(
        '{"step": 0.0, "loss/ce": 3.0}\n{"step": 9.0, "loss/ce": 2.5}\n'
    )
    return run


@pytest.fixture(scope="module")
def kept(run):
    return run.folder / "evaluated"  # where the command keeps its parts too


@pytest.fixture(scope="module")
def report(run, kept):
    return evaluate_run(run, quick=True, cache=kept)


def test_a_run_s_report_judges_four_claims_of_its_circuit(report, run):
    assert [claim.key for claim in report.claims] == [
        f"{kind}/single_double_quote" for kind in ("sufficient", "necessary", "carries", "needed")
    ]
    assert report.provenance["run"]["dense"]["fingerprint"] == run.dense.fingerprint
    assert report.provenance["draws"] == 19 and len(report.graphs) == 1


def test_a_bridge_that_was_never_trained_carries_nothing(report):
    assert {c.kind: c.outcome for c in report.claims}["carries"] != "positive"
    assert {c.kind: c.outcome for c in report.claims}["needed"] != "positive"


def test_every_row_stands_beside_its_control(report):
    names = [row.name for _, row in report]
    wanted = [f"site {s}: {what}" for s in range(5) for what in ("encoder FVU", "decoder FVU")]
    wanted += ["sufficiency: all else at its mean", "necessity: the circuit at its mean", "nodes"]
    assert not set(wanted) - set(names)
    assert all(row.n_draws >= 1 and row.outcome for _, row in report)


def test_the_matrix_has_the_circuit_s_own_harm_and_that_to_every_other_task(report):
    needed = next(claim for claim in report.claims if claim.kind == "needed")
    (matrix,) = report.pictures.matrices
    harms = dict(zip(matrix.columns, matrix.values[0], strict=True))
    assert matrix.rows == ("single_double_quote",) and len(harms) >= 5
    assert harms.pop("single_double_quote") == needed.value
    assert harms == {name: needed[f"specific.{name}"].against for name in harms}


def test_a_note_counts_the_nodes_that_namesakes_share(report, run):
    found = run.circuits()
    circuit, twin = (found[f"single_double_quote{end}"] for end in ("", ":nonsense"))
    first = set(ranked_nodes(twin)[: max(len(circuit), circuit.config["k_before_clean_up"])])
    shared = len(first & set(circuit))
    (note,) = [note for note in report.notes if "it shares" in note]
    assert f"it shares {shared} with the first {len(first)} of its nonsense twin" in note


def test_what_is_finished_is_not_measured_again(report, run, kept, monkeypatch):
    for name in ("evaluate_bridge", "evaluate_circuit", "evaluate_transfer"):
        monkeypatch.setattr(f"evals.evaluate.{name}", None)  # a call would be an error
    again = evaluate_run(run, quick=True, cache=kept)
    assert again.claims == report.claims and again.sections == report.sections
    with pytest.raises(TypeError):
        evaluate_run(run, quick=True, cache=kept, seed=1)  # another seed is another measurement


def test_a_report_can_be_measured_again_and_a_changed_number_is_seen(report, run):
    assert report.verify(run) == []
    claim = report.claims[0]
    other = replace(report, claims=(replace(claim, value=claim.value + 0.1), *report.claims[1:]))
    said = differences(other, report, 1e-4)
    assert len(said) == 1 and "sufficient/single_double_quote" in said[0]


def test_the_three_files_are_written_and_hold_the_same(report, run):
    paths = write_report(run, report)
    assert [p.name for p in paths] == ["report.json", "report.md", "report.html"]
    assert Report.load(run.folder) == report
    html = paths[2].read_text()
    assert "loss" in html and "necessity" in html and "cannot tell" in html
    assert not re.findall(r"(?:src|href)=.http", html)


def test_the_graph_names_every_node_and_edge_of_the_circuit(run):
    circuit = run.circuits()["single_double_quote"]
    drawn = graph(run.sparse, circuit)
    assert len(drawn["nodes"]) == len(circuit) == drawn["n_nodes"]
    assert len(drawn["edges"]) == len(circuit.edges(run.sparse))
    known = {node["id"] for node in drawn["nodes"]}
    assert all(
        j["source"] in known and j["target"] in known for j in drawn["edges"] + drawn["links"]
    )


def test_the_command_prints_the_table_and_the_paths(run, capsys):
    options = ["--quick", "--tasks", "single_double_quote"]
    assert main([str(run.folder), *options]) == 0
    out = capsys.readouterr().out
    assert "the sparse model needs the circuit" in out and str(run.folder / "report.html") in out
    assert json.loads((run.folder / "report.json").read_text())["provenance"]["draws"] == 19


def test_an_interruption_is_said_and_loses_nothing(run, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    before = (run.folder / "report.json").read_bytes()
    monkeypatch.setattr("evals.evaluate.evaluate_run", stop)
    assert main([str(run.folder)]) == 130
    assert "go on" in capsys.readouterr().err
    assert (run.folder / "report.json").read_bytes() == before


def test_a_folder_that_is_no_run_gets_a_clear_error_and_no_file(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no run folder" in error and "manifest.json is missing" in error
    assert list(tmp_path.iterdir()) == []
    assert main([str(tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "nowhere").exists()


def test_a_task_without_a_circuit_is_told_before_the_dense_model_is_opened(
    run, capsys, monkeypatch
):
    monkeypatch.setattr("dense.DenseModel.from_pretrained", None)
    assert main([str(run.folder), "--tasks", "bracket_counting"]) == 2
    assert "no circuit for ['bracket_counting']" in capsys.readouterr().err
    with pytest.raises(TypeError):  # control: a task that has one needs it
        main([str(run.folder), "--tasks", "single_double_quote", "--quick"])


def test_a_task_without_a_circuit_is_refused_by_name(run):
    with pytest.raises(ValueError, match=r"no circuit for \['bracket_counting'\]"):
        evaluate_run(run, tasks=["bracket_counting"])


def test_a_run_without_circuits_reports_its_bridges_and_says_so(run, tmp_path):
    (tmp_path / "heldout.safetensors").write_bytes(
        (run.folder / "heldout.safetensors").read_bytes()
    )
    bare = evaluate_run(replace(run, folder=tmp_path, output=tmp_path), quick=True)
    assert list(bare.sections) == ["Bridges"] and "no circuit" in bare.notes[0]


def test_help_answers_at_once_and_nothing_heavy_is_imported():
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "evals", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "RUN_DIR" in done.stdout
    assert time.monotonic() - start < 3
    code = "import evals, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_the_face_gives_what_it_names():
    for name in evals.__all__:
        assert getattr(evals, name)
    assert evals.__sparse_bridges__ == "evals"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = evals.nothing


def test_on_a_cpu_the_bridges_of_a_large_model_are_measured_on_fewer_blocks(run, monkeypatch):
    blocks = run.heldout()
    assert torch.equal(affordable(run, blocks), blocks)  # the built-in pair: all of them
    sizes = run.dense.model.num_parameters() + run.sparse.num_parameters()
    sites = len(run.bridges.config.sites)
    one = 2 * blocks.shape[1] * sizes * 4 * (2 + sites) / 2  # by hand: multiply and add
    monkeypatch.setattr("evals.claims.bridge.ON_CPU", 5.5 * one)
    assert torch.equal(affordable(run, blocks), blocks[:5])
    monkeypatch.setattr("evals.claims.bridge.ON_CPU", 0.0)
    assert len(affordable(run, blocks)) == 4
    report = evaluate_run(run, tasks=[], facts=False)
    assert report.sections["Bridges"][0].n == 4
    assert any("the first 4 of" in note for note in report.notes)
