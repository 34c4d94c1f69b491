#!/usr/bin/env python3
"""Teach a small Qwen3 to call your tools: tool-calling JSON in, a merged model in safetensors out.

    python train_qwen3_tool_calling.py --dataset_path data/mine.jsonl --tools_path data/tools.json

The data flows through this file from top to bottom: row -> example -> sequence -> stream -> model -> merged model.
Each section takes what the one above it gives. Everything that can be checked without a model is checked
before torch is imported, so a mistake costs a second and not an hour.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------------------
# 0  Defaults: edit these for a new dataset; every one is also a flag
# ---------------------------------------------------------------------------------------------------------------
MODEL_ID = "Qwen/Qwen3-0.6B"  # the smallest Qwen3: enough for tens of tools, trains on any GPU
DATASET_PATH = "data/synthetic_finetune_dataset.json"
TOOLS_PATH = "data/tools.json"  # for rows that bring no tools of their own
OUTPUT_DIR = "outputs/qwen3_tool_calling_unsloth"  # checkpoints and the adapter
FINAL_MODEL_DIR = "models/qwen3_tool_calling_merged"  # the model to serve

TRAIN_TEST_SPLIT = 0.1  # share of the rows held out from training
NUM_EPOCHS = 3  # a third pass still helps on a few thousand rows; more begins to memorise
BATCH_SIZE = 2  # sequences per device and micro-batch: fits 8 GB cards with rows of 2,048 tokens
GRADIENT_ACCUMULATION_STEPS = 4  # 2 x 4 = 8 sequences per optimizer step
LEARNING_RATE = 2e-4  # the usual rate for LoRA; full fine-tuning wants a tenth of it
WARMUP_STEPS = 10  # Adam's moments are noise in the first steps
WEIGHT_DECAY = 0.01
LR_SCHEDULER_TYPE = "linear"
MAX_SEQ_LENGTH = 2048  # longer sequences are reported, never cut
SEED = 3407

LORA_RANK = 16
LORA_ALPHA = 16  # alpha / rank = 1: the adapter's output is not scaled
LORA_DROPOUT = 0.0  # 0 lets Unsloth use its fused kernels
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SHOWN_ROWS = 3  # held-out requests whose answers are shown before and after
MAX_NEW_TOKENS = 256  # for those answers
CHECKED_ROWS = 8  # so many rows are computed shared and by themselves at the start of each run, and compared
RECORDED_BYTES = 2**30  # a stream whose layers' inputs take more than this is not recorded as a CUDA graph
READ_BACK_ROWS = 64  # held-out rows on which the merged model is compared with the adapter
MERGE_SLACK = 0.02  # nats per token by which a merge after 4-bit training may be worse: 2 % of a small loss is noise
SHOWN_PROBLEMS = 20
WRITTEN_BY = "# written by train_qwen3_tool_calling.py\n"  # first line of run.yaml: marks a folder as ours to replace


class UserError(Exception):
    """A mistake in data or environment that the user can mend: shown as `error: ...` lines, never as a traceback."""


class Example(NamedTuple):
    """One conversation in the OpenAI shape; `where` is the file:line it came from."""

    where: str
    messages: list[dict]
    tools: list[dict]


class Sequence(NamedTuple):
    """One assistant turn as tokens: the prompt as serving renders it, then the supervised answer."""

    where: str
    input_ids: list[int]
    prompt_length: int


def say(stage: str, text: str) -> None:
    """Print one line for one stage of the run."""
    print(f"{stage:<9}{text}", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# 1  Arguments: argv -> Namespace; argparse is the only declaration of a setting
# ---------------------------------------------------------------------------------------------------------------
def number(kind, low, high=math.inf, low_open=False):
    """Return an argparse type for an int or float in [low, high), or (low, high) with `low_open`."""

    def parse(text: str):
        value = kind(text)
        if not (low < value if low_open else low <= value) or not value < high:
            upper = "" if high == math.inf else f" and below {high}"
            raise argparse.ArgumentTypeError(f"must be {'above' if low_open else 'at least'} {low}{upper}, got {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the settings of a run; a wrong flag ends the program with exit code 2."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a Qwen3 model to call your tools, and save it merged in safetensors.",
        formatter_class=partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=34, width=120),
        allow_abbrev=False,
    )
    count, positive = number(int, 1), number(float, 0, low_open=True)

    data = parser.add_argument_group("data")
    data.add_argument("--dataset_path", default=DATASET_PATH, help="JSON array or JSONL of rows")
    data.add_argument("--tools_path", default=TOOLS_PATH, help="JSON array of tools for rows without their own")
    data.add_argument("--train_test_split", type=number(float, 0, 1), default=TRAIN_TEST_SPLIT, metavar="SHARE",
                      help="share of the rows to hold out")
    data.add_argument("--max_samples", type=count, metavar="N", help="use only the first N rows (default: all)",
                      default=argparse.SUPPRESS)
    data.add_argument("--max_seq_length", type=count, default=MAX_SEQ_LENGTH, metavar="TOKENS",
                      help="longest sequence; a longer one is a problem, it is never cut")
    data.add_argument("--on_invalid", choices=["error", "skip"], default="error",
                      help="what to do with a row that has a problem")

    model = parser.add_argument_group("model")
    model.add_argument("--model_id", default=MODEL_ID, help="Hub id or folder of the base model")
    model.add_argument("--merge_model_id", metavar="MODEL", default=argparse.SUPPRESS,
                       help="16-bit original to merge into, when --model_id is already quantised")
    model.add_argument("--engine", choices=["auto", "unsloth", "transformers"], default="auto",
                       help="auto: Unsloth on CUDA, Transformers + PEFT elsewhere")
    model.add_argument("--load_in_4bit", action=argparse.BooleanOptionalAction, default=True,
                       help="train on a 4-bit base (QLoRA)")
    model.add_argument("--lora_rank", type=count, default=LORA_RANK, metavar="R", help="rank of the adapter")
    model.add_argument("--lora_alpha", type=count, default=LORA_ALPHA, metavar="A", help="scale: alpha / rank")
    model.add_argument("--lora_dropout", type=number(float, 0, 1), default=LORA_DROPOUT, metavar="P",
                       help="dropout in front of the adapter")

    train = parser.add_argument_group("training")
    train.add_argument("--num_epochs", type=count, default=NUM_EPOCHS, metavar="N", help="passes over the data")
    train.add_argument("--max_steps", type=count, metavar="N", default=argparse.SUPPRESS,
                       help="stop after N optimizer steps (default: all)")
    train.add_argument("--batch_size", type=count, default=BATCH_SIZE, metavar="N",
                       help="sequences per device and micro-batch")
    train.add_argument("--gradient_accumulation_steps", type=count, default=GRADIENT_ACCUMULATION_STEPS, metavar="N",
                       help="micro-batches per optimizer step")
    train.add_argument("--learning_rate", type=positive, default=LEARNING_RATE, metavar="LR", help="peak rate")
    train.add_argument("--lr_scheduler_type", default=LR_SCHEDULER_TYPE, metavar="NAME",
                       help="linear, cosine, constant, ... as Transformers names them")
    train.add_argument("--warmup_steps", type=number(int, 0), default=WARMUP_STEPS, metavar="N",
                       help="steps until the peak rate")
    train.add_argument("--weight_decay", type=number(float, 0), default=WEIGHT_DECAY, metavar="W", help="AdamW's decay")
    train.add_argument("--optim", metavar="NAME", default=argparse.SUPPRESS,
                       help="optimizer (default: adamw_8bit on CUDA, adamw_torch elsewhere)")
    train.add_argument("--gradient_checkpointing", choices=["auto", "on", "off"], default="auto",
                       help="compute activations twice instead of keeping them; auto: on with CUDA")
    train.add_argument("--share_prefix", action=argparse.BooleanOptionalAction, default=True,
                       help="compute what rows have in common once per stream")
    train.add_argument("--cuda_graphs", action=argparse.BooleanOptionalAction, default=True,
                       help="record the step and replay it with a few launches (Unsloth)")
    train.add_argument("--seed", type=number(int, 0), default=SEED, help="seed of everything random")

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default=OUTPUT_DIR, help="folder for checkpoints and the adapter")
    output.add_argument("--final_model_dir", default=FINAL_MODEL_DIR, help="folder for the merged model")
    output.add_argument("--resume_from_checkpoint", nargs="?", const="newest", metavar="PATH",
                        default=argparse.SUPPRESS, help="go on from a checkpoint (no PATH: the newest in --output_dir)")
    output.add_argument("--report_to", default="none", metavar="NAME", help="tensorboard, wandb, ... or none")

    # SUPPRESS above keeps "(default: None)" out of --help; here those settings get their value.
    unset = dict(max_samples=None, merge_model_id=None, max_steps=None, optim=None, resume_from_checkpoint=None)
    args = argparse.Namespace(**unset)
    return parser.parse_args(argv, namespace=args)


# ---------------------------------------------------------------------------------------------------------------
# 2  Read: file -> (where, row) pairs, one by one, so that a missing key stays missing and each row keeps its line
# ---------------------------------------------------------------------------------------------------------------
def refuse_constant(name: str):
    """Reject NaN and Infinity, which Python reads but JSON does not have."""
    raise ValueError(f"{name} is not JSON")


def read_text(path: str) -> str:
    """Return a file's text; a file that is absent, empty or not UTF-8 is a UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8 JSON or JSONL") from None
    if not text.strip():
        raise UserError(f"{path}: is empty; expected a JSON array of rows, or one JSON object a line")
    return text


def read_array(path: str, text: str):
    """Yield (file:line, element) of a JSON array, decoding one element after the other to know its line."""
    decoder = json.JSONDecoder(parse_constant=refuse_constant)
    skip = re.compile(r"\s*,?\s*")
    position, line, counted, index, last_line = text.index("[") + 1, 1, 0, 0, 0
    while True:
        position = skip.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}" if line > last_line else f"{path}[{index}]"  # several on one line: count them
        index, last_line = index + 1, line
        if position >= len(text):
            raise UserError(f"{where}: the JSON array does not end; expected ]")
        if text[position] == "]":
            return
        try:
            element, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line += text.count("\n", counted, getattr(error, "pos", position))
            raise UserError(f"{path}:{line}: not valid JSON: {getattr(error, 'msg', error)}") from None
        yield where, element


def read_lines(path: str, text: str):
    """Yield (file:line, object) of a JSONL file; a broken line is yielded as the ValueError it raised."""
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                yield f"{path}:{line}", json.loads(content, parse_constant=refuse_constant)
            except (ValueError, RecursionError) as error:
                yield f"{path}:{line}", ValueError(f"not valid JSON: {getattr(error, 'msg', error)}; "
                                                   "expected one JSON object a line, or a JSON array")


def read_rows(path: str, max_samples: int | None = None) -> list[tuple[str, object]]:
    """Return the (where, row) pairs of a JSON array or JSONL file, at most `max_samples`."""
    text = read_text(path)
    rows = read_array(path, text) if text.lstrip().startswith("[") else read_lines(path, text)
    pairs = [pair for _, pair in zip(range(max_samples or sys.maxsize), rows)]
    if not pairs:
        raise UserError(f"{path}: holds no rows")
    return pairs


# ---------------------------------------------------------------------------------------------------------------
# 3  Convert: row of any known format -> Example; FORMATS is the one place to add a format
# ---------------------------------------------------------------------------------------------------------------
def to_tool_call(call: object) -> dict:
    """Return a call in the OpenAI shape with its arguments as a dict; ValueError says what is wrong with it."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
        raise ValueError('a call must be {"name": "...", "arguments": {...}}, got ' + shorten(call))
    arguments = call["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=refuse_constant)
        except ValueError:
            raise ValueError(f'call "{call["name"]}": arguments are not valid JSON: {shorten(arguments)}') from None
    if not isinstance(arguments, dict):
        raise ValueError(f'call "{call["name"]}": arguments must be an object, got {shorten(arguments)}')
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}


def shorten(value: object, limit: int = 80) -> str:
    """Return a value as JSON for a message, cut to `limit` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def convert_native(row: dict) -> list[dict]:
    """{"input": "...", "output": {"function_call": {...} | "function_calls": [...], "content": "..."}} -> messages."""
    output = row["output"]
    if not isinstance(output, dict) or not output.keys() & {"function_call", "function_calls", "content"}:
        raise ValueError('"output" must hold function_call, function_calls or content, got ' + shorten(output))
    calls = output.get("function_calls", [output["function_call"]] if output.get("function_call") else [])
    if not isinstance(calls, list):
        raise ValueError("function_calls must be a list, got " + shorten(calls))
    answer = {"role": "assistant", "content": output.get("content") or ""}
    if calls:
        answer["tool_calls"] = [to_tool_call(call) for call in calls]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": row["input"]}, answer]


def convert_openai(row: dict) -> list[dict]:
    """{"messages": [...], "tools": [...]} -> messages that hold only what a chat template reads."""
    if not isinstance(row["messages"], list) or not all(isinstance(message, dict) for message in row["messages"]):
        raise ValueError('"messages" must be a list of objects, got ' + shorten(row["messages"]))
    messages = []
    for message in row["messages"]:
        content = message.get("content")
        converted = {"role": message.get("role"), "content": "" if content is None else content}
        if isinstance(message.get("reasoning_content"), str) and message["reasoning_content"].strip():
            converted["reasoning_content"] = message["reasoning_content"]
        if message.get("tool_calls"):
            if not isinstance(message["tool_calls"], list):
                raise ValueError("tool_calls must be a list, got " + shorten(message["tool_calls"]))
            calls = [call.get("function", call) if isinstance(call, dict) else call for call in message["tool_calls"]]
            converted["tool_calls"] = [to_tool_call(call) for call in calls]
        messages.append(converted)
    return messages


FORMATS = {  # name: (keys that mark a row of this format, converter of the row to OpenAI messages)
    "native": ({"input", "output"}, convert_native),
    "openai": ({"messages"}, convert_openai),
}


def to_messages(row: object) -> list[dict]:
    """Return a row's conversation as OpenAI messages; ValueError says why it is of no known format."""
    if isinstance(row, ValueError):  # a line that was not JSON
        raise row
    if isinstance(row, dict):
        for keys, convert in FORMATS.values():
            if keys <= row.keys():
                return convert(row)
    shapes = " or ".join("{" + ", ".join(f'"{key}"' for key in sorted(keys)) + "}" for keys, _ in FORMATS.values())
    raise ValueError(f"expected an object with {shapes}, got {shorten(row)}")


# ---------------------------------------------------------------------------------------------------------------
# 4  Validate: example -> list of problems; a check_ returns problems, one place raises
# ---------------------------------------------------------------------------------------------------------------
# Inside content these tokens would forge turns, calls or thoughts: the tokenizer turns them into control tokens.
CONTROL_TOKEN = re.compile(r"<\|[a-z_]+\|>|</?(?:tool_call|tool_response|think)>")
NEXT_ROLES = {  # who may speak after whom
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("tool", "assistant"),
}
TYPE_NAMES = {"integer": "an integer", "number": "a number", "string": "a string", "boolean": "true or false",
              "array": "an array", "object": "an object", "null": "null"}


def check_roles(messages: list[dict]) -> list[str]:
    """Check that the conversation alternates as a chat does and ends with the assistant."""
    state, open_calls = "start", 0
    for index, message in enumerate(messages, start=1):
        role = message["role"]
        allowed = NEXT_ROLES[state] if state != "tool" else ("tool",) if open_calls else ("assistant",)
        if role not in allowed:
            reason = f"; {open_calls} of its calls still wait for their reply" if open_calls and state == "tool" else ""
            return [f"message {index} has the role {shorten(role)}; expected {' or '.join(allowed)}{reason}"]
        if role == "assistant":
            open_calls = len(message.get("tool_calls", []))
        elif role == "tool":
            open_calls -= 1
        state = "calls" if role == "assistant" and open_calls else role
    if not messages or messages[-1]["role"] != "assistant":
        return ["the last message must be the assistant's: it is what is trained"]
    return []


def check_text(messages: list[dict]) -> list[str]:
    """Check that every content is text, that none is missing, and that none holds a control token."""
    problems = []
    for index, message in enumerate(messages, start=1):
        name = f"message {index} ({message['role']})"
        content = message["content"]
        if not isinstance(content, str):
            problems.append(f"{name}: content must be text, got {shorten(content)}")
            continue
        if not content.strip() and message["role"] != "tool" and not message.get("tool_calls"):
            problems.append(f"{name}: content is empty")
        calls = json.dumps(message.get("tool_calls", ""), ensure_ascii=False)
        for text in (content, message.get("reasoning_content", ""), calls):
            if token := CONTROL_TOKEN.search(text):
                problems.append(f"{name}: holds the control token {token[0]}, which would forge a turn; remove it")
    return problems


def to_strict(schema: object) -> object:
    """Return the schema with unknown arguments refused wherever `properties` are listed and nothing else is said."""
    if not isinstance(schema, dict):
        return schema
    strict = dict(schema)
    if isinstance(schema.get("properties"), dict):
        strict["properties"] = {name: to_strict(value) for name, value in schema["properties"].items()}
        # Combinators may name further arguments, so there the schema's own word stands.
        if not schema.keys() & {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "if", "$ref"}:
            strict["additionalProperties"] = False
    if "items" in schema:
        strict["items"] = to_strict(schema["items"])
    return strict


def describe(error) -> str:
    """Return a jsonschema ValidationError as `arguments.time.hour must be an integer, got "7"`."""
    path = "arguments" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
    got = f", got {shorten(error.instance)}"
    if error.validator == "type":
        types = [error.validator_value] if isinstance(error.validator_value, str) else error.validator_value
        return f"{path} must be {' or '.join(TYPE_NAMES.get(name, name) for name in types)}{got}"
    if error.validator == "enum":
        return f"{path} must be one of {', '.join(shorten(value) for value in error.validator_value)}{got}"
    if error.validator == "required":
        return f"{path}.{error.message.rsplit(' is a required', 1)[0][1:-1]} is missing"
    if error.validator == "additionalProperties" and error.validator_value is False:
        unknown = [name for name in error.instance if name not in error.schema.get("properties", {})]
        return f"{path}.{unknown[0]} is not an argument of this tool"
    return f"{path}: {error.message if len(error.message) < 200 else error.validator + ' is not met'}"


def check_tools(tools: object) -> tuple[dict, list[str]]:
    """Return ({tool name: validator of its arguments}, problems) for a list of tools in the OpenAI shape."""
    import jsonschema
    import referencing

    if not isinstance(tools, list):
        return {}, ["tools must be a list, got " + shorten(tools)]
    validators, problems = {}, []
    for index, tool in enumerate(tools, start=1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            problems.append(f'tool {index}: expected {{"type": "function", "function": {{"name": ...}}}}, got '
                            + shorten(tool))
            continue
        name, schema = function["name"], function.get("parameters") or {"type": "object", "properties": {}}
        if name in validators:
            problems.append(f'tool {index} "{name}": the name is taken by an earlier tool')
        if token := CONTROL_TOKEN.search(json.dumps(tool, ensure_ascii=False)):
            problems.append(f'tool {index} "{name}": holds the control token {token[0]}; remove it')
        try:
            jsonschema.Draft202012Validator.check_schema(schema)
        except jsonschema.SchemaError as error:
            path = ".".join(["parameters", *map(str, error.absolute_path)])
            problems.append(f'tool {index} "{name}": {path} is not valid JSON Schema: {error.message[:200]}')
        # An empty registry: a $ref to elsewhere is a problem, never a download.
        validators[name] = jsonschema.Draft202012Validator(to_strict(schema), registry=referencing.Registry())
    return validators, problems


def check_calls(messages: list[dict], validators: dict) -> list[str]:
    """Check every call of the conversation against the JSON Schema of its own tool."""
    import referencing.exceptions

    problems = []
    calls = [call["function"] for message in messages for call in message.get("tool_calls", [])]
    for index, call in enumerate(calls, start=1):
        name = f'call {index} "{call["name"]}"'
        if call["name"] not in validators:
            close = difflib.get_close_matches(call["name"], validators, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"tools: {', '.join(validators) or 'none'}"
            problems.append(f"{name}: the row has no such tool; {hint}")
            continue
        try:
            errors = sorted(validators[call["name"]].iter_errors(call["arguments"]), key=lambda error: error.json_path)
            problems += [f"{name}: {describe(error)}" for error in errors]
        except referencing.exceptions.Unresolvable as error:
            problems.append(f"{name}: its tool's schema refers to {error.ref}, which is not inside that schema")
    return problems


def to_examples(rows: list[tuple[str, object]], tools_path: str) -> tuple[list[Example], list[tuple[str, str]]]:
    """Convert and check every row; return (valid examples, (where, problem) pairs of the others)."""
    examples, problems, checked = [], [], {}
    default_tools = None
    for where, row in rows:
        try:
            messages = to_messages(row)
            tools = row.get("tools")
        except ValueError as error:
            problems.append((where, str(error)))
            continue
        if tools is None:
            default_tools = default_tools or read_tools(tools_path)
            tools = default_tools
        key = json.dumps(tools) if tools is not default_tools else ""
        if key not in checked:  # most rows share their tools: check each list once
            checked[key] = check_tools(tools)
        validators, found = checked[key]
        found = found + check_roles(messages) + check_text(messages) + check_calls(messages, validators)
        problems += [(where, problem) for problem in found]
        if not found:
            examples.append(Example(where, messages, tools))
    return examples, problems


def read_tools(path: str) -> list[dict]:
    """Return the tools of a JSON file; a file that holds no valid list of tools is a UserError."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        raise UserError(f'{path}: expected a JSON array of tools, [{{"type": "function", "function": {{...}}}}, ...]')
    pairs = list(read_array(path, text))
    tools = [tool for _, tool in pairs]
    problems = check_tools(tools)[1]
    located = [(pairs[int(re.match(r"tool (\d+)", problem)[1]) - 1][0], problem) for problem in problems]
    report_problems(located, "error", len(tools), "tools")
    return tools


def report_problems(problems: list[tuple[str, str]], on_invalid: str, total: int, noun: str = "rows") -> None:
    """Raise a UserError that lists the problems, or with on_invalid "skip" print every one as a warning."""
    if not problems:
        return
    rows = len({where for where, _ in problems})
    if on_invalid == "skip":
        for where, problem in problems:
            print(f"skipped: {where}: {problem}", file=sys.stderr)
        say("skip", f"{rows:,} of {total:,} {noun}, named above")
        return
    lines = [f"{where}: {problem}" for where, problem in problems[:SHOWN_PROBLEMS]]
    more = f", the first {SHOWN_PROBLEMS} above" if len(problems) > SHOWN_PROBLEMS else ""
    advice = "; mend them, or leave them out with --on_invalid skip" if noun == "rows" else ""
    raise UserError("\n".join([*lines, f"{len(problems):,} problems in {rows:,} of {total:,} {noun}{more}{advice}"]))


def split_examples(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Return (training examples, held-out examples), chosen by the hash of the prompt.

    The rows with the smallest hashes are held out. So their order in the file does not matter, one prompt is never on
    both sides, and rows appended later move few others across.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        first_answer = next(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
        prompt = json.dumps(example.messages[:first_answer], sort_keys=True)
        groups.setdefault(hashlib.sha256(prompt.encode()).hexdigest(), []).append(example)
    wanted, held_out = round(len(examples) * share), set()
    for key in sorted(groups):
        if len(groups[key]) <= wanted:
            held_out.add(key)
            wanted -= len(groups[key])
    by_side = ([], [])
    for key, group in groups.items():
        by_side[key in held_out].extend(group)
    return by_side


# ---------------------------------------------------------------------------------------------------------------
# 5  Render: example -> one Sequence per assistant turn, on the prompt that serving will send
# ---------------------------------------------------------------------------------------------------------------
def parse_calls(text: str) -> list[dict]:
    """Return the calls in an answer, extracted as the Hermes parser of inference servers does; ValueError if broken."""
    blocks = re.findall(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", text, re.DOTALL)
    return [json.loads(closed or unclosed) for closed, unclosed in blocks]


def render_turn(tokenizer, example: Example, turn: int) -> tuple[str, str]:
    """Return (prompt, answer) text of the assistant turn `example.messages[turn]`; ValueError if they do not fit.

    A template may render one turn differently in the middle of a conversation and at its end: Qwen3 drops the think
    block of a turn that a tool reply follows. So the prompt is what serving sends before the turn, and the answer is
    what the template adds when the turn is the last message.
    """
    turn_message = example.messages[turn]
    render = partial(tokenizer.apply_chat_template, tools=example.tools or None, tokenize=False)
    prompt = render(example.messages[:turn], add_generation_prompt=True,
                    enable_thinking="reasoning_content" in turn_message)
    full = render(example.messages[: turn + 1])
    if not full.startswith(prompt):
        raise ValueError(f"message {turn + 1}: the chat template does not render this answer after its serving prompt")
    end = full.rfind(tokenizer.eos_token)
    if end < len(prompt):
        raise ValueError(f"message {turn + 1}: the chat template does not end this answer with {tokenizer.eos_token}")
    answer = full[len(prompt) : end + len(tokenizer.eos_token)]
    expected = [call["function"] for call in turn_message.get("tool_calls", [])]
    if parse_calls(answer) != expected:
        raise ValueError(f"message {turn + 1}: its calls do not survive rendering and parsing: {shorten(answer)}")
    return prompt, answer


def render_examples(tokenizer, examples: list[Example], max_seq_length: int):
    """Return ([sequences of example 0, ...], problems); the sequences of an example with a problem are left out."""
    from rich.progress import track

    rendered, problems, bad = [], [], set()
    for index, example in enumerate(track(examples, "render", transient=True, disable=not sys.stdout.isatty())):
        turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        try:
            rendered += [(index, *render_turn(tokenizer, example, turn)) for turn in turns]
        except ValueError as error:
            problems.append((example.where, str(error)))
            bad.add(index)
    # Prompt and answer are encoded apart: the model is served the prompt's tokens and then writes its own.
    encode = partial(tokenizer, add_special_tokens=False, return_attention_mask=False)
    prompts = encode([prompt for _, prompt, _ in rendered])["input_ids"] if rendered else []
    answers = encode([answer for _, _, answer in rendered])["input_ids"] if rendered else []
    groups: list[list[Sequence]] = [[] for _ in examples]
    for (index, _, _), prompt, answer in zip(rendered, prompts, answers):
        if len(prompt) + len(answer) > max_seq_length:
            bad.add(index)
            problems.append((examples[index].where, f"{len(prompt) + len(answer):,} tokens; "
                             f"--max_seq_length is {max_seq_length:,} and no answer is ever cut"))
        groups[index].append(Sequence(examples[index].where, prompt + answer, len(prompt)))
    return [[] if index in bad else group for index, group in enumerate(groups)], problems


def show_row(tokenizer, sequence: Sequence) -> None:
    """Print a training row as the model sees it; ▶ ... ◀ (green on a terminal) marks what is supervised."""
    from rich.console import Console
    from rich.text import Text

    prompt = tokenizer.decode(sequence.input_ids[: sequence.prompt_length])
    answer = tokenizer.decode(sequence.input_ids[sequence.prompt_length :])
    if len(prompt) > 500:
        prompt = f"{prompt[:160]} … {len(prompt) - 460:,} characters … {prompt[-300:]}"
    text = Text(f"\n{sequence.where}  ({sequence.prompt_length:,} prompt tokens, "
                f"{len(sequence.input_ids) - sequence.prompt_length} supervised)\n", style="bold")
    Console(highlight=False, soft_wrap=True).print(text + Text(prompt, style="dim") + Text(f"▶{answer}◀", style="green"))


# ---------------------------------------------------------------------------------------------------------------
# 6  Batch: sequences -> one flat stream per micro-batch that holds every common prefix once
# ---------------------------------------------------------------------------------------------------------------
class Plan(NamedTuple):
    """How an optimizer step is computed: `accumulation` streams of `rows` rows, filled up to one of `lengths`."""

    rows: int
    accumulation: int
    lengths: tuple[int, ...] = ()
    share_prefix: bool = True


def to_tree(rows: list) -> list[tuple]:
    """Sort rows so that each shares with the one before it all it shares with any: [(row, shared tokens), ...].

    The last prompt token always belongs to its row alone, because its prediction (the answer's first token) does.
    """
    import numpy as np

    keys = [np.asarray(row.input_ids[: row.prompt_length - 1], dtype=">u4") for row in rows]
    order = sorted(range(len(rows)), key=lambda i: keys[i].tobytes())  # big-endian bytes sort as the tokens do
    tree, last = [], keys[0][:0]
    for i in order:
        length = min(len(keys[i]), len(last))
        differences = np.flatnonzero(keys[i][:length] != last[:length])
        tree.append((rows[i], int(differences[0]) if len(differences) else length))
        last = keys[i]
    return tree


def count_tokens(rows: list[Sequence]) -> int:
    """Return how many tokens the stream of these rows has."""
    return sum(len(row.input_ids) - shared for row, shared in to_tree(rows))


def build_stream(rows: list[Sequence], lengths: tuple[int, ...] = ()) -> dict:
    """Lay rows out as one sequence in which a prefix that several rows share stands once.

    The rows form a tree of tokens, written in depth-first order: a token's descendants are the tokens after it up to
    its `subtree_end`. A token attends to its ancestors, which are all tokens k with k <= q < subtree_end[k]; so it sees
    its own row from the start and nothing of any other, and loss and gradient are those of the rows one by one.

    Args:
        rows: sequences in any order.
        lengths: the stream is filled to the first of these lengths that holds it, with tokens that see only themselves.
    Returns: int64 tensors of shape [1, tokens]: input_ids, position_ids, labels (-100: not supervised), subtree_end.
    """
    import numpy as np
    import torch

    columns = {"input_ids": [], "position_ids": [], "labels": []}
    subtree_end = np.zeros(sum(len(row.input_ids) for row in rows) + max(lengths, default=0), dtype=np.int64)
    path, size = np.zeros(0, dtype=np.int64), 0  # path: where the tokens of the row before stand in the stream
    for row, shared in to_tree(rows):
        subtree_end[path[shared:]] = size
        tokens = np.asarray(row.input_ids, dtype=np.int64)
        labels = np.where(np.arange(len(tokens)) < row.prompt_length, -100, tokens)
        for name, values in zip(columns, (tokens, np.arange(len(tokens)), labels)):
            columns[name].append(values[shared:])
        path = np.concatenate([path[:shared], np.arange(size, size + len(tokens) - shared)])
        size += len(tokens) - shared
    subtree_end[path] = size
    fill = next((length for length in lengths if length >= size), size) - size
    subtree_end[size : size + fill] = np.arange(size + 1, size + fill + 1)
    stream = {name: np.concatenate(parts + [np.full(fill, -100 if name == "labels" else 0)])
              for name, parts in columns.items()}
    stream["subtree_end"] = subtree_end[: size + fill]
    return {name: torch.from_numpy(values.astype(np.int64))[None] for name, values in stream.items()}


def build_padded(rows: list[Sequence]) -> dict:
    """Return the rows as an ordinary batch, padded on the right: int64 [rows, longest]; for --no-share_prefix."""
    import torch

    shape = len(rows), max(len(row.input_ids) for row in rows)
    padded = {"input_ids": torch.zeros(shape, dtype=torch.int64), "labels": torch.full(shape, -100),
              "attention_mask": torch.zeros(shape, dtype=torch.int64)}
    for i, row in enumerate(rows):
        tokens = torch.as_tensor(row.input_ids)
        padded["input_ids"][i, : len(tokens)] = tokens
        padded["labels"][i, row.prompt_length : len(tokens)] = tokens[row.prompt_length :]
        padded["attention_mask"][i, : len(tokens)] = 1
    return padded


def build_batch(rows: list[Sequence], plan: Plan) -> dict:
    """Return the tensors of one micro-batch as the plan says."""
    return build_stream(rows, plan.lengths) if plan.share_prefix else build_padded(rows)


def group_rows(sequences: list[Sequence]) -> list[list[list[int]]]:
    """Return indices of sequences: groups (the same tools) of conversations (the same row of the file) of turns.

    Rows whose prompts share at least half of their tokens are of one group.
    """
    tree = to_tree([*sequences])
    index_of = {id(sequence): i for i, sequence in enumerate(sequences)}
    groups: list[dict[str, list[int]]] = []
    for sequence, shared in tree:
        if not groups or shared < sequence.prompt_length / 2:
            groups.append({})
        groups[-1].setdefault(sequence.where, []).append(index_of[id(sequence)])
    return [list(group.values()) for group in groups]


def order_rows(groups: list[list[list[int]]], piece: int, seed: int, epoch: int) -> list[int]:
    """Return the order of the rows in one epoch: random, yet with rows of the same tools in runs of about `piece`.

    With one list of tools this is a plain shuffle. With many, rows that can share their prefix meet in a stream, and a
    stream still mixes several lists. The same seed and epoch give the same order, so a resumed run goes on as planned.
    """
    generator = random.Random(f"{seed} {epoch}")
    pieces = []
    for group in groups:
        conversations = generator.sample(group, len(group))
        rows = [row for conversation in conversations for row in conversation]
        pieces += [rows[i : i + piece] for i in range(0, len(rows), piece)]
    generator.shuffle(pieces)
    return [row for rows in pieces for row in rows]


def piece_size(rows: int) -> int:
    """Return how many rows of the same tools stand together in a stream of `rows`: half, so that it mixes two lists."""
    return max(1, rows // 2)


def first_rows(train: list[Sequence], args: argparse.Namespace, plan: Plan, count: int) -> list[Sequence]:
    """Return the rows that the run will compute first."""
    order = order_rows(group_rows(train), piece_size(plan.rows), args.seed, epoch=0)
    return [train[i] for i in order[:count]]


def plan_streams(sequences: list[Sequence], args: argparse.Namespace, engine: str) -> Plan:
    """Fuse accumulation steps into one stream as far as the flags' memory allows, for every stream of the run.

    A stream may hold batch_size x max_seq_length tokens: what the flags allow a padded batch to hold.
    """
    batch_size, steps = args.batch_size, args.gradient_accumulation_steps
    if not args.share_prefix:
        return Plan(batch_size, steps, share_prefix=False)
    groups = group_rows(sequences)
    for fused in range(steps, 0, -1):
        if steps % fused == 0:
            rows, sizes = batch_size * fused, []
            for epoch in range(args.num_epochs):
                order = order_rows(groups, piece_size(rows), args.seed, epoch)
                sizes += [count_tokens([sequences[i] for i in order[j : j + rows]]) for j in range(0, len(order), rows)]
            if fused == 1 or max(sizes) <= batch_size * args.max_seq_length:
                return Plan(rows, steps // fused, choose_lengths(sizes) if engine == "unsloth" else ())


def choose_lengths(sizes: list[int]) -> tuple[int, ...]:
    """Return the few lengths that streams are filled up to, because attention is compiled anew for each length.

    Quartiles, rounded up to the kernel's 128; a length less than a quarter below the next is not worth compiling.
    """
    sizes = sorted(sizes)
    quartiles = {-(-sizes[(len(sizes) - 1) * quarter // 4] // 128) * 128 for quarter in (1, 2, 3, 4)}
    lengths: list[int] = []
    for length in sorted(quartiles, reverse=True):
        if not lengths or length <= 0.75 * lengths[-1]:
            lengths.append(length)
    return tuple(reversed(lengths))


def to_batches(sequences: list[Sequence], plan: Plan) -> list[dict]:
    """Return sequences for scoring, where order does not matter: sorted, so that neighbours share the most."""
    ordered = [sequence for sequence, _ in to_tree(sequences)]
    return [build_batch(ordered[i : i + plan.rows], plan) for i in range(0, len(ordered), plan.rows)]


# ---------------------------------------------------------------------------------------------------------------
# 7  Model: model id -> model with LoRA, by Unsloth or by Transformers + PEFT; only this section knows the engine
# ---------------------------------------------------------------------------------------------------------------
def start_engine(args: argparse.Namespace) -> str:
    """Import the engine and return its name; Unsloth patches trl, transformers and peft, so it must come first."""
    import torch

    engine = args.engine if args.engine != "auto" else "unsloth" if torch.cuda.is_available() else "transformers"
    if engine == "unsloth":
        if not torch.cuda.is_available():
            raise UserError("--engine unsloth needs a CUDA GPU, and torch sees none; use --engine transformers")
        late = sorted({"trl", "transformers", "peft"} & sys.modules.keys())
        if late and "unsloth" not in sys.modules:
            raise RuntimeError(f"Unsloth must be imported before {', '.join(late)}: it patches them")
        # Its generated trainers belong with the run, not into the folder the user happens to stand in.
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(args.output_dir).resolve() / "unsloth_compiled"))
        if args.share_prefix:
            os.environ.setdefault("UNSLOTH_BLOCK_COMPILE", "0")  # compiled blocks serve padded batches, for ten seconds
            os.environ.setdefault("UNSLOTH_LOGPROB_CHUNK_GB", "0.0625")  # scratch for logits and for cuBLAS: with
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # 0.3 GB more they are no faster
        import unsloth  # noqa: F401
    import transformers

    quiet_libraries()
    transformers.set_seed(args.seed)
    return engine


def quiet_libraries() -> None:
    """Keep the libraries' advice off the screen: errors still show."""
    import logging
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("bitsandbytes", "datasets", "peft", "trl", "torch.utils._pytree", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def check_model(model_id: str, flag: str = "--model_id"):
    """Return the config of a causal language model; whatever is wrong with the id becomes one line that says so."""
    from transformers import AutoConfig

    folder = Path(model_id).expanduser()
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise UserError(f"{flag} {model_id}: the folder holds no *.safetensors; give a folder saved by save_pretrained")
    try:
        config = AutoConfig.from_pretrained(model_id)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{flag} {model_id}: {explain_hub_error(str(error), folder)}") from None
    names = config.architectures or []
    if not any(name.endswith("ForCausalLM") for name in names):
        raise UserError(f"{flag} {model_id}: not a causal language model ({', '.join(names) or config.model_type})")
    return config


def explain_hub_error(message: str, folder: Path) -> str:
    """Return what a user can do about a model that could not be loaded."""
    text = message.lower()
    if folder.is_dir():
        return f"not a model folder: {message.splitlines()[0]}"
    if "gated" in text or "401" in text or "403" in text:
        return "gated or private; accept its terms on the Hub, then run `hf auth login`"
    if "connect" in text or "offline" in text or "cached" in text or "resolve" in text:
        return "no such folder, not in the cache, and the Hub cannot be reached; check the network, or give a folder"
    return "no such folder and no such model on the Hub; check the spelling"


def load_tokenizer(model_id: str):
    """Return the base model's own tokenizer; a base without a chat template is a UserError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model_id {model_id}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
    if not tokenizer.chat_template:
        raise UserError(f"--model_id {model_id}: has no chat template; use a chat model such as {MODEL_ID}")
    return tokenizer


def to_dtype(device: str):
    """Return the compute type of a device: bf16 where a GPU has it, fp16 on older ones, fp32 on CPU."""
    import torch

    if device != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def use_checkpointing(args: argparse.Namespace) -> bool:
    """Return whether activations are computed twice instead of kept: less memory, a third more time."""
    import torch

    return torch.cuda.is_available() if args.gradient_checkpointing == "auto" else args.gradient_checkpointing == "on"


def to_attention_mask(subtree_end):
    """Return which keys a query sees, as bool [1, 1, queries, keys], from subtree_end [tokens]."""
    import torch

    index = torch.arange(len(subtree_end), device=subtree_end.device)
    return ((index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :]))[None, None]


def to_key_blocks(attention_mask) -> list[list[int]]:
    """Return for each block of queries the blocks of keys of which it sees anything, from a mask [1, 1, tokens, tokens]."""
    import torch

    size, length = block_size(attention_mask), attention_mask.shape[-1]
    blocks, fill = -(-length // size), -length % size
    padded = torch.nn.functional.pad(attention_mask[0, 0], (0, fill, 0, fill))
    return [row.nonzero()[:, 0].tolist() for row in padded.view(blocks, size, blocks, size).any(dim=3).any(dim=1).cpu()]


def block_size(tensor) -> int:
    """Return how many tokens a block of attention has: few on CPU, to skip much; many on a GPU, to launch little."""
    return 128 if tensor.device.type == "cpu" else 1024


def attend_in_blocks(module, query, key, value, attention_mask, scaling=None, key_blocks=None, **kwargs):
    """Return PyTorch's attention [1, tokens, heads, head_dim] without the blocks in which nothing is seen.

    A stream of many rows is mostly such blocks. Without `key_blocks` this is the attention of Transformers' "sdpa".
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if key_blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    size, outputs = block_size(query), []
    keys, values = key.split(size, dim=2), value.split(size, dim=2)
    for queries, mask, blocks in zip(query.split(size, dim=2), attention_mask.split(size, dim=2), key_blocks):
        masks = mask.split(size, dim=3)
        outputs.append(torch.nn.functional.scaled_dot_product_attention(
            queries, torch.cat([keys[block] for block in blocks], dim=2),
            torch.cat([values[block] for block in blocks], dim=2), torch.cat([masks[block] for block in blocks], dim=3),
            scale=scaling, enable_gqa=query.shape[1] != key.shape[1]))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def load_model(args: argparse.Namespace, engine: str, plan: Plan):
    """Return the base model, in 4 bits if asked, with fresh LoRA adapters on all seven projections."""
    lora = dict(r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, bias="none",
                target_modules=TARGET_MODULES)
    import torch

    if engine == "unsloth":
        from torch.nn.attention.flex_attention import flex_attention
        from trl.trainer.utils import add_fused_lm_head
        from unsloth import FastLanguageModel
        from unsloth.utils import prefix_grouper_kernel

        model, _ = FastLanguageModel.from_pretrained(
            args.model_id, max_seq_length=args.max_seq_length, load_in_4bit=args.load_in_4bit, dtype=None)
        model = FastLanguageModel.get_peft_model(
            model, **lora, random_state=args.seed,
            use_gradient_checkpointing="unsloth" if use_checkpointing(args) else False)
        add_fused_lm_head(model.get_base_model())
        # Streams have few lengths, so attention compiled for exactly these is worth it: half the time of "any length".
        prefix_grouper_kernel._flex_attention_compiled = torch.compile(flex_attention, dynamic=False)
        # A recorded gradient lies where the next one will be written, so there must be one stream per step.
        read_streams(model, record=args.cuda_graphs and plan.accumulation == 1 and not args.lora_dropout)
        return model

    from peft import LoraConfig, get_peft_model
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.masking_utils import sdpa_mask

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = to_dtype(device)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=dtype)
    AttentionInterface.register("blocks", attend_in_blocks)
    AttentionMaskInterface.register("blocks", sdpa_mask)
    model = AutoModelForCausalLM.from_pretrained(
        args.model_id, dtype=dtype, attn_implementation="blocks", device_map=device,
        quantization_config=four_bit if args.load_in_4bit else None)
    model.config.use_cache = False
    for module in model.modules():
        # On CPU, the first inference makes bitsandbytes repack 4-bit weights for bf16, in training from then on too.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))


def to_prefix_seg_info(subtree_end):
    """Return the object by which Unsloth's attention finds the block mask of this stream in its cache.

    Unsloth's FlexAttention kernel shares one prefix per group (unsloth/utils/prefix_grouper_kernel.py). The tree is
    more general and its mask simpler, so the mask is made here and put where the kernel looks first.
    """
    from types import SimpleNamespace

    from unsloth.utils import prefix_grouper_kernel as kernel

    def sees(batch, head, query, key):
        return (key <= query) & (query < subtree_end[key])

    length = len(subtree_end)
    seg_info = SimpleNamespace(signature=object(), T=length, T_pad=length)
    kernel.clear_block_mask_cache()  # one stream at a time
    kernel._BLOCK_MASK_CACHE[(seg_info.signature, str(subtree_end.device))] = kernel._create_block_mask_compiled(
        sees, B=1, H=None, Q_LEN=length, KV_LEN=length, device=subtree_end.device)
    return seg_info


def read_streams(model, record: bool) -> None:
    """Make Unsloth's decoder take streams (`subtree_end`), and replay them as CUDA graphs where that pays.

    The step of a small model is bound by the launch of its 6,000 kernels, not by their work. With `record`, forward and
    backward of each stream length are recorded when it first comes in training, and from then on replayed by two
    launches. Layers are then checkpointed without Unsloth's copies to the CPU, which a graph cannot hold; long streams,
    whose checkpoints would take much memory and which keep the GPU busy anyway, are left to those.
    """
    import torch.utils.checkpoint
    from transformers.modeling_outputs import BaseModelOutputWithPast

    decoder = model.get_base_model().model
    eager, graphs, pool = decoder.forward, {}, torch.cuda.graph_pool_handle()

    class Stream(torch.nn.Module):
        def __init__(self, length: int):
            super().__init__()
            self.decoder, self.packed_seq_lengths = decoder, torch.tensor([length])

        def forward(self, input_ids, position_ids, subtree_end):
            # Given packed_seq_lengths, Unsloth need not wait for the GPU to find them, which a graph cannot.
            return eager(input_ids=input_ids, position_ids=position_ids, packed_seq_lengths=self.packed_seq_lengths,
                         prefix_seg_info=to_prefix_seg_info(subtree_end)).last_hidden_state

    def to_graph(*tensors):
        checkpoint = getattr(torch.utils.checkpoint, "_old_checkpoint", torch.utils.checkpoint.checkpoint)
        unsloth_checkpoint = getattr(decoder.layers[0], "_gradient_checkpointing_func", None)
        torch.cuda.empty_cache()
        try:
            for layer in decoder.layers:
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False):
                return torch.cuda.make_graphed_callables(
                    Stream(len(tensors[-1])), tuple(t.clone() for t in tensors), num_warmup_iters=1, pool=pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # which leaves CUDA's allocator in a state not to be trusted
            raise UserError(f"the step cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}); "
                            "run again with --no-cuda_graphs, slower") from None
        finally:
            for layer in decoder.layers:
                layer._gradient_checkpointing_func = unsloth_checkpoint

    def forward(*inputs, subtree_end=None, **kwargs):
        if subtree_end is None:
            return eager(*inputs, **kwargs)
        length, tensors = len(subtree_end), (kwargs["input_ids"], kwargs["position_ids"], subtree_end)
        stream, held = Stream(length), 2 * length * decoder.config.hidden_size * len(decoder.layers)
        if record and decoder.training and torch.is_grad_enabled() and held <= RECORDED_BYTES:
            graphs[length] = stream = graphs.get(length) or to_graph(*tensors)
        return BaseModelOutputWithPast(last_hidden_state=stream(*tensors))

    decoder.forward = forward


def compute_token_losses(model, batch: dict, engine: str):
    """Return the loss in nats of each supervised token of a batch, fp32 [supervised tokens], with its gradient.

    In a stream, attention is limited to each token's ancestors. The vocabulary projection, the largest of all
    multiplications, is computed only where a token is supervised.
    """
    import torch

    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "subtree_end")}
    labels = batch["labels"][:, 1:]
    supervised = labels != -100
    if engine == "unsloth":  # TRL's head: a Triton kernel that never holds all logits
        if "subtree_end" in batch:
            inputs["subtree_end"] = batch["subtree_end"][0]
        outputs = model(**inputs, labels=batch["labels"], fused_lm_head=True)
        return -outputs.log_probs[supervised].float()
    if "subtree_end" in batch:
        inputs["attention_mask"] = to_attention_mask(batch["subtree_end"][0])
        inputs["key_blocks"] = to_key_blocks(inputs["attention_mask"])
    columns = supervised.any(dim=0).nonzero()[:, 0]
    logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits[supervised[:, columns]]
    return torch.nn.functional.cross_entropy(logits.float(), labels[supervised], reduction="none")


def generate_answers(model, tokenizer, sequences: list[Sequence], engine: str) -> list[str]:
    """Return the model's greedy answer to the prompt of each sequence."""
    import torch

    if engine == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    prompts = [sequence.input_ids[: sequence.prompt_length] for sequence in sequences]
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False,
                                temperature=None, top_p=None, top_k=None, use_cache=True, pad_token_id=pad,
                                eos_token_id=tokenizer.eos_token_id)
    model.train(was_training)
    if engine == "unsloth":
        FastLanguageModel.for_training(model)
    return [tokenizer.decode(row[longest:]).split(tokenizer.eos_token)[0].replace(tokenizer.pad_token or "", "")
            for row in output]


# ---------------------------------------------------------------------------------------------------------------
# 8  Train: SFTTrainer over the streams
# ---------------------------------------------------------------------------------------------------------------
def autocast(model):
    """Return the mixed-precision context that the trainer uses too."""
    import torch

    dtype = to_dtype(model.device.type)
    return torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)


def score_loss(model, batches, engine: str) -> float:
    """Return the mean loss over all supervised tokens of the batches, in nats per token."""
    import torch

    total, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.no_grad(), autocast(model):
            losses = compute_token_losses(model, batch, engine)
        total += losses.double().sum().item()
        tokens += len(losses)
    model.train(was_training)
    return total / tokens


def free_gpu() -> None:
    """Give the GPU memory of models that are no longer held back to the driver, for the next process."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compute_gradient(model, batches: list[dict], engine: str):
    """Return (loss summed over the supervised tokens, its gradient as one fp32 vector on the CPU) of the batches."""
    import torch

    parameters, total = [parameter for parameter in model.parameters() if parameter.requires_grad], 0.0
    model.zero_grad()
    for batch in batches:
        with autocast(model):
            loss = compute_token_losses(model, {n: tensor.to(model.device) for n, tensor in batch.items()}, engine).sum()
        loss.backward()
        total += loss.item()
    gradient = torch.cat([parameter.grad.float().flatten().cpu() for parameter in parameters])
    model.zero_grad()
    return total, gradient


def compare_sharing(model, rows: list[Sequence], lengths: tuple[int, ...], engine: str) -> tuple[float, float, float]:
    """Return (relative difference of the loss, of the gradient, limit) between rows in one stream and by themselves.

    By themselves: as ordinary padded batches through the model's own causal attention, with nothing of the stream.
    The limit on the gradient is 1e-4 in fp32 and 2 % in bf16. Where bf16 is coarser than that, as on losses near zero,
    it is twice what two other ways to compute the rows differ by: padded, and in a stream for each row.
    """
    import torch

    def difference(one, other):
        return ((one[1] - other[1]).norm() / other[1].norm()).item()

    was_training = model.training
    model.train()
    shared = compute_gradient(model, [build_stream(rows, lengths)], engine)
    single = compute_gradient(model, [build_padded(rows[i : i + 2]) for i in range(0, len(rows), 2)], engine)
    gradient, limit = difference(shared, single), 1e-4 if to_dtype(model.device.type) == torch.float32 else 2e-2
    if gradient > limit == 2e-2:
        alone = compute_gradient(model, [build_stream([row], lengths) for row in rows], engine)
        limit = max(limit, min(0.2, 2 * difference(alone, single)))
    model.train(was_training)
    return abs(shared[0] - single[0]) / abs(single[0]), gradient, limit


def check_sharing(args: argparse.Namespace, model, train: list[Sequence], plan: Plan, engine: str) -> bool:
    """Compute the first rows of the run shared and by themselves; print how they differ, return whether by rounding."""
    start = time.perf_counter()
    rows = first_rows(train, args, plan, CHECKED_ROWS)
    loss, gradient, limit = compare_sharing(model, rows, plan.lengths, engine)
    free_gpu()
    if gradient <= limit:
        say("check", f"sharing changes the loss of {len(rows)} rows by {loss:.1e} and their gradient by {gradient:.1e} "
                     f"of its norm: rounding ({time.perf_counter() - start:.1f} s)")
        return True
    print(f"warning: sharing the prefix changes the loss by {loss:.1e} and the gradient by {gradient:.1e} of its norm, "
          f"more than rounding ({limit:.0e}): sharing is switched off", file=sys.stderr)
    return False


def build_progress():
    """Return a TrainerCallback that draws a progress bar and prints about twenty losses and every held-out loss."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import TrainerCallback

    class ProgressBar(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            columns = ("train    ", BarColumn(), MofNCompleteColumn(), "steps", TextColumn("{task.fields[loss]}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), transient=True, disable=not sys.stdout.isatty())
            self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, loss="")
            self.bar.start()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                step, text = state.global_step, f"loss {float(logs['loss']):.4f}"
                self.bar.update(self.task, completed=step, loss=text)
                if step == 1 or step % max(1, state.max_steps // 20) == 0 or step == state.max_steps:
                    say("", f"step {step:>5,} of {state.max_steps:,}  {text}")

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            say("", f"step {state.global_step:>5,} of {state.max_steps:,}  epoch {state.epoch:.3g}: "
                    f"held-out loss {metrics['eval_loss']:.4f}")

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.stop()

    return ProgressBar()


def build_trainer(args: argparse.Namespace, engine: str, model, tokenizer, train, held_out, plan: Plan):
    """Return TRL's SFTTrainer over the pre-tokenised sequences, batched as planned.

    The rows go in as token ids: TRL would otherwise render and truncate them in its own way, and Unsloth's replacement
    of that step rejects conversations. The dataset holds indices; the collator looks the sequences up.
    """
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    groups, held_out = group_rows(train), [sequence for sequence, _ in to_tree(held_out)] if held_out else []

    class RowOrder(torch.utils.data.Sampler):
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __len__(self):
            return len(train)

        def __iter__(self):
            return iter(order_rows(groups, piece_size(plan.rows), args.seed, self.epoch))

    class StreamTrainer(SFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return RowOrder()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """Return the micro-batch's share of the mean over all supervised tokens of the optimizer step."""
            return compute_token_losses(model, inputs, engine).sum() / num_items_in_batch

        def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
            """Return the held-out loss as a mean over tokens; the library's is a mean over batches."""
            from transformers.trainer_utils import EvalLoopOutput

            metrics = {f"{metric_key_prefix}_loss": score_loss(self.model, dataloader, engine)}
            return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.dataset))

    def to_dataset(sequences, offset):
        return Dataset.from_dict({"index": range(offset, offset + len(sequences))}) if sequences else None

    def collate(rows):
        return build_batch([both[row["index"]] for row in rows], plan)

    # As arrays: lists would be turned into arrays anew in every step.
    both = [sequence._replace(input_ids=np.asarray(sequence.input_ids)) for sequence in (*train, *held_out)]
    cuda, dtype = model.device.type == "cuda", to_dtype(model.device.type)
    config = SFTConfig(
        output_dir=args.output_dir, per_device_train_batch_size=plan.rows, per_device_eval_batch_size=plan.rows,
        gradient_accumulation_steps=plan.accumulation, num_train_epochs=args.num_epochs, max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate, lr_scheduler_type=args.lr_scheduler_type, warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay, optim=args.optim or ("adamw_8bit" if cuda else "adamw_torch"), seed=args.seed,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16,
        gradient_checkpointing=use_checkpointing(args), logging_steps=1, save_strategy="epoch", report_to=args.report_to,
        eval_strategy="epoch" if held_out else "no", disable_tqdm=True, dataloader_pin_memory=cuda, use_cpu=not cuda,
        max_length=None, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = StreamTrainer(
        model=model, args=config, processing_class=tokenizer, data_collator=collate,
        train_dataset=to_dataset(train, 0), eval_dataset=to_dataset(held_out, len(train)))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(build_progress())
    # TRL makes the adapter of a 4-bit base bf16, in which late, small updates round to nothing.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if engine == "unsloth":  # the trainer would turn checkpointing on only in train(), after the self-check
        trainer.model.for_training(use_gradient_checkpointing=use_checkpointing(args))
    return trainer


def find_checkpoint(args: argparse.Namespace) -> str | None:
    """Return the checkpoint folder to resume from, or None; one that is not there is a UserError."""
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint != "newest":
        path = Path(args.resume_from_checkpoint)
        if not (path / "trainer_state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {path}: not a checkpoint; expected a folder checkpoint-N")
        return str(path)
    found = sorted(Path(args.output_dir).glob("checkpoint-*/trainer_state.json"),
                   key=lambda file: int(file.parent.name.split("-")[1]))
    if not found:
        raise UserError(f"--resume_from_checkpoint: {args.output_dir} holds no checkpoint; leave the flag out to start")
    return str(found[-1].parent)


def report_gpu(stage: str, seconds: float | None = None) -> None:
    """Print the GPU's name and memory use; on CPU print nothing."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        peak = torch.cuda.max_memory_reserved() / 2**30
        say(stage, f"{torch.cuda.get_device_name(0)}, {total:.1f} GiB; {peak:.2f} GiB reserved at peak "
                   f"({peak / total:.1%} of the card)")


# ---------------------------------------------------------------------------------------------------------------
# 9  Save: adapter, then the merged 16-bit model, read back and checked by a fresh process
# ---------------------------------------------------------------------------------------------------------------
def check_folder(path: str, flag: str) -> None:
    """Refuse a folder that holds anything and was not written by this script."""
    folder, marker = Path(path), Path(path) / "run.yaml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {path}: is a file; expected a folder")
    ours = marker.is_file() and marker.read_text(encoding="utf-8", errors="replace").startswith(WRITTEN_BY)
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise UserError(f"{flag} {path}: holds files that this script did not write; choose another folder or empty it")


def check_disk(args: argparse.Namespace, config) -> None:
    """Refuse to start when the merged model would not fit beside what is on the disk."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    needed = 2 * parameters
    folder = Path(args.final_model_dir).resolve()
    parent = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"--final_model_dir {args.final_model_dir}: the merged model needs {needed / 1e9:.1f} GB and the "
                        f"disk has {free / 1e9:.1f} GB free; free some space or choose another disk")


def check_merge_base(args: argparse.Namespace, config) -> str:
    """Return the id of the 16-bit model that the adapter will be merged into, settled before training."""
    if getattr(config, "quantization_config", None) is None:
        return args.merge_model_id or args.model_id
    if args.merge_model_id is None:
        raise UserError(f"--model_id {args.model_id}: is already quantised, and a merge needs the 16-bit weights; "
                        "name the original with --merge_model_id")
    return args.merge_model_id


def check_same_shape(config, merge_model_id: str) -> None:
    """Refuse a merge base whose layers are not those of the model that is trained."""
    other = check_model(merge_model_id, "--merge_model_id")
    if getattr(other, "quantization_config", None) is not None:
        raise UserError(f"--merge_model_id {merge_model_id}: is quantised too; expected the 16-bit original")
    for name in ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"):
        if getattr(config, name, None) != getattr(other, name, None):
            raise UserError(f"--merge_model_id {merge_model_id}: {name} is {getattr(other, name, None)}, "
                            f"and {getattr(config, name, None)} in --model_id; expected the same model in 16 bits")


def write_run(args: argparse.Namespace, folder: str | Path) -> None:
    """Write the resolved settings to `folder`/run.yaml, whose first line marks the folder as this script's."""
    import yaml

    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "run.yaml").write_text(WRITTEN_BY + yaml.safe_dump(vars(args), sort_keys=False), encoding="utf-8")


def partial_folder(final: str) -> Path:
    """Return where a folder is written before it is renamed to its final name."""
    return Path(final).with_name(f".{Path(final).name}.partial")


def put_in_place(final: str) -> None:
    """Give a finished partial folder its final name; what was there is removed only after that."""
    final_folder, old = Path(final), Path(final).with_name(f".{Path(final).name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final_folder.exists():
        final_folder.rename(old)
    partial_folder(final).rename(final_folder)
    shutil.rmtree(old, ignore_errors=True)


def save_adapter(model, output_dir: str) -> str:
    """Save the LoRA weights to `output_dir`/adapter and return that path."""
    adapter = str(Path(output_dir) / "adapter")
    shutil.rmtree(partial_folder(adapter), ignore_errors=True)
    model.save_pretrained(partial_folder(adapter))
    put_in_place(adapter)
    return adapter


def merge_adapter(args: argparse.Namespace, base_id: str, adapter: str, sequences: list[Sequence], shown: list[Sequence],
                  plan: Plan) -> dict:
    """Merge the adapter into the 16-bit base, save it, read it back and score it; runs in a fresh process.

    A fresh process, because Unsloth changes Transformers' classes for good, and the model must work where no Unsloth
    is: with plain AutoModelForCausalLM. Returns the loss on `sequences` and the answers to `shown`, for the caller to compare.
    """
    quiet_libraries()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = partial_folder(args.final_model_dir)
    shutil.rmtree(folder, ignore_errors=True)
    base = AutoModelForCausalLM.from_pretrained(base_id, dtype="auto", device_map=device)
    sums = {name: parameter.double().sum().item() for name, parameter in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    if all(sums[name] == parameter.double().sum().item() for name, parameter in merged.named_parameters()):
        raise UserError("the merged model equals the base: training changed nothing that 16-bit weights can hold")
    merged.config.use_cache = True  # off during training only
    merged.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(args.model_id)
    tokenizer.save_pretrained(folder)
    write_run(args, folder)
    del base, merged

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=to_dtype(device), device_map=device,
                                                       output_loading_info=True)
    strays = [*info["missing_keys"], *info["unexpected_keys"], *(n for n, _ in model.named_parameters() if "lora" in n)]
    if strays:
        raise UserError(f"{folder}: missing or unknown weights: {', '.join(sorted(strays)[:5])}")
    if bad := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        raise UserError(f"{folder}: weights that are not finite: {', '.join(bad[:5])}")
    return {"loss": score_loss(model, to_batches(sequences, plan), "transformers"),
            "answers": generate_answers(model, tokenizer, shown, "transformers")}


def run_fresh(function, *arguments):
    """Return function(*arguments), computed in a new Python process."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UserError("the process that merges was killed; it needs memory for the whole 16-bit model") from None


def check_merged(args: argparse.Namespace, adapter: str, expected: dict, got: dict) -> None:
    """Compare the merged model read back with the adapter it came from; a mismatch is a UserError.

    After 16-bit training both are the same model and must answer alike. After 4-bit training the merged model stands on
    the unquantised base, which is a little different and as a rule better, so its held-out loss decides.
    """
    if args.load_in_4bit:
        wrong = got["loss"] > expected["loss"] + max(0.02 * expected["loss"], MERGE_SLACK)
    else:
        wrong = got["answers"] != expected["answers"]
    if wrong or not math.isfinite(got["loss"]):
        shutil.rmtree(partial_folder(args.final_model_dir), ignore_errors=True)
        raise UserError(f"the merged model does not do what the adapter does: held-out loss {got['loss']:.4f}, adapter "
                        f"{expected['loss']:.4f}; answers {shorten(got['answers'])}, adapter "
                        f"{shorten(expected['answers'])}; nothing was written to {args.final_model_dir}, the adapter is "
                        f"safe in {adapter}")


# ---------------------------------------------------------------------------------------------------------------
# 10  Report: what a person sees at the end
# ---------------------------------------------------------------------------------------------------------------
def show_answers(tokenizer, sequences: list[Sequence], before: list[str], after: list[str]) -> None:
    """Print request, expected answer, and the model's answer before and after training."""
    for sequence, old, new in zip(sequences, before, after):
        prompt = tokenizer.decode(sequence.input_ids[: sequence.prompt_length])
        request = prompt.rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>")[0]
        expected = tokenizer.decode(sequence.input_ids[sequence.prompt_length :]).split(tokenizer.eos_token)[0]
        print(f"\n{sequence.where}  {request}")
        for name, text in (("expected", expected), ("before", old), ("after", new)):
            mark = "" if name == "expected" else " ✓" if text.strip() == expected.strip() else " ✗"
            print(f"  {name:<9}{' '.join(text.split())[:200]}{mark}")
    print()


# ---------------------------------------------------------------------------------------------------------------
# The run, one stage after the other
# ---------------------------------------------------------------------------------------------------------------
def read_examples(args: argparse.Namespace) -> list[Example]:
    """Return the valid examples of the dataset; problems end the run or are skipped, as --on_invalid says."""
    start = time.perf_counter()
    rows = read_rows(args.dataset_path, args.max_samples)
    examples, problems = to_examples(rows, args.tools_path)
    report_problems(problems, args.on_invalid, len(rows))
    if not examples:
        raise UserError(f"{args.dataset_path}: no valid row is left")
    calls = sum(bool(message.get("tool_calls")) for example in examples for message in example.messages)
    say("read", f"{len(examples):,} valid rows, {calls:,} turns that call, from {args.dataset_path} "
                f"({time.perf_counter() - start:.1f} s)")
    return examples


def render_all(args: argparse.Namespace, tokenizer, examples: list[Example]) -> tuple[list[Sequence], list[Sequence]]:
    """Return the training and held-out sequences of the valid examples."""
    start = time.perf_counter()
    groups, problems = render_examples(tokenizer, examples, args.max_seq_length)
    report_problems(problems, args.on_invalid, len(examples))
    sequences = {id(example): group for example, group in zip(examples, groups) if group}
    sides = split_examples([example for example in examples if id(example) in sequences], args.train_test_split)
    train, held_out = ([sequence for example in side for sequence in sequences[id(example)]] for side in sides)
    if not train:
        raise UserError(f"{args.dataset_path}: no row is left to train on; lower --train_test_split or add rows")
    tokens = [len(sequence.input_ids) for sequence in train]
    say("render", f"{len(train):,} training and {len(held_out):,} held-out sequences of {sum(tokens) // len(tokens):,} "
                  f"tokens on average, {max(tokens):,} at most ({time.perf_counter() - start:.1f} s)")
    return train, held_out


def show_plan(train: list[Sequence], args: argparse.Namespace, plan: Plan) -> None:
    """Print how many tokens the first step computes, beside what padded batches would."""
    step = first_rows(train, args, plan, plan.rows * plan.accumulation)
    streams = [build_batch(step[i : i + plan.rows], plan) for i in range(0, len(step), plan.rows)]
    computed = sum(stream["input_ids"].numel() for stream in streams)
    batches = [build_padded(step[i : i + args.batch_size]) for i in range(0, len(step), args.batch_size)]
    padded = sum(batch["input_ids"].numel() for batch in batches)
    if not plan.share_prefix:
        say("plan", f"{len(step)} rows per step in {len(batches)} padded batches of about {padded // len(batches):,} tokens")
        return
    say("plan", f"{len(step)} rows per step in {len(streams)} stream{'s' * (len(streams) > 1)} of about "
                f"{computed // len(streams):,} tokens instead of {len(batches)} batches of {padded // len(batches):,} "
                f"({padded / computed:.1f} times fewer)")


def start_output(args: argparse.Namespace, checkpoint: str | None) -> None:
    """Mark the output folder as this run's; without a checkpoint to go on from, an earlier run's are removed."""
    if checkpoint is None:
        for old in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(old)
    write_run(args, args.output_dir)


def train_model(trainer, checkpoint: str | None, train: list[Sequence], rows_per_step: int) -> None:
    """Train, from a checkpoint if there is one, and print the speed of the steps made now."""
    first = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    if checkpoint:
        say("resume", f"from {checkpoint}")
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    samples = (result.global_step - first) * rows_per_step
    tokens = samples * sum(len(sequence.input_ids) for sequence in train) / len(train)
    say("train", f"{result.global_step - first:,} steps in {seconds:.0f} s: {samples / seconds:.1f} samples/s, "
                 f"{tokens / seconds:,.0f} tokens/s of the rows; loss {result.training_loss:.4f}")


def main(argv: list[str] | None = None) -> None:
    """Run the whole job: read, check, render, train, score, save."""
    args = parse_args(argv)
    check_folder(args.output_dir, "--output_dir")
    check_folder(args.final_model_dir, "--final_model_dir")
    checkpoint = find_checkpoint(args)
    examples = read_examples(args)

    engine = start_engine(args)
    config = check_model(args.model_id)
    merge_base = check_merge_base(args, config)
    check_same_shape(config, merge_base) if merge_base != args.model_id else None
    check_disk(args, config)
    tokenizer = load_tokenizer(args.model_id)
    train, held_out = render_all(args, tokenizer, examples)
    for sequence in train[:2]:
        show_row(tokenizer, sequence)
    plan = plan_streams(train, args, engine)
    show_plan(train, args, plan)

    model = load_model(args, engine, plan)
    report_gpu("gpu")
    shown = (held_out or train)[:SHOWN_ROWS]
    before = generate_answers(model, tokenizer, shown, engine)

    trainer = build_trainer(args, engine, model, tokenizer, train, held_out, plan)
    if plan.share_prefix and not check_sharing(args, trainer.model, train, plan, engine):
        args.share_prefix = False
        plan = plan_streams(train, args, engine)
        trainer = build_trainer(args, engine, model, tokenizer, train, held_out, plan)
    start_output(args, checkpoint)
    train_model(trainer, checkpoint, train, plan.rows * plan.accumulation)
    report_gpu("gpu")

    compared = (held_out or train)[:READ_BACK_ROWS]
    expected = {"loss": score_loss(trainer.model, to_batches(compared, plan), engine),
                "answers": generate_answers(trainer.model, tokenizer, shown, engine)}
    adapter = save_adapter(trainer.model, args.output_dir)
    say("save", f"adapter: {adapter}")
    del trainer, model
    free_gpu()

    got = run_fresh(merge_adapter, args, merge_base, adapter, compared, shown, plan)
    check_merged(args, adapter, expected, got)
    put_in_place(args.final_model_dir)
    say("merge", f"16-bit, read back by a fresh process: held-out loss {got['loss']:.4f}, adapter {expected['loss']:.4f}")
    show_answers(tokenizer, shown, before, got["answers"])
    say("done", f"merged model: {args.final_model_dir}")


def run_command_line() -> int:
    """Run main; return 0, or 1 with the error in one line per problem, or 130 after Ctrl-C."""
    try:
        main()
        return 0
    except UserError as error:
        lines = str(error).splitlines()
    except KeyboardInterrupt:
        print("interrupted; go on with --resume_from_checkpoint", file=sys.stderr)
        return 130
    except MemoryError:
        lines = ["out of memory; lower --batch_size or --max_seq_length"]
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, named so that torch need not be imported here
            raise
        lines = ["out of GPU memory; lower --batch_size or --max_seq_length, or choose a smaller --model_id"]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(run_command_line())
