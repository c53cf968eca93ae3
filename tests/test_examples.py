"""The README's commands and examples run, at their smallest setting; and the thin ones stay thin.

All that needs the main job's run folder is in this file, so that one process runs that job once.
"""

import argparse
import ast
import json
import runpy
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.readme import MAIN_JOB, SETUP, blocks, commands, run_words, small

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {path.name: path for path in sorted((ROOT / "examples").glob("*.py"))}
JOBS = {"train_bridge.py", "train_dense.py", "train_sparse.py"}
JOBS |= {"sparsity_study.py", "bridge_study.py", "task_study.py"}
THIN = sorted(EXAMPLES.keys() - JOBS)
PRINTS = {  # example: what it must have printed
    "train_bridge.py": "process(es) on",
    "quickstart.py": "carries what the task is about",
    "sparsity_study.py": "wrote",
    "bridge_study.py": "| default |",
    "check_task.py": "does it",
    "task_study.py": "| `while_return_true` |",
    "find_circuit.py": "saved in",
    "map_to_dense.py": "strength 1.0",
    "evaluate.py": "wrote",
    "train_sparse.py": "wrote runs/sparse",
    "train_dense.py": "validation",
    "open_release.py": "replayed: 0.",
}
SMALL = {  # in the Python tour; the twin of six steps does no task
    "PruneConfig(n_steps=600)": "PruneConfig(n_steps=4), force=True",
    "nonsense=twin, ": "nonsense=twin, draws=1, max_pairs=5, facts=False, ",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the repository, with a little text, in which commands are run."""
    folder = tmp_path_factory.mktemp("a workplace")
    library = Path(sysconfig.get_path("stdlib"))
    modules = [library / f"{name}.py" for name in ("argparse", "ast", "inspect", "typing")]
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in modules)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run_command(workplace: Path) -> Callable[[str], str]:
    """`run_command(line)`: what a README command prints, run small, once, in the workplace.

    Commands read the run folder that the main job leaves, so that one is run first.
    """

    done: dict[str, str | AssertionError] = {}

    def run(line: str) -> str:
        if line != MAIN_JOB:
            run(MAIN_JOB)
        if line not in done:
            try:
                done[line] = run_words(small(line), workplace)
            except AssertionError as error:  # do not run for minutes to fail again
                done[line] = error
        if isinstance(result := done[line], AssertionError):
            raise result
        return result

    return run


@pytest.fixture(scope="module")
def main_job(run_command: Callable[[str], str]) -> str:
    """What the main job prints, run small; its run folder is runs/tiny-demo in the workplace."""
    return run_command(MAIN_JOB)


@pytest.fixture(scope="module")
def run_python(workplace: Path) -> Callable[[str], str]:
    """`run_python(code)`: what Python prints in the workplace, where our packages are installed."""
    return lambda code: run_words([sys.executable, "-c", code], workplace)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_as_the_readme_says(example, run_command):
    lines = [line for line in commands() if f"examples/{example}" in line]
    assert lines, f"the README has no command for {example}"
    assert PRINTS[example] in run_command(lines[0])


def test_the_main_job_leaves_a_whole_run(workplace, main_job):
    run = workplace / "runs" / "tiny-demo"
    files = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    circuit = "circuits/single_double_quote"
    assert files >= {"manifest.json", "log.jsonl", "heldout.safetensors"}
    assert files >= {"sparse/config.json", "sparse/model.safetensors", "sparse/tokenizer.json"}
    assert files >= {"bridges", f"{circuit}/circuit.json", f"{circuit}-nonsense/circuit.json"}
    assert files >= {"report.json", "report.md", "report.html"}
    assert json.loads((run / "manifest.json").read_text())["dense"]["name"] == "tiny"


def test_every_command_runs(run_command):
    made, ran = set(), []
    for line in commands():
        if line.startswith("make "):
            made.add(line.removeprefix("make "))
        elif line not in SETUP:
            run_command(line)
            ran.append(line)
    assert made == {"demo", "test"} and len(ran) >= 8


def test_the_main_job_says_beforehand_what_the_dense_model_does_of_its_tasks(main_job):
    first, _, rest = main_job.partition("what the dense model does of the tasks:")
    assert "single_double_quote: 0." in rest and "(chance 0.693)" in rest and "does it" in rest
    assert "twin:" not in first and "twin:" in rest  # before anything is built


def test_the_python_tour_runs_on_the_demo(main_job, run_python):
    first, *others = blocks("python")
    assert len([line for line in first.splitlines() if line.strip()]) <= 12
    tour = "\n".join([first, *others])  # later blocks go on where the first one ended
    for large, few in SMALL.items():
        assert tour.count(large) == 1
        tour = tour.replace(large, few)
    said = run_python(tour)
    assert (
        "carries/single_double_quote" in said
        and "while_return_true: " in said
        and "cannot be asked" in said
    )


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_puts_its_repository_first_before_anything_of_ours(example):
    tree = ast.parse(EXAMPLES[example].read_text(encoding="utf-8"))
    first, *rest = [node for node in tree.body if not isinstance(node, ast.Expr) or _call(node)]
    while isinstance(first, ast.Import | ast.ImportFrom):
        names = {alias.name.partition(".")[0] for alias in first.names}
        names.add((getattr(first, "module", None) or "").partition(".")[0])
        assert names - {""} <= set(sys.stdlib_module_names) | _members(first), ast.unparse(first)
        first, *rest = rest
    want = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
    assert ast.unparse(first) == want


def _call(node: ast.Expr) -> bool:
    return isinstance(node.value, ast.Call)


def _members(node: ast.stmt) -> set[str]:
    return {a.name for a in node.names} if isinstance(node, ast.ImportFrom) else set()


@pytest.mark.parametrize("example", THIN)
def test_a_thin_example_is_short_and_has_few_flags(example, monkeypatch):
    assert len(EXAMPLES[example].read_text(encoding="utf-8").splitlines()) <= 60
    seen: list[str] = []

    def parse_args(parser: argparse.ArgumentParser, *_):
        seen.extend(a.dest for a in parser._actions if a.dest != "help")
        sys.exit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES[example]), run_name="__main__")
    assert 1 <= len(seen) <= 5, seen


@pytest.mark.parametrize("example", ["find_circuit.py", "map_to_dense.py", "evaluate.py"])
def test_a_wrong_folder_is_told_in_one_line(example, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [example, str(tmp_path)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="^error: .* is no run folder"):
        runpy.run_path(str(EXAMPLES[example]), run_name="__main__")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--length", "1"], "--length 1 must be at least 2"),
        (["--threads", "-1"], "--threads: -1 must be above 0"),
        (["--expansion", "0"], "--expansion 0.0 must be above 0"),
        (["--tasks", "unheard_of"], "no task is called 'unheard_of'"),
        (["--output_dir", __file__], "is a file; name a folder"),
    ],
)
def test_a_senseless_flag_is_told_before_anything_is_written(
    flags, says, monkeypatch, tmp_path, capsys
):
    out = ["--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train_bridge.py", *out, *flags])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES["train_bridge.py"]), run_name="__main__")
    assert says in capsys.readouterr().err + str(stop.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--density", "0"], "--density 0.0 must be above 0"),
        (["--width", "100"], "--width 100 must be a multiple of 16"),
        (["--density", "0.001"], "error: model.blocks.0.attn.qkv.weight: a budget of"),
        (["--dataset", "./nowhere"], "error: load_corpus: there is no file or folder './nowhere'"),
        (["--output_dir", __file__], "is a file; name a folder"),
    ],
)
def test_a_senseless_flag_of_sparse_training_is_told_in_one_line(
    flags, says, monkeypatch, tmp_path, capsys
):
    out = ["--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train_sparse.py", *out, *flags])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES["train_sparse.py"]), run_name="__main__")
    assert says in capsys.readouterr().err + str(stop.value)
    assert not list(tmp_path.iterdir())


def test_the_card_of_the_main_jobs_twin_has_its_numbers(workplace, main_job):
    text = (workplace / "runs" / "tiny-demo" / "sparse" / "README.md").read_text()
    assert "Nothing was measured" not in text and "Measured on the weights in this folder" in text
    lines = [line for line in text.splitlines() if line.startswith("| held-out cross entropy")]
    assert [line.split(" | ")[3] for line in lines] == [
        "unigram frequencies of the training text",
        "the dense model",
    ]
    assert "| single_double_quote: nodes, lower is better |" in text
    assert "examples/train_bridge.py --dense tiny" in text and "| sparse twin of | tiny |" in text
