"""Comments behind parameters become sections of the docstrings, and nothing else of a module changes."""

import ast
import inspect
from pathlib import Path
from typing import Any

import docments
import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "cryptoresearch").rglob("*.py"))


def without_docstrings(source: str) -> str:
    "Code of a module, each docstring replaced by one word."
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Expr(ast.Constant("doc"))
    return ast.dump(tree)


def build(source: str) -> dict[str, Any]:
    "Names of a module after the rewriting, which must leave its code as it was."
    text = docments.with_sections(source)
    assert without_docstrings(text) == without_docstrings(source)
    found: dict[str, Any] = {}
    exec(compile("from __future__ import annotations\n" + text, "module", "exec"), found)
    return found


def doc(source: str, name: str = "f") -> str:
    return inspect.getdoc(eval(name, build(source))) or ""


def test_parameters_and_return() -> None:
    source = '''
def f(
    con: Connection,  # the store
    symbol: str = "BTC#USDT",  # such as `BTCUSDT`; "#" is no comment
    *rest: int,  # more
    spec: str | None = None,
    **kept,  # passed on
) -> pd.DataFrame:  # bar frame, UTC index
    "Read bars."
    return 1
'''
    assert doc(source).split("\n") == [
        "Read bars.",
        "",
        "Parameters",
        "----------",
        "con : Connection",
        "    the store",
        "symbol : str, default 'BTC#USDT'",
        '    such as `BTCUSDT`; "#" is no comment',
        "*rest : int",
        "    more",
        "spec : str | None, default None",
        "**kept",
        "    passed on",
        "",
        "Returns",
        "-------",
        "pd.DataFrame",
        "    bar frame, UTC index",
    ]


def test_annotations_and_defaults_over_several_lines() -> None:
    source = '''
def f(
    a: dict[
        str, int
    ] = {
        "x": 1,
    },  # counts by name
    # the comment above, which takes
    # two lines
    b: int = 2,
) -> tuple[
    int,
    int,
]:  # both
    "Count."
'''
    text = doc(source)
    assert "a : dict[str, int], default {'x': 1}\n    counts by name" in text
    assert "b : int, default 2\n    the comment above, which takes two lines" in text
    assert text.endswith("tuple[int, int]\n    both")


def test_one_line_gives_its_comment_to_what_ends_it() -> None:
    text = doc('def f(a: int, b: int) -> int:  # their sum\n    "Add."\n')
    assert text.endswith("Returns\n-------\nint\n    their sum") and "Parameters" not in text


def test_methods_of_every_kind() -> None:
    source = '''
class C:
    "A thing."

    def __init__(self, a: int):  # start value
        "Set a."

    @property
    def p(self) -> int:  # bars
        "Count."

    @classmethod
    def c(
        cls,
        x: int,  # rows
    ) -> "C":  # a new one
        "Make."

    @staticmethod
    async def s(
        x: int,  # rows
    ) -> None:
        """Wait
        for rows.
        """
'''
    assert doc(source, "C.p").endswith("int\n    bars")
    assert "x : int\n    rows" in doc(source, "C.c") and "cls" not in doc(source, "C.c") and "self" not in doc(source, "C.__init__")
    assert doc(source, "C.s") == "Wait\nfor rows.\n\nParameters\n----------\nx : int\n    rows"
    assert doc(source, "C") == "A thing.\n\nParameters\n----------\na : int\n    start value"


def test_a_public_class_shows_the_constructor_of_its_private_base() -> None:
    source = '''
class _Options:
    "Hold options."

    def __init__(self, a: int) -> None:  # start value
        self.a = a


class _Middle(_Options):
    "Use them."


class C(_Middle):
    "A thing."


class D(C):
    "Another thing."
'''
    assert doc(source, "C") == "A thing.\n\nParameters\n----------\na : int\n    start value"
    assert doc(source, "_Middle") == "Use them." and doc(source, "D") == "Another thing."


def test_dataclass_fields_are_attributes() -> None:
    source = '''
from dataclasses import dataclass, field

@dataclass(frozen=True)
class D:
    "A row."
    n: int  # bars
    names: list[str] = field(default_factory=list)  # of columns
    _hidden: int = 0  # private
    K = 3
'''
    expected = "A row.\n\nAttributes\n----------\nn : int\n    bars\nnames : list[str], default field(default_factory=list)\n    of columns"
    assert doc(source, "D") == expected


def test_overloads_and_decorators() -> None:
    source = '''
from typing import overload
from functools import cache

@overload
def f(a: int) -> int: ...
@overload
def f(a: str) -> str: ...
@cache  # kept
def f(
    a,  # anything
):
    "Return a."
    return a
'''
    assert doc(source) == "Return a.\n\nParameters\n----------\na\n    anything"


@pytest.mark.parametrize(
    "source",
    [
        'def f(a: int) -> None:\n    "Do nothing."\n',
        'def f(a: int):\n    # no comment of a parameter\n    "Do nothing."\n',
        '# above\ndef f(a: int):\n    "Do nothing."\n',
        "def f(\n    a: int,  # without a docstring\n):\n    return a\n",
        'def f(): "On one line."\n',
        'import typer\ndef f(\n    a: int,  # help\n):\n    "Help of a command."\n',
        'from fastapi import FastAPI\ndef f(\n    a: int,  # help\n):\n    "Description of a route."\n',
    ],
)
def test_left_as_it_is(source: str) -> None:
    assert docments.with_sections(source) == source


def test_odd_docstrings() -> None:
    source = 'def f(\n    a: int,  # a "quoted" \\d+ and \\"""\n):\n    r"Match \\d+ in `ä`."  # noqa\n    return "\x0c"\n'
    assert "Match \\d+ in `ä`." in doc(source) and 'a "quoted" \\d+ and \\"""' in doc(source)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_code_of_the_package_is_unchanged(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert without_docstrings(docments.with_sections(source)) == without_docstrings(source)
