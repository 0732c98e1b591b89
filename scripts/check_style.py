"""Count and list what the rules of style forbid, in notebooks and in what they export.

    python scripts/check_style.py --summary          one table with the totals and what is allowed
    python scripts/check_style.py nbs/data/*.ipynb   the findings of these notebooks, with cell and line
    python scripts/check_style.py --check words      the findings of one check everywhere
"""

import argparse
import ast
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from docments import Entry, Function, attributes, comments_by_line, is_dataclass, signature

# How many findings each check may have. A number only ever goes down; the goal is 0 everywhere.
ALLOWED = {
    "docments": 0,  # parameters, fields and returns of public functions without a comment
    "docstring missing": 0,  # public functions and classes without a docstring
    "docstring question": 0,  # a docstring that begins like a question or a noun clause: What, Whether, How …
    "docstring noun": 0,  # a function's docstring that begins with no imperative verb
    "long cell": 0,  # exported cells above 25 lines
    "many cells": 0,  # notebooks above 75 code cells
    "long line": 0,  # code lines above 140 characters
    "conditional": 0,  # conditional expressions in cells of the research templates
    "words": 0,  # words and phrases that STYLE replaces
    "module name": 0,  # modules named by a figure of speech
    "any": 114,  # `Any` in annotations of exported code
    "no picture": 0,  # exporting notebooks of PICTURES without one
}
# Counted and shown, never a failure.
REPORTED = ("str option",)

CELL_LINES, LINE_CHARS, CODE_CELLS = 25, 140, 75
PICTURES = ("data", "ingest", "features", "labels", "metrics", "models", "runs", "evaluation")
MODULE_NAMES = {"luck", "question", "held", "own", "peers", "growth", "strays", "landing", "dirt"}
PROSE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")

# ---------------------------------------------------------------- words

_PER = "row|bar|second|minute|hour|day|week|month|year|file|block|cell|line|side|column|run|fold|trade|model|core|page|frame|process|worker|symbol"
_THINGS = (
    "ticks|trades|rows|bars|events|messages|bytes|points|cells|files|values|outcomes|forecasts|names|digits|calls|pages|requests|candles|snapshots|"
    "seconds|nanoseconds|ns|µs|ms|states|barriers|one|two|three|four|five|six|ten|[\\d,.]+"
)
# phrase, what to write. The whole table of STYLE and the column "today" of wording.md; matched without regard to case in prose outside of `code`.
WORDS: dict[str, str] = {
    # agents and actors
    r"(?:nobody|somebody|whoever)(?:'s)?": "the passive voice, 'the user', 'another process'",
    # figures of speech
    r"st(?:and|ands|ood|anding)(?! (?:for|in for|alone|out|still)\b)(?!-)(?: beside)?": "'is', 'is shown', 'is listed', 'is stored'",
    r"stand-ins?": "'a local server that speaks the protocol', 'a substitute'",
    "beside": "'next to', 'alongside', 'in addition to'",
    r"(?:is|are|was|were|be|been|being|gets?) told": "'is reported', 'is described'",
    r"(?:tell|tells|told|telling)(?: \w+){0,4} apart": "'distinguish'",
    r"(?:says?|said|means?) what (?:it|they) (?:is|are|says?)": "'is calibrated'",
    r"what it says is what comes": "'perfect calibration'",
    r"what came(?: of (?:it|them|that))?": "'the outcome', 'the realised value'",
    r"came of (?:it|them|that|this)": "'the outcome'",
    r"(?:bring|brings|bringing|brought)(?: \S+){1,6}? down to(?: \w+)? bars": "'aggregate into bars'",
    r"(?:made|make|makes|making|make it|made it) (?:\w+ )?(?:again|anew)": "'reproduce', 'rebuild'",
    r"(?:the|this|that|these|those|its|their) very (?!first|last|same|end|few|many|beginning|little|large|small|long|short)\w+": "'the same …'",
    # odd adverbs and prepositions
    "anew": "'again'",
    "afresh": "'again'",
    "wholly": "'entirely', 'fully'",
    "at hand": "'current', 'available'",
    r"(?:go|goes|going|went|gone) on(?! to\b)": "'continue'",
    r"behind (?:the|a|an|each|every|any|its|that|this|another|one) (?:\w+ )?(?:gaps?|holes?|points?|dates?|rows?|lines?|headers?|newlines?|ends?|close|bars?|block|repetition|trades?|ones?|last|first)\b": "'after'",
    rf"(?:{_THINGS}) an? (?:{_PER})": "'per', as in 'ticks per bar'",
    # terms
    r"calm(?:er|est|ly)?": "'low volatility'",
    r"storm(?:s|y|ier)?": "'high volatility'",
    r"middle (?:third|tercile|regime)|(?:calm|low), middle|middle,? (?:and )?(?:high|storm)": "'medium volatility'",
    r"(?:by |of |sheer |good |bad )?luck(?: alone)?|lucky": "'chance', 'overfitting'",
    r"(?:run's|whole) questions?|questions? of (?:a|the|each|its) (?:run|configuration)|answers? one question": "'run configuration'",
    r"(?:trials?|runs?|stud(?:y|ies)|models|search(?:es)?|comparisons?) (?:of|that answer) (?:one|the same|this|that|its|a|the) questions?": "'run configuration'",
    r"held data": "'captured data'",
    r"peers?(?:'s?)?": "'linear models', 'reference model'",
    r"strays?": "'late rows'",
    "dirt": "'corruption'",
    r"landing (?:area|folder|place|zone|table)": "'staging'",
    # reports, pages and figures
    r"tenths? of (?:the )?forecasts": "'deciles'",
    r"was it tested on what it had seen": "'Look-ahead check'",
    r"how good are the forecasts": "'Forecast accuracy'",
    r"when does it work": "'Performance by regime'",
    r"do (?:the )?forecasts mean what they say": "'Calibration'",
    r"would it have paid": "'Trading performance'",
    r"chosen from how many": "'Multiple testing'",
    r"could the pipeline fool itself": "'Negative-control audit'",
    r"what does the model look at": "'Feature importance'",
    r"a model of any kind on features": "the model and the test by name",
    r"finds something where nothing is": "'Not audited. Run: …'",
    r"given up for that": "'purge gap'",
    r"(?:forecasts|baselines) that cost nothing|cost(?:s)? nothing to make": "'naive benchmarks'",
    r"draw(?:s|n|ing)? blocks of time|blocks of time drawn": "'block bootstrap'",
    r"had the training been another one": "'Other training histories (CPCV)'",
    r"saved by the model|loss saved|saved loss": "'loss reduction'",
    r"among the best": "'in the model confidence set'",
    r"holds zero": "'interval includes zero'",
    r"are not \w+ proofs": "'these scores are not independent'",
    r"impact eats": "'capacity'",
    r"hunt(?:s|ed|ing)? for (?:a )?leaks?": "'check for leakage'",
    r"root of the sum of squared (?:log )?returns": "'realised volatility'",
    r"shares? of (?:the )?gain": "'feature importance (gain share)'",
    r"every 20th bar": "'Price (thinned for display)'",
    r"its parameters of the label": "'label parameters'",
}
# `last`, `parts`, `inside, below, above` and `without a trade` of wording.md, and `own`, `question`, `growth`, `landing` of STYLE, are ordinary
# English too: only the labels themselves, or the phrases above, can be found without false alarms.
LABELS: dict[str, str] = {
    "inside": "'coverage'",
    "calm": "'low volatility'",
    "storm": "'high volatility'",
    "without a trade": "'zero-volume bars'",
    "its parameters": "'label parameters'",
}
# Text in which a word above is right, with the reason. A match is dropped if it lies inside of one of these.
FINE: dict[str, str] = {
    r"stand-?alone": "an adjective of its own",
    r"understand\w*": "another word",
    r"peer[- ]review\w*|peer-to-peer": "terms",
}
_FINE = re.compile("|".join(f"(?:{pattern})" for pattern in FINE), re.IGNORECASE)
_WORDS = [(re.compile(rf"(?<![\w`/.#-])(?:{p})(?![\w`-])", re.IGNORECASE), fix) for p, fix in WORDS.items()]
# a fronted phrase is one at the start of a sentence: with a capital
_WORDS.append(
    (re.compile(r"(?<![\w`/#-])Of (?:a|an|the|each|every|what|its|one|those|these|two|three|both|all|\w+) [^.,:;\n]{2,60}?[ ,](?:is|are|has|have|was|were|can|\w+s)\b"), "'For …', or the subject first")
)
_ANY = re.compile(r"(?<![\w`/.#-])(?:" + "|".join(f"(?:{p})" for p in [*WORDS, "of"]) + ")", re.IGNORECASE)  # fast: most texts have none

# ---------------------------------------------------------------- docstrings

_QUESTIONS = "What Which Whether Where How Who Whose When Why Whatever Whoever Is Are Does Was Were Has"
_VERBS = """
Abort Accept Accumulate Acquire Act Adapt Add Adjust Advance Aggregate Align Allocate Allow Announce Annotate Annualise Answer Append Apply Approximate Archive Arrange Ask
Assemble Assert Assess Assign Associate Attach Attempt Audit Average Await Back Balance Batch Begin Bind Block Bootstrap Bound Break Bring Broadcast Browse Buffer Build Bump
Cache Calculate Calibrate Call Cancel Cap Capture Carry Cast Catch Center Centre Change Charge Chart Check Choose Classify Clean Clear Clip Clone Close Cluster Coerce Collapse
Collect Colour Combine Commit Compact Compare Compile Complete Compose Compress Compute Concatenate Condense Configure Confirm Connect Construct Consume Contrast Convert
Convolve Copy Correct Correlate Count Cover Create Cross Cut Deal Debug Decay Decide Declare Decode Decompose Decompress Decorate Deduplicate Default Defer Define Deflate Delegate
Delete Deliver Demean Demonstrate Deposit Deprecate Derive Describe Deserialise Destroy Detect Determine Detrend Difference Digest Discard Disconnect Discount Discover Discretise
Dispatch Display Distinguish Distribute Divide Do Document Download Downsample Draw Drive Drop Dump Duplicate Embed Emit Enable Encode Enforce Ensure Enter Enumerate Erase
Escape Establish Estimate Evaluate Evict Examine Exchange Exclude Execute Exit Expand Expect Explain Export Expose Express Extend Extract Fail Fall Fetch File Fill Filter
Finalise Find Finish Fit Fix Flag Flatten Flip Flush Fold Follow Force Forecast Forget Fork Form Format Forward Free Freeze Gate Gather Generate Get Give Grant Group Grow Guard
Guess Halt Hand Handle Hash Heal Hide Highlight Hold Identify Ignore Impose Import Impute Include Increase Increment Index Indicate Infer Inform Ingest Inherit Initialise Inject
Insert Inspect Install Integrate Interpolate Interpret Intersect Introduce Invalidate Inverse Invert Invoke Isolate Issue Iterate Join Journal Judge Keep Kill Label Lag Launch Lay Lead Learn
Leave Let Limit Line Link List Listen Load Locate Lock Log Look Loop Lower Make Manage Map Mark Mask Match Materialise Mature Measure Merge Migrate Mirror Mix Model Modify Monitor Move
Multiply Mute Name Narrow Neutralise Normalise Note Notify Nudge Number Observe Obtain Offer Offset Omit Open Optimise Order Organise Orthogonalise Overlay Override Overwrite Pack
Pad Page Paint Parse Partition Pass Patch Pause Penalise Perform Permute Persist Pick Ping Pin Pivot Place Plan Play Plot Point Poll Pool Pop Populate Position Post Predict Prefer Prepare
Prepend Preserve Print Probe Process Produce Profile Project Promote Propagate Propose Protect Prove Provide Prune Publish Pull Purge Push Put Quantise Query Queue Quit Quote Raise
Randomise Rank Rate Reach React Read Rebuild Recalibrate Receive Recompute Reconcile Reconnect Reconstruct Record Recover Redact Redirect Reduce Refer Refit Refresh Refuse Register Reindex
Reject Release Reload Remember Remove Rename Render Renew Reorder Repair Repeat Replace Replay Reply Report Represent Reproduce Request Require Resample Rescale Reserve Reset Reshape
Resize Resolve Respond Restart Restore Restrict Resume Retain Retire Retrieve Retry Return Reuse Reveal Reverse Revert Review Revise Rewind Rewrite Roll Rotate Round Route Run Sample
Sanitise Save Scale Scan Schedule Score Scrape Screen Scroll Search See Seed Select Send Separate Serialise Serve Set Settle Shape Share Shift Shorten Show Shrink Shuffle Shut Sign
Signal Simplify Simulate Size Skip Sleep Slice Smooth Snap Solve Sort Space Specify Split Spread Square Squeeze Stack Stage Stamp Standardise Start State Stay Steer Step Stop Store
Stream Stretch Strip Style Submit Subscribe Subset Subtract Suggest Sum Summarise Supply Support Suppress Suspend Swap Switch Synchronise Tabulate Tag Tail Take Tally Tell Terminate
Test Thin Throttle Tick Tidy Tie Time Toggle Touch Trace Track Trade Train Transfer Transform Translate Transpose Traverse Treat Trigger Trim Truncate Trust Try Tune Turn Type Unpack
Unregister Unsubscribe Unwrap Update Upgrade Upload Upsert Use Validate Value Vary Verify View Visit Wait Wake Walk Warm Warn Watch Weight Whiten Widen Winsorise Withdraw Work Wrap Write
Go Say Yield Zero Zip Mount Hook Hint Host Hedge Halve Double Bisect Bracket Bucket Bin Encrypt Decrypt Anchor Age Arm Disarm Beat Acknowledge Admit Advise Allot Backfill Refill Bias Blend
Boost Clamp Claim Compensate Concede Contain Contract Coordinate Credit Debit Dedupe Delay Deny Depend Depict Disable Dismiss Echo Edit Elect Eliminate Encapsulate Encourage Endure Enqueue
Dequeue Enrich Equalise Exempt Exhaust Exploit Explore Extrapolate Factor Favour Fan Feed Figure Fire Flow Fuse Gauge Govern Help Impersonate Imply Inflate Instruct Instantiate Intercept Lend
Lift Lint Maintain Mean Mend Minimise Maximise Mimic Nest Notice Outline Outsource Own Panic Peek Piece Preload Prevent Price Prime Prioritise Promise Prompt Quantify Quarantine Rebase Rebin
Reassemble Recall Reclaim Recognise Recommend Recreate Regress Relabel Relax Relate Rely Remap Remind Repack Reparse Requeue Rerun Rescue Respect Rethrow Sandwich Satisfy Scatter Seal Seek Sell
Buy Sense Sequence Shade Shield Signify Simplify Sketch Span Spawn Spell Splice Spool Spot Stall Stitch Substitute Succeed Survey Survive Tap Target Tighten Title Total Transmit Triage Unite
Unlock Unmask Unstack Unzip Vote Weigh Weaken Wire Zoom
"""
# Verbs of the list that are nouns as often ("Mean absolute error"): verbs only with an object behind them that begins like one.
_OFTEN_NOUNS = """Mean Sample Share Log Name Number Score Position Rank Level Root Time Size Volume Slope Length Weight Forecast Label Value Model Index Rate Price Average Difference Test Place
Sum Cost Target Range State Source Sign Change Loss Line Order Quote Cap Step Bound Stamp Error Type File Page Figure Spread Path Cross Drift Square Total Project Profile Process Title
Feed Fan Flow Age Factor Inverse Bias Lag Span Width Margin Point Part End Text"""
# Nouns only before "of" and the like: "Digest of the rows", "Trade ids".
_SELDOM_NOUNS = "List Trade Note Count Measure Report Plan Digest Copy Map Answer Search Record Change"
QUESTIONS, VERBS, OFTEN_NOUNS, SELDOM_NOUNS = (frozenset(text.split()) for text in (_QUESTIONS, _VERBS, _OFTEN_NOUNS, _SELDOM_NOUNS))
_OBJECT = re.compile(
    r"^\w+,? (?:and \w+ )?(?:a|an|the|all|each|every|any|its|their|both|one|two|what|how|whether|which|where|when|those|these|this|that|rows|bars|trades|features|`|[A-Z]|out|up|down|in|into|"
    r"from|on|off|to|with|for|by|at|as|back|no|only|many|several|more|such|data|files|messages|names|columns|forecasts|models|values|events|missing|new|old|stored|some|most)\b|^\w+ `"
)


def first_word_problem(doc: str, kind: str) -> str | None:
    "Say which docstring check a first line fails: `question`, `noun` or none. `kind` is function, property or class."
    words = doc.split()
    if not words:
        return "noun"
    first = words[0].strip(",.:;`'\"()")
    if first in QUESTIONS or re.match(r"(?:True|False)(?: if| for| when| where| unless|,|$)", doc) or doc.split("\n")[0].rstrip().endswith("?"):
        return "question"
    if kind != "function":
        return None
    if first not in VERBS:
        return "noun"
    follows = r"^\w+ (?:of|in|at|by|on|per|from|to|with|for|as|that|which|over)\b"
    if first in SELDOM_NOUNS:
        return "noun" if re.match(r"^\w+,? (?:of|that|which|over|ids?)\b", doc) else None
    if first in OFTEN_NOUNS:
        return None if _OBJECT.match(doc) and not re.match(follows, doc) else "noun"
    return None


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Finding:
    "One place that breaks a rule."

    check: str
    path: str
    cell: int | None  # number of the cell from 0, as nbdev and Jupyter's JSON count; None in a text file
    line: int  # within the cell, from 1
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{'' if self.cell is None else f'cell {self.cell}:'}{self.line}: {self.check}: {self.text}"


@dataclass
class Totals:
    "Figures that are shares, by module."

    documented: Counter[str] = field(default_factory=Counter)  # entries with a comment
    entries: Counter[str] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)  # functions with all comments
    functions: Counter[str] = field(default_factory=Counter)
    anys: Counter[str] = field(default_factory=Counter)
    hidden: Counter[str] = field(default_factory=Counter)  # cells with assertions that are hidden
    tested: Counter[str] = field(default_factory=Counter)  # cells with assertions
    cells: Counter[str] = field(default_factory=Counter)  # code cells by notebook


def directives(source: str) -> set[str]:
    "Directives of a cell, such as export and hide."
    return {words[0] for line in source.splitlines() if line.startswith("#|") and (words := line[2:].split())}


def is_picture(output: dict) -> bool:
    "Tell whether an output shows a picture."
    data = output.get("data", {})
    html = "".join(data.get("text/html", []))
    return any(k.startswith("image/") or "plotly" in k for k in data) or "<svg" in html or "<img" in html or "Plotly.newPlot" in html


def parse(source: str) -> ast.Module | None:
    "Parse a cell without its magics; None if it is no Python."
    lines = ["pass" if line.lstrip().startswith(("%", "!")) else line for line in source.split("\n")]
    try:
        tree = compile("\n".join(lines), "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    except SyntaxError:
        return None
    assert isinstance(tree, ast.Module)
    return tree


def walk(tree: ast.AST) -> list[ast.AST]:
    "List a tree's nodes, contexts and operators left out; faster than `ast.walk`."
    nodes = [tree]
    for node in nodes:
        for name in node._fields:
            value = getattr(node, name, None)
            if type(value) is list:
                nodes += [v for v in value if isinstance(v, ast.AST)]
            elif isinstance(value, ast.AST) and name not in ("ctx", "op"):
                nodes.append(value)
    return nodes


# ---------------------------------------------------------------- checks


def lint_words(text: str) -> Iterator[tuple[int, str]]:
    "Find words that are to be replaced, as (line from 0, message)."
    if not _ANY.search(text):
        return
    plain = re.sub(r"`[^`\n]*`", lambda m: "`" + "_" * (len(m[0]) - 2) + "`" if len(m[0]) > 1 else m[0], text)
    fine = [m.span() for m in _FINE.finditer(plain)]
    seen: list[tuple[int, int]] = []
    for pattern, fix in _WORDS:
        for m in pattern.finditer(plain):
            if any(a <= m.start() and m.end() <= b for a, b in fine) or any(a < m.end() and m.start() < b for a, b in seen):
                continue
            seen.append(m.span())
            yield plain.count("\n", 0, m.start()), f"'{' '.join(m[0].split())}' → {fix}"


def prose_of_markdown(text: str) -> str:
    "Blank out code blocks, link targets and HTML tags of Markdown, line by line."
    inside, lines = False, []
    for line in text.split("\n"):
        fence = line.lstrip().startswith(("```", "~~~"))
        inside ^= fence
        lines.append("" if inside or fence else re.sub(r"\]\([^)]*\)|<[^>]+>|https?://\S+", lambda m: " " * len(m[0]), line))
    return "\n".join(lines)


def strings(nodes: list[ast.AST]) -> Iterator[tuple[int, str, bool]]:
    "Yield (line, text, whether it is a docstring) of each string; the fields of an f-string are blanks."
    docs, parts = set(), set()
    for n in nodes:
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module) and n.body and isinstance(n.body[0], ast.Expr):
            docs.add(id(n.body[0].value))
        elif isinstance(n, ast.JoinedStr):
            parts |= {id(p) for p in n.values} | {id(p) for f in n.values if isinstance(f, ast.FormattedValue) and f.format_spec for p in walk(f.format_spec)}
    for n in nodes:
        if isinstance(n, ast.JoinedStr) and id(n) not in parts:
            yield n.lineno, "".join(p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else "_" for p in n.values), False
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in parts:
            yield n.lineno, n.value, id(n) in docs


def check_words(nodes: list[ast.AST], source: str) -> Iterator[tuple[str, int, str]]:
    "Lint the strings and comments of a code cell."
    for line, text, is_doc in strings(nodes):
        if not is_doc and text in LABELS:
            yield "words", line, f"label '{text}' → {LABELS[text]}"
        elif is_doc or " " in text:
            for i, message in lint_words(text):
                yield "words", line + i, message
    if any("#" in line and not line.startswith("#|") for line in source.split("\n")):
        try:
            comments = comments_by_line(source)
        except (tokenize.TokenError, SyntaxError):  # a cell with a magic
            return
        for line, (text, _) in comments.items():
            if not text.startswith("|"):
                for _, message in lint_words(text):
                    yield "words", line, message


def functions_of(tree: ast.Module) -> Iterator[tuple[Function, str, bool]]:
    "Yield (function, qualified name, whether it is public) of functions and methods, not of functions inside functions."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, node.name, not node.name.startswith("_")
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield item, f"{node.name}.{item.name}", not node.name.startswith("_") and (not item.name.startswith("_") or item.name == "__init__")


def _decorated(node: Function | ast.ClassDef, *names: str) -> bool:
    return any(re.search(rf"\b{name}\b", ast.unparse(d)) for d in node.decorator_list for name in names)


_CHOICES = re.compile(r"(?:['\"`]\w+['\"`](?:,| or|, or) )+(?:or )?['\"`]\w+['\"`]|\bone of\b|^\w+(?:, \w+)* or \w+(?:$|[;:,.])")


def check_signatures(tree: ast.Module, nodes: list[ast.AST], source: str, module: str, totals: Totals) -> Iterator[tuple[str, int, str]]:
    "Check comments, docstrings and annotations of one exported cell."
    comments = comments_by_line(source)
    for node, name, public in functions_of(tree):
        if _decorated(node, "overload"):
            continue
        rows: list[Entry] = [] if node.name == "__init__" and not node.args.args[1:] + node.args.kwonlyargs else signature(node, comments)
        if public:
            totals.functions[module] += 1
            missing = [e for e in rows if not e.comment and "help=" not in e.annotation + e.default]
            totals.entries[module] += len(rows)
            totals.documented[module] += len(rows) - len(missing)
            totals.whole[module] += not missing
            for e in missing:
                yield "docments", e.line, f"{name}: no comment for {'the return' if e.name == 'return' else e.name}"
            if ast.get_docstring(node) is None and node.name != "__init__":
                yield "docstring missing", node.lineno, f"{name} has no docstring"
        for e in rows:
            if e.annotation in ("str", "str | None") and (_CHOICES.search(e.comment)) and e.name != "return":
                yield "str option", e.line, f"{name}({e.name}: {e.annotation}{' = ' + e.default if e.default else ''}): {e.comment}"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield "docstring missing", node.lineno, f"{node.name} has no docstring"
            if is_dataclass(node):
                fields = [e for e in attributes(node, comments) if not e.default.startswith("option(")]  # `option` has the help as an argument
                totals.entries[module] += len(fields)
                totals.documented[module] += sum(bool(e.comment) for e in fields)
                for e in fields:
                    if not e.comment:
                        yield "docments", e.line, f"{node.name}: no comment for the field {e.name}"
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
            kind = "class" if isinstance(node, ast.ClassDef) else "property" if _decorated(node, "property", "cached_property") else "function"
            if kind == "function" and isinstance(node, ast.FunctionDef) and node.name.startswith("__") and node.name != "__init__":
                kind = "property"
            if problem := first_word_problem(doc, kind):
                yield f"docstring {problem}", node.body[0].lineno, f"{node.name}: {doc.splitlines()[0]!r}"
    for node in _annotations(nodes):
        if isinstance(node, ast.Name) and node.id == "Any":
            totals.anys[module] += 1
            yield "any", node.lineno, "Any"


def _is_alias(node: ast.Assign) -> bool:
    "Tell whether an assignment looks like `Name = type`."
    return any(isinstance(t, ast.Name) and t.id[:1].isupper() and not t.id.isupper() for t in node.targets)


def _annotations(nodes: list[ast.AST]) -> list[ast.AST]:
    "List all nodes below annotations and below type aliases."
    roots: list[ast.AST] = []
    for n in nodes:
        if isinstance(n, ast.arg | ast.AnnAssign) and n.annotation is not None:
            roots.append(n.annotation)
        elif isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.returns is not None:
            roots.append(n.returns)
        elif isinstance(n, ast.TypeAlias) or (isinstance(n, ast.Assign) and isinstance(n.value, ast.Subscript | ast.BinOp) and _is_alias(n)):
            roots.append(n.value)
        elif isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "cast":
            roots += n.args[:1]
    return list({id(x): x for root in roots for x in walk(root)}.values())


_TESTS = re.compile(r"test_|assert_|expect_fail|raises")


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def check_cell(cell: dict, source: str, folder: str, module: str | None, name: str, totals: Totals) -> Iterator[tuple[str, int, str]]:
    "Check one code cell."
    marks = directives(source)
    exported = bool(marks & {"export", "exporti", "exports"})
    tree = parse(source)
    nodes = walk(tree) if tree is not None else []
    for i, line in enumerate(source.split("\n"), 1):
        if len(line) > LINE_CHARS and not line.startswith("#|"):
            yield "long line", i, f"{len(line)} characters"
    if exported and tree is not None and module is not None:
        size = sum(bool(line.strip()) and not line.startswith("#|") for line in source.split("\n"))
        if size > CELL_LINES:
            yield "long cell", 1, f"{size} lines"
        yield from check_signatures(tree, nodes, source, module, totals)
    if folder == "research":
        for n in nodes:
            if isinstance(n, ast.IfExp | ast.If | ast.Match):
                yield "conditional", n.lineno, ast.unparse(n).split("\n")[0][:100]
    if not exported and any(isinstance(n, ast.Assert) or (isinstance(n, ast.Call) and _TESTS.match(_name(n.func))) for n in nodes):
        totals.tested[name] += 1
        totals.hidden[name] += "hide" in marks
    yield from check_words(nodes, source)


def check_notebook(path: Path, root: Path, totals: Totals) -> Iterator[Finding]:
    "Check one notebook."
    name = path.relative_to(root).as_posix()
    parts = path.relative_to(root / "nbs").parts
    folder = parts[0] if len(parts) > 1 else ""
    cells = [c | {"source": "".join(c["source"])} for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    module = next((m[1] for c in cells if c["cell_type"] == "code" and (m := re.search(r"^#\|\s*default_exp\s+(\S+)", c["source"], re.M))), None)
    code = [c for c in cells if c["cell_type"] == "code"]
    totals.cells[name] = len(code)
    if len(code) > CODE_CELLS:
        yield Finding("many cells", name, 0, 1, f"{len(code)} code cells")
    if module and module.split(".")[-1] in MODULE_NAMES:
        yield Finding("module name", name, 0, 1, module)
    if module and folder in PICTURES and not any(is_picture(o) for c in code for o in c.get("outputs", [])):
        yield Finding("no picture", name, 0, 1, "no picture among the outputs")
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            for line, message in lint_words(prose_of_markdown(cell["source"])):
                yield Finding("words", name, i, line + 1, message)
        elif cell["cell_type"] == "code":
            for check, line, text in check_cell(cell, cell["source"], folder, module, name, totals):
                yield Finding(check, name, i, line, text)


def notebooks(root: Path) -> list[Path]:
    "List the notebooks below `nbs`."
    return [p for p in sorted((root / "nbs").rglob("*.ipynb")) if not any(part.startswith((".", "_")) for part in p.relative_to(root).parts)]


def check(root: Path, paths: list[Path] | None = None) -> tuple[list[Finding], Totals]:
    "Check notebooks and text files; all of the project when none is given."
    totals, found = Totals(), []
    prose = [*(root / p for p in PROSE if (root / p).is_file()), *sorted((root / "docs").rglob("*.md"))]
    every = [*notebooks(root), *prose, root / "cryptoresearch/__init__.py"]
    for path in every if paths is None else paths:
        name = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            found += check_notebook(path, root, totals)
        elif path.suffix == ".md":
            found += [Finding("words", name, None, line + 1, message) for line, message in lint_words(prose_of_markdown(text))]
        elif path.suffix == ".py":
            tree = ast.parse(text)
            found += [Finding(c, name, None, line, message) for c, line, message in check_words(walk(tree), text)]
            found += [Finding(c, name, None, line, message) for c, line, message in check_signatures(tree, walk(tree), text, path.stem, totals)]
    return found, totals


def _share(part: int, whole: int) -> str:
    return f"{part}/{whole} ({100 * part / whole:.1f} %)" if whole else "0/0"


def summary(found: list[Finding], totals: Totals) -> str:
    "Render the table of totals."
    counts = Counter(f.check for f in found)
    lines = [f"{'check':<20}{'found':>7}{'allowed':>9}"]
    lines += [f"{c:<20}{counts[c]:>7}{ALLOWED[c]:>9}{'  TOO MANY' if counts[c] > ALLOWED[c] else ''}" for c in ALLOWED]
    lines += [f"{c:<20}{counts[c]:>7}{'-':>9}" for c in REPORTED]
    lines += [
        "",
        f"comments complete: {_share(totals.documented.total(), totals.entries.total())} of parameters, fields and returns; {_share(totals.whole.total(), totals.functions.total())} of public functions",
        f"hidden of the cells with assertions: {_share(totals.hidden.total(), totals.tested.total())}",
        f"code cells: {totals.cells.total()} in {len(totals.cells)} notebooks",
    ]
    return "\n".join(lines)


def by_module(found: list[Finding], totals: Totals) -> str:
    "Render one line per module."
    lines = [f"{'module':<32}{'functions documented':>24}{'comments':>22}{'Any':>6}"]
    for m in sorted(totals.functions, key=lambda m: (totals.whole[m] / totals.functions[m], m)):
        lines.append(f"{m:<32}{_share(totals.whole[m], totals.functions[m]):>24}{_share(totals.documented[m], totals.entries[m]):>22}{totals.anys[m]:>6}")
    return "\n".join(lines)


def too_many(found: list[Finding]) -> list[str]:
    "List the checks with more findings than allowed."
    counts = Counter(f.check for f in found)
    return [f"{c}: {counts[c]} found, {n} allowed" for c, n in ALLOWED.items() if counts[c] > n]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks or folders; the findings in them are listed")
    parser.add_argument("--root", type=Path, default=None, help="the project; the parent of this script's folder otherwise")
    parser.add_argument("--summary", action="store_true", help="totals only")
    parser.add_argument("--modules", action="store_true", help="shares of comments and number of Any by module")
    parser.add_argument("--check", action="append", help="list the findings of this check only; may be repeated")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    asked = parser.parse_args()
    root = (asked.root or Path(__file__).resolve().parents[1]).resolve()
    paths = None
    if asked.paths:
        given = [p if p.is_absolute() or p.exists() else root / p for p in asked.paths]
        paths = [q.resolve() for p in given for q in (sorted(p.rglob("*.ipynb")) if p.is_dir() else [p])]
    found, totals = check(root, paths)
    if asked.check:
        found = [f for f in found if f.check in asked.check]
    if asked.json:
        print(json.dumps([vars(f) for f in found], ensure_ascii=False, indent=1))
    elif asked.summary:
        print(summary(found, totals))
    elif asked.modules:
        print(by_module(found, totals))
    elif asked.check or paths is not None:
        print(*(f for f in sorted(found, key=lambda f: (f.path, f.cell or 0, f.line))), sep="\n")
        print(summary(found, totals))
    else:
        print(summary(found, totals))
    return 1 if paths is None and not asked.check and too_many(found) else 0


if __name__ == "__main__":
    sys.exit(main())
