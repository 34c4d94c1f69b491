"""Rows to checked examples, and back to rows."""

import copy
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tool_calling.data.formats import convert
from tool_calling.data.messages import check_calls, check_roles, check_text, is_trained
from tool_calling.data.rows import read_rows
from tool_calling.data.tools import check_tools, read_tools, to_tools
from tool_calling.files import write_file
from tool_calling.terminal import UserError, list_first, plural, report_problems, say, shorten

SHOWN_CHANGES = 8  # how many kinds of change to tools, and keys that are not read, are named on screen


class Example(NamedTuple):
    """One conversation in the OpenAI shape; `source` is the file:line it came from."""

    source: str
    messages: list[dict]
    tools: list[dict]
    format: str = "openai"  # of the row it came from


@dataclass(frozen=True)
class Reading:
    """How rows are read: the flags of the same names."""

    tools_path: str
    format: str = "auto"
    max_samples: int | None = None
    thinking: str = "auto"
    on_invalid: str = "error"


@dataclass
class Checked:
    """What `total` rows have become."""

    examples: list[Example] = field(default_factory=list)  # of the valid rows
    problems: list[tuple[str, str]] = field(default_factory=list)  # (source, problem); a row may have several
    total: int = 0
    changes: Counter = field(default_factory=Counter)  # {what was normalised in a list of tools: how often}
    unread: Counter = field(default_factory=Counter)  # {(place, key) that holds something and is not read: how often}


def to_row(example: Example) -> dict:
    """Return the example as an OpenAI row with arguments as JSON text; reading it gives the same example again."""
    messages = copy.deepcopy(example.messages)
    for call in (call["function"] for message in messages for call in message.get("tool_calls", [])):
        call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    return {"messages": messages, "tools": example.tools}


def to_examples(rows, tools_path: str, name: str = "auto") -> Checked:
    """Convert and check every (source, row); one without tools of its own gets those of `tools_path`."""
    checked, seen = Checked(), {}  # most rows share their tools: convert and check each list once
    for checked.total, (source, row) in enumerate(rows, start=1):
        try:
            found_format, messages, tools, unread = convert(row, name)
            checked.unread.update(unread)
            key = json.dumps(tools)
            if key not in seen:
                if tools is None and not Path(tools_path).exists():
                    raise UserError(f"{source}: has no tools of its own, and --tools_path {tools_path} does not exist")
                tools, changes = read_tools(tools_path) if tools is None else to_tools(tools)
                seen[key] = tools, *check_tools(tools)
                checked.changes += changes
            tools, validators, problems = seen[key]
            problems = problems + check_roles(messages) + check_text(messages) + check_calls(messages, validators)
        except ValueError as error:
            problems = [str(error)]
        except RecursionError:
            problems = ["is nested too deeply; expected a few hundred levels at most"]
        checked.problems += [(source, " ".join(problem.splitlines())) for problem in problems]
        if not problems:
            checked.examples.append(Example(source, messages, tools, found_format))
    return checked


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


def check_rows(paths: list[str], reading: Reading) -> Checked:
    """Read, convert and check the rows of files, folders and Hub datasets; no valid row is a UserError."""
    rows = read_rows(paths, reading.max_samples, reading.tools_path)
    checked = to_examples(rows, reading.tools_path, reading.format)
    apply_thinking(checked, reading.thinking)
    if not checked.examples:
        report_problems(checked.problems, reading.on_invalid, checked.total)
        raise UserError(f"{' '.join(paths)}: no valid row is left")
    if checked.changes:
        counts = (f"{change} {count:,}".replace("->", "→") for change, count in checked.changes.most_common())
        say("read", f"tools normalised: {list_first(counts, SHOWN_CHANGES)}")
    if checked.unread:
        found = sorted(checked.unread.items(), key=lambda item: (item[0][0] == "row", -item[1]))  # columns are many
        counts = (f"{shorten(key)} of {plural(count, place)}" for (place, key), count in found)
        say("read", f"not read, as the format has no such key: {list_first(counts, SHOWN_CHANGES)}")
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
    if target.exists():
        raise UserError(f"--convert_to {path}: already exists; expected the name of a new file")
    examples, _ = read_examples(paths, reading)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, "".join(json.dumps(to_row(example), ensure_ascii=False) + "\n" for example in examples))
    except OSError as error:
        raise UserError(f"--convert_to {path}: cannot be written: {error.strerror}") from None
    say("write", f"{plural(len(examples), 'row')}: {path}")
