"""Model files of a run from elsewhere: loading any bytes ends in a model or in a typed error, never in the end of the process."""

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import examples
from notebook_runner import Runner

from cryptoresearch.errors import SchemaError
from cryptoresearch.models.catalogue import MODELS

SMALL = {
    "xgboost": {"n_estimators": 6, "n_threads": 1},
    "lightgbm": {"n_estimators": 6, "n_threads": 1},
    "histgb": {"n_estimators": 6},
    "gb": {"n_estimators": 6},
    "ridge": {},
    "ensemble": {"members": ("ridge", "xgboost"), "member_params": {"xgboost": {"n_estimators": 4, "n_threads": 1}}},
}
TREES = ("xgboost", "lightgbm", "histgb", "gb")

# load each case in a child of its own and print the outcome: a model, a typed error, another error, or the end of the process
LOADER = """
import hashlib, json, os, signal, sys, warnings
from pathlib import Path
import lightgbm, pandas as pd, sklearn.ensemble, skops.io, xgboost  # once, not in each child
from cryptoresearch.errors import CryptoResearchError
from cryptoresearch.models.catalogue import MODELS
warnings.simplefilter("ignore")
home = Path(sys.argv[1])
X = pd.read_parquet(home / "X.parquet")
for case in sorted((home / "cases").iterdir()):
    kind = case.name.split("-")[0]
    folder, info = home / "changed" / kind, json.loads((home / kind / "model.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if not child:
        signal.alarm(20)
        data = case.read_bytes()
        (folder / MODELS[kind].file).write_bytes(data)
        (folder / "model.json").write_text(json.dumps(info | {"trees_sha256": hashlib.sha256(data).hexdigest()}))
        try:
            model = MODELS[kind].load(folder)
            model.predict(X), model.importance()
            code = 0
        except CryptoResearchError:
            code = 1
        except BaseException as e:
            print(case.name, type(e), e, file=sys.stderr)
            code = 2
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("outcome", kind, {0: "model", 1: "typed", 2: "untyped"}.get(code, f"ended by {code}"), flush=True)
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    "Return a folder with small models and the rows that they forecast."
    home = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(1200, 4)), columns=list("abcd"))
    X[rng.random(X.shape) < 0.1] = np.nan
    y = np.sign(X["a"].fillna(0.0)) + rng.normal(size=1200)
    for kind, params in SMALL.items():
        MODELS[kind](**params).fit(X, y).save(home / kind)
    X[:40].to_parquet(home / "X.parquet")
    return home


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    "Return the bytes with one to three flipped bits."
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        out[int(rng.integers(len(out)))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    "Return the bytes with flipped bits, another digit, or cut short; of a zip, at times inside an entry whose checksum is right."
    kind = rng.choice(["bits", "bits", "digits", "cut"])
    if data[:2] == b"PK" and rng.random() < 0.7:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            parts = {name: old.read(name) for name in old.namelist()}
        name = str(rng.choice([*parts]))
        parts[name] = damaged(parts[name], rng)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as new:
            for name, part in parts.items():
                new.writestr(zipfile.ZipInfo(name), part)
        return out.getvalue()
    if kind == "cut":
        return data[: int(rng.integers(len(data)))]
    digits = [k for k, byte in enumerate(data) if 48 <= byte < 58]
    if kind == "digits" and digits:
        at = int(rng.choice(digits))
        return data[:at] + str(rng.choice(["-1", "0", "7", "99", "4294967296"])).encode() + data[at + 1 :]
    return flipped(data, rng)


def outcomes(runner: Runner, stored: Path, cases: list[tuple[str, bytes]]) -> Counter:
    "Load each case, of a kind of model, in a child of its own, and count the outcomes by kind."
    folder = stored / "cases"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, (kind, data) in enumerate(cases):
        (folder / f"{kind}-{number:04}").write_bytes(data)
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # a forked child cannot start OpenMP's threads again
    run = runner.call(LOADER, [stored], env, stored, timeout_s=280)
    assert run.returncode == 0, run.stderr[-2000:]
    found = Counter(tuple(line.split(" ", 2)[1:]) for line in run.stdout.splitlines() if line.startswith("outcome "))
    assert sum(found.values()) == len(cases)
    assert {outcome for _, outcome in found} <= {"model", "typed"}, f"{found}\n{run.stderr[-2000:]}"
    return found


def test_damaged_files_are_refused_or_loaded(runner, stored):
    rng, kinds = np.random.default_rng(5), [*TREES, "ensemble"]
    whole = {kind: (stored / kind / MODELS[kind].file).read_bytes() for kind in kinds}
    n = examples(12, 40)
    cases = [(kind, case) for kind, data in whole.items() for case in (data, b"", data[:-1], *(damaged(data, rng) for _ in range(n)))]
    found = outcomes(runner, stored, cases)
    for kind in kinds:
        assert found[kind, "model"] >= 1 and found[kind, "typed"] >= examples(5, 15), found  # a flipped bit of a threshold is a valid model


def with_field(text: str, field: str, value: str) -> bytes:
    "Change a field of LightGBM's first tree, and the size of the tree along with it."
    head, rest = text.split("\n\nTree=0\n", 1)
    tree, tail = rest.split("\n\n\n", 1)
    values = value if field == "num_leaves" else " ".join([value] * (tree.split("split_feature=")[1].split("\n")[0].count(" ") + 1))
    block = "\n".join(f"{field}={values}" if line.startswith(f"{field}=") else line for line in tree.split("\n"))
    first = head.split("tree_sizes=")[1].split(" ")[0]
    head = head.replace(f"tree_sizes={first}", f"tree_sizes={int(first) + len(block) - len(tree)}")
    return f"{head}\n\nTree=0\n{block}\n\n\n{tail}".encode()


def with_child(data: bytes, field: str, child: int) -> bytes:
    "Change the first node of each tree in a skops file."
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        for name, part in parts.items():
            values = np.load(io.BytesIO(part)) if name.endswith(".npy") else np.zeros(0)
            changed = io.BytesIO(part)
            if field in (values.dtype.names or ()):
                values[field][0] = child
                np.save(changed, values)
            new.writestr(zipfile.ZipInfo(name), changed.getvalue())
    assert out.getvalue() != data
    return out.getvalue()


def test_trees_with_cycles_or_children_out_of_range_are_refused(runner, stored):
    text = (stored / "lightgbm" / "model.txt").read_text()
    fields = (("left_child", "0"), ("left_child", "900000"), ("split_feature", "77"), ("num_leaves", "9"), ("decision_type", "1"))
    cases = [("lightgbm", with_field(text, field, value)) for field, value in fields]
    for kind, fields in (("histgb", ("left", "right")), ("gb", ("left_child", "right_child"))):
        data = (stored / kind / "model.skops").read_bytes()
        cases += [(kind, with_child(data, field, child)) for field in fields for child in (0, 10**7)]
    assert outcomes(runner, stored, cases) == {("lightgbm", "typed"): 5, ("histgb", "typed"): 4, ("gb", "typed"): 4}


DESCRIPTIONS = [
    {"best_iteration": 2**31 + 5}, {"best_iteration": -1}, {"best_iteration": "3"}, {"best_iteration": None},
    {"feature_names_in": ["a", "b"]}, {"feature_names_in": ["a", "a", "b", "c"]}, {"feature_names_in": 7}, {"residual_quantiles": [1]},
    {"residual_quantiles": "ab"}, {"log_correction": None}, {"n_rows": None}, {"params": 3}, {"params": {}},
]  # fmt: skip


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize("change", DESCRIPTIONS, ids=str)
def test_a_description_that_does_not_fit_is_refused(stored, tmp_path, kind, change):
    write_changed(stored / kind, tmp_path, change)
    with pytest.raises(SchemaError, match="rain the run again"):
        MODELS[kind].load(tmp_path)


def write_changed(folder: Path, to: Path, change: dict) -> None:
    "Copy a model with another description."
    info = json.loads((folder / "model.json").read_text())
    for name in (p.name for p in folder.iterdir() if p.is_file()):
        (to / name).write_bytes((folder / name).read_bytes())
    (to / "model.json").write_text(json.dumps(info | change))


@pytest.mark.parametrize("threads", [0, 100_000, "all", 2.5])
def test_as_many_threads_as_no_machine_has_are_refused(stored, tmp_path, threads):
    params = json.loads((stored / "xgboost" / "model.json").read_text())["params"]
    write_changed(stored / "xgboost", tmp_path, {"params": params | {"n_threads": threads}})
    with pytest.raises(SchemaError, match="Correct n_threads"):
        MODELS["xgboost"].load(tmp_path)


def test_coefficients_that_do_not_fit_are_refused(stored, tmp_path):
    short = {"mean": [0, 1], "scale": [1], "coef": [1, 1, 1, 1], "intercept": 0}
    for text in ("{}", "[]", "null", json.dumps(short), json.dumps(short | {"coef": ["x"]})):
        write_changed(stored / "ridge", tmp_path, {"trees_sha256": hashlib.sha256(text.encode()).hexdigest()})
        (tmp_path / "model.coef.json").write_text(text)
        with pytest.raises(SchemaError, match="do not load this file"):
            MODELS["ridge"].load(tmp_path)


class Trap:
    "An object that leaves a file behind when it is read by pickle or made by skops."

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")

    def __setstate__(self, state) -> None:
        Path(state["file"]).touch()


@pytest.mark.parametrize("kind", SMALL)
def test_a_pickle_is_refused_and_not_run(stored, tmp_path, kind):
    trap, data = tmp_path / "trap", pickle.dumps(Trap(tmp_path / "trap"))
    pickle.loads(data).close()
    assert trap.exists()
    trap.unlink()
    write_changed(stored / kind, tmp_path, {"trees_sha256": hashlib.sha256(data).hexdigest()})
    (tmp_path / MODELS[kind].file).write_bytes(data)
    with pytest.raises(SchemaError):
        MODELS[kind].load(tmp_path)
    assert not trap.exists()


def test_a_skops_file_with_other_objects_is_refused_and_makes_none(stored, tmp_path, monkeypatch):
    import skops.io

    monkeypatch.setattr(Trap, "__reduce__", object.__reduce__)
    data = skops.io.dumps({"trees": Trap(tmp_path / "trap"), "fill": None})
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:  # stored, as `save` writes it
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), old.read(name))
    write_changed(stored / "histgb", tmp_path, {"trees_sha256": hashlib.sha256(out.getvalue()).hexdigest()})
    (tmp_path / "model.skops").write_bytes(out.getvalue())
    with pytest.raises(SchemaError, match="Trap"):
        MODELS["histgb"].load(tmp_path)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("file", ["model.json", "file"])
@pytest.mark.parametrize("kind", SMALL)
def test_deep_json_is_refused(stored, tmp_path, kind, file):
    data = b"[" * 100_000
    write_changed(stored / kind, tmp_path, {"trees_sha256": hashlib.sha256(data).hexdigest()})
    (tmp_path / (MODELS[kind].file if file == "file" else file)).write_bytes(data)
    with pytest.raises(SchemaError):
        MODELS[kind].load(tmp_path)


REFIT = """
import hashlib, sys
import pandas as pd
from cryptoresearch.models.catalogue import MODELS
from sklearn.utils._openmp_helpers import _openmp_effective_n_threads
from threadpoolctl import threadpool_limits
X = pd.read_parquet(sys.argv[1])
y = X["a"].fillna(0.0) + 0.1 * X["b"].fillna(0.0) ** 2
for n in (1, 2, 3):
    with threadpool_limits(n, user_api="openmp"):
        models = [MODELS["histgb"](n_estimators=8, loss=loss, min_samples_leaf=20) for loss in ("mean", "quantile", "probability")]
        made = [m.fit(X, (y > 0).astype(float) if m.loss == "probability" else y)._dump() for m in models]
        print(_openmp_effective_n_threads(), *(hashlib.sha256(data).hexdigest() for data in made))
"""


def test_the_bytes_of_histgb_do_not_depend_on_the_number_of_threads(runner, stored, tmp_path):
    rng = np.random.default_rng(2)
    pd.DataFrame(rng.normal(size=(3000, 5)), columns=list("abcde")).to_parquet(tmp_path / "X.parquet")
    done = runner.call(REFIT, [tmp_path / "X.parquet"], dict(os.environ), tmp_path)
    assert done.returncode == 0, done.stderr
    threads, *digests = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert threads == ("1", "2", "3") and len(digests) == 3, done.stderr
    assert [len(set(of_one_loss)) for of_one_loss in digests] == [1, 1, 1]
