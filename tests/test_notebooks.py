"""Each notebook runs, is clean, and is what its module was exported from."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
from notebook_runner import Outcome, Runner

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
LIB = ROOT / "cryptoresearch"
BIN = Path(sys.executable).parent

# these run elsewhere: benchmarks by `make bench`; research and dashboards need a store, and tests of their own give them one
NOT_RUN_HERE = ("benchmarks", "research", "dashboards")
TIMEOUT_S = 900


def notebooks(*folders: str) -> list[str]:
    "Notebooks below `folders` (all when none is named), seen from the repository's root."
    found = (path.relative_to(ROOT) for path in sorted(NBS.rglob("*.ipynb")))
    kept = (path for path in found if not any(part.startswith((".", "_")) for part in path.parts))
    return [path.as_posix() for path in kept if not folders or path.parts[1] in folders]


ALL = notebooks()
RUN = [path for path in ALL if Path(path).parts[1] not in NOT_RUN_HERE]
TRAVEL = notebooks("research", "dashboards")  # they are part of the wheel


def cells(path: str | Path) -> list[dict]:
    "Cells of a notebook, with the source as one string."
    found = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found]


def is_tagged(cell: dict) -> bool:
    "True for the cell behind which papermill puts its parameters."
    return "parameters" in cell["metadata"].get("tags", [])


def default_exp(path: str) -> str | None:
    "Module that a notebook exports to."
    for cell in cells(path):
        if cell["cell_type"] == "code" and (match := re.search(r"^#\|\s*default_exp\s+(\S+)", cell["source"], re.MULTILINE)):
            return match[1]
    return None


def test_ids_of_cells_are_unique() -> None:
    "Tools that read notebooks replace the second cell of an id by one with another."
    twice = {path: [i for i in ids if ids.count(i) > 1] for path in ALL if (ids := [cell["id"] for cell in cells(path)])}
    assert not {path: found for path, found in twice.items() if found}


def copy_project(to: Path) -> Path:
    "What nbdev works on, in a folder of its own: no run of a notebook and no check of it may change the repository."

    def ignore(folder: str, names: list[str]) -> set[str]:  # a kernel at work may have its sockets there
        left_out = {"__pycache__", ".ipynb_checkpoints", ".last_checked"}
        return {n for n in names if n in left_out or not ((Path(folder) / n).is_file() or (Path(folder) / n).is_dir())}

    for name in ("nbs", "cryptoresearch", "scripts"):
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
    for name in ("settings.ini", "setup.py", "pyproject.toml", "constraints.txt", ".env.example", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, to / name)
    return to


def difference(left: Path, right: Path, pattern: str) -> list[str]:
    "Files that differ between two folders or are in one of them only."
    names = {p.relative_to(side).as_posix() for side in (left, right) for p in side.rglob(pattern) if "__pycache__" not in p.parts}
    return sorted(n for n in names if not ((left / n).is_file() and (right / n).is_file() and (left / n).read_bytes() == (right / n).read_bytes()))


def clean_environment() -> dict[str, str]:
    "For a process that finds its project by its working folder; the notebook's own folder says where that is."
    return {k: v for k, v in os.environ.items() if k != "CRYPTORESEARCH_HOME"} | {"PYTHONWARNINGS": "ignore", "MPLBACKEND": "agg"}


def skip_flags() -> str:
    "Directives of cells that nbdev leaves out unless asked."
    parser = ConfigParser(delimiters=["="], comment_prefixes=(";",))
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]["tst_flags"]


# --- running


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A copy of the project: the working folder of notebooks."
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.mark.timeout(TIMEOUT_S * 2)
@pytest.mark.parametrize("path", RUN)
def test_runs(path: str, runner: Runner, project: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    "A notebook runs from top to bottom in a process of its own, without the user's settings; next to an S3 server where it has cells `#| minio`."
    flags = "minio" if request.config.getoption("--quick") else "slow minio heavy" if request.config.getoption("--heavy") else "slow minio"
    env = clean_environment() | {"TMPDIR": str(tmp_path)}
    if any(re.search(r"^#\|\s*minio\b", cell["source"], re.MULTILINE) for cell in cells(path)):
        env |= request.getfixturevalue("s3").env
    done = runner.run(project / path, project, env, tmp_path / "output.txt", flags, skip_flags(), TIMEOUT_S)
    output = done.output.replace(str(project), str(ROOT))
    print(f"{done.cpu_s} s of processor time\n{output}")
    if done.code and "DataNotFound" in output and not Path(os.environ["CRYPTORESEARCH_SHARED_DATA"]).is_dir():
        pytest.skip("needs the real market data, which are absent (CRYPTORESEARCH_SHARED_DATA)")
    # nbdev names the notebook and the cell's number above the traceback
    assert done.code == 0, f"{path} failed:\n{output[-6000:]}"


FORKED = """
import os, sys, threading
assert os.environ.get("LEFT") is None and "left" not in globals() and os.getpgid(0) == os.getpid(), "something is left of another notebook"
os.environ["LEFT"] = "1"; left = 1; sys.path.insert(0, "left"); os.chdir("/")
print("ran", [p for p in sys.path if p == "left"], len(threading.enumerate()))
"""


def test_notebooks_do_not_meet(runner: Runner, project: Path, tmp_path: Path) -> None:
    "Variables, environment, working folder and sys.path of one notebook are gone in the next; an error and an endless loop are reported."
    import nbformat

    def run(source: str, timeout_s: float = 300) -> Outcome:
        doc = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        nbformat.write(doc, tmp_path / "a.ipynb")
        return runner.run(tmp_path / "a.ipynb", project, clean_environment(), tmp_path / "out.txt", timeout_s=timeout_s)

    for _ in range(2):
        done = run(FORKED + "assert sys.path.count('left') == 1")
        assert done.code == 0, done.output
    failed = run("1 / 0")
    assert failed.code == 1 and "ZeroDivisionError" in failed.output and "Cell #1" in failed.output
    late = run("import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)", timeout_s=3)
    assert late.code != 0 and "not finished after 3 s" in late.output
    assert run("1").code == 0


def test_compiled_functions_of_the_package_are_kept_by_what_they_are_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Another copy of the project loads them; a changed helper function has them compiled again."
    import numba_cache
    from numba.core import caching

    for owner, name in ((caching.CacheImpl, "_locator_classes"), (caching.Cache, "_index_key"), (caching.Cache, "_save_overload")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    numba_cache.install(tmp_path / "cache")

    def made(copy: str, helper: str) -> Any:
        file = tmp_path / copy / "made.py"
        file.parent.mkdir()
        file.write_text(f"from numba import njit\n@njit\ndef helper(x):\n    return {helper}\n@njit(cache=True)\ndef f(x):\n    return 2 * helper(x)\n")
        spec = importlib.util.spec_from_file_location("cryptoresearch.made", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.f

    first, copied, changed = made("first", "x + 1"), made("copied", "x + 1"), made("changed", "x + 2")
    assert [f(1.0) for f in (first, copied, changed)] == [4.0, 4.0, 6.0]
    assert [bool(f.stats.cache_hits) for f in (first, copied, changed)] == [False, True, False]


# --- clean, exported, complete


def test_notebooks_are_clean(tmp_path: Path) -> None:
    "nbdev_clean changes nothing."
    home = copy_project(tmp_path)
    subprocess.run([BIN / "nbdev_clean"], cwd=home, env=clean_environment(), check=True, capture_output=True)
    assert not (found := difference(NBS, home / "nbs", "*.ipynb")), f"run nbdev_clean, or `make hooks` once: {found}"


def test_export_changes_nothing(tmp_path: Path) -> None:
    "The package is what nbdev_export makes of the notebooks."
    home = copy_project(tmp_path)
    subprocess.run([BIN / "nbdev_export"], cwd=home, env=clean_environment(), check=True, capture_output=True)
    assert not (found := difference(LIB, home / "cryptoresearch", "*.py")), f"edit the notebook, not the module, and run nbdev_export: {found}"


def test_each_module_has_one_notebook() -> None:
    "Two notebooks with one `default_exp` would overwrite each other; a renamed notebook leaves its old module."
    sources: dict[str, list[str]] = {}
    for path in ALL:
        if module := default_exp(path):
            sources.setdefault(module.replace(".", "/") + ".py", []).append(path)
    assert not {m: p for m, p in sources.items() if len(p) > 1}, "several notebooks export to one module"
    modules = {p.relative_to(LIB).as_posix() for p in LIB.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")}
    assert modules == set(sources), f"no notebook exports {sorted(modules - set(sources))}; not exported: {sorted(set(sources) - modules)}"


def test_nothing_is_skipped_silently() -> None:
    "No notebook hides from the tests: skip_exec reports success without running, eval: false breaks what follows."
    found = []
    for path in ALL:
        if re.search(r"skip_exec\s*:\s*true", (ROOT / path).read_text(encoding="utf-8"), re.IGNORECASE):
            found.append(f"{path}: skip_exec")
        found += [f"{path}: {c['source'][:60]!r}" for c in cells(path) if re.search(r"^#\|\s*eval:\s*false", c["source"], re.MULTILINE)]
    found += [p.relative_to(ROOT).as_posix() for p in NBS.rglob(".notest")]
    assert not found


PRIVATE = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|var/folders)/[\w.]|\bsite-packages\b|at 0x[0-9a-f]{6,}")


def test_outputs_are_fit_to_be_read() -> None:
    "No committed output holds an error, a warning, a path of the machine or an address in memory."
    found = []
    for path in ALL:
        for number, cell in enumerate(cells(path)):
            for output in cell.get("outputs", []):
                where = f"{path}, cell {number}"
                if output["output_type"] == "error":
                    found.append(f"{where}: error {output['ename']}")
                elif output.get("name") == "stderr":
                    found.append(f"{where}: {''.join(output['text'])[:80]!r} on standard error")
                else:
                    data = {k: v for k, v in output.get("data", {}).items() if k.startswith("text/")}
                    text = json.dumps([output.get("text"), data])
                    if match := PRIVATE.search(text):
                        found.append(f"{where}: {text[max(0, match.start() - 20) : match.end() + 40]!r}")
    assert not found, "\n".join(found)


def test_no_widget_state_is_stored() -> None:
    "The state of widgets holds whole libraries of JavaScript; nbdev_clean leaves it."
    found = [path for path in ALL if "widgets" in json.loads((ROOT / path).read_text(encoding="utf-8"))["metadata"]]
    assert not found, f"remove metadata.widgets from {found}"


def test_the_module_map_is_complete() -> None:
    "CONTRIBUTING.md lists every module in the row of its package."
    rows = [line.split("|") for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    listed = {(row[1].strip(" `"), name) for row in rows if len(row) == 5 for name in re.findall(r"`(\w+)`", row[3])}
    there = {(module.parent.name if module.parent != LIB else "top level", module.stem) for module in LIB.rglob("*.py")}
    there = {m for m in there if m[1] not in ("__init__", "_modidx")}
    assert there <= listed, f"not in the module map: {sorted(there - listed)}"
    packages = {p for p, _ in there}
    assert not (gone := {m for m in listed if m[0] in packages} - there), f"in the module map, but gone: {sorted(gone)}"


def test_readme_is_the_index_notebook() -> None:
    "README.md has not drifted from nbs/index.ipynb."
    done = subprocess.run([sys.executable, ROOT / "scripts/readme.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- papermill


def parameters_cell(path: Path) -> int:
    "Place of the one cell that is tagged `parameters`."
    tagged = [i for i, cell in enumerate(cells(path)) if is_tagged(cell)]
    assert len(tagged) == 1, f"{path.name}: papermill needs one cell tagged `parameters`, found {len(tagged)}"
    return tagged[0]


def with_parameter(notebook: Path, out: Path, name: str, value: object) -> object:
    "What the notebook's code sees as `name` when papermill is given `value`: all cells up to the parameters, then a look at it."
    import nbformat
    import papermill

    doc = nbformat.read(notebook, 4)
    doc.cells = [*doc.cells[: parameters_cell(notebook) + 1], nbformat.v4.new_code_cell(f"import json as _json\n_json.dumps({name})")]
    cut = out / f"cut-{notebook.name}"
    nbformat.write(doc, cut)
    done = papermill.execute_notebook(cut, out / f"out-{notebook.name}", {name: value}, kernel_name="python3", progress_bar=False, cwd=str(notebook.parent))
    return json.loads(eval(done.cells[-1].outputs[0]["data"]["text/plain"]))


def test_a_changed_parameter_arrives_after_cleaning(tmp_path: Path) -> None:
    "nbdev_clean keeps the tag `parameters`; without it papermill would run the defaults and report success."
    import nbformat

    home = copy_project(tmp_path)
    doc = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    doc.cells = [nbformat.v4.new_code_cell("horizon = 1", metadata={"tags": ["parameters"], "scrolled": True})]
    path = home / "nbs" / "zz_parameters.ipynb"
    nbformat.write(doc, path)
    subprocess.run([BIN / "nbdev_clean", "--fname", path], cwd=home, env=clean_environment(), check=True, capture_output=True)
    assert cells(path)[0]["metadata"] == {"tags": ["parameters"]}
    assert with_parameter(path, tmp_path, "horizon", 7) == 7


# each research notebook takes parameters; a dashboard may
@pytest.mark.parametrize("path", [p for p in TRAVEL if Path(p).parts[1] == "research" or any(map(is_tagged, cells(p)))])
def test_parameters_arrive(path: str, tmp_path: Path) -> None:
    "A parameter of a notebook for papermill or Voila, changed from outside, is what its code sees."
    import papermill

    known = papermill.inspect_notebook(ROOT / path)
    texts = [name for name, info in known.items() if re.fullmatch(r"(['\"]).*\1", info["default"].strip())]
    assert texts, f"{path} has no parameter with a text as its default: {sorted(known)}"
    assert with_parameter(ROOT / path, tmp_path, texts[0], "a value from outside") == "a value from outside"
