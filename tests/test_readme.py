"""The README is true: its files and words exist; tests/test_examples.py runs its commands."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers.readme import README, ROOT, SETUP, blocks, commands

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_make_runs_the_commands_that_the_readme_shows():
    recipes = MAKEFILE.replace("$(PYTHON)", "python")
    main_job = next(line for line in commands() if line.startswith("accelerate"))
    for line in [*SETUP, main_job]:
        assert line in commands()
        assert re.search(rf"{re.escape(line)}( &&)?$", recipes, flags=re.M), line
    for target in ("demo", "test", "check"):
        assert re.search(rf"^{target}: \.venv/\.installed$", MAKEFILE, flags=re.M)
    assert "\tmake test" not in MAKEFILE
    assert "make test" in (ROOT / ".ci" / "run").read_text()


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
    registry = r"index-url|find-links [^w]|pypi\.|file://"
    folder = r"(?<![\w.:/)}>~*-])/(?!dev/|usr/bin/env )[a-z]+/"  # absolute, not a part of a path
    found = re.findall(f"{registry}|{folder}", text)
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
