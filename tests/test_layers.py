"""Imports follow the layers: none goes up, none in a circle, none to a private name, none to a later notebook."""

import json
from pathlib import Path

import check_layers as layers
import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_no_import_breaks_a_rule() -> None:
    found = layers.check(ROOT)
    assert not found, "\n".join(map(str, found))


def test_every_package_has_a_layer() -> None:
    present = {layers.layer_of(m) for m in layers.modules(ROOT)} - set(layers.THIN)
    assert present <= set(layers.LAYERS)


def test_the_table_has_no_circle() -> None:
    "Each layer lists only what was listed before it."
    seen: set[str] = set()
    for layer, below in layers.LAYERS.items():
        assert set(below) <= seen, layer
        seen.add(layer)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    "Project without modules."
    for folder in ("cryptoresearch/data", "cryptoresearch/models", "cryptoresearch/runs", "nbs/data"):
        (tmp_path / folder).mkdir(parents=True)
    for package in ("", "data/", "models/", "runs/"):
        (tmp_path / f"cryptoresearch/{package}__init__.py").touch()
    return tmp_path


def rules(project: Path, **files: str) -> list[str]:
    "Rules that modules break; `data_bars` is data/bars.py."
    for name, source in files.items():
        (project / "cryptoresearch" / (name.replace("_", "/", 1) + ".py")).write_text(source)
    return [v.rule for v in layers.check(project)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ..runs.run import x", ["layer"]),
        ("from cryptoresearch.runs.run import x", ["layer"]),
        ("import cryptoresearch.runs.run", ["layer"]),
        ("from ..runs import run", ["layer"]),
        ("if TYPE_CHECKING:\n    from ..runs.run import x", ["layer"]),
        ("def f():\n    from ..runs.run import x  # heavy: loaded on first use", ["layer"]),
        ("import importlib\nx = importlib.import_module('cryptoresearch.runs.run')", ["layer"]),
        ("from ..errors import E", []),
        ("from .store import x", []),
        ("from . import store", []),
        ("from .store import _x", ["private"]),
        ("from . import store\nstore._x", ["private"]),
        ("from . import store\nstore.__name__", []),
        ("self._x", []),
        ("def f():\n    from .store import x", ["function"]),
        ("def f():\n    from .store import x  # heavy: loaded on first use", []),
        ("from .. import __version__", []),
        ("from .. import read_bars", ["layer"]),
        ("import pandas as pd\npd._libs", []),
    ],
)
def test_rules(project: Path, source: str, expected: list[str]) -> None:
    assert rules(project, errors="", runs_run="", data_store="", data_bars=source) == expected


def test_circles_include_imports_inside_functions(project: Path) -> None:
    found = rules(project, data_a="from .b import x", data_b="from .c import x", data_c="def f():\n    from .a import x  # later")
    assert found == ["cycle"]
    assert layers.check(project)[0].text.startswith("data.a, data.b, data.c")


def test_imports_for_types_make_no_circle(project: Path) -> None:
    assert rules(project, data_a="from .b import x", data_b="if TYPE_CHECKING:\n    from .a import x") == []


def test_thin_modules_may_import_everything(project: Path) -> None:
    assert rules(project, cli="def f():\n    from .runs.run import x", runs_run="") == []


def test_unknown_packages_are_found(project: Path) -> None:
    assert rules(project, other="from .errors import E", errors="") == ["unknown"]


def test_notebooks_import_from_lower_numbers(project: Path) -> None:
    for name, module in (("01_store", "data.store"), ("04_bars", "data.bars"), ("04a_late", "data.late")):
        cell = {"cell_type": "code", "source": [f"#| default_exp {module}"]}
        (project / f"nbs/data/{name}.ipynb").write_text(json.dumps({"cells": [cell]}))
    assert rules(project, data_store="", data_bars="from .store import x", data_late="from .bars import x") == []
    assert rules(project, data_store="", data_bars="from .late import x", data_late="") == ["number"]
