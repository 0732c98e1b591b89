"""Make or update `.venv`: the package, editable, with what builds and tests it, at the versions of constraints.txt.

Called by the Makefile with a suitable Python. A pinned `uv` is installed into the environment first, because it installs several
times faster than pip; where it cannot be had or fails, plain pip does the same. Only the standard library is used here.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UV = "uv==0.13.9"
WINDOWS = os.name == "nt"


def python_of(folder: Path) -> Path:
    "The interpreter of an environment."
    return folder / ("Scripts/python.exe" if WINDOWS else "bin/python")


def works(folder: Path) -> bool:
    "True for an environment that starts, has pip, is of the right version and was not moved here from another folder."
    code = "import sys, pip; print(sys.prefix); sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))"
    script = folder / ("Scripts/pip.exe" if WINDOWS else "bin/pip")
    try:
        run = subprocess.run([python_of(folder), "-c", code], capture_output=True, text=True, check=False)
        moved = not WINDOWS and script.is_file() and str(folder) not in script.read_text(encoding="utf-8", errors="replace").split("\n", 2)[0]
    except OSError:
        return False
    return run.returncode == 0 and Path(run.stdout.strip()).resolve() == folder.resolve() and not moved


def pip_settings(python: Path) -> dict[str, str]:
    "What pip is configured with on this machine, by files and by PIP_*; later sources win, as in pip."
    run = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    found: dict[str, str] = {}
    for section in ("global.", "install.", ":env:."):
        for line in run.stdout.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(section):
                try:
                    found[key.removeprefix(section)] = str(ast.literal_eval(value))
                except (ValueError, SyntaxError):
                    continue
    return found


def uv_environment(python: Path) -> dict[str, str]:
    "The same settings under uv's names: uv reads none of pip's."
    pip, env = pip_settings(python), dict(os.environ)
    names = {
        "index-url": "UV_DEFAULT_INDEX",
        "extra-index-url": "UV_INDEX",
        "find-links": "UV_FIND_LINKS",
        "cert": "SSL_CERT_FILE",
        "trusted-host": "UV_INSECURE_HOST",
        "default-timeout": "UV_HTTP_TIMEOUT",
        "timeout": "UV_HTTP_TIMEOUT",
        "proxy": "ALL_PROXY",
        "no-index": "UV_NO_INDEX",
    }
    for key, name in names.items():
        if value := pip.get(key, "").strip():
            values = value.split()
            if key == "find-links":  # uv refuses a folder that is not there, pip passes over it
                values = [v for v in values if "://" in v or Path(v).expanduser().is_dir()]
            if values:
                env.setdefault(name, ("," if key == "find-links" else " ").join(values))
    env["VIRTUAL_ENV"] = str(python.parents[1])
    env.pop("PYTHONHOME", None)
    return env


def install(
    folder: Path,  # the environment
    what: list[str],  # arguments for the installer: requirements, -e, paths
    use_uv: bool = True,  # False: plain pip
    quiet: bool = False,  # without the installer's own report
    bytecode: bool = True,  # compile all at once, by uv on all cores; False: for an environment that lives for minutes
) -> str:  # which installer did it
    "Install into an environment at the pinned versions, by uv if it can be had, else by pip."
    python, constraints = python_of(folder), ["-c", str(ROOT / "constraints.txt")]
    calm = ["-q"] if quiet else []
    if use_uv:
        uv = folder / ("Scripts/uv.exe" if WINDOWS else "bin/uv")
        have = uv.is_file() or subprocess.run([python, "-m", "pip", "install", "-q", UV], cwd=ROOT, check=False).returncode == 0
        if have:
            command = [uv, "pip", "install", *calm, "--python", python, *(["--compile-bytecode"] if bytecode else []), *constraints, *what]
            if subprocess.run(command, cwd=ROOT, env=uv_environment(python), check=False).returncode == 0:
                return "uv"
        print("uv did not do it; pip does, which takes a few minutes", file=sys.stderr, flush=True)
    subprocess.run([python, "-m", "pip", "install", *([] if bytecode else ["--no-compile"]), *(calm or ["--progress-bar", "off"]), *constraints, *what], cwd=ROOT, check=True)
    return "pip"


def main() -> int:
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".venv", help="where (default .venv)")
    parser.add_argument("--extra", default="dev", help="extra of setup.py to install, '' for none (default dev)")
    parser.add_argument("--pip", action="store_true", help="use plain pip")
    args = parser.parse_args()
    folder, start = args.folder.resolve(), time.monotonic()
    if not works(folder):
        if folder.exists():
            if not (folder / "pyvenv.cfg").is_file() and any(folder.iterdir()):
                print(f"{folder} is in the way: not empty and not a virtual environment", file=sys.stderr)
                return 1
            shutil.rmtree(folder)
        print(f"making {folder.name} with Python {sys.version.split()[0]}, once", flush=True)
        venv.create(folder, with_pip=True, symlinks=not WINDOWS)
    extra = f"[{args.extra}]" if args.extra else ""
    try:
        # compat: a plain path entry; the import hook of setuptools loses against a folder of the package's name next to a script
        tool = install(folder, ["-C", "editable_mode=compat", "-e", f".{extra}"], use_uv=not args.pip)
    except subprocess.CalledProcessError:
        print("the installation failed; is the package index reachable? (pip config list, PIP_INDEX_URL)", file=sys.stderr)
        return 1
    print(f"{folder.name} is ready ({tool}, {time.monotonic() - start:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
