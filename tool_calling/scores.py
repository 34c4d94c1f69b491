"""An answer beside its reference to a verdict, and verdicts to scores."""

import math
import re
from collections import Counter
from typing import NamedTuple

from tool_calling.data.literals import as_list
from tool_calling.prompts import Sample, parse_calls

NO_CALL, BROKEN = "(no call)", "(broken)"  # labels beside the names of the tools
MAX_CLASSES = 20  # plain answers that take at most so many values are classes
JSON_TYPES = {
    dict: {"object"},
    list: {"array"},
    str: {"string"},
    int: {"integer", "number"},
    float: {"number"},
    bool: {"boolean"},
    type(None): {"null"},
}  # what a value may serve as: 5.0 is no integer
IGNORED = re.compile(r"[ ,./\-_*^]")  # what the Berkeley Function-Calling Leaderboard (BFCL) ignores in a string


class Verdict(NamedTuple):
    """How one answer compares with the expected one; `expected` and `got` name the tools called, () is no call."""

    exact: bool
    ast: bool
    broken: bool
    expected: tuple[str, ...]
    got: tuple[str, ...]


def read_calls(text: str, parser: str = "hermes") -> list[dict]:
    """Return the calls in an answer; ValueError if one of them is nothing that a server could run."""
    calls = parse_calls(text, parser)
    if not all(
        isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)
        for call in calls
    ):
        raise ValueError('a call must be {"name": "...", "arguments": {...}}')
    return [{"name": call["name"], "arguments": call["arguments"]} for call in calls]


def is_same(got: object, expected: object) -> bool:
    """Say whether two JSON values are equal: 1 is 1.0, true is not 1, and the order of keys does not matter."""
    if isinstance(got, dict) and isinstance(expected, dict):
        return got.keys() == expected.keys() and all(is_same(got[key], expected[key]) for key in got)
    if isinstance(got, list) and isinstance(expected, list):
        return len(got) == len(expected) and all(map(is_same, got, expected))
    return isinstance(got, bool) == isinstance(expected, bool) and got == expected


def is_alike(got: object, expected: object, schema: object) -> bool:
    """Say whether two values match by BFCL's rules: types by the schema, strings without case and punctuation."""
    schema = schema if isinstance(schema, dict) else {}
    types = schema.get("type", [])
    if types and JSON_TYPES[type(got)].isdisjoint(as_list(types)):
        return False
    if isinstance(got, dict) and isinstance(expected, dict):
        return has_alike_arguments(got, expected, schema)
    if isinstance(got, list) and isinstance(expected, list):
        schemas = schema.get("prefixItems", []) + [schema.get("items")] * len(got)
        return len(got) == len(expected) and all(map(is_alike, got, expected, schemas))
    if isinstance(got, str) and isinstance(expected, str):
        got, expected = (IGNORED.sub("", text).lower().replace("'", '"') for text in (got, expected))
    return is_same(got, expected)


def has_alike_arguments(got: dict, expected: dict, schema: dict) -> bool:
    """Say whether two objects match by BFCL's rules: none required is missing; a default may be left out or written.

    An unknown argument needs no check of its own: the expected call has none, and there is no default to equal.
    """
    rules = schema.get("properties", {})
    defaults = {name: rule["default"] for name, rule in rules.items() if isinstance(rule, dict) and "default" in rule}
    full_got, full_expected = {**defaults, **got}, {**defaults, **expected}
    return got.keys() >= set(schema.get("required", [])) and all(
        name in full_got
        and name in full_expected
        and is_alike(full_got[name], full_expected[name], rules.get(name, schema.get("additionalProperties")))
        for name in got.keys() | expected.keys()
    )


def can_pair(got: list, expected: list, fits) -> bool:
    """Say whether all of `got` pair off one to one with all of `expected`, each with one it fits (maximum matching)."""
    partners: dict[int, object] = {}

    def place(item: object, tried: set[int]) -> bool:
        for index, candidate in enumerate(expected):
            if index not in tried and fits(item, candidate):
                tried.add(index)
                if index not in partners or place(partners[index], tried):  # its partner may find another place
                    partners[index] = item
                    return True
        return False

    return len(got) == len(expected) and all(place(item, set()) for item in got)


def score_answer(got: str, expected: str, tools: list[dict], parser: str = "hermes") -> Verdict:
    """Compare an answer with the expected one, exactly and by BFCL's rules; without tools only the text counts."""
    wanted = read_calls(expected, parser)
    wanted_names = tuple(call["name"] for call in wanted)
    try:
        calls = read_calls(got, parser)
    except (ValueError, RecursionError):  # a model that repeats itself can open a thousand brackets
        return Verdict(False, False, True, wanted_names, ())
    if tools:
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
        exact = can_pair(calls, wanted, is_same)
        alike = exact or can_pair(
            calls,
            wanted,
            lambda call, other: (
                call["name"] == other["name"]
                and is_alike(call["arguments"], other["arguments"], schemas.get(call["name"]))
            ),
        )
    else:
        exact = alike = got.strip() == expected.strip()
    return Verdict(exact, alike, False, wanted_names, tuple(call["name"] for call in calls))


def divide(part: float, whole: float) -> float:
    """Return the share part / whole; of nothing, all is right."""
    return part / whole if whole else 1.0


def macro_f1(rows: list[tuple[tuple, tuple]]) -> float:
    """Return the mean F1 over the labels that are expected anywhere, given each row's (expected, got) labels."""
    scores = []
    for label in sorted({label for expected, _ in rows for label in expected}):
        hits = sum(min(expected.count(label), got.count(label)) for expected, got in rows)
        scores.append(2 * hits / sum(expected.count(label) + got.count(label) for expected, got in rows))
    return divide(math.fsum(scores), len(scores))


def count_scores(verdicts: list[Verdict]) -> dict:
    """Return the scores over all rows; a broken call counts as a call."""
    called = [bool(row.got) or row.broken for row in verdicts]
    wanted = [bool(row.expected) for row in verdicts]
    both = sum(call and want for call, want in zip(called, wanted))
    return {
        "exact_match": divide(sum(row.exact for row in verdicts), len(verdicts)),
        "ast_match": divide(sum(row.ast for row in verdicts), len(verdicts)),
        "tool_macro_f1": macro_f1([(row.expected, row.got) for row in verdicts]),
        "call_precision": divide(both, sum(called)),
        "call_recall": divide(both, sum(wanted)),
        "broken_json": sum(row.broken for row in verdicts),
        "n": len(verdicts),
    }


def count_per_tool(verdicts: list[Verdict]) -> dict[str, dict]:
    """Return per tool how many rows expect it, and the shares of these that call it and that match exactly."""
    table = {}
    for label in [*sorted({name for row in verdicts for name in row.expected}), NO_CALL]:
        rows = [row for row in verdicts if label in (row.expected or (NO_CALL,))]
        called = [label in (row.got or (BROKEN if row.broken else NO_CALL,)) for row in rows]
        if rows:
            table[label] = {
                "support": len(rows),
                "tool": divide(sum(called), len(rows)),
                "exact": divide(sum(row.exact for row in rows), len(rows)),
            }
    return table


def pair_labels(row: Verdict) -> list[tuple[str, str]]:
    """Return (expected, got) labels of one row: equal names first, then the others in order."""
    nothing = BROKEN if row.broken else NO_CALL
    if not row.expected:
        return [(NO_CALL, name) for name in row.got or (nothing,)]
    pairs, missed, others = [], [], list(row.got)
    for name in row.expected:
        if name in others:
            others.remove(name)
            pairs.append((name, name))
        else:
            missed.append(name)
    return pairs + list(zip(missed, others + [nothing] * len(missed)))


def count_confusion(verdicts: list[Verdict]) -> tuple[list[str], list[list[int]]]:
    """Return (labels, counts): counts[i][j] is how often label i was expected and label j given."""
    pairs = [pair for row in verdicts for pair in pair_labels(row)]
    special = [label for label in (NO_CALL, BROKEN) if any(label in pair for pair in pairs)]
    expected = {wanted for wanted, _ in pairs}.difference(special)
    others = {got for _, got in pairs}.difference(special, expected)
    labels, counts = sorted(expected) + sorted(others) + special, Counter(pairs)
    return labels, [[counts[wanted, got] for got in labels] for wanted in labels]


def count_classes(pairs: list[tuple[str, str]]) -> float | None:
    """Return the macro-F1 of plain (expected, got) answers if the expected ones are a few classes, else None."""
    rows = [((expected.strip(),), (got.strip(),)) for expected, got in pairs]
    return macro_f1(rows) if 0 < len({expected for expected, _ in rows}) <= MAX_CLASSES else None


def score_results(samples: list[Sample], results: dict) -> tuple[dict, dict]:
    """Return ({model: scores}, {model: verdicts}) of the answers of each model."""
    verdicts = {
        name: [
            score_answer(answer, sample.completion, sample.tools, sample.parser)
            for answer, sample in zip(result["answers"], samples)
        ]
        for name, result in results.items()
    }
    return {name: count_scores(of_model) for name, of_model in verdicts.items()}, verdicts
