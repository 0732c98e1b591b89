"""Write the methods and types of `cryptoresearch.client` from the API's own OpenAPI description.

    scripts/write_client.py            write the cells of nbs/95_client.ipynb; then run nbdev_export
    scripts/write_client.py --check    change nothing; end with an error if a cell differs from the description
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from cryptoresearch.serving.api import create_app
from cryptoresearch.settings import Settings

type Schema = dict  # of JSON Schema

NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs" / "95_client.ipynb"
MARK = "#| export\n# written by scripts/write_client.py\n"
ARROW, EVENTS = "application/vnd.apache.arrow.stream", "text/event-stream"
PLAIN = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}


def of_ref(schema: Schema) -> str:
    "Name what a schema refers to; empty if it is no reference."
    return schema.get("$ref", "").rpartition("/")[2]


def python_type(schema: Schema, known: Schema) -> str:
    "Write a schema as a type."
    if name := of_ref(schema):
        return "dict[str, object]" if known[name].get("additionalProperties") is True else name
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(python_type(part, known) for part in schema["anyOf"]))
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return f"Literal[{', '.join(json.dumps(v) for v in values)}]"
    if schema.get("type") == "array":
        return f"list[{python_type(schema['items'], known)}]"
    if schema.get("type") == "object" or "type" not in schema:
        inner = schema.get("additionalProperties")
        return f"dict[str, {python_type(inner, known)}]" if isinstance(inner, dict) and inner else "dict[str, object]" if "type" in schema else "object"
    return PLAIN[schema["type"]]


def line(code: str, comment: str) -> str:
    "Write a line with its comment, above it where both together are too long."
    both = f"{code}  # {comment}"
    indent = code[: len(code) - len(code.lstrip())]
    return both if len(both) <= 140 else f"{indent}# {comment}\n{code}"


def typed_dict(name: str, schema: Schema, known: Schema) -> str:
    "Write a class for an object."
    rows = []
    for field, part in schema["properties"].items():
        text = part.get("description") or {"symbol": "such as BTCUSDT", "run_id": "id of the run", "spec": "bar length"}.get(field, field.replace("_", " "))
        rows.append(line(f"    {field}: {python_type(part, known)}", text))
    return f'class {name}(TypedDict):\n    "{schema["description"]}"\n\n' + "\n".join(rows)


def needed(schema: object, known: Schema) -> Iterator[str]:
    "List the objects that a schema needs, those that others need first."
    if isinstance(schema, dict):
        name = of_ref(schema)
        if name and known[name].get("additionalProperties") is not True:
            yield from needed(known[name].get("properties", {}), known)
            yield name
        for part in schema.values():
            yield from needed(part, known)
    elif isinstance(schema, list):
        for part in schema:
            yield from needed(part, known)


def parameter_type(schema: Schema, known: Schema) -> str:
    "Write the type of a parameter; a time may be a datetime or text."
    is_time = "date-time" in (schema.get("format"), *(part.get("format") for part in schema.get("anyOf", [])))
    return "When | None" if is_time else python_type(schema, known)


def method(path: str, verb: str, what: Schema, known: Schema) -> tuple[str, str]:
    "Write the function of a route; return its name too."
    name = what["summary"].lower().replace(" ", "_")
    content = what["responses"]["200"]["content"]
    args, query, headers = [], [], []
    parameters = [p for p in what.get("parameters", []) if p["name"] != "format"]
    for p in sorted(parameters, key=lambda p: not p.get("required")):
        own = {"Last-Event-ID": "last_id"}.get(p["name"], p["name"])
        default = "" if p.get("required") else f" = {p['schema'].get('default')!r}".replace("'", '"')
        args.append(line(f"    {own}: {parameter_type(p['schema'], known)}{default},", p.get("description", own)))
        (headers if p["in"] == "header" else query if p["in"] == "query" else []).append(own)
    given, url = ", ".join(f"{q}={q}" for q in query), f'f"{path}"' if "{" in path else f'"{path}"'
    if verb == "post":
        body = known[of_ref(what["requestBody"]["content"]["application/json"]["schema"])]["properties"]
        for field, part in body.items():
            args.append(line(f"    {field}: {'pd.DataFrame' if part.get('type') == 'array' else python_type(part, known)},", part["description"]))
        given = ", ".join(f"{f}=rows_of({f})" if p.get("type") == "array" else f"{f}={f}" for f, p in body.items())
    call = f"client, {url}{', ' if given else ''}{given}"
    if EVENTS in content:
        result, about, code = "Iterator[Event]", "ends when the server stops", f"read_events({call}, last_id=last_id)"
    elif ARROW in content:
        result, about = "pd.DataFrame", "rows; attrs: snapshot, and source and next_start or next_cursor where there are any"
        code = f"read_table({call})"
    elif "application/json" in content:
        result = python_type(content["application/json"]["schema"], known)
        about, code = "JSON", f"cast({json.dumps(result) if '[' in result else result}, {'send_json' if verb == 'post' else 'read_json'}({call}))"
    else:
        result, about, code = "str", "text", f"ask(client, {url}).text"
    head = f'def {name}(\n    client: "Client",  # of the server\n' + "".join(f"{a}\n" for a in args)
    text = what["description"].replace('"', "'")
    code = f"    return {code}"
    if len(code) > 140:
        start = code.index("(") + 1
        code = f"{code[:start]}\n        {code[start:-1]}\n    )"
    return name, f'{head}) -> {result}:  # {about}\n    "{text}"\n{code}'


def wrapped(names: list[str]) -> str:
    "Write the methods of the class, four per line."
    fours = [names[i : i + 4] for i in range(0, len(names), 4)]
    return "\n".join(f"    {', '.join(n.partition('_')[2] for n in some)} = {', '.join(some)}" for some in fours)


GROUPS = {  # tag of the routes: heading and introduction
    "service": ("The service", "Whether the server works, and how the live predictions of its store do."),
    "data": ("Data", "What the store holds, and the tables that are made from it."),
    "models": ("Models, runs and predictions", "What was trained, what it is worth, and what it forecasts. `predict` sends a table of bars, and stores nothing."),
}
MOST_LINES = 24  # of a generated cell, unless a single definition is longer


def row(name: str, what: Schema, code: str, known: Schema) -> str:
    "Write the row of a method in the table of its group."
    required = [p["name"] for p in what.get("parameters", []) if p.get("required")]
    if body := what.get("requestBody"):
        required += known[of_ref(body["content"]["application/json"]["schema"])]["required"]
    returns = re.search(r"^\) -> (.+?):  # ", code, re.MULTILINE)[1].replace("|", "or").replace("pd.", "")
    return f"| `client.{name.partition('_')[2]}({', '.join(required)})` | {what['description'].split('. ')[0].rstrip('.')} | `{returns}` |"


def packed(definitions: list[str]) -> Iterator[str]:
    "Put definitions together into cells."
    cell = ""
    for one in definitions:
        both = f"{cell}\n\n\n{one}" if cell else one
        if cell and both.count("\n") + 3 > MOST_LINES:
            yield cell
            both = one
        cell = both
    yield cell


def cells() -> list[str]:
    "Write all generated cells; those that do not begin with MARK are text."
    api = create_app(Settings(_env_file=None)).openapi()
    known, names, written = api["components"]["schemas"], [], list[str]()
    rows, types, codes = ({tag: list[str]() for tag in GROUPS} for _ in range(3))
    for path, methods in api["paths"].items():
        for verb, what in methods.items():
            (tag,), content = what["tags"], what["responses"]["200"]["content"]
            name, code = method(path, verb, what, known)
            names.append(name)
            rows[tag].append(row(name, what, code, known))
            codes[tag].append(code)
            objects = [] if ARROW in content else list(dict.fromkeys(needed(content.get("application/json", {}), known)))
            types[tag] += [typed_dict(n, known[n], known) for n in objects if n not in written]
            written += objects
    out = []
    for tag, (title, about) in GROUPS.items():
        out.append("\n".join([f"### {title}", about, "", "| call | what it does | returns |", "| --- | --- | --- |", *rows[tag]]))
        out += [f"{MARK}\n{code}" for code in packed([*types[tag], *codes[tag]])]
    about = "### The client\nThe functions above are its methods."
    return [*out, about, f"{MARK}\n{CLASS.replace('METHODS', wrapped(names))}"]


CLASS = '''class Client:
    "Read an API of cryptoresearch: a method for each route."

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",  # of the server
        key: str | None = None,  # API key, where the server needs one
        timeout_s: float = 60.0,  # until an answer begins
    ) -> None:
        self.http = connection(url, key, timeout_s)

    def __repr__(self) -> str:
        return f"Client({shown(self)!r})"

METHODS'''


def identity(source: str) -> str:
    "Make the id of a cell from what it begins with."
    key = re.search(r"(?:class|def) \w+|^### .*", source, re.MULTILINE)[0]
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def main() -> None:
    "Write the generated cells, or compare them."
    notebook, wanted = json.loads(NOTEBOOK.read_text(encoding="utf-8")), {identity(source): source.rstrip("\n") for source in cells()}
    sources = ["".join(c["source"]) for c in notebook["cells"]]
    old = [i for i, c in enumerate(notebook["cells"]) if sources[i].startswith(MARK) or c["id"] in wanted]
    if [sources[i] for i in old] == list(wanted.values()):
        return
    if "--check" in sys.argv[1:]:
        sys.exit("the client differs from the API's description. Run: python scripts/write_client.py; nbdev_export")
    new = []
    for name, source in wanted.items():
        is_code = source.startswith(MARK)
        cell = {"cell_type": "code" if is_code else "markdown", "id": name, "metadata": {}, "source": source.splitlines(keepends=True)}
        new.append(cell | ({"execution_count": None, "outputs": []} if is_code else {}))
    at = old[0] if old else len(notebook["cells"])
    kept = [c for i, c in enumerate(notebook["cells"]) if i not in old]
    notebook["cells"] = kept[:at] + new + kept[at:]
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
