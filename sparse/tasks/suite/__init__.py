"""The built-in tasks, by name: a suite about Python code and one about English.

A suite is a folder, a recipe a constant in one of its files. To add a task, copy a recipe, and name
it here.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from sparse.tasks.recipe import Recipe, make
from sparse.tasks.task import VARIANTS, Task

from .english import facts, grammar, people
from .python import blocks, brackets, strings

PYTHON: dict[str, Recipe] = {
    "single_double_quote": strings.SINGLE_DOUBLE_QUOTE,
    "bracket_counting": brackets.BRACKET_COUNTING,
    "while_return_true": blocks.WHILE_RETURN_TRUE,
    "set_or_string": strings.SET_OR_STRING,
    "set_or_string_fixedvarname": strings.SET_OR_STRING_FIXEDVARNAME,
    "final_kwarg": brackets.FINAL_KWARG,
    "class_init": brackets.CLASS_INIT,
    "with_as": blocks.WITH_AS,
    "bracket_brace": brackets.BRACKET_BRACE,
    "with_open": blocks.WITH_OPEN,
    "for_while": blocks.FOR_WHILE,
    "else_elif": blocks.ELSE_ELIF,
    "fstring_brace": strings.FSTRING_BRACE,
    "if_ternary": blocks.IF_TERNARY,
    "var_swap": brackets.VAR_SWAP,
    "indent_for": blocks.INDENT_FOR,
    "lambda_func": blocks.LAMBDA_FUNC,
    "if_equals": blocks.IF_EQUALS,
    "enumerate_range": blocks.ENUMERATE_RANGE,
    "var_if": blocks.VAR_IF,
}
"""The 20 tasks of Gao et al. 2025, Table 1."""
ENGLISH: dict[str, Recipe] = {
    "pronoun": people.PRONOUN,
    "possessive": people.POSSESSIVE,
    "ioi_simple": people.IOI_SIMPLE,
    "ioi_relaxed": people.IOI_RELAXED,
    "tense": grammar.TENSE,
    "question_mark": grammar.QUESTION_MARK,
    "a_an": grammar.A_AN,
    "agreement": grammar.AGREEMENT,
    "greater_than": facts.GREATER_THAN,
    "capital": facts.CAPITAL,
}
"""Tasks for models of English."""
SUITE = PYTHON | ENGLISH
CHANGES = (*VARIANTS, "nonsense")
"""What may follow the name of a task, each after a colon."""


def task_names() -> tuple[str, ...]:
    """Return the names of the built-in tasks; each has a twin called `<name>:nonsense`.

    >>> from sparse import task_names
    >>> "single_double_quote" in task_names(), len(task_names())
    (True, 30)
    """
    return tuple(SUITE)


def get_task(name: str | Path, variant: str | None = None) -> Task:
    """Return a built-in task, or the task in a .jsonl file of one's own (`Task.from_jsonl`).

    After either name may stand, each after a colon, a variant (`:longer`, `:distractors`; or give
    `variant`) and `:nonsense`, the nonsense twin. Raises ValueError for an unknown name, and
    FileNotFoundError for a file that is not there.

    >>> from sparse import get_task
    >>> task = get_task("single_double_quote")
    >>> task.train[0].target_1, task.train[0].target_2
    ('"\\n', "'\\n")
    >>> get_task("single_double_quote:nonsense").train[0].target_1
    ' The'
    """
    text = str(name)
    file = re.fullmatch(r"(.*\.jsonl)((?::\w*)*)", text, re.DOTALL)
    plain, *changes = (file[2] if file else text).split(":")
    task = _own(Path(file[1])) if file else _built_in(plain, text)
    for change in [*([variant] if variant else []), *changes]:
        if change not in CHANGES:
            raise ValueError(
                f"{text}: no variant is called {change!r}; after a task's name may stand "
                f"{', '.join(f':{known}' for known in CHANGES)}"
            )
        task = task.nonsense() if change == "nonsense" else task.variant(change)
    return task


def _built_in(plain: str, text: str) -> Task:
    if plain not in SUITE:
        near = get_close_matches(plain, SUITE, 1)
        raise ValueError(
            f"no task is called {text!r}{f' (did you mean {near[0]}?)' if near else ''}; there are "
            f"{list(SUITE)}, each also as <name>:nonsense, <name>:longer and <name>:distractors; "
            "for a task of your own name a .jsonl file"
        )
    return _made(plain)


@cache
def _made(plain: str) -> Task:
    return make(plain, SUITE[plain])


def _own(path: Path) -> Task:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there; name a .jsonl file with one pair per line, or one of "
            f"{list(SUITE)}"
        )
    if path.stem in SUITE:
        raise ValueError(
            f"{path} is called like the built-in task {path.stem}, and a run keeps one circuit per "
            "name; rename the file"
        )
    return Task.from_jsonl(path)
