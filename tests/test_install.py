"""Installing beside others: the import names exist on PyPI too, and scipy asks for one of them."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("sparse", "dense", "bridges", "evals")
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
WHERE = (
    "import importlib.util\n"
    f"for name in {PACKAGES}:\n"
    "    print(importlib.util.find_spec(name).origin)\n"
)


def python(
    code: str, path: list[Path], cwd: Path, *flags: str, **env: str
) -> subprocess.CompletedProcess:
    """Run `code` in a new Python whose path starts with `path`."""
    first = os.pathsep.join([*map(str, path), os.environ["PYTHONPATH"]])
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": first} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def run_help(words: list[str]) -> str:
    """Return code that asks a script or module for --help and then says what it has imported."""
    return f"""
        import runpy, sys
        sys.argv = {words!r} + ["--help"]
        run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
        try:
            run(sys.argv[0], run_name="__main__")
        except SystemExit as done:
            assert not done.code, done.code
        heavy = {{"torch", "transformers", "accelerate", "scipy", "nnsight"}} & set(sys.modules)
        assert not heavy, heavy
    """


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A site folder with somebody else's `sparse`, `evals` and `bridges`."""
    for name in ("sparse", "evals", "bridges"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text('__version__ = "0.19.3"\n')
    return tmp_path / "site"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and an sdist of a copy of the project, built without a network."""
    folder = tmp_path_factory.mktemp("build")
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*PACKAGES, "examples", "tests"):
        shutil.copytree(ROOT / name, folder / "project" / name, ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "project")
    sdist = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    pip = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    for words in (["-c", sdist], [*pip, "-w", str(folder), "."]):
        done = subprocess.run(
            [sys.executable, *words], cwd=folder / "project", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def shipped() -> set[str]:
    """Return the files of our packages, as paths from the repository's root."""
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


# Z1: the names are taken


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_finds_our_packages_before_foreign_ones(example, foreign, tmp_path):
    path = str(ROOT / "examples" / example)
    done = python(textwrap.dedent(run_help([path])) + WHERE, [foreign], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-4:] == [str(ROOT / p / "__init__.py") for p in PACKAGES]


def test_control_without_the_examples_first_line_the_foreign_ones_win(foreign, tmp_path):
    done = python(WHERE, [foreign, ROOT], tmp_path)
    assert done.stdout.splitlines()[0] == str(foreign / "sparse" / "__init__.py")


@pytest.mark.parametrize("name", ["sparse", "evals"])
def test_the_guard_names_the_foreign_file_and_the_cure(name, foreign, tmp_path):
    for other in {"sparse", "evals", "bridges"} - {name}:
        shutil.rmtree(foreign / other)
    done = python("import bridges", [foreign, ROOT], tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError") and f"`{name}`" in last
    assert str(foreign / name / "__init__.py") in last
    assert f"put {ROOT} first on sys.path (PYTHONPATH)" in last


def test_the_cure_cures(foreign, tmp_path):
    done = python("import bridges, evals, dense\n" + WHERE, [ROOT, foreign], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(ROOT / p / "__init__.py") for p in PACKAGES]


def test_a_package_overwritten_by_the_other_is_noticed(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    assert python("import bridges", [site], tmp_path).returncode == 0
    (site / "sparse" / "__init__.py").write_text('__version__ = "0.19.3"\n')
    done = python("import bridges", [site], tmp_path)
    assert done.returncode == 1 and str(site / "sparse" / "__init__.py") in done.stderr
    assert "reinstall sparse-bridges" in done.stderr
    shutil.rmtree(site / "sparse")  # and pip uninstall of the other takes the folder away
    done = python("import bridges", [site], tmp_path, "-S")  # no editable install to fall back on
    assert done.returncode == 1 and "nothing at all" in done.stderr


def test_the_packages_under_test_are_ours():
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec and spec.origin == str(ROOT / name / "__init__.py")


# Z2: scipy asks any module called `sparse` for SparseArray

SCIPY = """
    from scipy import stats
    from scipy.cluster.vq import whiten
    a, b = [1.0, 2.0, 4.0], [2.0, 3.0, 3.5]
    stats.ttest_ind(a, b), stats.ttest_1samp(a, 0.0), stats.gmean(a), stats.entropy(a)
    stats.sem(a), whiten([[1.0, 2.0], [3.0, 5.0]])
    import torch
    stats.ttest_ind(torch.tensor(a), torch.tensor(b))
"""


def test_scipy_works_beside_our_sparse(tmp_path):
    done = python("    import sparse" + SCIPY, [ROOT], tmp_path, SCIPY_ARRAY_API="1")
    assert done.returncode == 0, done.stderr


def test_control_scipy_fails_beside_a_sparse_without_the_sentinel(tmp_path):
    (tmp_path / "sparse.py").write_text("")
    done = python("    import sparse" + SCIPY, [tmp_path], tmp_path, SCIPY_ARRAY_API="1")
    assert done.returncode == 1 and "no attribute 'SparseArray'" in done.stderr


# what is shipped


def test_a_wheel_holds_the_four_packages_whole_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
        (metadata,) = (n for n in packed.namelist() if n.endswith(".dist-info/METADATA"))
        about = packed.read(metadata).decode()
    assert {name.partition("/")[0] for name in names} == set(PACKAGES)
    assert names == shipped()
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert "evals/report/page.html" in names
    assert {"dense/tiny_data/model.safetensors", "dense/tiny_data/tokenizer.json"} <= names
    assert sum((ROOT / n).stat().st_size for n in names if "tiny_data" in n) < 6e6
    assert "bridges/tiny_run/sparse/model.safetensors" in names
    assert sum((ROOT / n).stat().st_size for n in names if "tiny_run" in n) <= 8e6
    assert "Name: sparse-bridges\n" in about and "License-Expression: Apache-2.0\n" in about


def test_a_source_distribution_holds_the_four_packages_whole(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        names = {m.name.partition("/")[2] for m in packed.getmembers() if m.isfile()}
    assert {name for name in names if name.partition("/")[0] in PACKAGES} == shipped()
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_a_wheel_alone_runs_the_quickstart_in_a_fresh_environment(wheel, tmp_path):
    """Its dependencies are those of this environment, whose editable install of ours is not read:
    a .pth file that names a folder puts it on the path, and leaves the .pth files in it alone.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = tmp_path.glob("env/lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    folders = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(folders)))
    (tmp_path / "elsewhere" / "examples").mkdir(parents=True)
    script = shutil.copy(ROOT / "examples" / "quickstart.py", tmp_path / "elsewhere" / "examples")
    code = f"""
        import importlib, runpy, sys
        sys.argv = [{script!r}, "--draws", "5"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        for name in {PACKAGES}:
            print("from", importlib.import_module(name).__file__)
        print(*sys.path, sep="\\n")
    """
    done = subprocess.run(
        [tmp_path / "env" / "bin" / "python", "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests" / "offline")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "carries what" in done.stdout and "refused a connection" not in done.stderr
    lines = done.stdout.splitlines()
    for name in PACKAGES:
        assert f"from {site / name / '__init__.py'}" in lines
    assert str(ROOT) not in lines and str(site) in lines


def test_every_dependency_has_a_tested_version():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(r.specifier).startswith("==") and not r.url for r in tested)
    exact = {canonicalize_name(r.name): str(r.specifier)[2:] for r in tested}
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(exact[canonicalize_name(wanted.name)]), text
        assert all(bound.operator == ">=" for bound in wanted.specifier), text
    assert exact["torch"] == "2.13.0"


# what answers at once


@pytest.mark.parametrize(
    "words", [[f"examples/{name}"] for name in EXAMPLES] + [["evals"]], ids=str
)
def test_help_comes_before_anything_heavy(words, tmp_path):
    done = python(run_help([str(ROOT / w) if "/" in w else w for w in words]), [ROOT], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and "--" in done.stdout


@pytest.mark.parametrize("package", ["bridges", "evals"])
def test_importing_a_lazy_face_imports_nothing_heavy(package, tmp_path):
    code = f"import sys, {package}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    done = python(code, [ROOT], tmp_path)
    assert done.returncode == 0, done.stderr


def test_importing_sparse_registers_the_auto_classes():
    import transformers

    import sparse

    config = transformers.AutoConfig.for_model("sparse_gpt", vocab_size=7, hidden_size=8)
    assert isinstance(config, sparse.SparseGPTConfig)
    config = sparse.SparseGPTConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1)
    assert isinstance(transformers.AutoModelForCausalLM.from_config(config), sparse.SparseGPT)
