"""The floor plan as a test: imports run downwards, and the budgets of the house hold.

Every rule reads a tree of files and returns what breaks it, so that each can be seen to fail on a
planted violation.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # package: the packages of ours it may name
    "sparse": set(),
    "dense": set(),
    "bridges": {"sparse", "dense"},
    "evals": {"sparse", "dense", "bridges"},
    "examples": {"sparse", "dense", "bridges", "evals"},
}
ORDER = {  # package: its modules; each may import only those before it
    "sparse": "files csr shard config kernels kernels_project activation attention blocks passes "
    "compressed card saving trunk model nodes project corpus data checkpoint "
    "run_state train pretrain suite tasks slices compiled calibration edges circuit mask "
    "prune release_files release_config release_tokenizer release_circuit "
    "release_write release",
    "dense": "twin identity inputs sites split passes proof load model delta edit",
    "bridges": "losses models settings sitemap bridge hybrid cotraining compiling probing kept "
    "planning run change directions intervene transfer",
    "evals": "scores bench bridge circuit transfer report charts view run __main__",
}
PACKAGES = tuple(ORDER)
MAX_FILE, MAX_FUNCTION = 350, 60  # lines
MAY_PRINT = {"evals/__main__.py"}
MAY_IMPORT_NNSIGHT = {"dense/edit.py"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save"}  # files are safetensors and JSON
MAY_LOAD_TORCH = {"sparse/release_files.py"}  # others' released files, and weights_only there


def sources(root: Path, *folders: str) -> Iterator[tuple[str, str, ast.Module]]:
    """Yield (package, path, tree) of the Python files in `folders`."""
    for package in folders:
        for path in sorted((root / package).glob("*.py")):
            yield package, f"{package}/{path.name}", ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module, package: str) -> Iterator[tuple[str, str, int]]:
    """Yield (module, name or "", line) of every import, wherever it stands.

    `import_module("x.y")` counts too: a floor is not left by the window.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((alias.name, "", node.lineno) for alias in node.names)
            case ast.ImportFrom():
                parts = [package] * (node.level > 0) + [node.module] * (node.module is not None)
                yield from ((".".join(parts), alias.name, node.lineno) for alias in node.names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield (f"{package}{name}" if name.startswith(".") else name), "", node.lineno


def imports_run_down_between_packages(root: Path) -> list[str]:
    return [
        f"{path}:{line} imports {module}: {package} may name {sorted(MAY_IMPORT[package])}"
        for package, path, tree in sources(root, *MAY_IMPORT)
        for module, _, line in imports(tree, package)
        if (top := module.partition(".")[0]) in MAY_IMPORT
        and top not in MAY_IMPORT[package] | {package}
    ]


def imports_run_down_inside_packages(root: Path) -> list[str]:
    broken = []
    for package, path, tree in sources(root, *PACKAGES):
        order, own = ORDER[package].split(), Path(path).stem
        if own == "__init__":
            continue
        if own not in order:
            broken.append(f"{path} has no place in ORDER; give it one below what it imports")
            continue
        for module, name, line in imports(tree, package):
            top, _, inner = module.partition(".")
            target = inner.partition(".")[0] or name
            if top == package and target not in order[: order.index(own)]:
                broken.append(f"{path}:{line} imports {module} {name}: not before it in ORDER")
    return broken


def public_names(root: Path, package: str) -> set[str]:
    tree = ast.parse((root / package / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return set(ast.literal_eval(value))
    return set()


def examples_use_public_faces(root: Path) -> list[str]:
    faces = {package: public_names(root, package) for package in PACKAGES}
    return [
        f"{path}:{line} imports {name or 'all'} of {module}: write from {top} import a public name"
        for _, path, tree in sources(root, "examples")
        for module, name, line in imports(tree, "examples")
        if (top := module.partition(".")[0]) in faces and (module != top or name not in faces[top])
    ]


def nnsight_has_one_door(root: Path) -> list[str]:
    return [
        f"{path}:{line} imports nnsight: only {sorted(MAY_IMPORT_NNSIGHT)} may"
        for package, path, tree in sources(root, *MAY_IMPORT)
        for module, _, line in imports(tree, package)
        if module.partition(".")[0] == "nnsight" and path not in MAY_IMPORT_NNSIGHT
    ]


def files_are_short(root: Path) -> list[str]:
    return [
        f"{path} has {lines} lines, at most {MAX_FILE}: it is two files"
        for _, path, _ in sources(root, *MAY_IMPORT)
        if (lines := len((root / path).read_text(encoding="utf-8").splitlines())) > MAX_FILE
    ]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def functions_are_short(root: Path) -> list[str]:
    return [
        f"{path}:{f.lineno} {f.name} has {lines} lines, at most {MAX_FUNCTION}"
        for _, path, tree in sources(root, *MAY_IMPORT)
        for f in functions(tree)
        if (lines := (f.end_lineno or f.lineno) - f.lineno + 1) > MAX_FUNCTION
    ]


def no_except_is_broad(root: Path) -> list[str]:
    def broad(kind: ast.expr | None) -> bool:
        parts = kind.elts if isinstance(kind, ast.Tuple) else [kind]
        return any(p is None or ast.unparse(p) in ("Exception", "BaseException") for p in parts)

    broken = []
    for _, path, tree in sources(root, *MAY_IMPORT):
        for node in ast.walk(tree):
            match node:
                case ast.ExceptHandler(type=kind) if broad(kind):
                    broken.append(f"{path}:{node.lineno} catches everything: name what may happen")
                case ast.Call(func=func, args=kinds) if ast.unparse(func).endswith("suppress"):
                    if any(map(broad, kinds)):
                        broken.append(f"{path}:{node.lineno} suppresses everything")
    return broken


def safe_loads(tree: ast.Module) -> set[ast.expr]:
    """Every `torch.save`, and the `torch.load` of every call that says weights_only=True."""
    safe = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute() if ast.unparse(node) == "torch.save":
                safe.add(node)
            case ast.Call(func=ast.Attribute() as called, keywords=said):
                if "weights_only=True" in map(ast.unparse, said):
                    safe.add(called)
    return safe


def files_are_read_safely(root: Path) -> list[str]:
    broken = []
    for package, path, tree in sources(root, *MAY_IMPORT):
        for module, name, line in imports(tree, package):
            if module.partition(".")[0] in UNSAFE_MODULES or f"{module}.{name}" in UNSAFE_CALLS:
                broken.append(f"{path}:{line} imports {module} {name}: use safetensors or JSON")
        safe = safe_loads(tree) if path in MAY_LOAD_TORCH else set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_CALLS:
                if node not in safe:
                    where = f"{path}:{node.lineno} uses {ast.unparse(node)}"
                    broken.append(f"{where}: use safetensors, or weights_only=True at its one door")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                broken.append(f"{path}:{node.lineno} allows pickle: use safetensors")
    return broken


def packages_do_not_print(root: Path) -> list[str]:
    return [
        f"{path}:{node.lineno} prints: return it, or raise"
        for _, path, tree in sources(root, *PACKAGES)
        if path not in MAY_PRINT
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]


def public_definitions_have_docstrings(root: Path) -> list[str]:
    return [
        f"{path}:{node.lineno} {node.name} has no docstring"
        for _, path, tree in sources(root, *PACKAGES)
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]


Rule = Callable[[Path], list[str]]
PLANTED: dict[Rule, dict[str, str]] = {  # rule: file to what breaks the rule there
    imports_run_down_between_packages: {
        "dense/twin.py": "import bridges\n",
        "sparse/model.py": "def f():\n    from dense.sites import probe\n",
        "bridges/run.py": "from evals import Report\n",
        "evals/run.py": "import examples.quickstart\n",
        "dense/sites.py": 'import_module("sparse.model")\n',
    },
    imports_run_down_inside_packages: {
        "sparse/model.py": "from .prune import prune\n",
        "dense/sites.py": "from dense.model import DenseModel\n",
        "bridges/losses.py": "from . import transfer\n",
        "evals/scores.py": "if TYPE_CHECKING:\n    from .report import Report\n",
        "dense/twin.py": 'import_module("dense.edit")\n',
        "sparse/newcomer.py": "",
    },
    examples_use_public_faces: {
        "examples/deep.py": "from sparse.model import SparseGPT\n",
        "examples/private.py": "from sparse import _hidden\n",
        "examples/whole.py": "import sparse\n",
    },
    nnsight_has_one_door: {
        "dense/model.py": "import nnsight\n",
        "evals/view.py": "from nnsight import NNsight\n",
    },
    files_are_short: {"dense/model.py": "\n" * (MAX_FILE + 1)},
    functions_are_short: {"examples/long.py": "def f():\n" + "    pass\n" * MAX_FUNCTION},
    no_except_is_broad: {
        "sparse/a.py": "try:\n    f()\nexcept:\n    pass\n",
        "sparse/b.py": "try:\n    f()\nexcept (OSError, Exception):\n    pass\n",
        "sparse/c.py": "with contextlib.suppress(BaseException):\n    f()\n",
    },
    files_are_read_safely: {
        "sparse/a.py": "import pickle\n",
        "sparse/b.py": "import torch\n\nx = torch.load('x')\n",
        "sparse/c.py": "from torch import load\n",
        "sparse/d.py": "import numpy\n\nx = numpy.load('x', allow_pickle=True)\n",
        "sparse/e.py": "import torch\n\nx = torch.load('x', weights_only=True)\n",
        "sparse/release_files.py": "import torch\n\nx = torch.load('x', weights_only=False)\n",
    },
    packages_do_not_print: {"evals/report.py": "print(1)\n"},
    public_definitions_have_docstrings: {
        "sparse/a.py": "def f():\n    return 1\n",
        "sparse/b.py": "class A:\n    x = 1\n",
    },
}
HARMLESS = {
    "sparse/__init__.py": '__all__ = ["prune"]\n\nfrom .prune import prune\n',
    "dense/__init__.py": "",
    "bridges/__init__.py": "",
    "evals/__init__.py": "",
    "sparse/release_files.py": "import torch\n\nx = torch.load('x', weights_only=True)\n"
    "torch.save(x, 'x')\n",
    "sparse/prune.py": "import torch\nfrom .model import SparseGPT\n\n\ndef _f():\n    pass\n",
    "bridges/run.py": "from dense import DenseModel\nfrom sparse.model import SparseGPT\n",
    "dense/edit.py": "import nnsight\n",
    "evals/__main__.py": "print(1)\n",
    "examples/good.py": "from sparse import prune\n\nprint(prune)\n",
}


def name_of(rule: Rule) -> str:
    return rule.__name__.replace("_", " ")


def plant(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.mark.parametrize("rule", PLANTED, ids=name_of)
def test_the_house_stands(rule: Rule):
    assert not (broken := rule(ROOT)), "\n".join(broken)


@pytest.mark.parametrize("rule", PLANTED, ids=name_of)
def test_a_harmless_tree_breaks_no_rule(rule: Rule, tmp_path: Path):
    assert not rule(plant(tmp_path, HARMLESS))


@pytest.mark.parametrize(
    ("rule", "path"),
    [(rule, path) for rule, files in PLANTED.items() for path in files],
    ids=lambda x: x if isinstance(x, str) else name_of(x),
)
def test_a_planted_violation_is_found(rule: Rule, path: str, tmp_path: Path):
    broken = rule(plant(tmp_path, HARMLESS | {path: PLANTED[rule][path]}))
    assert len(broken) == 1 and broken[0].startswith(path)


def test_every_package_is_looked_at():
    seen = {package for package, _, _ in sources(ROOT, *MAY_IMPORT)}
    assert seen == set(MAY_IMPORT)
    assert all(not list((ROOT / p).glob("*/*.py")) for p in MAY_IMPORT), "a package has folders"
