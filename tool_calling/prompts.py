"""Examples to samples: one for each supervised turn, on the prompt that a server renders."""

import argparse
import json
import re
import sys
import time
from functools import partial
from typing import NamedTuple

import jinja2
from rich.progress import track
from rich.text import Text

from tool_calling.data.examples import Example, split_examples
from tool_calling.data.messages import is_trained
from tool_calling.data.special_tokens import CONTROL_TOKEN, find_forbidden
from tool_calling.terminal import UserError, make_console, report_problems, say, shorten, warn


class Sample(NamedTuple):
    """One assistant turn as tokens: the prompt as serving renders it, then the supervised answer."""

    source: str  # file:line of the row
    input_ids: list[int]
    prompt_length: int
    completion: str = ""  # the supervised text without its end token, for scoring
    tools: list[dict] = []
    request: str = ""  # what the user said last
    parser: str = "hermes"  # reads the calls of the answer, see parse_calls


PARSERS = ("hermes", "llama3_json")  # as vLLM's --tool-call-parser names them
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"probe": {"type": "string"}}},
    },
}
PROBE = [
    {"role": "user", "content": "probe"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": "probe0001", "function": {"name": "probe_tool", "arguments": {"probe": "value"}}}
        ],
    },
    {"role": "tool", "content": "probe reply", "name": "probe_tool", "tool_call_id": "probe0001"},
]


def parse_llama_calls(text: str) -> list[dict]:
    """Return the calls in an answer that is one JSON object {"name", "parameters"}, or several with ";" between them.

    Any other answer is plain text and has no calls; ValueError if it begins as a call and is none.
    """
    rest, calls = text.strip().removeprefix("<|python_tag|>").lstrip(), []
    if not rest.startswith("{"):
        return []
    while rest:
        try:
            call, end = json.JSONDecoder().raw_decode(rest)
        except ValueError:
            if '"name"' in text:
                raise
            return []
        if not isinstance(call, dict) or "name" not in call or not call.keys() & {"parameters", "arguments"}:
            return []
        calls.append({"name": call["name"], "arguments": call.get("arguments", call.get("parameters"))})
        rest = rest[end:].lstrip().removeprefix(";").lstrip()
    return calls


def parse_calls(text: str, parser: str = "hermes") -> list[dict]:
    """Return the calls in an answer, extracted as that parser of inference servers does; ValueError if broken."""
    if parser == "llama3_json":
        return parse_llama_calls(text)
    blocks = re.findall(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", text, re.DOTALL)
    return [json.loads(closed or unclosed) for closed, unclosed in blocks]


def render_text(tokenizer, messages: list[dict], date: str | None = None, **options) -> str:
    """Return the text that the chat template makes of messages; if it refuses them, a ValueError.

    Some templates write today's date. With `date` (YYYY-MM-DD) they write that one.
    """
    if date:
        options["strftime_now"] = lambda form: time.strftime(form, time.strptime(date, "%Y-%m-%d"))
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError, ValueError) as error:  # the last two as Python words what it computes
        raise ValueError(f"the chat template refuses it: {error}") from None


def find_date(tokenizer) -> str | None:
    """Return today's date if the chat template writes it into prompts, as Llama's does, else None."""
    texts = {render_text(tokenizer, PROBE[:1], date) for date in ("2001-01-01", "2002-02-02")}
    return time.strftime("%Y-%m-%d") if len(texts) > 1 else None


def render_turn(
    tokenizer, example: Example, turn: int, parser: str = "hermes", date: str | None = None
) -> tuple[str, str]:
    """Return (prompt, answer) text of the assistant turn `example.messages[turn]`; ValueError if they do not fit.

    A template may render one turn differently in the middle of a conversation and at its end: Qwen3 drops the think
    block of a turn that a tool reply follows. So the prompt is what serving sends before the turn, and the answer is
    what the template adds when the turn is the last message.
    """
    turn_message, where = example.messages[turn], f"message {turn + 1}"
    render = partial(render_text, tokenizer, date=date, tools=example.tools or None)
    try:
        prompt = render(
            example.messages[:turn], add_generation_prompt=True, enable_thinking="reasoning_content" in turn_message
        )
        full = render(example.messages[: turn + 1])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not full.startswith(prompt):
        raise ValueError(f"{where}: the chat template does not render this answer after its serving prompt")
    end = full.rfind(tokenizer.eos_token)
    if end < len(prompt):
        raise ValueError(f"{where}: the chat template does not end this answer with {tokenizer.eos_token}")
    answer = full[len(prompt) : end]
    for name in ("reasoning_content", "content"):
        if turn_message.get(name, "").strip() not in answer:
            raise ValueError(f"{where}: the chat template leaves out its {name}; remove it, or choose another model")
    expected = [call["function"] for call in turn_message.get("tool_calls", [])]
    try:
        found = parse_calls(answer, parser)
    except ValueError:
        raise ValueError(f"{where}: would be read as a broken call: {shorten(answer)}") from None
    if found != expected:
        raise ValueError(f"{where}: its calls do not survive rendering and parsing: {shorten(answer)}")
    return prompt, answer + tokenizer.eos_token


def find_parser(tokenizer) -> str:
    """Return which of PARSERS reads the calls that the chat template writes; ValueError if none does."""
    for parser in PARSERS:
        try:
            render_turn(tokenizer, Example("", PROBE[:2], [PROBE_TOOL]), 1, parser)
            return parser
        except ValueError as error:
            reason = str(error).removeprefix("message 2: ")
    raise ValueError(f"the chat template writes calls in a way that cannot be read back: {reason}")


def check_template(tokenizer, examples: list[Example]) -> str:
    """Return the parser for the chat template's calls; one that leaves out what the rows use is a UserError."""
    if not any(example.tools for example in examples):
        return PARSERS[0]
    replies = any(message["role"] == "tool" for example in examples for message in example.messages)
    try:
        if "probe_tool" not in render_text(tokenizer, PROBE[:1], tools=[PROBE_TOOL]):
            raise ValueError("the chat template leaves out the tools")
        if replies and "probe reply" not in render_text(tokenizer, PROBE, tools=[PROBE_TOOL]):
            raise ValueError("the chat template leaves out the replies of tools")
        return find_parser(tokenizer)
    except ValueError as error:
        raise UserError(
            f"{tokenizer.name_or_path}: {error}; expected that of a model whose calls vLLM's parser "
            f"{' or '.join(PARSERS)} reads"
        ) from None


def find_control_tokens(tokenizer) -> re.Pattern | None:
    """Return what matches the tokenizer's own control tokens beyond CONTROL_TOKEN, or None if there are none."""
    tokens = [
        str(token)
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or str(token) in str(tokenizer.chat_template)
    ]
    tokens = [token for token in tokens if token.strip() and not CONTROL_TOKEN.search(token)]
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def check_control_tokens(example: Example, control_token: re.Pattern) -> None:
    """Raise a ValueError if a message or a tool holds a control token."""
    parts = {"tools": example.tools} | {f"message {i}": part for i, part in enumerate(example.messages, start=1)}
    for name, part in parts.items():
        if problem := find_forbidden(json.dumps(part, ensure_ascii=False), control_token):
            raise ValueError(f"{name}: {problem}")


def describe_length(tokens: int, max_seq_length: int) -> str:
    """Return the problem of a sample that is too long."""
    return f"{tokens:,} tokens; --max_seq_length is {max_seq_length:,} and no answer is ever cut"


def render_examples(tokenizer, examples: list[Example], max_seq_length: int, date: str | None = None):
    """Return ([samples of example 0, ...], problems); the samples of an example with a problem are left out."""
    rendered, problems, bad = [], [], set()
    parser, control_token = check_template(tokenizer, examples), find_control_tokens(tokenizer)
    for index, example in enumerate(track(examples, "render", transient=True, disable=not sys.stdout.isatty())):
        turns = [i for i, message in enumerate(example.messages) if is_trained(message)]
        try:
            check_control_tokens(example, control_token) if control_token else None
            rendered += [(index, turn, *render_turn(tokenizer, example, turn, parser, date)) for turn in turns]
        except (ValueError, RecursionError) as error:
            problems.append((example.source, str(error)))
            bad.add(index)
    # Prompt and answer are encoded apart: the model is served the prompt's tokens and then writes its own.
    encode = partial(tokenizer, add_special_tokens=False, return_attention_mask=False)
    prompts = encode([prompt for *_, prompt, _ in rendered])["input_ids"] if rendered else []
    answers = encode([answer for *_, answer in rendered])["input_ids"] if rendered else []
    groups: list[list[Sample]] = [[] for _ in examples]
    for (index, turn, _, text), prompt, answer in zip(rendered, prompts, answers):
        example = examples[index]
        if len(prompt) + len(answer) > max_seq_length:
            bad.add(index)
            problems.append((example.source, describe_length(len(prompt) + len(answer), max_seq_length)))
        request = next((m["content"] for m in reversed(example.messages[:turn]) if m["role"] == "user"), "")
        groups[index].append(
            Sample(
                example.source,
                prompt + answer,
                len(prompt),
                text.removesuffix(tokenizer.eos_token),
                example.tools,
                request,
                parser,
            )
        )
    return [[] if index in bad else group for index, group in enumerate(groups)], problems


def show_row(tokenizer, sample: Sample, whole: bool = False) -> None:
    """Print a row as the model sees it, cut unless `whole`; ▶ ... ◀ (green on a terminal) is what is supervised."""
    prompt = tokenizer.decode(sample.input_ids[: sample.prompt_length])
    answer = tokenizer.decode(sample.input_ids[sample.prompt_length :])
    if len(prompt) > 500 and not whole:
        prompt = f"{prompt[:160]} … {len(prompt) - 460:,} characters … {prompt[-300:]}"
    text = Text(
        f"\n{sample.source}  ({sample.prompt_length:,} prompt tokens, "
        f"{len(sample.input_ids) - sample.prompt_length} supervised)\n",
        style="bold",
    )
    text += Text(prompt, style="dim") + Text(f"▶{answer}◀", style="green")
    make_console(soft_wrap=True).print(text)


def find_shown(args: argparse.Namespace, examples: list[Example]) -> str | None:
    """Return where the row of --show_row is, or None; a number beyond the last row is a UserError."""
    if args.show_row and args.show_row > len(examples):
        raise UserError(f"--show_row {args.show_row}: no such row; expected 1 to {len(examples):,}, the valid rows")
    return examples[args.show_row - 1].source if args.show_row else None


def show_rows(tokenizer, samples: list[Sample], shown: str | None) -> None:
    """Print every trained turn of the row `shown` whole; without it, the first two samples, shortened."""
    chosen = [sample for sample in samples if sample.source == shown] if shown else samples[:2]
    if not chosen:
        warn(f"--show_row: {shown} is left out; expected a row without a problem")
    for sample in chosen:
        show_row(tokenizer, sample, whole=shown is not None)


def find_end_token(tokenizer) -> str | None:
    """Return the token with which the chat template ends an answer, or None if there is none."""
    answer = {"role": "assistant", "content": "probe answer"}
    try:
        tail = render_text(tokenizer, [PROBE[0], answer]).rpartition(answer["content"])
    except ValueError:
        return None
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token) in tail[2]]
    return min(tokens, key=tail[2].find, default=None) if tail[1] else None


def count_origins(samples: list[Sample]) -> int:
    """Return of how many rows these samples are: one with several trained turns makes several."""
    return len({sample.source for sample in samples})


def name_unit(*sides: list[Sample]) -> str:
    """Return what samples are to be called: rows, or turns where rows have several."""
    return "rows" if all(count_origins(side) == len(side) for side in sides) else "turns"


def to_sides(
    args: argparse.Namespace, examples: list[Example], held_out: list[Example], groups: list[list[Sample]]
) -> list[list[Sample]]:
    """Return the training and held-out samples of rendered examples, split here if none are held out yet."""
    samples = {id(example): group for example, group in zip([*examples, *held_out], groups) if group}
    sides = [[example for example in side if id(example) in samples] for side in (examples, held_out)]
    if not held_out:
        sides = split_examples(sides[0], args.train_test_split)
    return [[sample for example in side for sample in samples[id(example)]] for side in sides]


NOT_HELD_OUT = "no row is held out: the scores will be those of training rows, and say nothing about new requests"


def check_sides(args: argparse.Namespace, train: list[Sample], held_out: list[Sample]) -> None:
    """Refuse a run without a training row, and one that keeps its best by scores of no row."""
    if not train:
        paths = " ".join(args.dataset_path)
        raise UserError(f"{paths}: no row is left to train on; lower --train_test_split or add rows")
    if not held_out and args.metric_for_best:
        flag = "--early_stopping_patience" if args.early_stopping_patience else "--metric_for_best"
        raise UserError(
            f"{flag}: no row is held out to choose a checkpoint by; raise --train_test_split, or give "
            "--eval_dataset_path"
        )


def render_all(
    args: argparse.Namespace, tokenizer, examples: list[Example], held_out: list[Example] = [], date: str | None = None
) -> tuple[list[Sample], list[Sample]]:
    """Return the training and held-out samples of the valid examples, split here if none are held out yet."""
    start = time.perf_counter()
    both = [*examples, *held_out]
    groups, problems = render_examples(tokenizer, both, args.max_seq_length, date)
    report_problems(problems, args.on_invalid, len(both))
    train, test = to_sides(args, examples, held_out, groups)
    check_sides(args, train, test)
    if not test:
        warn(NOT_HELD_OUT)
    tokens = [len(sample.input_ids) for sample in (*train, *test)]
    say(
        "render",
        f"{len(train):,} training and {len(test):,} held-out samples of {sum(tokens) // len(tokens):,} "
        f"tokens on average, {max(tokens):,} at most ({time.perf_counter() - start:.1f} s)",
    )
    if date:
        say("", f"the chat template writes the date into prompts: {date}, the day this run began, also when resumed")
    return train, test
