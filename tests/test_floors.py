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
WINGS = {  # package: its wings (and files that stand beside them), ground floor first
    "sparse": "storage ops | tasks text model | training circuits | release",
    "dense": "weights | twin | inputs | sites | opening | probe | stand_ins | proof | "
    "outlying | model | edit | traced | open",
    "bridges": "protocol losses | maps | planted training run_folder | "
    "cost transfer task_circuits | presets",
    "evals": "scores | trials | claims report cache notes | evaluate | __main__",
}
PACKAGES = tuple(WINGS)
MAX_FILE, MAX_FUNCTION = 300, 45  # lines of code; docstrings, comments and blank lines are free
MAX_FOLDER = 12  # files in one folder, __init__ aside
MAY_PRINT = {"evals/__main__.py"}
MAY_IMPORT_NNSIGHT = {"dense/traced.py"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save"}  # files are safetensors and JSON
MAY_LOAD_TORCH = {"sparse/release/files.py"}  # others' released files, and weights_only there


def sources(root: Path, *folders: str) -> Iterator[tuple[str, str, ast.Module]]:
    """Yield (package, path, tree) of the Python files in `folders` and below."""
    for package in folders:
        for path in sorted((root / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            yield package, path.relative_to(root).as_posix(), tree


def imports(tree: ast.Module, path: str) -> Iterator[tuple[str, str, int]]:
    """Yield (module, name or "", line) of every import of the file at `path`, wherever it stands.

    `import_module("x.y")` counts too: a floor is not left by the window. Relative imports are
    resolved: modules are absolute.
    """
    folders = path.split("/")[:-1]
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((alias.name, "", node.lineno) for alias in node.names)
            case ast.ImportFrom():
                above = folders[: len(folders) - node.level + 1] if node.level else []
                module = ".".join([*above, *filter(None, [node.module])])
                yield from ((module, alias.name, node.lineno) for alias in node.names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                inside = ".".join(folders) if name.startswith(".") else ""
                yield inside + name, "", node.lineno


def imports_run_down_between_packages(root: Path) -> list[str]:
    return [
        f"{path}:{line} imports {module}: {package} may name {sorted(MAY_IMPORT[package])}"
        for package, path, tree in sources(root, *MAY_IMPORT)
        for module, _, line in imports(tree, path)
        if (top := module.partition(".")[0]) in MAY_IMPORT
        and top not in MAY_IMPORT[package] | {package}
    ]


def room(package: str, path: str) -> str:
    """Return the wing that a file of `package` stands in, or the file's own name beside them."""
    return path.removeprefix(f"{package}/").partition("/")[0].removesuffix(".py")


def imports_run_down_among_wings(root: Path) -> list[str]:
    """A wing names those of the floors below it; wings of one floor do not know each other."""
    broken = []
    for package, path, tree in sources(root, *PACKAGES):
        floors = {name: i for i, f in enumerate(WINGS[package].split("|")) for name in f.split()}
        own = room(package, path)
        if own == "__init__":
            continue
        if own not in floors:
            broken.append(f"{path} has no place in WINGS; give it one above what it imports")
            continue
        for module, name, line in imports(tree, path):
            top, _, inner = module.partition(".")
            other = inner.partition(".")[0] or name
            if top == package and other != own and floors.get(other, 99) >= floors[own]:
                broken.append(f"{path}:{line} imports {module} {name}: not on a floor below")
    return broken


def imported_files(root: Path, tree: ast.Module, path: str) -> set[str]:
    """Return the files of this repository that a file imports, its own package's face included."""
    found = set()
    for module, name, _ in imports(tree, path):
        base = module.replace(".", "/")
        places = (f"{base}/{name}.py", f"{base}.py", f"{base}/{name}/__init__.py")
        places += (f"{base}/__init__.py",)
        found |= set([p for p in places if (root / p).is_file()][:1])
    return found


def rings(graph: dict[str, set[str]]) -> list[str]:
    """Return one sentence for a ring of imports, or nothing where they run one way."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return way[way.index(node) :]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := walk(other, [*way, node]):
                return found
        done.add(node)
        return []

    for node in sorted(graph):
        if ring := walk(node, []):
            return [f"{ring[0]} imports itself by way of {', '.join(ring[1:])}"]
    return []


def imports_run_one_way_among_files(root: Path) -> list[str]:
    graph = {path: imported_files(root, tree, path) for _, path, tree in sources(root, *PACKAGES)}
    return rings(graph)


def imports_run_one_way_among_folders(root: Path) -> list[str]:
    """A wing and the folders inside it do not import in rings; files beside wings are by WINGS."""

    def folder(path: str) -> str:
        above = path.rpartition("/")[0]
        return path if above in PACKAGES else above

    graph: dict[str, set[str]] = {}
    for _, path, tree in sources(root, *PACKAGES):
        others = {folder(other) for other in imported_files(root, tree, path)}
        graph.setdefault(folder(path), set()).update(others - {folder(path)})
    return rings(graph)


def folders_are_small(root: Path) -> list[str]:
    folders: dict[str, list[str]] = {}
    for _, path, _ in sources(root, *PACKAGES):
        if not path.endswith("/__init__.py"):
            folders.setdefault(path.rpartition("/")[0], []).append(path)
    return [
        f"{folder} holds {len(files)} files, at most {MAX_FOLDER}: it is two wings"
        for folder, files in folders.items()
        if len(files) > MAX_FOLDER
    ]


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
        for module, name, line in imports(tree, path)
        if (top := module.partition(".")[0]) in faces and (module != top or name not in faces[top])
    ]


def nnsight_has_one_door(root: Path) -> list[str]:
    return [
        f"{path}:{line} imports nnsight: only {sorted(MAY_IMPORT_NNSIGHT)} may"
        for package, path, tree in sources(root, *MAY_IMPORT)
        for module, _, line in imports(tree, path)
        if module.partition(".")[0] == "nnsight" and path not in MAY_IMPORT_NNSIGHT
    ]


def code_lines(text: str, tree: ast.Module) -> set[int]:
    """Return the lines that hold code: no blanks, comments, docstrings or field texts."""
    lines = enumerate(text.splitlines(), start=1)
    code = {i for i, x in lines if x.strip() and not x.strip().startswith("#")}
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return code


def files_are_short(root: Path) -> list[str]:
    return [
        f"{path} has {n} lines of code, at most {MAX_FILE}: it is two files"
        for _, path, tree in sources(root, *MAY_IMPORT)
        if (n := len(code_lines((root / path).read_text(encoding="utf-8"), tree))) > MAX_FILE
    ]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def functions_are_short(root: Path) -> list[str]:
    broken = []
    for _, path, tree in sources(root, *MAY_IMPORT):
        code = code_lines((root / path).read_text(encoding="utf-8"), tree)
        for f in functions(tree):
            n = len(code & set(range(f.lineno, (f.end_lineno or f.lineno) + 1)))
            if n > MAX_FUNCTION:
                broken.append(
                    f"{path}:{f.lineno} {f.name} has {n} lines of code, at most {MAX_FUNCTION}"
                )
    return broken


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
    for _, path, tree in sources(root, *MAY_IMPORT):
        for module, name, line in imports(tree, path):
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


def wings_are_mirrored_by_tests(root: Path) -> list[str]:
    """A test file is named after the file or the wing that it tests; laws of several are `laws`."""
    broken = []
    for package in PACKAGES:
        for path in sorted((root / "tests" / package).rglob("test_*.py")):
            inner = path.relative_to(root / "tests")
            folder, name = root / inner.parent, path.stem.removeprefix("test_")
            if inner.parts[1] == "laws":
                continue
            wing = folder.is_dir() and folder.name == name
            if not wing and not (folder / f"{name}.py").is_file():
                where = path.relative_to(root).as_posix()
                broken.append(f"{where} mirrors no {folder.relative_to(root)}/{name}.py")
    return broken


Rule = Callable[[Path], list[str]]
PLANTED: dict[Rule, dict[str, str]] = {  # rule: file to what breaks the rule there
    imports_run_down_between_packages: {
        "dense/twin.py": "import bridges\n",
        "sparse/model/gpt.py": "def f():\n    from dense.sites import probe\n",
        "bridges/run_folder.py": "from evals import Report\n",
        "evals/evaluate.py": "import examples.quickstart\n",
        "dense/sites.py": 'import_module("sparse.model.gpt")\n',
    },
    imports_run_down_among_wings: {
        "sparse/model/gpt.py": "from sparse.circuits.circuit import Circuit\n",
        "sparse/ops/project.py": "from ..model.gpt import SparseGPT\n",
        "sparse/tasks/task.py": "from sparse.text.pack import pack\n",
        "dense/sites.py": "from dense.model import DenseModel\n",
        "bridges/losses/chunked.py": "from bridges import transfer\n",
        "evals/scores/score.py": "if TYPE_CHECKING:\n    from evals.report.report import Report\n",
        "dense/twin.py": 'import_module(".edit", __package__)\n',
        "sparse/newcomer.py": "",
        "sparse/attic/old.py": "",
    },
    imports_run_one_way_among_files: {
        "sparse/model/blocks.py": "from .gpt import SparseGPT\n",
        "sparse/circuits/pruning/prune.py": "from sparse import prune\n",
    },
    imports_run_one_way_among_folders: {
        "sparse/circuits/circuit.py": "from .extract.other import x\n",
    },
    folders_are_small: {"dense/thirteenth.py": ""},
    examples_use_public_faces: {
        "examples/deep.py": "from sparse.model.gpt import SparseGPT\n",
        "examples/private.py": "from sparse import _hidden\n",
        "examples/whole.py": "import sparse\n",
    },
    nnsight_has_one_door: {
        "dense/model.py": "import nnsight\n",
        "evals/report/page.py": "from nnsight import NNsight\n",
    },
    files_are_short: {"dense/model.py": "x = 1\n" * (MAX_FILE + 1)},
    functions_are_short: {"examples/long.py": "def f():\n" + "    pass\n" * MAX_FUNCTION},
    no_except_is_broad: {
        "sparse/ops/a.py": "try:\n    f()\nexcept:\n    pass\n",
        "sparse/ops/b.py": "try:\n    f()\nexcept (OSError, Exception):\n    pass\n",
        "sparse/ops/c.py": "with contextlib.suppress(BaseException):\n    f()\n",
    },
    files_are_read_safely: {
        "sparse/ops/a.py": "import pickle\n",
        "sparse/ops/b.py": "import torch\n\nx = torch.load('x')\n",
        "sparse/ops/c.py": "from torch import load\n",
        "sparse/ops/d.py": "import numpy\n\nx = numpy.load('x', allow_pickle=True)\n",
        "sparse/ops/e.py": "import torch\n\nx = torch.load('x', weights_only=True)\n",
        "sparse/release/files.py": "import torch\n\nx = torch.load('x', weights_only=False)\n",
    },
    packages_do_not_print: {"evals/report/report.py": "print(1)\n"},
    public_definitions_have_docstrings: {
        "sparse/ops/a.py": "def f():\n    return 1\n",
        "sparse/ops/b.py": "class A:\n    x = 1\n",
    },
    wings_are_mirrored_by_tests: {
        "tests/sparse/test_project.py": "",
        "tests/sparse/attic/test_project.py": "",
        "tests/sparse/ops/test_projection.py": "",
        "tests/bridges/ops/test_project.py": "",
        "tests/dense/model/test_model.py": "",
    },
}
HARMLESS = {
    "sparse/__init__.py": '__all__ = ["prune"]\n\nfrom .circuits.pruning.prune import prune\n',
    "dense/__init__.py": "",
    **{
        f"dense/{name}.py": ""
        for name in WINGS["dense"].replace("|", " ").split()
        if name != "opening"
    },
    "bridges/__init__.py": "",
    "evals/__init__.py": "",
    "sparse/release/files.py": "import torch\n\nx = torch.load('x', weights_only=True)\n"
    "torch.save(x, 'x')\n",
    "sparse/model/gpt.py": "from sparse.ops.project import project_\n\nfrom .blocks import Block\n",
    "sparse/model/blocks.py": "",
    "sparse/ops/project.py": "",
    "sparse/circuits/circuit.py": "",
    "sparse/circuits/extract/other.py": "",
    "sparse/circuits/extract/circuit_module.py": "from ..circuit import Circuit\n",
    "sparse/circuits/pruning/prune.py": "import torch\n\nfrom sparse.model.gpt import SparseGPT\n"
    "\n\ndef _f():\n    pass\n",
    "bridges/run_folder.py": "from dense import DenseModel\nfrom sparse.model.gpt import SparseGPT",
    "dense/traced.py": "import nnsight\n",
    "dense/edit.py": '"""'
    + "Prose is free.\n" * MAX_FILE
    + '"""\n'
    + "# so are comments\n" * MAX_FILE,
    "evals/__main__.py": "print(1)\n",
    "examples/good.py": "from sparse import prune\n\nprint(prune)\n",
    "tests/sparse/conftest.py": "",
    "tests/sparse/laws/test_reliable.py": "",
    "tests/sparse/ops/test_ops.py": "",
    "tests/sparse/ops/test_project.py": "",
    "tests/dense/test_model.py": "",
    "tests/helpers/small_run.py": "",
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
    folder = path.rpartition("/")[0]
    assert len(broken) == 1 and (path in broken[0] or broken[0].startswith(f"{folder} "))


def test_every_package_and_every_wing_is_looked_at():
    seen = {path for _, path, _ in sources(ROOT, *MAY_IMPORT)}
    assert {path.partition("/")[0] for path in seen} == set(MAY_IMPORT)
    for package, floors in WINGS.items():
        rooms = {room(package, path) for path in seen if path.startswith(f"{package}/")}
        assert rooms - {"__init__"} == set(floors.replace("|", " ").split())
