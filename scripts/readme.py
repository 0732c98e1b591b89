"""README.md from nbs/index.ipynb, as it was last run: nothing is executed here.

    scripts/readme.py            write README.md and the pictures that the notebook's outputs hold, into nbs/images
    scripts/readme.py --check    change nothing; end with an error where they have drifted from the notebook
"""

import argparse
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "nbs" / "index.ipynb"
README = ROOT / "README.md"
IMAGES = ROOT / "nbs" / "images"
PREFIX = "readme_"  # pictures with this beginning belong to this script: stale ones are removed
HEAD = "<!-- made from nbs/index.ipynb by scripts/readme.py (make docs): edit the notebook, not this file -->\n\n"


CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def relative(target: str) -> str:
    "A link that was written in nbs/, as seen from the repository's root."
    if re.match(r"^([a-z][a-z0-9+.-]*:|#|/|//)", target, re.IGNORECASE):
        return target
    path, mark, anchor = target.partition("#")
    return os.path.normpath(f"nbs/{path}").replace(os.sep, "/") + mark + anchor


def relink(markdown: str) -> str:
    "Markdown whose links and pictures are seen from the root; code is left alone."
    parts = CODE.split(markdown)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(\]\()([^)\s]+)", lambda m: m[1] + relative(m[2]), parts[i])
        parts[i] = re.sub(r"(<(?:img|a)\b[^>]*?\b(?:src|href)=\")([^\"]+)", lambda m: m[1] + relative(m[2]), parts[i])
    return "".join(parts)


def render(notebook: Path = NOTEBOOK) -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and its pictures by file name."
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config

    doc = nbformat.read(notebook, 4)
    kept = []
    for cell in doc.cells:
        lines = cell.source.splitlines()
        directives = " ".join(line.removeprefix("#|").strip() for line in lines if line.startswith("#|"))
        if cell.cell_type == "raw" or re.search(r"\b(hide|include:\s*false)\b", directives):
            continue
        cell.source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source)
        elif re.search(r"\becho:\s*false\b", directives):
            cell.source = ""
        for output in cell.get("outputs", []):
            if html := output.get("data", {}).get("text/html"):  # GitHub shows a style block as text
                html = re.sub(r"<style.*?</style>", "", "".join(html), flags=re.DOTALL)
                output["data"]["text/html"] = re.sub(r"\n\s*\n", "\n", html)
        kept.append(cell)
    doc.cells = kept
    doc.metadata["language_info"] = {"name": "python"}  # nbdev_clean takes it away; GitHub colours by it
    config = Config()
    config.NbConvertBase.display_data_priority = ["text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/html", "text/plain"]
    config.ExtractOutputPreprocessor.output_filename_template = PREFIX + "{cell_index}_{index}{extension}"
    body, resources = MarkdownExporter(config=config).from_notebook_node(doc, {"output_files_dir": ""})
    pictures = {Path(name).name: data for name, data in resources.get("outputs", {}).items()}
    body = re.sub(r"^```python\s*```$", "", body, flags=re.MULTILINE)
    for name in pictures:
        body = re.sub(rf"!\[[^\]]*\]\((?:\./|nbs/)?{re.escape(name)}\)", f"![{doc.metadata.get('title', 'picture')}](nbs/images/{name})", body)
    body = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", body, flags=re.MULTILINE))
    return HEAD + body.strip() + "\n", pictures


def main() -> int:
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    if not NOTEBOOK.is_file():
        print("README.md is made from nbs/index.ipynb, and there is no such notebook", file=sys.stderr)
        return 1
    text, pictures = render()
    wanted = {README: text.encode()} | {IMAGES / name: data for name, data in pictures.items()}
    stale = [path for path in IMAGES.glob(f"{PREFIX}*") if path not in wanted]
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", CODE.sub("", text))
    missing = [link for link in links if not (ROOT / link).exists() and (ROOT / link) not in wanted]
    if missing:
        print(f"links to files that are not there: {', '.join(sorted(set(missing)))}", file=sys.stderr)
        return 1
    drifted = [path for path, data in wanted.items() if not path.is_file() or path.read_bytes() != data]
    if check:
        if drifted or stale:
            names = ", ".join(path.relative_to(ROOT).as_posix() for path in (*drifted, *stale))
            print(f"drifted from nbs/index.ipynb: {names}; run `make docs`", file=sys.stderr)
            return 1
        return 0
    if pictures:
        IMAGES.mkdir(parents=True, exist_ok=True)
    for path in drifted:
        path.write_bytes(wanted[path])
    for path in stale:
        path.unlink()
    print(f"{README.name}: {'written' if drifted or stale else 'no change'}, {len(pictures)} pictures from outputs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
