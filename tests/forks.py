"Programs that tests start: each in a process of its own that need not import the large libraries again."
import hashlib
import subprocess
import textwrap
from pathlib import Path
from typing import Any

from notebook_runner import CAN_FORK, Runner


def _python(runner: Runner) -> str:
    "Path of the runner's script, for programs that may be killed: nobody sets how SIGKILL is handled."
    script = Path(runner.python)
    ours = script.with_name("python-for-tests")
    if CAN_FORK and not ours.exists():
        text = script.read_text(encoding="utf-8")
        line = "    signal.signal(-code, signal.SIG_DFL)\n"
        assert line in text
        ours.write_text(text.replace(line, f"    if code != -signal.SIGKILL:\n    {line}"), encoding="utf-8")
        ours.chmod(0o755)
    return str(ours if CAN_FORK else script)


def start(runner: Runner, folder: Path, code: str, *args: object, **options: Any) -> subprocess.Popen[str]:
    "Start Python code as `python -c` does, in `folder`; options as for Popen. A signal to the process reaches the fork."
    text = textwrap.dedent(code)
    name = f"program_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"{name}.py").exists():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return subprocess.Popen([_python(runner), "-m", name, *map(str, args)], cwd=folder, text=True, **options)
