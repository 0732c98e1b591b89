"""The wheel, without the development tools, imports and runs: next to the libraries that are here, and alone in an empty environment."""

import ast
import json
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import docments
import pytest
from test_notebooks import LIB, TRAVEL, clean_environment, copy_project

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
DEVELOPMENT = ("nbdev", "fastcore", "execnb", "pytest", "ruff", "mypy", "moto", "playwright", "hypothesis", "polars", "matplotlib", "jupyterlab")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The wheel, built from a copy: building leaves nothing in the repository."
    home, out = copy_project(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, home]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = out.glob("*.whl")
    return built


HIDE = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: None if name.partition(".")[0] in {DEVELOPMENT!r} else find(name, path, target)
"""


@pytest.fixture(scope="module", params=["hiding", pytest.param("empty", marks=pytest.mark.heavy)])
def empty(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Folder with the programs of an environment: the wheel and libraries of this one, where development tools cannot be found; or the wheel and what it requires."
    import venv

    import make_venv

    folder = tmp_path_factory.mktemp(request.param) / "venv"
    venv.create(folder, with_pip=request.param == "empty", symlinks=sys.platform != "win32")
    if request.param == "empty":
        make_venv.install(folder, [str(wheel)], quiet=True, bytecode=False)
    else:
        python = make_venv.python_of(folder)
        subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
        (site,) = folder.glob("**/site-packages")
        (site / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        (site / "sitecustomize.py").write_text(HIDE)
    return make_venv.python_of(folder).parent


def documented(file: Path, function: str) -> list[tuple[str, str]]:
    "Names and comments of a function's parameters and of its return, all of which must have one."
    source = file.read_text(encoding="utf-8")
    (node,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == function)
    entries = docments.signature(node, docments.comments_by_line(source))
    assert all(e.comment for e in entries)
    return [(e.name, e.comment) for e in entries]


def test_no_development_tool_is_declared(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        (name,) = (n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
        required = [line.split(": ")[1] for line in z.read(name).decode().splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert len(required) > 10
    assert not {re.split(r"[^\w-]", r)[0].lower().replace("_", "-") for r in required} & set(DEVELOPMENT)


def run(command: list[object], cwd: Path, code: int | None = 0) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean_environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert code is None or done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_no_development_tool_is_required(empty: Path, tmp_path: Path) -> None:
    code = f"import importlib.util as u, json; print(json.dumps([m for m in {DEVELOPMENT!r} if u.find_spec(m)]))"
    assert json.loads(run([empty / "python", "-c", code], tmp_path)) == []


def test_every_module_imports(empty: Path, tmp_path: Path) -> None:
    modules = [".".join(("cryptoresearch", *p.relative_to(LIB).with_suffix("").parts)).removesuffix(".__init__") for p in sorted(LIB.rglob("*.py"))]
    code = f"import importlib, json; print(json.dumps([importlib.import_module(m).__file__ for m in {modules!r}]))"
    files = json.loads(run([empty / "python", "-c", code], tmp_path).splitlines()[-1])
    assert len(files) == len(modules) and all("site-packages" in f for f in files)


def test_the_notebooks_travel_along(empty: Path, tmp_path: Path) -> None:
    code = "import importlib.resources as r; print(*(f.name for k in ('research', 'dashboards') for f in (r.files('cryptoresearch')/'notebooks'/k).iterdir()))"
    inside = run([empty / "python", "-c", code], tmp_path).split() if TRAVEL else []
    assert {Path(p).name for p in TRAVEL} <= set(inside)


def test_help_explains_parameters(empty: Path, tmp_path: Path) -> None:
    "The comments behind the parameters of `read_bars` and the fields of a dataclass, as `help` prints them."
    code = "from cryptoresearch.data.bars import read_bars; from cryptoresearch.data.archive import StoredObject; help(read_bars); help(StoredObject)"
    lines = [line.strip(" |") for line in run([empty / "python", "-c", code], tmp_path).splitlines()]
    expected = documented(LIB / "data" / "bars.py", "read_bars")
    assert len(expected) > 5 and expected[-1][0] == "return"
    at = lines.index("Parameters")
    for name, comment in expected:
        at = next(i for i, line in enumerate(lines) if i > at and (line == "Returns" if name == "return" else line.startswith(f"{name} :")))
        # a long comment is wrapped
        assert " ".join(lines[at : at + 8]).count(comment) == 1, f"{name}: {comment}"
    assert "Attributes" in lines


def test_help_of_commands_stays_short(empty: Path, tmp_path: Path) -> None:
    assert "---" not in run([empty / "cryptoresearch", "ingest", "--help"], tmp_path)


def test_the_wheel_makes_the_same_runs(empty: Path, tmp_path: Path) -> None:
    "Docstrings of the wheel differ from those of the checkout; the identity of the code does not."
    from cryptoresearch.runs.identity import code_version

    assert run([empty / "python", "-c", "from cryptoresearch.runs.identity import code_version; print(code_version())"], tmp_path).strip() == code_version()


def test_the_command_line_starts(empty: Path, tmp_path: Path) -> None:
    text = run([empty / "cryptoresearch", "--help"], tmp_path)
    assert all(command in text for command in ("demo", "doctor", "train", "runs", "reproduce", "api", "dashboards", "stream", "replay"))


def test_doctor_reports(empty: Path, tmp_path: Path) -> None:
    "In an empty folder some checks may fail, each with a remedy; none of them as a traceback."
    text = run([empty / "cryptoresearch", "doctor"], tmp_path, code=None)
    assert "Traceback" not in text and "ModuleNotFoundError" not in text
    assert "duckdb" in text.lower()
