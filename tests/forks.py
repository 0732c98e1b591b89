"""Programs that tests start: each in a process of its own that need not import the large libraries again."""
import hashlib
import subprocess
import textwrap
from pathlib import Path
from typing import Any

from notebook_runner import Runner


def start(runner: Runner, folder: Path, code: str, *args: object, **options: Any) -> subprocess.Popen[str]:
    "Start Python code as `python -c` does, in `folder`; options as for Popen. SIGINT, SIGTERM and SIGHUP reach the fork; SIGKILL ends it too."
    text = textwrap.dedent(code)
    name = f"program_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"{name}.py").exists():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return subprocess.Popen([runner.python, "-m", name, *map(str, args)], cwd=folder, text=True, **options)
