"""Check the imports of the package against its layers, and those of the notebooks against their numbers.

    python scripts/check_layers.py           the violations, one per line
    python scripts/check_layers.py --json    the same as JSON
"""

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from dataclasses import asdict, dataclass
from pathlib import Path

PACKAGE = "cryptoresearch"

# The layers from bottom to top, and what each may import besides itself. A name stands for a package or a module at the top level.
LAYERS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "settings": ("errors",),
    "data": ("errors", "settings"),
    "ingest": ("data", "errors", "settings"),
    "live": ("data", "errors", "settings"),
    "features": ("data", "errors", "settings"),
    "labels": ("features", "data", "errors", "settings"),
    "metrics": ("errors",),
    "models": ("metrics", "errors"),
    "runs": ("models", "metrics", "labels", "features", "data", "errors", "settings"),
    "evaluation": ("runs", "models", "metrics", "labels", "features", "data", "errors", "settings"),
    "client": ("errors",),
    "serving": ("evaluation", "runs", "models", "metrics", "labels", "features", "live", "ingest", "data", "errors", "settings"),
}
# Thin modules at the top: they may import everything, and each other, and may import inside functions, because each command has to start fast.
THIN = ("cli", "cli_data", "cli_research", "cli_shared", "doctor", "accessor", "demo", "__init__", "_modidx")


@dataclass(frozen=True)
class Import:
    "One module of the package that a module imports."

    module: str  # that imports, without the package's name, such as data.bars
    target: str  # that is imported
    names: tuple[str, ...]  # names taken from it; empty for the module itself
    line: int
    function: str  # function around the import; empty at module level
    typing: bool  # below `if TYPE_CHECKING`
    reason: str  # comment on the line


@dataclass(frozen=True)
class Violation:
    "One import that breaks a rule."

    rule: str  # layer, unknown, cycle, function, private or number
    place: str  # file and line
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.rule}: {self.text}"


def modules(root: Path) -> dict[str, Path]:
    "Map the names of modules, without the package's, to their files; a package is its `__init__`."
    base = root / PACKAGE
    found = {}
    for path in sorted(base.rglob("*.py")):
        parts = path.relative_to(base).with_suffix("").parts
        found["__init__" if parts == ("__init__",) else ".".join(p for p in parts if p != "__init__")] = path
    return found


def comments(source: str) -> dict[int, str]:
    "Map lines to the comments on them."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("#").strip() for t in tokens if t.type == tokenize.COMMENT}


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str | None:
    "Resolve the module of `from … import` to a name without the package's; None if it belongs to another package."
    if not node.level:
        if node.module == PACKAGE:
            return ""
        return node.module.removeprefix(f"{PACKAGE}.") if node.module and node.module.startswith(f"{PACKAGE}.") else None
    parts = [] if module == "__init__" else module.split(".")
    up = node.level - 1 if is_package else node.level
    parts = parts[: len(parts) - up] if up else parts
    return ".".join([*parts, *(node.module.split(".") if node.module else [])])


def imports_of(source: str, module: str, known: set[str], is_package: bool = False) -> list[Import]:
    "List the imports of the package's own modules in one module's source."
    notes, found = comments(source), []

    def add(node: ast.stmt | ast.expr, target: str, names: tuple[str, ...], function: str, typing: bool) -> None:
        reason = next((notes[i] for i in range(node.lineno, (node.end_lineno or node.lineno) + 1) if i in notes), "")
        found.append(Import(module, target, names, node.lineno, function, typing, reason))

    def visit(node: ast.AST, function: str, typing: bool) -> None:
        if isinstance(node, ast.ImportFrom) and (base := _absolute(node, module, is_package)) is not None:
            plain = []
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                if inner in known:
                    add(node, inner, (), function, typing)
                else:
                    plain.append(alias.name)
            if plain:
                add(node, base or "__init__", tuple(plain), function, typing)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == PACKAGE or alias.name.startswith(f"{PACKAGE}."):
                    add(node, alias.name.removeprefix(PACKAGE).lstrip(".") or "__init__", (), function, typing)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__") and node.args:
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if isinstance(name, str) and name.startswith(f"{PACKAGE}."):
                add(node, name.removeprefix(f"{PACKAGE}."), (), function, typing)
        inner_typing = typing or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        inside = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not function else function
        for child in ast.iter_child_nodes(node):
            visit(child, inside, inner_typing)

    visit(ast.parse(source), "", False)
    return found


def layer_of(module: str) -> str:
    "Name the layer of a module: its package, or the module itself at the top level."
    return module.split(".")[0]


def check_layers(imports: list[Import]) -> list[Violation]:
    "Find imports of a layer that is not below."
    found = []
    for i in imports:
        low, high = layer_of(i.target), layer_of(i.module)
        if high in THIN:
            continue
        if high not in LAYERS:
            found.append(Violation("unknown", _place(i), f"{high} has no layer; add it to LAYERS"))
        elif i.target == "__init__":
            if any(n != "__version__" for n in i.names):
                found.append(Violation("layer", _place(i), f"{i.module} imports {', '.join(i.names)} from the top of the package"))
        elif low != high and low not in LAYERS[high]:
            found.append(Violation("layer", _place(i), f"{i.module} imports {i.target}{_names(i)}, which is not below it"))
    return found


def check_functions(imports: list[Import]) -> list[Violation]:
    "Find imports inside functions that give no reason."
    return [
        Violation("function", _place(i), f"{i.module}.{i.function} imports {i.target}{_names(i)} and gives no reason in a comment on the line")
        for i in imports
        if i.function and not i.reason and layer_of(i.module) not in THIN
    ]


def circles(imports: list[Import]) -> list[list[str]]:
    "Find the groups of modules that import each other, directly or not (Tarjan 1972)."
    graph: dict[str, set[str]] = {}
    for i in imports:
        # the package's `__init__` imports lazily: a module that reads the version from it makes no circle
        if not i.typing and i.target != "__init__" and i.module != "__init__":
            graph.setdefault(i.module, set()).add(i.target)
            graph.setdefault(i.target, set())
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def connect(v: str) -> None:
        order[v] = low[v] = len(order)
        stack.append(v)
        for w in sorted(graph[v]):
            if w not in order:
                connect(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], order[w])
        if low[v] == order[v]:
            group = stack[stack.index(v) :]
            del stack[stack.index(v) :]
            if len(group) > 1 or v in graph[v]:
                found.append(sorted(group))

    for v in sorted(graph):
        if v not in order:
            connect(v)
    return sorted(found)


def check_cycles(imports: list[Import]) -> list[Violation]:
    "Find modules that import each other, imports inside functions included."
    found = []
    for group in circles(imports):
        edges = sorted({f"{i.module} → {i.target}{' (in ' + i.function + ')' if i.function else ''}" for i in imports if i.module in group and i.target in group})
        found.append(Violation("cycle", f"{PACKAGE}/{group[0].replace('.', '/')}.py", f"{', '.join(group)}: {'; '.join(edges)}"))
    return found


def is_private(name: str) -> bool:
    "Tell whether a name begins with an underscore and is no dunder."
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def check_private(imports: list[Import], sources: dict[str, str]) -> list[Violation]:
    "Find private names of other modules: imported, or read as attributes of an imported module."
    found = [Violation("private", _place(i), f"{i.module} imports {n} from {i.target}") for i in imports if i.target != i.module for n in i.names if is_private(n)]
    for module, source in sources.items():
        tree = ast.parse(source)
        targets = {i.target.split(".")[-1]: i.target for i in imports if i.module == module and not i.names}
        names = {a.asname or a.name: targets[a.name] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names if a.name in targets}
        names |= {a.asname: a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names if a.asname and a.name.startswith(f"{PACKAGE}.")}
        for n in ast.walk(tree):
            if isinstance(n, ast.Attribute) and is_private(n.attr):
                base = ast.unparse(n.value)
                if base in names or base.startswith(f"{PACKAGE}."):
                    found.append(Violation("private", f"{_file(module)}:{n.lineno}", f"{module} reads {base}.{n.attr}"))
    return found


def number_of(path: Path) -> tuple[int, str] | None:
    "Read the number before a notebook's name, letters included; None if it has none."
    match = re.match(r"(\d+)([a-z]*)_", path.name)
    return (int(match[1]), match[2]) if match else None


def notebooks(root: Path) -> dict[str, Path]:
    "Map modules to the notebooks that export them."
    found = {}
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if any(part.startswith((".", "_")) for part in path.relative_to(root).parts):
            continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code" and (match := re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(cell["source"]), re.MULTILINE)):
                found[match[1]] = path
                break
    return found


def check_numbers(root: Path, imports: list[Import]) -> list[Violation]:
    "Find notebooks whose exported code imports from a higher number in their folder."
    books, found = notebooks(root), []
    for i in imports:
        here, there = books.get(i.module), books.get(i.target)
        if here is None or there is None or here.parent != there.parent or here == there or i.typing:
            continue
        low, high = number_of(there), number_of(here)
        if low is not None and high is not None and low > high:
            found.append(Violation("number", here.relative_to(root).as_posix(), f"imports {i.target}{_names(i)} from {there.name}, which comes later"))
    return sorted(set(found), key=str)


def _file(module: str) -> str:
    return f"{PACKAGE}/{module.replace('.', '/')}.py"


def _place(i: Import) -> str:
    return f"{_file(i.module)}:{i.line}"


def _names(i: Import) -> str:
    return f" ({', '.join(i.names)})" if i.names else ""


def check(root: Path) -> list[Violation]:
    "List every violation in a project."
    files = modules(root)
    sources = {name: path.read_text(encoding="utf-8") for name, path in files.items() if name != "_modidx"}
    known = set(files)
    imports = [i for name, source in sources.items() for i in imports_of(source, name, known, files[name].name == "__init__.py")]
    return [
        *check_layers(imports), *check_cycles(imports), *check_functions(imports), *check_private(imports, sources), *check_numbers(root, imports),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=None, help="the project; the parent of this script's folder otherwise")
    parser.add_argument("--json", action="store_true", help="the violations as JSON")
    parser.add_argument("--rule", action="append", help="only these rules: layer, unknown, cycle, function, private, number")
    asked = parser.parse_args()
    found = check((asked.root or Path(__file__).resolve().parents[1]).resolve())
    found = [v for v in found if not asked.rule or v.rule in asked.rule]
    if asked.json:
        print(json.dumps([asdict(v) for v in found], indent=1, ensure_ascii=False))
    else:
        print(*found, sep="\n")
        counts = {rule: sum(v.rule == rule for v in found) for rule in dict.fromkeys(v.rule for v in found)}
        print(f"{len(found)} violations" + (f": {', '.join(f'{n} {r}' for r, n in counts.items())}" if found else ""))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
