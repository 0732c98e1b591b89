"""The rules of style, counted: no check finds more than its allowed number, which only goes down."""

from pathlib import Path

import check_style as style
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def found() -> list[style.Finding]:
    return style.check(ROOT)[0]


@pytest.mark.parametrize("check", style.ALLOWED)
def test_no_more_than_allowed(check: str, found: list[style.Finding]) -> None:
    places = [str(f) for f in found if f.check == check]
    shown = "\n".join(places[:40])
    assert len(places) <= style.ALLOWED[check], f"{len(places)} found, {style.ALLOWED[check]} allowed (scripts/check_style.py --check '{check}'):\n{shown}"


@pytest.mark.parametrize(
    ("doc", "kind", "problem"),
    [
        ("Read the bars.", "function", None),
        ("List everything that is missing.", "function", None),
        ("Name the series of a file.", "function", None),
        ("Sample `n` rows.", "function", None),
        ("Do nothing.", "function", None),
        ("What the ledger has under a checksum.", "function", "question"),
        ("Whether rows follow each other.", "class", "question"),
        ("True if it is a bar frame.", "property", "question"),
        ("True range as a fraction of the close.", "function", "noun"),
        ("Is it causal?", "function", "question"),
        ("The rows of a file.", "function", "noun"),
        ("The rows of a file.", "property", None),
        ("Mean absolute error.", "function", "noun"),
        ("Sample standard deviation of the last bars.", "function", "noun"),
        ("Digest of the rows.", "function", "noun"),
        ("Reads the rows.", "function", "noun"),
        ("A run and its files.", "class", None),
    ],
)
def test_first_words(doc: str, kind: str, problem: str | None) -> None:
    assert style.first_word_problem(doc, kind) == problem


@pytest.mark.parametrize(
    "text",
    [
        "the baseline stands beside it", "two functions are told apart", "one a row", "3,000 trades a second", "ticks a bar", "made again", "built anew",
        "nobody traded", "the bar at hand", "rows behind a gap", "by luck", "a calm day", "the very features", "it goes on", "what came of it",
        "bring trades down to bars", "Of an event the forecast is a probability.", "Rows. Of each feature the rank is shown.", "the run's question",
        "Would it have paid?", "a wholly covered bar", "whoever reads it", "a stand-in for the server",
    ],
)  # fmt: skip
def test_words_found(text: str) -> None:
    assert list(style.lint_words(text)), text


@pytest.mark.parametrize(
    "text",
    [
        "`stand` and `beside` are names", "z stands for the score", "a stand-alone file", "the forecast of a bar is its mean", "once a day", "is a bar",
        "trades per second", "one of the rows", "the very first bar", "price stood still", "it is going on to the next", "ongoing", "a question of cost", "held-out data",
        "your own features", "leaves nothing behind", "the model behind the interval", "as a row", "the middle of the bar", "peer-to-peer", "says what it expected",
    ],
)  # fmt: skip
def test_words_left_alone(text: str) -> None:
    assert list(style.lint_words(text)) == []


def check_cell(source: str, folder: str = "data") -> list[tuple[str, int]]:
    cell = {"cell_type": "code", "source": source}
    return [(check, line) for check, line, _ in style.check_cell(cell, source, folder, "data.bars", "nbs/x.ipynb", style.Totals())]


def test_comments_are_missed() -> None:
    source = (
        '#| export\ndef f(\n    a: int,  # bars\n    b: int,\n) -> int:\n    "Count."\n    return a\n\n'
        'def _g(a: int) -> int:\n    "Count."\n    return a\n\nclass C:\n    "A thing."\n    def m(self, x: int) -> None:\n        "Set x."\n'
    )
    assert check_cell(source) == [("docments", 4), ("docments", 5), ("docments", 15)]


def test_long_cells_and_lines() -> None:
    assert check_cell("#| export\n" + "x = 1\n\n" * 26) == [("long cell", 1)]
    assert check_cell("#| export\n#| slow\n" + "x = 1\n\n" * 25) == []
    assert check_cell("x = '" + "y" * 140 + "'") == [("long line", 1)]


def test_any_and_conditionals() -> None:
    assert check_cell("#| export\nfrom typing import Any\nx: dict[str, Any] = {}\n") == [("any", 3)]
    assert check_cell("x = 1 if y else 2\nawait z", "research") == [("conditional", 1)]
    assert check_cell("x = 1 if y else 2") == []


def test_strings_and_comments_of_a_cell() -> None:
    assert check_cell('beside = f"stands beside {x} there"  # made anew') == [("words", 1), ("words", 1)]
    assert check_cell('ax.hist(x, label="storm")') == [("words", 1)]


def test_code_in_markdown_is_no_prose() -> None:
    text = "Rows `beside` it.\n```sh\nstands beside\n```\n[x](http://a/beside) beside"
    assert [line for line, _ in style.lint_words(style.prose_of_markdown(text))] == [4]
