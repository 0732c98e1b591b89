"""Read the comments behind parameters and returns, for the checks of style and for the wheel's docstrings."""

import ast
import io
import textwrap
import tokenize
from dataclasses import dataclass

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Entry:
    "One parameter, attribute or return value with its comment."

    name: str  # with its stars; "return" for the return value
    line: int  # 1-based
    comment: str  # empty if there is none
    annotation: str  # source of the annotation, empty if there is none
    default: str  # source of the default, empty if there is none


def comments_by_line(source: str) -> dict[int, tuple[str, bool]]:
    "Map each line with a comment to its text and whether the comment is alone on the line."
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#").strip()
            found[token.start[0]] = (text, not token.line[: token.start[1]].strip())
    return found


def _comment(comments: dict[int, tuple[str, bool]], first: int, last: int, start: int) -> str:
    "Find the comment behind one of the lines `first` to `last`, else the block of comments right above, after line `start`."
    for line in range(last, first - 1, -1):
        if line in comments and not comments[line][1]:
            return comments[line][0]
    above, line = [], first - 1
    while line > start and line in comments and comments[line][1]:
        above.append(comments[line][0])
        line -= 1
    return " ".join(reversed(above))


def _text(node: ast.AST | None) -> str:
    return "" if node is None else ast.unparse(node)


def returns_value(node: Function) -> bool:
    "Tell whether a function is annotated to return something other than None."
    return node.returns is not None and _text(node.returns) not in ("None", "NoReturn", "'None'", "Never")


def signature(node: Function, comments: dict[int, tuple[str, bool]]) -> list[Entry]:
    "List the parameters of a function without `self` and `cls`, then its return value unless that is None."
    spec = node.args
    positional = [*spec.posonlyargs, *spec.args]
    defaults: list[ast.expr | None] = [*[None] * (len(positional) - len(spec.defaults)), *spec.defaults]
    rows: list[tuple[str, ast.arg | ast.expr, ast.expr | None]] = [(a.arg, a, d) for a, d in zip(positional, defaults, strict=True)]
    if rows and rows[0][0] in ("self", "cls"):
        rows.pop(0)
    if spec.vararg:
        rows.append((f"*{spec.vararg.arg}", spec.vararg, None))
    rows += [(a.arg, a, d) for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
    if spec.kwarg:
        rows.append((f"**{spec.kwarg.arg}", spec.kwarg, None))
    if returns_value(node):
        assert node.returns is not None
        rows.append(("return", node.returns, None))
    spans = [(a.lineno, max(a.end_lineno or a.lineno, d.end_lineno or 0 if d is not None else 0)) for _, a, d in rows]
    found = []
    for i, ((name, item, default), (first, last)) in enumerate(zip(rows, spans, strict=True)):
        # where several share a line, its comment belongs to the last of them
        alone = all(other > last for other, _ in spans[i + 1 :])
        annotation = item.annotation if isinstance(item, ast.arg) else item
        found.append(Entry(name, first, _comment(comments, first, last, node.lineno) if alone else "", _text(annotation), _text(default)))
    return found


def attributes(node: ast.ClassDef, comments: dict[int, tuple[str, bool]]) -> list[Entry]:
    "List the annotated fields of a class."
    found = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_"):
            text = _comment(comments, item.lineno, item.end_lineno or item.lineno, node.lineno)
            found.append(Entry(item.target.id, item.lineno, text, _text(item.annotation), _text(item.value)))
    return found


def is_dataclass(node: ast.ClassDef) -> bool:
    "Tell whether a class is decorated as a dataclass."
    return any("dataclass" in _text(d) for d in node.decorator_list)


def _section(title: str, entries: list[Entry]) -> list[str]:
    lines = [title, "-" * len(title)]
    for e in entries:
        kind = ", ".join(part for part in (e.annotation, f"default {e.default}" if e.default else "") if part)
        lines.append(kind if e.name == "return" else f"{e.name} : {kind}" if kind else e.name)
        lines += textwrap.wrap(e.comment, 110, initial_indent="    ", subsequent_indent="    ", break_long_words=False)
    return lines


def _constructor(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> ast.FunctionDef | None:
    "Find the `__init__` of a class; a public class may inherit it from a private base class of the same module."
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    while init is None and node.bases and (base := classes.get(_text(node.bases[0]), node)).name.startswith("_") and base is not node:
        node = base
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    return init


def _parts(
    node: Function | ast.ClassDef, comments: dict[int, tuple[str, bool]], classes: dict[str, ast.ClassDef]
) -> list[tuple[str, list[Entry]]]:
    "List the sections of a function or a class; the parameters of a class are those of its `__init__`."
    if isinstance(node, ast.ClassDef):
        init = _constructor(node, {} if node.name.startswith("_") else classes)
        return [("Parameters", signature(init, comments) if init is not None else []), ("Attributes", attributes(node, comments))]
    entries = signature(node, comments)
    return [("Parameters", [e for e in entries if e.name != "return"]), ("Returns", [e for e in entries if e.name == "return"])]


def _sections(node: Function | ast.ClassDef, comments: dict[int, tuple[str, bool]], classes: dict[str, ast.ClassDef]) -> list[str]:
    "Write the sections that have at least one comment, in numpydoc's form."
    parts = [(title, entries) for title, entries in _parts(node, comments, classes) if any(e.comment for e in entries)]
    return [line for title, entries in parts for line in ("", *_section(title, entries))]


def shows_docstrings(tree: ast.Module) -> bool:
    "Tell whether a module's docstrings are texts for users: help of commands (typer) or descriptions of routes (FastAPI)."
    names = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names} | {n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)}
    return any(name.split(".")[0] in ("typer", "fastapi") for name in names)


def with_sections(source: str) -> str:
    "Return a module's source with the comments of its signatures and fields as sections of the docstrings."
    tree, comments = ast.parse(source), comments_by_line(source)
    if shows_docstrings(tree):
        return source
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    lines = [f"{line}\n" for line in source.split("\n")]  # as the tree counts; `splitlines` also splits at form feeds
    edits: list[tuple[int, int, str]] = []  # first and last line of a docstring, and what replaces them
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        sections = _sections(node, comments, classes)
        if not sections:
            continue
        first = node.body[0]
        doc = ast.get_docstring(node)
        if doc is None:
            continue
        # the docstring must be alone on its lines: a body behind a semicolon, or on the line of `def`, stays as it is
        assert isinstance(first, ast.Expr)
        last_line = first.end_lineno or first.lineno
        before = lines[first.lineno - 1].encode()[: first.col_offset].decode()  # the tree counts bytes
        after = lines[last_line - 1].encode()[first.end_col_offset or 0 :].decode()
        if before.strip() or (after.strip() and not after.strip().startswith("#")):
            continue
        text = "\n".join([doc.rstrip(), *sections])
        body = "\n".join(f"{before}{line}" if line and i else line for i, line in enumerate(text.split("\n")))
        body = body.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
        edits.append((first.lineno, last_line, f'{before}"""{body}\n{before}"""{after.rstrip()}\n'))
    for start, end, text in sorted(edits, reverse=True):
        lines[start - 1 : end] = [text]
    return "".join(lines).removesuffix("\n")
