"""A cache for compiled functions of notebook cells and of the package, keyed by what they are made of.

Numba's own cache looks at the cell or the file of the function alone: after a change in a helper function it would still load machine
code with the old helper inside. And it belongs to one copy of the project: a fresh clone would compile the whole package again, in each
of its processes. Here the key covers the source of the function, of every compiled function it calls, and the
constants it reads. So the cache is valid for every process, every copy of the project and every later run of the tests.
"""

import hashlib
import inspect
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

KEEP_DAYS = 30


def cache_folder() -> Path:
    "Return the folder with compiled functions of this user."
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "cryptoresearch" / "numba"


def prune(folder: Path, days: float = KEEP_DAYS) -> None:
    "Remove compiled functions that were stored more than `days` ago."
    for path in folder.glob("*.nb?"):
        with suppress(OSError):  # another process may have removed it
            if path.stat().st_mtime < time.time() - days * 86400:
                path.unlink()


def _names(code: CodeType) -> Iterator[str]:
    "List the global names that a function reads, also in its inner functions."
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def source_of(function: FunctionType) -> bytes:
    "Return the source of a function with its decorators."
    return inspect.getsource(function).encode()


def _described(value: Any, seen: set[int]) -> bytes:
    "Describe a value that compiled code has inside, for a digest."
    import numpy as np
    from numba.core.dispatcher import Dispatcher

    if isinstance(value, Dispatcher):
        return digest(value.py_func, seen).encode()
    if isinstance(value, ModuleType):
        path = getattr(value, "__file__", None)  # the versions of other packages are those of the environment, see below
        return Path(path).read_bytes() if path and value.__name__.startswith("cryptoresearch") else value.__name__.encode()
    if isinstance(value, np.ndarray):
        return repr((value.dtype, value.shape)).encode() + value.tobytes()
    if isinstance(value, (tuple, list)):
        return b"(" + b",".join(_described(v, seen) for v in value) + b")"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        return repr((type(value).__name__, value)).encode()
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}".encode()
    return f"{type(value).__qualname__}:{value}".encode()


def digest(function: FunctionType, seen: set[int] | None = None) -> str:
    "Compute the digest of a function, of the compiled functions it calls and of the constants it reads."
    import numpy as np

    seen = set() if seen is None else seen
    if id(function) in seen:
        return "seen"
    seen.add(id(function))
    found = {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not filled yet
            found[name] = cell.cell_contents
    sha = hashlib.sha256(f"numpy {np.__version__}\n".encode() + source_of(function))
    for name in sorted(found):
        sha.update(name.encode() + b"=" + _described(found[name], seen) + b"\n")
    return sha.hexdigest()


def install(folder: Path | None = None) -> None:
    "Let numba of this process, and of its forks, keep functions of cells and of the package in `folder`; one process writes at a time."
    from filelock import FileLock
    from numba.core import caching

    folder = cache_folder() if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    key, save = caching.Cache._index_key, caching.Cache._save_overload

    class CellLocator(caching._CacheLocator):
        "Place and freshness of a function that was defined in a cell or in the package."

        def __init__(self, function: FunctionType) -> None:
            self._source = hashlib.sha256(source_of(function)).hexdigest()

        def get_cache_path(self) -> str:
            return str(folder)

        def get_source_stamp(self) -> str:
            return self._source

        def get_disambiguator(self) -> str:
            return self._source[:16]

        @classmethod
        def from_function(cls, py_func: FunctionType, py_file: str) -> "CellLocator | None":
            return cls(py_func) if py_file.startswith("<ipython-") or py_func.__module__.startswith("cryptoresearch.") else None

    def index_key(self: Any, sig: Any, codegen: Any) -> tuple:  # asked for at the first call, when all that the function needs is defined
        more = (digest(self._py_func),) if isinstance(self._impl.locator, CellLocator) else ()
        return (*key(self, sig, codegen), *more)

    def save_overload(self: Any, sig: Any, data: Any) -> None:  # numba numbers the files: two writers would give one number twice
        with FileLock(folder / ".lock"):
            save(self, sig, data)

    caching.CacheImpl._locator_classes = [CellLocator, *caching.CacheImpl._locator_classes]
    caching.Cache._index_key = index_key
    caching.Cache._save_overload = save_overload
