"""Write the parameters cells of the research templates from the table in `cryptoresearch.runs.options`.

    scripts/write_parameters.py            write the cells
    scripts/write_parameters.py --check    change nothing; end with an error if a cell differs from the table
"""

import json
import sys
from pathlib import Path

from cryptoresearch.runs.options import parameters_cell, TEMPLATES

RESEARCH = Path(__file__).resolve().parents[1] / "nbs" / "research"


def main() -> None:
    stale = []
    for name, wanted in TEMPLATES.items():
        path = RESEARCH / f"{name}.ipynb"
        notebook = json.loads(path.read_text(encoding="utf-8"))
        [cell] = [c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])]
        source = parameters_cell(wanted).splitlines(keepends=True)
        if cell["source"] != source:
            stale.append(name)
            cell["source"] = source
            if "--check" not in sys.argv[1:]:
                path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"the parameters of {', '.join(stale)} differ from the table of options. Run: python scripts/write_parameters.py")


if __name__ == "__main__":
    main()
