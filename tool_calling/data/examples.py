"""Rows to checked examples, and their split into training and held-out ones."""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tool_calling.data.formats import convert
from tool_calling.data.messages import check_calls, check_roles, check_text, is_trained
from tool_calling.data.rows import read_rows
from tool_calling.data.tools import check_tools, read_tools, to_tools
from tool_calling.files import digest, write_file
from tool_calling.terminal import UserError, list_first, plural, report_problems, say, shorten

SHOWN_CHANGES = 8  # kinds of change to tools, and keys that are not read, that a line after reading names


class Example(NamedTuple):
    """One conversation in the OpenAI shape; `where` is the file:line it came from."""

    where: str
    messages: list[dict]
    tools: list[dict]
    format: str = "openai"  # of the row that it was


def to_row(example: Example) -> dict:
    """Return the example as an OpenAI row with arguments as JSON text; reading it gives the same example again."""
    messages = []
    for message in example.messages:
        if "tool_calls" in message:
            calls = [
                {
                    **call,
                    "function": {
                        **call["function"],
                        "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                    },
                }
                for call in message["tool_calls"]
            ]
            message = {**message, "tool_calls": calls}
        messages.append(message)
    return {"messages": messages, "tools": example.tools}


def to_examples(
    rows, tools_path: str, name: str = "auto"
) -> tuple[list[Example], list[tuple[str, str]], int, Counter, Counter]:
    """Convert and check every (where, row).

    Returned are (valid examples, (where, problem) pairs, number of rows, changes to tools, what list_unread finds).
    """
    examples, problems, changes, unread, checked, total = [], [], Counter(), Counter(), {}, 0
    for total, (where, row) in enumerate(rows, start=1):
        try:
            found_format, messages, tools, left_out = convert(row, name)
            unread.update(left_out)
            key = json.dumps(tools)
            if key not in checked:  # most rows share their tools: convert and check each list once
                if tools is None and not Path(tools_path).exists():
                    raise UserError(f"{where}: has no tools of its own, and --tools_path {tools_path} is not there")
                tools, changed = read_tools(tools_path) if tools is None else to_tools(tools)
                checked[key] = tools, *check_tools(tools)
                changes += changed
            tools, validators, found = checked[key]
            found = found + check_roles(messages) + check_text(messages) + check_calls(messages, validators)
        except ValueError as error:
            found = [str(error)]
        except RecursionError:
            found = ["is nested too deeply; expected at most some hundred levels"]
        problems += [(where, " ".join(problem.splitlines())) for problem in found]
        if not found:
            examples.append(Example(where, messages, tools, found_format))
    return examples, problems, total, changes, unread


def apply_thinking(examples: list[Example], thinking: str) -> tuple[list[Example], list[tuple[str, str]]]:
    """Return (examples, (where, problem) pairs) as --thinking wants them.

    A turn with reasoning is trained, and was prompted, with thinking on. So "off" drops the reasoning of every turn,
    as no turn that is served without thinking has any; and with "on" a trained turn without it is a problem.
    """
    if thinking == "auto":
        return examples, []
    if thinking == "off":
        return [
            example._replace(
                messages=[
                    {key: value for key, value in message.items() if key != "reasoning_content"}
                    for message in example.messages
                ]
            )
            for example in examples
        ], []
    problems = [
        (example.where, f"message {index}: has no reasoning; with --thinking on every trained answer needs it")
        for example in examples
        for index, message in enumerate(example.messages, start=1)
        if is_trained(message) and "reasoning_content" not in message
    ]
    bad = {where for where, _ in problems}
    return [example for example in examples if example.where not in bad], problems


def find_first_answer(example: Example) -> int:
    """Return the index of the first assistant message."""
    return next(i for i, message in enumerate(example.messages) if message["role"] == "assistant")


def digest_prompt(example: Example) -> str:
    """Return the digest of the messages before the first answer."""
    return digest(example.messages[: find_first_answer(example)])


def split_examples(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Return (training examples, held-out examples), chosen by the hash of the prompt.

    The rows with the smallest hashes are held out. So their order in the file does not matter, one prompt is never on
    both sides, and rows appended later move few others across.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(digest_prompt(example), []).append(example)
    wanted, held_out = round(len(examples) * share), set()
    for key in sorted(groups):
        if len(groups[key]) <= wanted:
            held_out.add(key)
            wanted -= len(groups[key])
    by_side = ([], [])
    for key, group in groups.items():
        by_side[key in held_out].extend(group)
    return by_side


def list_calls(example: Example) -> list[list[str]]:
    """Return the names of the tools that each trained turn of a row calls; turns without a call are left out."""
    turns = [
        [call["function"]["name"] for call in message.get("tool_calls", [])]
        for message in filter(is_trained, example.messages)
    ]
    return [names for names in turns if names]


def find_leaks(examples: list[Example], held_out: list[Example]) -> list[tuple[str, str]]:
    """Return (where, where in training) of each held-out row whose prompt also occurs in training."""
    training = {digest_prompt(example): example.where for example in reversed(examples)}
    return [(example.where, training[key]) for example in held_out if (key := digest_prompt(example)) in training]


def find_warnings(examples: list[Example], held_out: list[Example]) -> list[str]:
    """Return what would spoil the model or its score although every row is valid."""
    found = []
    if any(example.tools for example in examples) and all(map(list_calls, examples)):
        found.append("no row without a call: a model so trained forgets to refuse")
    if leaks := find_leaks(examples, held_out):
        found.append(
            f"{len(leaks):,} of {len(held_out):,} held-out rows also occur in training ({leaks[0][0]} is "
            f"{leaks[0][1]}): their score says nothing about new requests"
        )
    return found


def check_rows(args: argparse.Namespace, paths: list[str]) -> tuple[list[Example], list[tuple[str, str]], int]:
    """Return (valid examples of the files, (where, problem) pairs, number of rows); no valid row is a UserError."""
    rows = read_rows(paths, args.max_samples, args.tools_path)
    examples, problems, total, changes, unread = to_examples(rows, args.tools_path, args.format)
    examples, more = apply_thinking(examples, args.thinking)
    problems += more
    if not examples:
        report_problems(problems, args.on_invalid, total)
        raise UserError(f"{' '.join(paths)}: no valid row is left")
    if changes:
        counts = (f"{change} {count:,}".replace("->", "→") for change, count in changes.most_common())
        say("read", f"tools normalised: {list_first(counts, SHOWN_CHANGES)}")
    if unread:
        found = sorted(unread.items(), key=lambda item: (item[0][0] == "row", -item[1]))  # columns are often many
        counts = (f"{shorten(key)} of {plural(count, place)}" for (place, key), count in found)
        say("read", f"not read, as the format has no such key: {list_first(counts, SHOWN_CHANGES)}")
    return examples, problems, total


def read_examples(args: argparse.Namespace, paths: list[str]) -> tuple[list[Example], int]:
    """Return (valid examples of the files, rows skipped); problems end the run or are skipped, as --on_invalid says."""
    start = time.perf_counter()
    examples, problems, total = check_rows(args, paths)
    report_problems(problems, args.on_invalid, total)
    calls = sum(bool(message.get("tool_calls")) for example in examples for message in example.messages)
    say(
        "read",
        f"{plural(len(examples), 'valid row')}, {plural(calls, 'turn')} that call{'s' * (calls == 1)}, from "
        f"{' '.join(paths)} ({time.perf_counter() - start:.1f} s)",
    )
    return examples, total - len(examples)


def write_converted(args: argparse.Namespace) -> None:
    """Write the valid rows of --dataset_path in the OpenAI form to the new file --convert_to; train nothing."""
    path = Path(args.convert_to)
    if path.exists():
        raise UserError(f"--convert_to {path}: is there already; expected the name of a new file")
    examples, _ = read_examples(args, args.dataset_path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, "".join(json.dumps(to_row(example), ensure_ascii=False) + "\n" for example in examples))
    except OSError as error:
        raise UserError(f"--convert_to {path}: cannot be written: {error.strerror}") from None
    say("write", f"{plural(len(examples), 'row')}: {path}")
