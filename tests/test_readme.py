"""The README is true: its commands run, its files exist, its Python runs."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SETUP = {  # what sets up and what is this suite itself: `make` runs the same words
    "python -m venv .venv",
    ". .venv/bin/activate",
    'pip install -c constraints.txt -e ".[test]"',
    "pytest",
}
SMALL = {"n_steps=600": "n_steps=4", "draws=100": "draws=4"}  # in the Python tour


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.M | re.S)


def test_every_command_runs(readme_commands, run_command):
    made, ran = set(), []
    for line in readme_commands:
        if line.startswith("make "):
            made.add(line.removeprefix("make "))
        elif line not in SETUP:
            run_command(line)
            ran.append(line)
    assert made == {"demo", "test"} and len(ran) >= 8


def test_make_runs_the_commands_that_the_readme_shows(readme_commands):
    recipes = MAKEFILE.replace("$(PYTHON)", "python")
    main_job = next(line for line in readme_commands if line.startswith("accelerate"))
    for line in [*SETUP, main_job]:
        assert line in readme_commands
        assert re.search(rf"{re.escape(line)}( &&)?$", recipes, flags=re.M), line
    for target in ("demo", "test", "check"):
        assert re.search(rf"^{target}: \.venv/\.installed$", MAKEFILE, flags=re.M)
    assert "\tmake test" not in MAKEFILE
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_python_tour_runs_on_the_demo(main_job, run_python):
    (tour,) = blocks("python")
    lines = [line for line in tour.splitlines() if line.strip()]
    assert len(lines) <= 12
    for large, small in SMALL.items():
        assert tour.count(large) == 1
        tour = tour.replace(large, small)
    assert "steering" in run_python(tour)


def test_the_files_and_wings_of_the_tree_exist_and_no_wing_is_missing():
    tree = next(block for block in blocks("text") if "sparse/" in block)
    named, package = set(), ""
    for line in tree.splitlines():
        word = line.split()[0]
        if not line.startswith(" "):
            package = word
            named.add(word)
        if package in ("sparse/", "bridges/", "evals/"):
            named |= {
                package + wing for wing in re.findall(r"\b([a-z]+/)", line) if wing != package
            }
    named = {name for name in named if not name.endswith("suite/")}
    assert {"sparse/", "dense/", "bridges/", "evals/", "examples/", "tests/"} <= named
    missing = [name for name in named if not any(p.exists() for p in places(name))]
    assert not missing
    wings = {
        f"{p.parent.name}/{p.name}/" for x in ("sparse", "bridges", "evals") for p in wings_of(x)
    }
    assert wings <= named


def places(name: str) -> list[Path]:
    """Return where what the tree names may be: itself, or in a wing of its package."""
    package, _, rest = name.partition("/")
    return [ROOT / name, *((ROOT / package).glob(f"*/{rest}") if rest else ())]


def wings_of(package: str) -> list[Path]:
    return [path.parent for path in (ROOT / package).glob("*/__init__.py")]


def test_links_and_files_named_in_the_text_exist():
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    named = re.findall(r"`((?:examples|tests|docs)/[\w./-]+\.\w+|[A-Z]+\.(?:md|cff))`", README)
    assert named
    assert not [name for name in [*links, *named] if not (ROOT / name).exists()]


def test_the_first_line_says_what_a_bridge_is():
    lines = [line for line in README.splitlines() if line and not line.startswith("#")]
    assert "*bridge*" in lines[0] and "TransformerBridge" in lines[1]


@pytest.mark.parametrize(
    "name", ["README.md", "Makefile", "constraints.txt", "pyproject.toml", ".ci/run"]
)
def test_no_file_names_a_registry_or_somebodys_folder(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.findall(r"index-url|find-links [^w]|pypi\.|file://|/home/|/opt/|/work/|/root/", text)
    assert not found


def test_git_ignores_what_make_and_the_examples_write():
    try:
        done = subprocess.run(
            ["git", "check-ignore", ".venv/x", "runs/x", "sparse_bridges.egg-info/x"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("no git here")
    if done.returncode == 128:
        pytest.skip("not a git repository")
    assert len(done.stdout.split()) == 3
