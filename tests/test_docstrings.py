"""Every function on a public face has an example in its docstring, and all examples run."""

import doctest
import inspect
from importlib import import_module

import jaxtyping
import pytest

FACES = ("sparse", "sparse.release", "dense", "bridges", "evals")
MORE = ("sparse.ops.seeds.seed_of",)  # examples off the faces


def functions(face: str) -> list[str]:
    """Return the dotted names of the functions on a face."""
    module = import_module(face)
    named = {name: getattr(module, name) for name in module.__all__}
    return [f"{face}.{name}" for name, x in sorted(named.items()) if inspect.isfunction(x)]


def classes(face: str) -> list[str]:
    """Return the dotted names of the classes on a face whose docstring, or a method's, has one."""
    module = import_module(face)
    named = {name: getattr(module, name) for name in module.__all__}
    return [
        f"{face}.{name}"
        for name, x in sorted(named.items())
        if inspect.isclass(x) and ">>>" in inspect.getsource(x)
    ]


def examples(name: str) -> list[doctest.DocTest]:
    module, _, last = name.rpartition(".")
    found = inspect.unwrap(getattr(import_module(module), last))
    finder = doctest.DocTestFinder(recurse=inspect.isclass(found))
    globs = dict(vars(inspect.getmodule(found)))
    return [test for test in finder.find(found, last, globs=globs) if test.examples]


def failures(test: doctest.DocTest) -> str:
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    return "".join(said)


@pytest.fixture(autouse=True)
def as_a_user_runs_them(tmp_path, monkeypatch):
    """In an empty folder, without the suite's checks of shapes: torch.compile cannot trace them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("name", [name for face in FACES for name in functions(face)] + [*MORE])
def test_every_function_on_a_face_has_an_example_that_runs(name):
    (test,) = examples(name)
    assert not (said := failures(test)), said


@pytest.mark.parametrize("name", [name for face in FACES for name in classes(face)])
def test_examples_of_classes_run(name):
    for test in examples(name):
        assert not (said := failures(test)), said


def test_control_a_wrong_example_is_seen():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert "Expected:\n    3\nGot:\n    2" in failures(wrong)
