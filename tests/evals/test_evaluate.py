"""A whole run folder, evaluated from the command line."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import evals
from bridges import BridgeConfig, BridgeSet, save_run
from evals.__main__ import main
from evals.evaluate import evaluate_run, write_report
from evals.report.report import Report
from evals.report.schema_1 import with_keys
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
def report(run):
    return evaluate_run(run, draws=5, quick=True)


def test_a_run_s_report_has_every_claim_beside_its_control(report, run):
    names = [row.name for _, row in report]
    wanted = [f"site {s}: {what}" for s in range(5) for what in ("encoder FVU", "decoder FVU")]
    wanted += ["sufficiency, mean ablation", "sufficiency, zero ablation", "necessity", "nodes"]
    wanted += [
        "steering, strength 1, v. directions",
        "ablation, v. nodes",
        "ablation, v. directions",
    ]
    assert not set(wanted) - set(names)
    assert sum(name.startswith("nonsense twin") for name in names) == 2
    assert all(row.n_draws >= 1 and row.outcome for _, row in report)
    assert report.provenance["run"]["dense"]["fingerprint"] == run.dense.fingerprint
    assert len(report.curves) == len(report.graphs) == 1


def test_a_report_of_before_scores_had_keys_gets_the_keys_of_today(report):
    for rows in report.sections.values():
        old = [{k: v for k, v in row.to_dict().items() if k != "key"} for row in rows]
        assert [row["key"] for row in with_keys(old)] == [row.key for row in rows]


def test_the_same_seed_gives_the_same_report(report, run):
    assert evaluate_run(run, draws=5, quick=True).sections == report.sections


def test_the_three_files_are_written_and_hold_the_same(report, run):
    paths = write_report(run, report)
    assert [p.name for p in paths] == ["report.json", "report.md", "report.html"]
    assert Report.load(run.folder) == report
    html = paths[2].read_text()
    assert "loss" in html and "necessity" in html and "http" not in html


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
    options = ["--draws", "3", "--quick", "--tasks", "single_double_quote"]
    assert main([str(run.folder), *options]) == 0
    out = capsys.readouterr().out
    assert "95 % interval" in out and "necessity" in out and str(run.folder / "report.html") in out
    assert json.loads((run.folder / "report.json").read_text())["provenance"]["draws"] == 3


def test_a_folder_that_is_no_run_gets_a_clear_error_and_no_file(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no run folder" in error and "manifest.json is missing" in error
    assert list(tmp_path.iterdir()) == []
    assert main([str(tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "nowhere").exists()


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
