"""Rows to checked examples, and back to rows."""

import copy
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tool_calling.data.formats import FORMATS, convert
from tool_calling.data.messages import check_calls, check_roles, check_text, cut_tail, is_trained, settle_turns
from tool_calling.data.rows import ROW_FILES, name_file, read_rows
from tool_calling.data.syntaxes import READ_AS, read_calls
from tool_calling.data.tools import KEPT_NULL, check_tools, find_bare_tools, read_tools, settle_arguments, to_tools
from tool_calling.files import write_file
from tool_calling.terminal import UserError, list_first, plural, report_problems, say, shorten, warn

SHOWN_CHANGES = 8  # how many kinds of change, and keys that are not read, are named on screen
REFUSED = {  # what a problem of a call says: its kind
    " is missing": "argument missing",
    " is not an argument of this tool": "argument unknown",
    " must be one of ": "value not among the choices",
    " must be ": "argument of another type",
}


class Example(NamedTuple):
    """One conversation in the OpenAI shape; `source` is the file:line it came from."""

    source: str
    messages: list[dict]
    tools: list[dict]
    format: str = "openai"  # of the row it came from
    syntax: str = ""  # of the calls that stood in its texts
    filled: bool = False  # whether its tools are those of --tools_path


@dataclass(frozen=True)
class Reading:
    """How rows are read: the flags of the same names."""

    tools_path: str
    format: str = "auto"
    max_samples: int | None = None
    thinking: str = "auto"
    on_invalid: str = "error"
    named_tools: bool = False  # whether the user named tools_path: then it serves rows of every format


@dataclass
class Checked:
    """What `total` rows have become."""

    examples: list[Example] = field(default_factory=list)  # of the valid rows
    problems: list[tuple[str, str]] = field(default_factory=list)  # (source, problem); a row may have several
    total: int = 0
    changes: Counter = field(default_factory=Counter)  # {what was normalised: how often}; in a list of tools once
    first: dict[str, str] = field(default_factory=dict)  # {what was normalised in a row: the first such source}
    kept: Counter = field(default_factory=Counter)  # {kind of call that its schema refuses: how many are trained}
    filled: int = 0  # rows of other formats than native with the tools of --tools_path
    unread_in: dict[str, Counter] = field(default_factory=dict)  # {file: {(place, key) not read: how often}}

    @property
    def unread(self) -> Counter:
        """Return {(place, key) that holds something and is not read: how often}."""
        return sum(self.unread_in.values(), Counter())


def to_row(example: Example) -> dict:
    """Return the example as an OpenAI row with arguments as JSON text; reading it gives the same example again."""
    messages = copy.deepcopy(example.messages)
    for call in (call["function"] for message in messages for call in message.get("tool_calls", [])):
        if not isinstance(call["arguments"], str):  # one of a wrong turn may be no JSON
            call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    return {"messages": messages, "tools": example.tools}


class Toolbox(NamedTuple):
    """A list of tools in the OpenAI shape, checked, with what its calls are settled by."""

    tools: list[dict]
    validators: dict
    problems: list[str]
    schemas: dict[str, object]  # {tool: its parameters}


class Reader:
    """Rows to examples. Most rows share their tools, so each list is converted and checked once."""

    def __init__(self, reading: Reading):
        self.reading, self.checked = reading, Checked()
        self.boxes: dict[str, Toolbox] = {}

    def find_tools(self, source: str, format: str, tools: object) -> tuple[Toolbox, bool]:
        """Return (tools, whether --tools_path gives them): it serves native rows, and others if the user names it."""
        filled = tools is None and (format == "native" or self.reading.named_tools)
        tools = [] if tools is None else tools
        key = "filled" if filled else json.dumps(tools)
        if key not in self.boxes:
            path = self.reading.tools_path
            if filled and not Path(path).exists():
                raise UserError(f"{source}: has no tools of its own, and --tools_path {path} does not exist")
            tools, changes = read_tools(path) if filled else to_tools(tools)
            validators, problems = check_tools(tools)
            functions = [] if problems else [tool["function"] for tool in tools]
            schemas = {function["name"]: function.get("parameters") for function in functions}
            self.boxes[key] = Toolbox(tools, validators, problems, schemas)
            self.checked.changes += changes
        return self.boxes[key], filled

    def read(self, source: str, row: object) -> list[str]:
        """Keep the example of a row, or return its problems."""
        checked, name = self.checked, self.reading.format
        format, messages, tools, unread, changes = convert(row, name)
        if unread:
            checked.unread_in.setdefault(name_file(source), Counter()).update(unread)
        box, filled = self.find_tools(source, format, tools)
        if not box.problems:
            messages = read_calls(messages, box.tools, changes, FORMATS[name].syntax if name in FORMATS else None)
        messages = settle_turns(messages, changes)
        for call in (call["function"] for message in messages for call in message.get("tool_calls", ())):
            if isinstance(call["arguments"], dict) and call["name"] in box.schemas:
                call["arguments"] = settle_arguments(call["arguments"], box.schemas[call["name"]], changes)
        problems = box.problems + check_roles(messages) + check_text(messages)
        messages = cut_tail(messages, changes)
        unknown, refused = check_calls(messages, box.validators)
        kept = refused if self.reading.on_invalid == "keep" and not problems and not unknown else []
        problems = [*problems, *unknown, *([] if kept else refused)]
        if problems:
            return problems
        syntax = "+".join(change.removeprefix(READ_AS) for change in changes if change.startswith(READ_AS))
        checked.examples.append(Example(source, messages, box.tools, format, syntax, filled))
        for problem in kept:  # counted by what a schema has against a call
            kinds = (kind for mark, kind in REFUSED.items() if mark in problem)
            checked.kept[next(kinds, "another rule of the schema")] += 1
        checked.filled += filled and format != "native"  # which has no other place for tools
        checked.changes.update(changes)
        for change in changes:
            checked.first.setdefault(change, source)
        return []


def to_examples(rows, reading: Reading) -> Checked:
    """Convert and check every (source, row)."""
    reader = Reader(reading)
    for reader.checked.total, (source, row) in enumerate(rows, start=1):
        try:
            problems = reader.read(source, row)
        except ValueError as error:
            problems = [str(error)]
        except RecursionError:
            problems = ["is nested too deeply; expected a few hundred levels at most"]
        reader.checked.problems += [(source, " ".join(problem.splitlines())) for problem in problems]
    return reader.checked


def apply_thinking(checked: Checked, thinking: str) -> None:
    """Drop all reasoning if `thinking` is "off", as no turn served without thinking has any; if "on", require it."""
    if thinking == "off":
        for message in (message for example in checked.examples for message in example.messages):
            message.pop("reasoning_content", None)
    if thinking == "on":
        problems = [
            (example.source, f"message {index}: has no reasoning; with --thinking on every trained answer needs it")
            for example in checked.examples
            for index, message in enumerate(example.messages, start=1)
            if is_trained(message) and "reasoning_content" not in message
        ]
        bad = {source for source, _ in problems}
        checked.examples = [example for example in checked.examples if example.source not in bad]
        checked.problems += problems


def find_doubts(checked: Checked) -> list[str]:
    """Return what a user should know of the valid rows: nulls that are trained, and tools that say too little."""
    found, lists, bare = [], {}, {}
    if count := checked.changes[KEPT_NULL]:
        what = f"{plural(count, 'null')} of required arguments trained as written"
        found.append(f"{what}; the first is in {checked.first[KEPT_NULL]}")
    for example in checked.examples:  # most share their tools
        lists.setdefault(id(example.tools), example)
    for example in lists.values():
        for name in find_bare_tools(example.tools):
            bare.setdefault(name, example.source)
    if bare:
        what = f"{plural(len(bare), 'tool')} without a description or without parameters"
        first = f"the first is in {next(iter(bare.values()))}"
        found.append(f"{what}: {list_first(bare, SHOWN_CHANGES)}; {first}: a model can only guess what they do")
    return found


def check_rows(paths: list[str], reading: Reading) -> Checked:
    """Read, convert and check the rows of files, folders and Hub datasets; no valid row is a UserError."""
    rows = read_rows(paths, reading.max_samples, reading.tools_path)
    checked = to_examples(rows, reading)
    apply_thinking(checked, reading.thinking)
    if not checked.examples:
        report_problems(checked.problems, reading.on_invalid, checked.total)
        raise UserError(f"{' '.join(paths)}: no valid row is left")
    ranked = checked.changes.most_common()
    for what, changes, shown in (
        ("tools normalised", [pair for pair in ranked if pair[0] not in checked.first], SHOWN_CHANGES),
        ("rows normalised", [pair for pair in ranked if pair[0] in checked.first], len(ranked)),
        ("calls kept that their schemas refuse", checked.kept.most_common(), len(checked.kept)),
    ):
        if changes:
            counts = (f"{change} {count:,}".replace("->", "→") for change, count in changes)
            say("read", f"{what}: {list_first(counts, shown)}")
    if reading.named_tools and checked.filled:
        say("read", f"tools of {reading.tools_path} given to {plural(checked.filled, 'row')} without their own")
    if unread := checked.unread:
        found = sorted(unread.items(), key=lambda item: (item[0][0] == "row", -item[1]))  # columns are many
        counts = (f"{shorten(key)} of {plural(count, place)}" for (place, key), count in found)
        say("read", f"not read, as the format has no such key: {list_first(counts, SHOWN_CHANGES)}")
    for doubt in find_doubts(checked):
        warn(doubt)
    return checked


def read_examples(paths: list[str], reading: Reading) -> tuple[list[Example], int]:
    """Return (valid examples, number of rows skipped); without --on_invalid skip a problem is a UserError."""
    start = time.perf_counter()
    checked = check_rows(paths, reading)
    report_problems(checked.problems, reading.on_invalid, checked.total)
    examples = checked.examples
    calls = sum("tool_calls" in message for example in examples for message in example.messages)
    counts = f"{plural(len(examples), 'valid row')}, {plural(calls, 'turn')} with calls"
    say("read", f"{counts}, from {' '.join(paths)} ({time.perf_counter() - start:.1f} s)")
    return examples, checked.total - len(examples)


def write_converted(path: str, paths: list[str], reading: Reading) -> None:
    """Write the valid rows in the OpenAI form to a new file."""
    target = Path(path)
    if ROW_FILES.fullmatch(target.name) and target.suffix.lower() not in (".jsonl", ".json"):
        raise UserError(f"--convert_to {path}: is written as JSONL; expected a name that ends with .jsonl")
    if target.exists():
        raise UserError(f"--convert_to {path}: already exists; expected the name of a new file")
    examples, _ = read_examples(paths, reading)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, "".join(json.dumps(to_row(example), ensure_ascii=False) + "\n" for example in examples))
    except OSError as error:
        raise UserError(f"--convert_to {path}: cannot be written: {error.strerror}") from None
    say("write", f"{plural(len(examples), 'row')}: {path}")
