"""Build the documentation site from the notebooks, the docstrings and `docs/`: nothing is executed.

    scripts/docs_site.py [--to FOLDER]    default _docs/html; a warning of Sphinx, such as a dead link, is an error

The pages: those of `docs/`, README as the first, every notebook as it was last run without its hidden cells, the help of
every command, and one reference page for each module with the parameters that its comments describe.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from docments import with_sections

ROOT = Path(__file__).resolve().parents[1]
STAGE = ROOT / "_docs" / "source"
PACKAGES = {  # in reading order
    "tutorials": "Tutorials",
    "data": "Data",
    "ingest": "Ingestion",
    "live": "Live",
    "features": "Features",
    "labels": "Labels",
    "metrics": "Metrics",
    "models": "Models",
    "runs": "Runs",
    "evaluation": "Evaluation",
    "serving": "Serving",
    "research": "Research templates",
    "benchmarks": "Benchmarks",
    "": "Errors, settings, command line",
}
HIDDEN = re.compile(r"^#\|\s*(hide|include:\s*false)\b", re.MULTILINE)


def page(notebook: dict[str, object]) -> dict[str, object]:
    "A notebook as a page: without hidden cells, directives and papermill's parameters of its machine."
    kept = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if HIDDEN.search(source):
            continue
        if cell["cell_type"] == "code":
            source = "\n".join(line for line in source.split("\n") if not line.startswith("#|")).strip()
        if source:
            kept.append({**cell, "source": source})
    return {**notebook, "cells": kept}


def toctree(entries: list[str]) -> str:
    "A list of pages in MyST's form."
    return "\n".join(["```{toctree}", ":maxdepth: 1", "", *entries, "```", ""])


def stage_notebooks() -> None:
    "Copy the notebooks, one folder a package, each with a page that lists them."
    for folder, title in PACKAGES.items():
        stage = STAGE / "nbs" / folder
        stage.mkdir(parents=True, exist_ok=True)
        paths = sorted(p for p in (ROOT / "nbs" / folder).glob("*.ipynb") if p.name != "index.ipynb")
        for path in paths:
            (stage / path.name).write_text(json.dumps(page(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
        (stage / "index.md").write_text(f"# {title}\n\n" + toctree([p.stem for p in paths]), encoding="utf-8")


def relink(text: str) -> str:
    "README's links as seen from the site: sources that are no pages lose their link."
    def link(m: re.Match[str]) -> str:
        target = m[2].split("#")[0]
        return m[0] if re.match(r"[a-z]+:|#", m[2]) or (STAGE / target).exists() or (ROOT / target).suffix == ".png" else m[1]
    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


def stage_pages() -> None:
    "Copy `docs/`, README as the first page, CONTRIBUTING and CHANGELOG."
    shutil.copytree(ROOT / "docs", STAGE, dirs_exist_ok=True)
    shutil.copytree(ROOT / "nbs" / "images", STAGE / "nbs" / "images", dirs_exist_ok=True)
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        (STAGE / name).write_text(relink((ROOT / name).read_text(encoding="utf-8")), encoding="utf-8")
    readme = re.sub(r"\A<!--.*?-->\s*", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    index = STAGE / "index.md"
    index.write_text(relink(readme) + "\n" + index.read_text(encoding="utf-8"), encoding="utf-8")


def stage_modules() -> None:
    "Copy the package with its comments as docstrings, and write a reference page for each module."
    package = STAGE.parent / "package"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "cryptoresearch", package / "cryptoresearch", ignore=shutil.ignore_patterns("__pycache__"))
    names: dict[str, str] = {}
    for path in sorted((package / "cryptoresearch").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        path.write_text(with_sections(text), encoding="utf-8")
        parts = path.relative_to(package).with_suffix("").parts
        if not any(part.startswith("_") for part in parts) and "__all__" in text:
            names[".".join(parts[1:])] = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    folder = STAGE / "api"
    folder.mkdir()
    for name in names:  # not in the sidebar, which would name each on every page
        page = f":orphan:\n\n{name}\n{'=' * len(name)}\n\n.. automodule:: cryptoresearch.{name}\n   :members:\n"
        (folder / f"{name}.rst").write_text(page, encoding="utf-8")
    rows = [f"| [`{name}`]({name}.rst) | {text} |" for name, text in names.items()]
    (folder / "index.md").write_text("\n".join(["# Python reference", "", "| module | purpose |", "| --- | --- |", *rows, ""]), encoding="utf-8")


def commands(group, path: str = "cryptoresearch"):
    "Every command of the command line with its path, groups opened."
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        elif not command.hidden:
            yield f"{path} {name}", command


def stage_commands() -> None:
    "Write the page of the command line: the help of each command, as a terminal shows it at 80 columns."
    sys.path.insert(0, str(STAGE.parent / "package"))
    os.environ.update(COLUMNS="80", NO_COLOR="1", TERM="dumb")
    import typer.main
    from cryptoresearch.cli import app
    from typer.testing import CliRunner

    parts = ["# Command line\n"]
    for path, _ in commands(typer.main.get_command(app)):
        text = CliRunner().invoke(app, [*path.split()[1:], "--help"], prog_name="cryptoresearch").output
        parts.append(f"## `{path}`\n\n```text\n{text.rstrip()}\n```\n")
    (STAGE / "commands.md").write_text("\n".join(parts), encoding="utf-8")


def main() -> int:
    "Stage the pages and call Sphinx; returns its exit code."
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--to", type=Path, default=ROOT / "_docs" / "html")
    target = parser.parse_args().to.resolve()
    shutil.rmtree(STAGE.parent, ignore_errors=True)
    STAGE.mkdir(parents=True)
    stage_notebooks()
    stage_pages()
    stage_modules()
    stage_commands()
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "auto", "-b", "html", STAGE, target]
    environment = {**os.environ, "PYTHONPATH": str(STAGE.parent / "package"), "NUMBA_DISABLE_JIT": "1"}
    return subprocess.run(command, env=environment, cwd=STAGE, check=False).returncode  # the root would come first in sys.path


if __name__ == "__main__":
    sys.exit(main())
