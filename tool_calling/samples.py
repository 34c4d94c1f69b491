"""Examples as samples: one for each supervised turn, its prompt and completion as tokens."""

import json
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from rich.progress import track
from rich.text import Text

from tool_calling.data.examples import Example
from tool_calling.data.messages import is_trained
from tool_calling.data.special_tokens import find_forbidden
from tool_calling.data.splits import split_examples
from tool_calling.data.variants import UNSEEN, list_called
from tool_calling.files import digest
from tool_calling.prompts import (
    check_calls,
    check_template,
    find_special_tokens,
    give_ids,
    render_turn,
    write_as_ollama,
)
from tool_calling.terminal import UserError, hide_secrets, make_console, report_problems, say, warn

NOT_HELD_OUT = "no row is held out: the scores will be those of training rows and say nothing about new requests"


class Sample(NamedTuple):
    """One supervised turn as tokens: the prompt that a server renders, then the completion."""

    source: str  # file:line of the row
    input_ids: list[int]
    prompt_length: int
    completion: str = ""  # the supervised text without its end token: the reference for scores
    tools: list[dict] = []
    request: str = ""  # the last user message
    parser: str = "hermes"  # reads the calls of the completion, see parse_calls
    row: int = 0  # the index of its example, of both sides: a row that is taken twice has two
    turn: int = 0  # the index of its message in the example
    variant: str = ""  # of the row: see data/variants.py; "" for the row as it is
    edition: int = 0  # of the rows, see editions.py
    compact: bool = False  # whether its prompt has the tools as Ollama writes them
    weight: float = 1.0  # of its supervised tokens in the loss


def render_examples(
    tokenizer, examples: list[Example], max_seq_length: int, date: str | None = None
) -> tuple[list[list[Sample]], list[tuple[str, str]]]:
    """Return ([samples of example 0, ...], [(source, problem), ...]).

    An example with a problem has no samples; of one with answers over `max_seq_length` only these are left out.
    """
    turns, problems = [], {}
    parser, special = check_template(tokenizer, examples), find_special_tokens(tokenizer)
    for index, example in enumerate(track(examples, "render", transient=True, disable=not sys.stdout.isatty())):
        try:
            check_special_tokens(example, special)
            example = example._replace(messages=give_ids(example.messages))
            for turn, message in enumerate(example.messages):
                if is_trained(message):
                    prompt, completion, end = render_turn(tokenizer, example, turn, date)
                    check_calls(completion, example, turn, parser)
                    turns.append((index, turn, prompt, completion, end))
        except (ValueError, RecursionError) as error:
            problems[index] = str(error)
    # Prompt and completion are encoded apart: the model is served the tokens of the prompt and then writes its own.
    encode = partial(tokenizer, add_special_tokens=False, return_attention_mask=False)
    prompts = encode([prompt for _, _, prompt, _, _ in turns])["input_ids"] if turns else []
    completions = encode([completion + end for *_, completion, end in turns])["input_ids"] if turns else []
    groups: list[list[Sample]] = [[] for _ in examples]
    for (index, turn, _, text, _), prompt, completion in zip(turns, prompts, completions):
        if index not in problems:
            example, tokens = examples[index], prompt + completion
            request = next((m["content"] for m in reversed(example.messages[:turn]) if m["role"] == "user"), "")
            sample = Sample(example.source, tokens, len(prompt), text, example.tools, request, parser, index, turn)
            groups[index].append(sample)
    kept, too_long = drop_long(groups, max_seq_length)
    return kept, [*((examples[index].source, problem) for index, problem in problems.items()), *too_long]


def drop_long(groups: list[list[Sample]], limit: int) -> tuple[list[list[Sample]], list[tuple[str, str]]]:
    """Return (groups without the samples over `limit` tokens, their problems); the other turns of a row stay."""
    rule, problems = f"--max_seq_length is {limit:,} and no answer is ever cut", []
    for group in groups:
        for number, sample in enumerate(group, start=1):
            if (size := len(sample.input_ids)) > limit:
                name = f"answer {number} of {len(group)}: " if len(group) > 1 else ""
                problems.append((sample.source, f"{name}{size:,} tokens; {rule}"))
    return [[sample for sample in group if len(sample.input_ids) <= limit] for group in groups], problems


def check_special_tokens(example: Example, special: re.Pattern | None) -> None:
    """Raise a ValueError if a message or a tool contains a special token of the tokenizer."""
    parts = {"tools": example.tools} | {f"message {i}": part for i, part in enumerate(example.messages, start=1)}
    for name, part in parts.items() if special else ():
        if problem := find_forbidden(json.dumps(part, ensure_ascii=False), special):
            raise ValueError(f"{name}: {problem}")


def to_sides(
    examples: list[Example], held_out: list[Example], groups: list[list[Sample]], share: float
) -> tuple[list[Sample], list[Sample]]:
    """Return the training and held-out samples, given those of each example of both sides (`groups`).

    Without `held_out` examples, a `share` of `examples` is held out.
    """
    samples = {id(example): group for example, group in zip([*examples, *held_out], groups) if group}
    train, test = ([example for example in side if id(example) in samples] for side in (examples, held_out))
    if not held_out:
        train, test = split_examples(train, share)
    return tuple([sample for example in side for sample in samples[id(example)]] for side in (train, test))


def set_apart(
    train: list[Sample], held_out: list[Sample], examples: list[Example], names: str | None
) -> tuple[list[Sample], list[Sample]]:
    """Return both sides after all rows that call tools of these names have become UNSEEN held-out ones.

    Also a call that is not trained counts: the list of a training row has no such tool.
    """
    if not names:
        return train, held_out
    apart = {row for row, example in enumerate(examples) if list_called(example.messages) & {*names.split(",")}}
    unseen = [sample._replace(variant=UNSEEN) for sample in (*train, *held_out) if sample.row in apart]
    train, held_out = ([sample for sample in side if sample.row not in apart] for side in (train, held_out))
    return train, held_out + unseen


def list_plain(samples: list[Sample]) -> list[Sample]:
    """Return the samples of rows as they are."""
    return [sample for sample in samples if not sample.variant]


def make_compact(
    tokenizer,
    samples: list[Sample],
    examples: list[Example] | dict[int, Example],
    share: float,
    limit: int,
    date: str | None = None,
) -> list[Sample]:
    """Return the samples, those of a `share` of the rows with tools as Ollama writes them.

    A hash of its messages chooses a row, so neither order nor other rows matter. A sample without tools stays as it is,
    and so does one that would have more than `limit` tokens.
    """
    made = []
    for sample in samples:
        example = examples[sample.row]
        if share and sample.tools and is_in_share(["compact", example.messages], share):
            example = example._replace(messages=give_ids(example.messages))
            try:
                prompt = write_as_ollama(render_turn(tokenizer, example, sample.turn, date)[0], sample.tools)
            except ValueError as error:
                raise UserError(f"--compact_tools: {tokenizer.name_or_path}: {error}") from None
            start = tokenizer([prompt], add_special_tokens=False)["input_ids"][0]
            tokens = start + sample.input_ids[sample.prompt_length :]
            if len(tokens) <= limit:
                sample = sample._replace(input_ids=tokens, prompt_length=len(start), compact=True)
        made.append(sample)
    return made


def is_in_share(key: object, share: float) -> bool:
    """Say whether the hash of a key chooses it among all, of which it chooses this share."""
    return int(digest(key)[:12], 16) < share * 16**12


def choose(samples: list[Sample], count: int) -> list[Sample]:
    """Return at most `count` different samples, chosen by hash, in their order.

    A hash chooses, not the place in the file: the first rows often call the same tool.
    """
    ranks = [digest(["choose", sample.request, sample.completion]) for sample in samples]
    found: dict[tuple, int] = {}  # by prompt and completion as tokens
    for index in sorted(range(len(samples)), key=ranks.__getitem__):
        if len(found) < count:
            found.setdefault((samples[index].prompt_length, *samples[index].input_ids), index)
    return [samples[index] for index in sorted(found.values())]


@dataclass(frozen=True)
class Rendering:
    """How rows become samples of either side: the flags of the same names."""

    dataset_path: list[str]
    train_test_split: float
    max_seq_length: int
    on_invalid: str
    metric_for_best: str | None
    early_stopping_patience: int | None
    compact_tools: float = 0
    holdout_tools: str | None = None  # names, separated by commas

    @property
    def choosing(self) -> str | None:  # the flag that chooses a checkpoint by held-out rows, if one is given
        flags = ("early_stopping_patience", "metric_for_best")
        return next((f"--{flag}" for flag in flags if getattr(self, flag)), None)


def render_valid(
    tokenizer, examples: list[Example], held_out: list[Example], rendering: Rendering, date: str | None = None
) -> tuple[list[Sample], list[Sample]]:
    """Return the training and held-out samples of the valid examples, split here if none are held out yet."""
    train, test = render_alike([tokenizer], examples, held_out, rendering, date)[0]
    return make_compact(tokenizer, train, examples, rendering.compact_tools, rendering.max_seq_length, date), test


def render_alike(
    tokenizers: list, examples: list[Example], held_out: list[Example], rendering: Rendering, date: str | None = None
) -> list[tuple[list[Sample], list[Sample]]]:
    """Return what render_valid does for each of several models: the same turns of the same rows.

    What one chat template has no place for, or what is too long for one tokenizer, is a problem for all.
    """
    both = [*examples, *held_out]
    rendered = [render_examples(tokenizer, both, rendering.max_seq_length, date) for tokenizer in tokenizers]
    problems = dict.fromkeys(problem for _, found in rendered for problem in found)
    report_problems([*problems], rendering.on_invalid, len(both))
    shared = [
        set.intersection(*({sample.turn for sample in group} for group in row))
        for row in zip(*(groups for groups, _ in rendered))
    ]
    sides = []
    for groups, _ in rendered:
        kept = [[sample for sample in group if sample.turn in turns] for group, turns in zip(groups, shared)]
        sides.append(to_sides(examples, held_out, kept, rendering.train_test_split))
    return [set_apart(*side, both, rendering.holdout_tools) for side in sides]


def render_sides(
    tokenizer, examples: list[Example], held_out: list[Example], rendering: Rendering, date: str | None = None
) -> tuple[list[Sample], list[Sample]]:
    """Return what render_valid does, as it suffices for a run, and print it."""
    start = time.perf_counter()
    train, test = render_valid(tokenizer, examples, held_out, rendering, date)
    plain = list_plain(test)
    check_sides(train, plain, rendering)
    if not plain:
        warn(NOT_HELD_OUT)
    tokens = [len(sample.input_ids) for sample in (*train, *test)]
    sizes = f"{sum(tokens) // len(tokens):,} tokens on average, {max(tokens):,} at most"
    seconds = time.perf_counter() - start
    compact = f" ({sum(sample.compact for sample in train):,} with compact tools)" if rendering.compact_tools else ""
    counts = f"{len(train):,} training{compact} and {len(plain):,} held-out samples"
    if rendering.holdout_tools:
        counts += f", {len(test) - len(plain):,} with calls of {rendering.holdout_tools},"
    say("render", f"{counts} of {sizes} ({seconds:.1f} s)")
    if date:
        say("", f"the chat template writes the date into prompts: {date}, the day this run began, also when resumed")
    return train, test


def check_sides(train: list[Sample], held_out: list[Sample], rendering: Rendering) -> None:
    """Refuse a run without a training row, and one that chooses a checkpoint by held-out rows and has none."""
    if not train:
        paths = " ".join(rendering.dataset_path)
        raise UserError(f"{paths}: no row is left to train on; lower --train_test_split or add rows")
    if rendering.choosing and not held_out:
        advice = "raise --train_test_split or give --eval_dataset_path"
        raise UserError(f"{rendering.choosing}: no row is held out to choose a checkpoint by; {advice}")


def count_origins(samples: list[Sample]) -> int:
    """Return how many rows the samples come from; a row makes a sample of each supervised turn."""
    return len({sample.row for sample in samples})


def find_longest(samples: list[Sample]) -> int:
    """Return how many tokens the longest sample has."""
    return max(len(sample.input_ids) for sample in samples)


def name_unit(*sides: list[Sample]) -> str:
    """Return what samples are called on screen: rows, or turns where rows have several."""
    return "rows" if all(count_origins(side) == len(side) for side in sides) else "turns"


def check_shown(number: int | None, examples: list[Example]) -> None:
    """Refuse a --show_row beyond the last row."""
    if number and number > len(examples):
        raise UserError(f"--show_row {number}: no such row; expected 1 to {len(examples):,}, the valid rows")


def show_rows(tokenizer, samples: list[Sample], shown: int | None) -> None:
    """Print all turns of row number `shown` as the model sees them; without a number, two samples with short prompts.

    ▶ ... ◀ (green on a terminal) is supervised. What is the same in several editions is printed once.
    """
    chosen = [sample for sample in samples if sample.row == shown - 1] if shown else samples[:2]
    forms: dict[tuple, Sample] = {}
    for sample in chosen:
        forms.setdefault(tuple(sample.input_ids), sample)
    if not chosen:
        warn(f"--show_row {shown}: the row is left out; expected one without a problem")
    for sample in forms.values():
        tokens = (sample.input_ids[: sample.prompt_length], sample.input_ids[sample.prompt_length :])
        prompt, completion = (hide_secrets(tokenizer.decode(part)) for part in tokens)
        if len(prompt) > 500 and not shown:
            prompt = f"{prompt[:160]} … {len(prompt) - 460:,} characters … {prompt[-300:]}"
        kind = f"{sample.variant}: " if sample.variant else ""
        head = f"\n{sample.source}  ({kind}{len(tokens[0]):,} prompt tokens, {len(tokens[1])} supervised)\n"
        text = Text(head, style="bold") + Text(prompt, style="dim") + Text(f"▶{completion}◀", style="green")
        make_console(soft_wrap=True).print(text)
