"""Scores: an answer and its reference give a verdict, and the verdicts of a model give its scores."""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, repeat
from statistics import NormalDist
from typing import NamedTuple

from tool_calling.parsers import parse_calls
from tool_calling.prompts import take_answer
from tool_calling.samples import Sample

NO_CALL, EMPTY, BROKEN = "(no call)", "(empty)", "(broken)"  # labels beside the names of the tools
MAX_CLASSES = 20  # references without tools that take at most this many values are classes
IGNORED = re.compile(r"[ ,./\-_*^]")  # in a string, as the Berkeley Function-Calling Leaderboard (BFCL) does
Z = NormalDist().inv_cdf(0.975)  # 95 % of a normal distribution lie within Z deviations of its mean


class Said(NamedTuple):
    """An answer without its reasoning, and the calls in it; None: a server could not run one of them."""

    text: str
    calls: list[dict] | None


class Verdict(NamedTuple):
    """How an answer compares with its reference; `expected` and `got` name the tools they call, () is no call."""

    exact: bool  # the same calls as JSON values
    ast: bool  # the same calls by BFCL-like rules; so is every exact match
    broken: bool  # a call that no server could run
    expected: tuple[str, ...]
    got: tuple[str, ...]
    text: bool = False  # without tools, only the text was compared

    @property
    def labels(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return (expected, got) with a label where no tool is called."""
        empty = not (self.expected or self.exact or self.text)  # any other text is right where no call is expected
        return self.expected or (NO_CALL,), self.got or (BROKEN if self.broken else EMPTY if empty else NO_CALL,)


@dataclass(frozen=True)
class Proof:
    """The answers of each model to the same samples, with their verdicts and scores; the model to keep is the last.

    Models side by side may have templates of their own: then each has samples of its own, of the same turns.
    """

    samples: list[Sample]
    # {model: {"answers": [text], "calls": those that a server has read, "loss": nats per token, "samples": its own,
    # "trials": {kind: [text]}, "asked": {kind: its own samples}}}
    results: dict[str, dict]
    said: dict[str, list[Said]]
    verdicts: dict[str, list[Verdict]]
    scores: dict[str, dict]
    trials: dict[str, "Proof"] = field(default_factory=dict)  # {kind: answers to samples with other lists of tools}

    @classmethod
    def of(
        cls, samples: list[Sample], results: dict[str, dict], trials: dict[str, list[Sample]] | None = None
    ) -> "Proof":
        """Score the answers of each model; those to `trials`, {kind: samples}, are in its result, too, by kind."""
        said, verdicts = {}, {}
        for name, result in results.items():
            rows, answers = result.get("samples", samples), result["answers"]
            read = [*map(Said, answers, result["calls"])] if "calls" in result else [*map(read_answer, answers, rows)]
            said[name] = read
            verdicts[name] = [judge(got, read_reference(row), row.tools) for got, row in zip(read, rows)]
        proof = cls(samples, results, said, verdicts, {name: count_scores(rows) for name, rows in verdicts.items()})
        if not any(sample.tools for sample in samples):
            references = [read_reference(row).text for row in proof.asked(proof.last)]
            classes = count_classes([*zip(references, (got.text for got in said[proof.last]))])
            proof.scores[proof.last] |= {} if classes is None else {"macro_f1": classes}
        for kind, asked in (trials or {}).items():
            answered = {
                name: {"answers": result["trials"][kind]} for name, result in results.items() if "trials" in result
            }
            for name in answered:
                answered[name] |= {"samples": results[name]["asked"][kind]} if "asked" in results[name] else {}
            proof.trials[kind] = cls.of(asked, answered)
        return proof

    def asked(self, model: str) -> list[Sample]:
        """Return the samples that a model has answered."""
        return self.results[model].get("samples", self.samples)

    @property
    def first(self) -> str:  # the model before training
        return next(iter(self.results))

    @property
    def last(self) -> str:  # the model to keep
        return next(reversed(self.results))


def read_answer(text: str, sample: Sample) -> Said:
    """Return what an answer to a sample says."""
    text = take_answer(text, sample.completion)
    try:
        return Said(text, read_calls(text, sample.parser, sample.tools))
    except (ValueError, RecursionError):  # a model that repeats itself can open a thousand brackets
        return Said(text, None)


def read_reference(sample: Sample) -> Said:
    """Return what the supervised text of a sample says; ValueError if it holds a broken call."""
    text = take_answer(sample.completion, sample.completion)
    return Said(text, read_calls(text, sample.parser, sample.tools))


def judge(got: Said, expected: Said, tools: list[dict]) -> Verdict:
    """Compare an answer with its reference, exactly and by BFCL-like rules; without tools only the text counts.

    Where no call is expected, any text without a call is right; an empty answer is wrong. Unlike BFCL's checker, ours
    takes defaults from the schema, knows one expected value for each argument, pairs parallel calls by maximum
    matching, and compares at any depth. 5.0 is the integer 5, as in JSON Schema, and true is never 1.
    """
    names = tuple(call["name"] for call in expected.calls)
    if got.calls is None:
        return Verdict(False, False, True, names, (), not tools)
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}

    def fits(call: dict, other: dict) -> bool:
        name = call["name"]
        return name == other["name"] and is_alike(call["arguments"], other["arguments"], schemas.get(name))

    if not tools:
        exact = alike = got.text.strip() == expected.text.strip()
    elif not got.text.strip():
        exact = alike = False
    else:
        exact = can_pair(got.calls, expected.calls, is_same)
        alike = exact or can_pair(got.calls, expected.calls, fits)
    return Verdict(exact, alike, False, names, tuple(call["name"] for call in got.calls), not tools)


def read_calls(text: str, parser: str = "hermes", tools: list[dict] | tuple = ()) -> list[dict]:
    """Return the calls in a text; ValueError if a server could not run one of them."""
    return to_calls(parse_calls(text, parser, tools))


def to_calls(parsed: list) -> list[dict]:
    """Return parsed calls, each by name and arguments; ValueError if a server could not run one of them."""
    calls = []
    for call in parsed:
        match call:
            case {"name": str(name), "arguments": dict(arguments)}:
                calls.append({"name": name, "arguments": arguments})
            case _:
                raise ValueError('a call must be {"name": "...", "arguments": {...}}')
    return calls


def can_pair(got: list, expected: list, fits: Callable) -> bool:
    """Say whether `got` and `expected` pair off one to one such that each pair fits (maximum matching)."""
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


def is_same(got: object, expected: object) -> bool:
    """Say whether two JSON values are equal: 1 is 1.0, true is not 1, and the order of keys does not matter."""
    if isinstance(got, dict) and isinstance(expected, dict):
        return got.keys() == expected.keys() and all(is_same(got[key], expected[key]) for key in got)
    if isinstance(got, list) and isinstance(expected, list):
        return len(got) == len(expected) and all(map(is_same, got, expected))
    return isinstance(got, bool) == isinstance(expected, bool) and got == expected


def is_alike(got: object, expected: object, schema: object) -> bool:
    """Say whether two values match by BFCL-like rules: strings without case and punctuation, defaults by the schema."""
    schema = schema if isinstance(schema, dict) else {}
    if is_same(got, expected):
        return True
    if isinstance(got, dict) and isinstance(expected, dict):
        return has_alike_arguments(got, expected, schema)
    if isinstance(got, list) and isinstance(expected, list):
        schemas = schema.get("prefixItems", []) + [schema.get("items")] * len(got)
        return len(got) == len(expected) and all(map(is_alike, got, expected, schemas))
    if isinstance(got, str) and isinstance(expected, str):
        got, expected = (IGNORED.sub("", text).lower().replace("'", '"') for text in (got, expected))
        return got == expected
    return False


def has_alike_arguments(got: dict, expected: dict, schema: dict) -> bool:
    """Say whether two objects match by BFCL-like rules: no required key is missing, a default may be.

    An unknown key needs no check of its own: the reference does not have it, and it has no default.
    """
    rules = schema.get("properties", {})
    defaults = {name: rule["default"] for name, rule in rules.items() if isinstance(rule, dict) and "default" in rule}
    full_got, full_expected = defaults | got, defaults | expected
    return got.keys() >= set(schema.get("required", [])) and all(
        name in full_got
        and name in full_expected
        and is_alike(full_got[name], full_expected[name], rules.get(name, schema.get("additionalProperties")))
        for name in got.keys() | expected.keys()
    )


def mean(values: list[float]) -> float | None:
    """Return the mean, None of no values."""
    return math.fsum(values) / len(values) if values else None


def find_interval(hits: float, rows: float) -> list[float] | None:
    """Return the 95 % interval of the share `hits` / `rows` by Wilson's formula, [low, high]; None of no rows."""
    if not rows:
        return None
    share, spread = hits / rows, Z**2 / rows
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = ((share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))
    return [max(low, 0.0), min(high, 1.0)]  # rounding may pass the ends


def to_shares(hits: dict[str, list[bool]]) -> dict:
    """Return {name: share of the rows that hit, ..., "interval": {name: its find_interval, ...}}."""
    shares = {name: mean(rows) for name, rows in hits.items()}
    return shares | {"interval": {name: find_interval(sum(rows), len(rows)) for name, rows in hits.items()}}


def macro_f1(rows: list[tuple[tuple, tuple]]) -> float | None:
    """Return the mean F1 over all labels that are expected, given the (expected, got) labels of each row."""
    hits, total = Counter(), Counter()
    for expected, got in rows:
        hits.update(Counter(expected) & Counter(got))
        total.update([*expected, *got])
    labels = {label for expected, _ in rows for label in expected}
    return mean([2 * hits[label] / total[label] for label in labels])


def count_scores(verdicts: list[Verdict]) -> dict:
    """Return the scores over all rows, with the number of rows and the interval of each share.

    A broken call counts as a call. `no_call` leaves out rows without tools: there a model can hardly err.
    """
    calling, made = ([row for row in verdicts if row.expected], [row for row in verdicts if row.got or row.broken])
    hits = {
        "exact_match": [row.exact for row in verdicts],
        "call_exact": [row.exact for row in calling],
        "no_call": [row.exact for row in verdicts if not row.expected and not row.text],
        "ast_match": [row.ast for row in verdicts],
        "call_precision": [bool(row.expected) for row in made],
        "call_recall": [bool(row.got) or row.broken for row in calling],
    }
    return to_shares(hits) | {
        "tool_macro_f1": macro_f1([(row.expected, row.got) for row in verdicts]),
        "broken_json": sum(row.broken for row in verdicts),
        "n": len(verdicts),
        "rows": {name: len(rows) for name, rows in hits.items()},
    }


def count_classes(pairs: list[tuple[str, str]]) -> float | None:
    """Return the macro-F1 of (expected, got) texts if the expected ones are a few classes, else None."""
    rows = [((expected.strip(),), (got.strip(),)) for expected, got in pairs]
    return macro_f1(rows) if 0 < len({expected for expected, _ in rows}) <= MAX_CLASSES else None


def count_per_tool(verdicts: dict[str, list[Verdict]]) -> dict[str, dict]:
    """Return {tool: {"support": rows that expect it, model: to_shares of "tool" (it is called) and "exact", ...}}."""
    table: dict[str, dict] = {}
    for model, of_model in verdicts.items():
        for label in [*sorted({name for row in of_model for name in row.expected}), NO_CALL]:
            if rows := [row for row in of_model if label in row.labels[0]]:
                hits = {"tool": [label in row.labels[1] for row in rows], "exact": [row.exact for row in rows]}
                table.setdefault(label, {"support": len(rows)})[model] = to_shares(hits)
    return table


def pair_labels(row: Verdict) -> list[tuple[str, str]]:
    """Return the (expected, got) labels of a row: equal names first, then the others in order."""
    if not row.expected:
        return [(NO_CALL, name) for name in row.labels[1]]
    expected, got = Counter(row.expected), Counter(row.got)
    nothing = BROKEN if row.broken else NO_CALL
    hits, missed = (expected & got).elements(), (expected - got).elements()
    return [(name, name) for name in hits] + list(zip(missed, chain((got - expected).elements(), repeat(nothing))))


def count_confusion(verdicts: list[Verdict]) -> dict[str, list]:
    """Return {"labels": [...], "counts": [[...], ...]}: how often label i was expected and label j given."""
    pairs = Counter(pair for row in verdicts for pair in pair_labels(row))
    special = [label for label in (NO_CALL, EMPTY, BROKEN) if any(label in pair for pair in pairs)]
    expected = {wanted for wanted, _ in pairs}.difference(special)
    others = {got for _, got in pairs}.difference(special, expected)
    labels = [*sorted(expected), *sorted(others), *special]
    return {"labels": labels, "counts": [[pairs[wanted, got] for got in labels] for wanted in labels]}
