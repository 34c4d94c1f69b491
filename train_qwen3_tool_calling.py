#!/usr/bin/env python3
"""Teach a small Qwen3 to call your tools: tool-calling JSON in, a merged model in safetensors out.

    python train_qwen3_tool_calling.py --dataset_path data/mine.jsonl --tools_path data/tools.json

The data flows through this file from top to bottom: row -> example -> sequence -> stream -> model -> merged model.
Each section takes what the one above it gives. Everything that can be checked without a model is checked
before torch is imported, so a mistake costs a second and not an hour.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import contextlib
import difflib
import errno
import gc
import hashlib
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from datetime import timedelta
from functools import lru_cache, partial
from itertools import chain, islice
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, NoReturn

# ---------------------------------------------------------------------------------------------------------------
# 0  Defaults: edit these for a new dataset; each is also a flag
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
LEARNING_RATE = 2e-4  # the usual rate for LoRA; full fine-tuning takes a tenth of it
WARMUP_STEPS = 10  # Adam's moments are noise in the first steps
WEIGHT_DECAY = 0.01
LR_SCHEDULER_TYPE = "linear"
MAX_SEQ_LENGTH = 2048  # longer sequences are reported, never cut
SEED = 3407

LORA_RANK = 16
LORA_ALPHA = 16  # alpha / rank = 1: the adapter's output is not scaled
LORA_DROPOUT = 0.0  # 0 lets steps be recorded as CUDA graphs
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

EVAL_SAMPLES = 200  # held-out rows answered by the base, the adapter and the merged model: +-3 of 100 at 95 %
EVAL_BATCH_SIZE = 64  # answers written at once
MAX_NEW_TOKENS = 256  # longest answer; several calls fit

# No flags from here on: what was measured, and names that are used throughout.
CUDA_OPTIM = "adamw_torch_fused"  # on CUDA: a few launches for all weights of an adapter
FULL_CUDA_OPTIM = "adamw_8bit"  # of a whole model there: its two moments of a weight take 2 bytes instead of 8
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
              "inverse_sqrt")  # those of Transformers that need nothing but the number of steps
SHOWN_ROWS = 3  # held-out requests whose answers are shown before and after
CHECKED_ROWS = 8  # so many rows are computed shared and by themselves at the start of each run, and compared
HELD_SCORES = 2**28  # attention scores held at once when answers are written: 1 GiB in fp32
RECORDED_SHARE = 0.5  # of the free GPU memory: CUDA graphs that would hold more are not recorded
READ_BACK_ROWS = 64  # held-out rows on which the losses of merged model and adapter are compared
READ_BACK_BATCH = 4  # of them at once: their logits are held, with Qwen3's vocabulary 60 MB for an answer of 40 tokens
MERGE_SLACK = 0.02  # nats per token (a share of losses over 1), and share of the rows, that a merge may cost
ROUNDED_WEIGHTS = 2**26  # of a weight, so many numbers are rounded or summed at a time: it takes as much memory again
COMPARED_NUMBERS = 2**27  # of a gradient of more numbers, every n-th is compared: half a GiB each time it is held
SHOWN_PROBLEMS = 20
CHECK_SECONDS = 2  # the longest that a call may take to check
PATIENCE = 3600  # seconds that processes wait for each other, as for the one that writes a large checkpoint
MEASURED_EPOCHS = 50  # so many epochs of a run are measured to plan its streams
NAMED_ROWS = 8  # so many rows of a step that failed are named
CLEAR_RISE = 0.02  # nats by which, beside a tenth, the held-out loss must rise to be pointed out
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")  # their values are written nowhere
SHOWN_CHANGES = 8  # kinds of change to tools, and keys that are not read, that a line after reading names
WRITTEN_BY = "# written by train_qwen3_tool_calling.py\n"  # first line of run.yaml: marks a folder as ours to replace
MANIFEST = "manifest.json"  # in each checkpoint: size and SHA-256 of its files
LOCK = ".lock"  # in --output_dir, and for --final_model_dir among the temporary files: held while a run lasts
SMALL_FILES = 2**24  # bytes of tokenizer, settings and state that are saved beside weights
CONVERTED_GGUF = ("f32", "f16", "bf16", "q8_0")  # what llama.cpp's converter writes by itself
GGUF_NAMES = (*CONVERTED_GGUF, "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0",
              "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")  # of the others, those that need no importance matrix
COMPILED = "unsloth_compiled"  # in --output_dir: what Unsloth generates when it is imported
# Settings that a resumed run must share with the one it goes on from.
AGREED = ("model_id", "load_in_4bit", "lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "target_modules",
          "thinking", "share_prefix", "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio",
          "weight_decay", "optim", "seed", "metric_for_best", "early_stopping_patience")
ONCE = ("resume_from_checkpoint", "dry_run", "show_row")  # not in run.yaml: who repeats a run wants none of these
PROGRAM = sys.argv[0] if __name__ == "__main__" else __file__  # as the command line is shown


class UserError(Exception):
    """A mistake in data or environment that the user can mend: shown as `error: ...` lines, never as a traceback."""


class FlagError(UserError):
    """A wrong flag, on the command line or in the file of --config: exit code 2 instead of 1."""


class Interrupted(BaseException):
    """The user wants the run to end: no library that catches every Exception may swallow it. args[0] is the signal."""


class Example(NamedTuple):
    """One conversation in the OpenAI shape; `where` is the file:line it came from."""

    where: str
    messages: list[dict]
    tools: list[dict]
    format: str = "openai"  # of the row that it was


class Sequence(NamedTuple):
    """One assistant turn as tokens: the prompt as serving renders it, then the supervised answer."""

    where: str
    input_ids: list[int]
    prompt_length: int
    answer: str = ""  # the supervised text without its end token, for scoring
    tools: list[dict] = []
    request: str = ""  # what the user said last
    parser: str = "hermes"  # reads the calls of the answer, see parse_calls


def hide_secrets(text: str) -> str:
    """Return a text without the secrets of the environment and without the passwords in addresses."""
    for name in SECRETS:
        if len(os.environ.get(name, "")) >= 8:  # shorter ones may be parts of words
            text = text.replace(os.environ[name], f"${name}")
    return re.sub(r"(?<=://)[^/\s@\"'\\]+@", "", text)


def is_main() -> bool:
    """Say whether this process speaks and writes: of those that torchrun starts, one for each GPU, only the first."""
    return os.environ.get("RANK", "0") == "0"


def count_devices() -> int:
    """Return how many processes share the rows of a step: as many as torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_launcher() -> list[str]:
    """Return the words that started this process, as a command line shows them."""
    devices, here = count_devices(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = ["--nnodes", str(devices // here)] if devices > here else []
    return ["torchrun", *nodes, "--nproc_per_node", str(here)] if devices > 1 else ["python"]


LAUNCHER = find_launcher()  # now, because leave_group forgets it


def say(stage: str, text: str) -> None:
    """Print one line for one stage of the run; if nobody reads any more, as after `| head`, the run goes on."""
    try:
        print(f"{stage:<9}{hide_secrets(text)}", flush=True)
    except BrokenPipeError:
        drop_output()


def drop_output() -> None:
    """Let all that is printed from now on go nowhere, as the one who read it is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_console(**settings):
    """Return a console of rich that goes on, as `say` does, if nobody reads any more; rich would end the process."""
    from rich.console import Console

    console = Console(highlight=False, **settings)
    console.on_broken_pipe = drop_output
    return console


def warn(text: str, kind: str = "warning") -> None:
    """Print one line on stderr."""
    if is_main():
        print(f"{kind}: {hide_secrets(text)}", file=sys.stderr, flush=True)


def plural(count: int, noun: str) -> str:
    """Return `1 row`, `2,000 rows` or `2 batches`."""
    return f"{count:,} {noun}{('es' if noun.endswith('ch') else 's') * (count != 1)}"


def list_first(names, limit: int) -> str:
    """Return `a, b, and 3 more`: the first names of an iterable, and how many follow."""
    names = [*names]
    return ", ".join(names[:limit]) + (f", and {len(names) - limit:,} more" if len(names) > limit else "")


def raise_interrupted(number: int, frame) -> None:
    """End whatever is going on, as the handler of a signal; but an import or a __del__ only when it is done.

    An import that is cut off leaves half a library behind: the next error hides what happened, or the process aborts.
    Of a __del__ Python would swallow the exception.
    """
    while frame and frame.f_code is not run_command_line.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib") or frame.f_code.co_name == "__del__":
            later = threading.Timer(0.01, os.kill, (os.getpid(), number))
            later.daemon = True
            return later.start()
        frame = frame.f_back
    raise Interrupted(number)


@contextlib.contextmanager
def handle_signals(handler, numbers: tuple = (signal.SIGINT, signal.SIGTERM)):
    """Let `handler(number, frame)` answer Ctrl-C and SIGTERM (or these) for a while; then the former handlers do again.

    Signals reach the main thread alone, so for a caller in another one nothing changes.
    """
    numbers = numbers if threading.current_thread() is threading.main_thread() else ()
    former = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in former.items():
            signal.signal(number, old)


def partial_folder(final: str | Path) -> Path:
    """Return where a folder is written before it is renamed to its final name."""
    return Path(final).with_name(f".{Path(final).name}.partial")


def move_aside(folder: Path) -> Path:
    """Return the hidden name that a folder, if it is there, now has: killed in between, its removal leaves no half."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    return old


def put_in_place(final: str | Path, written: Path | None = None) -> None:
    """Give a finished folder (its partial one) its final name; what was there is removed only after that."""
    written = written or partial_folder(final)
    umask = os.umask(0)
    os.umask(umask)
    for file in written.glob("*.safetensors"):  # written for the owner alone
        file.chmod(0o666 & ~umask)
    noted: list[int] = []
    try:
        with handle_signals(lambda number, frame: noted.append(number)):  # between the two there is no such folder
            old = move_aside(Path(final))
            written.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        for number in noted:
            signal.raise_signal(number)


def write_file(path: str | Path, text: str) -> None:
    """Write a text file under a hidden name and then give it its own: a broken write leaves no half one."""
    # Half a character, of a row or of a file's name, as JSON writes it.
    partial_folder(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    partial_folder(path).replace(path)


def is_disk_full(error: BaseException) -> bool:
    """Say whether an error is that of a full disk, or of a used-up quota, also as torch and safetensors word it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # torch names no reason: its archive writer only says that a write failed, or that it is not where it should be.
    return any(text in str(error) for text in ("No space left", "PytorchStreamWriter failed", "unexpected pos"))


@contextlib.contextmanager
def discard_partial(final: str | Path):
    """Yield the partial folder of `final`; whatever happens, nothing of it stays, and a full disk is a UserError.

    Of several processes, the first one looks after the folder.
    """
    folder = partial_folder(final)
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    except Exception as error:
        if is_disk_full(error):
            raise UserError(f"{final}: the disk is full; free some space, then go on from the last checkpoint with "
                            "--resume_from_checkpoint") from None
        raise
    finally:
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------
# 1  Arguments: argv, and the file of --config -> Namespace; argparse is the only declaration of a setting
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


def gguf_names(text: str) -> str:
    """Return names of GGUF quantisations, separated by commas, in lower case; as an argparse type."""
    names = [name.strip() for name in text.lower().split(",")]
    if unknown := [name for name in names if name not in GGUF_NAMES]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; expected any of {', '.join(GGUF_NAMES)}")
    return ",".join(names)


def suggest(name: str, known) -> str:
    """Return the end of a message that names the nearest of the known names, if one is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def scheduler(text: str) -> str:
    """Return a name of SCHEDULERS, as an argparse type."""
    if text not in SCHEDULERS:
        hint = suggest(text, SCHEDULERS)
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(SCHEDULERS)}, got {text}{hint}")
    return text


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises a FlagError instead of ending the program."""

    def error(self, message: str):
        unknown = re.match("unrecognized arguments: (--[^ =]+)", message)
        raise FlagError(message + (suggest(unknown[1], self._option_string_actions) if unknown else ""))


def to_words(actions: dict, name: str, node) -> list[str]:
    """Return the words of a command line that give the flag `name` the value of a YAML node, as it is written there."""
    if name not in actions:
        raise FlagError(f"{name}: " + ("a file of settings cannot name another" if name == "config" else
                                       f"no flag is named so{suggest(name, actions)}"))
    flag, nargs, kind = actions[name].option_strings[0], actions[name].nargs, node.tag.rsplit(":", 1)[-1]
    if kind == "null":
        return []
    if nargs == "+" and kind == "seq" and all(item.id == "scalar" and item.value[:1] != "-" for item in node.value):
        return [flag, *(item.value for item in node.value)]
    if node.id != "scalar":
        raise FlagError(f"argument {flag}: must be one value" + ", or a list, without - in front" * (nargs == "+"))
    if nargs != 0:
        return [f"{flag}={node.value}"]
    if kind != "bool":
        raise FlagError(f"argument {flag}: must be true or false, got {node.value}")
    no = actions[name].option_strings[1:]  # --no-x, if there is such a flag
    return [flag] if node.value.lower() in ("true", "yes", "on") else no


def read_config(parser: Parser, path: str) -> list[str]:
    """Return the settings of a YAML file as the words of a command line; its mistakes are one FlagError.

    Each line is `name of a flag: value`, and the value is taken as the text that it is, so that argparse checks and
    converts it as on the command line. null is nothing given, and `facts` what run.yaml tells of a run.
    """
    import yaml

    if not Path(path).is_file():
        raise FlagError(f"--config {path}: not a file; expected YAML, `flag: value` a line")
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise FlagError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML: "
                        f"{getattr(error, 'problem', None) or str(error).splitlines()[0]}") from None
    if not isinstance(root, yaml.MappingNode):
        raise FlagError(f"{path}: expected lines `flag: value`, such as batch_size: 4")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    words, problems = {}, []
    for key, node in root.value:
        name = key.value if key.id == "scalar" else key.id
        try:
            if name in words:
                raise FlagError(f"{name}: stands twice")
            words[name] = to_words(actions, name, node) if name != "facts" else []
            parser.parse_args(words[name])
        except FlagError as error:
            problems.append(f"{path}:{key.start_mark.line + 1}: {error}")
    together = [*chain(*words.values())]
    if not problems:
        try:
            parser.parse_args(together)
        except FlagError as error:  # settings that exclude each other
            problems = [f"{path}: {error}"]
    if problems:
        raise FlagError("\n".join(problems))
    return together


def build_parser() -> Parser:
    """Return the declaration of all flags. Those without `default` are None unless given, which --help would show."""
    parser = Parser(
        description="Fine-tune a Qwen3 model to call your tools, and save it merged in safetensors.",
        formatter_class=partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=34, width=120),
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
    )
    count, path = number(int, 1), os.path.expanduser  # after "=" and in --config, no shell sees to ~
    parser.add_argument("--config", metavar="FILE",
                        help="YAML file of settings, `flag: value`, as the run.yaml of each run; flags override it")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_path", nargs="+", type=path, default=DATASET_PATH, metavar="PATH",
        help="JSON or JSONL files, folders of them, or Hugging Face datasets: name[:split]")
    add("--format", choices=["auto", *FORMATS], default="auto", help="shape of the rows (auto: each row's own)")
    add("--tools_path", type=path, default=TOOLS_PATH, help="JSON array of tools for rows without their own")
    add("--train_test_split", type=number(float, 0, 1), default=TRAIN_TEST_SPLIT, metavar="SHARE",
        help="share of the rows to hold out")
    add("--max_samples", type=count, metavar="N", help="use only the first N rows (default: all)")
    add("--max_seq_length", type=count, default=MAX_SEQ_LENGTH, metavar="TOKENS",
        help="longest sequence; a longer one is a problem, it is never cut")
    add("--on_invalid", choices=["error", "skip"], default="error", help="what to do with a row that has a problem")
    add("--thinking", choices=["auto", "on", "off"], default="auto",
        help="train answers with reasoning: auto: those that have some, on: all must, off: drop it")
    add("--eval_dataset_path", nargs="+", type=path, metavar="PATH",
        help="rows to hold out, instead of a share of --dataset_path; as there")
    add("--convert_to", type=path, metavar="PATH",
        help="train nothing: write the rows of --dataset_path in the OpenAI form to this new JSONL file")
    add("--dry_run", action="store_true",
        help="train nothing: print what a run would do, and write it to OUTPUT_DIR/audit.json")
    add("--show_row", type=count, metavar="N", help="print the N-th valid row whole, as the model sees it")

    add = parser.add_argument_group("model").add_argument
    add("--model_id", default=MODEL_ID, help="Hub id or folder of the base model")
    add("--merge_model_id", metavar="MODEL", help="16-bit original to merge into, when --model_id is already quantised")
    add("--engine", choices=["auto", "unsloth", "transformers"], default="auto",
        help="auto: Unsloth on CUDA, Transformers + PEFT elsewhere")
    add("--load_in_4bit", action=argparse.BooleanOptionalAction,
        help="train on a 4-bit base (QLoRA); never with --lora_rank 0 (default: True)")
    add("--trust_remote_code", action="store_true", default=False,
        help="run the Python code that a model brings along: only if you know who wrote it")
    add("--lora_rank", type=number(int, 0), default=LORA_RANK, metavar="R",
        help="rank of the adapter; 0 trains all weights of the model instead")
    add("--lora_alpha", type=count, default=LORA_ALPHA, metavar="A", help="scale: alpha / rank")
    add("--lora_dropout", type=number(float, 0, 1), default=LORA_DROPOUT, metavar="P",
        help="dropout in front of the adapter")
    add("--use_rslora", action=argparse.BooleanOptionalAction, default=False,
        help="scale by alpha / sqrt(rank) (rsLoRA): for high ranks")
    add("--target_modules", nargs="+", default=" ".join(TARGET_MODULES), metavar="NAME",
        help="linear layers that get an adapter")

    train = parser.add_argument_group("training")
    add = train.add_argument
    add("--num_epochs", type=count, default=NUM_EPOCHS, metavar="N", help="passes over the data")
    add("--max_steps", type=count, metavar="N", help="train N optimizer steps, not --num_epochs")
    add("--batch_size", type=count, default=BATCH_SIZE, metavar="N", help="sequences per device and micro-batch")
    add("--gradient_accumulation_steps", type=count, default=GRADIENT_ACCUMULATION_STEPS, metavar="N",
        help="micro-batches per optimizer step")
    add("--learning_rate", type=number(float, 0, low_open=True), metavar="LR",
        help=f"peak rate; with --lora_rank 0 a tenth of the default (default: {LEARNING_RATE})")
    add("--lr_scheduler_type", type=scheduler, default=LR_SCHEDULER_TYPE, metavar="NAME",
        help="linear, cosine, constant, ... as Transformers names them")
    warmup = train.add_mutually_exclusive_group()  # argparse tells a given number from the default, which is a text
    warmup.add_argument("--warmup_steps", type=number(int, 0), default=str(WARMUP_STEPS), metavar="N",
                        help="steps until the peak rate")
    warmup.add_argument("--warmup_ratio", type=number(float, 0, 1), metavar="SHARE",
                        help="the same as a share of all steps, instead of --warmup_steps")
    add("--weight_decay", type=number(float, 0), default=WEIGHT_DECAY, metavar="W", help="AdamW's decay")
    add("--optim", metavar="NAME",
        help="optimizer (default: adamw_torch; on CUDA adamw_torch_fused, or adamw_8bit if all weights are trained on "
             "each GPU)")
    add("--gradient_checkpointing", choices=["auto", "on", "off"], default="auto",
        help="compute activations twice instead of keeping them; auto: on with CUDA")
    add("--share_prefix", action=argparse.BooleanOptionalAction, default=True,
        help="compute what rows have in common once per stream")
    add("--cuda_graphs", action=argparse.BooleanOptionalAction, default=True,
        help="record the step and replay it with a few launches (Unsloth)")
    add("--fsdp", action=argparse.BooleanOptionalAction, default=False,
        help="split the weights over all GPUs (FSDP2), for models too large for one")
    add("--seed", type=number(int, 0, 2**32), default=SEED, help="seed of everything random")
    add("--logging_steps", type=count, default=1, metavar="N", help="steps from one loss to the next")
    add("--save_steps", type=count, metavar="N", help="steps from one checkpoint to the next (default: an epoch)")
    add("--save_total_limit", type=count, metavar="N",
        help="keep the N newest checkpoints, and the best one (default: all)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_steps", type=count, metavar="N",
        help="steps from one held-out loss and exact match to the next (default: an epoch)")
    add("--metric_for_best", choices=["exact_match", "loss"],
        help="keep the checkpoint that is best on the held-out rows (default: the last)")
    add("--early_stopping_patience", type=count, metavar="N",
        help="stop after N evaluations without improvement (default: never)")
    add("--eval_samples", type=count, default=EVAL_SAMPLES, metavar="N",
        help="held-out rows to answer at the end with base, adapter and merged model")
    add("--eval_batch_size", type=count, default=EVAL_BATCH_SIZE, metavar="N", help="answers written at once")
    add("--max_new_tokens", type=count, default=MAX_NEW_TOKENS, metavar="N", help="longest answer")
    add("--eval_only", metavar="MODEL", help="train nothing: score this model or adapter on the held-out rows")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=path, default=OUTPUT_DIR, help="folder for checkpoints and the adapter")
    add("--final_model_dir", type=path, default=FINAL_MODEL_DIR, help="folder for the merged model")
    add("--save_method", choices=["merged_16bit", "merged_4bit", "lora"], default="merged_16bit",
        help="what to save at the end; lora: only the adapter, in OUTPUT_DIR/adapter")
    add("--save_gguf", type=gguf_names, metavar="NAMES",
        help="also write GGUF files and an Ollama Modelfile, with llama.cpp: q8_0,q4_k_m,...")
    add("--push_to_hub", metavar="REPO",
        help="upload the result to this Hugging Face repository at the end; a new one is private")
    add("--resume_from_checkpoint", nargs="?", const="newest", metavar="PATH",
        help="go on from a checkpoint (no PATH: the newest in --output_dir)")
    add("--report_to", default="none", metavar="NAME", help="tensorboard, wandb, ... or none")
    add("--run_name", metavar="NAME", help="the run's name there")

    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the settings of a run: of the command line, else of the file of --config, else the defaults.

    A wrong flag is a FlagError; --help ends the program.
    """
    parser = build_parser()
    unset = [action.dest for action in parser._actions if action.default == argparse.SUPPRESS]
    args = argparse.Namespace(**dict.fromkeys(unset))
    config = getattr(parser.parse_args(argv), "config", None)
    for words in (read_config(parser, config) if config else [], argv):
        share = args.warmup_ratio
        parser.parse_args(words, namespace=args)
        if None not in (args.warmup_ratio, args.warmup_steps):  # the later of the two counts
            setattr(args, "warmup_steps" if share is None else "warmup_ratio", None)
    del args.config, args.help
    args.dataset_path = as_list(args.dataset_path)  # a list as default would look like Python in --help
    args.target_modules = sorted({*" ".join(as_list(args.target_modules)).split()})  # their order means nothing
    if args.lora_rank and not args.target_modules:
        parser.error("--target_modules: expected at least one name")
    args.dry_run = bool(args.dry_run)
    if args.eval_only and (args.dry_run or args.show_row or args.resume_from_checkpoint):
        parser.error("--eval_only trains nothing: leave out --dry_run, --show_row and --resume_from_checkpoint")
    if args.convert_to and (args.dry_run or args.eval_only):
        parser.error("--convert_to only writes rows: leave out --dry_run and --eval_only")
    if args.dry_run and args.resume_from_checkpoint:
        parser.error("--dry_run shows a run from its start: leave out --resume_from_checkpoint")
    if not args.lora_rank:
        if args.load_in_4bit or args.engine == "unsloth" or args.save_method == "lora":
            parser.error("--lora_rank 0 trains the 16-bit weights themselves, with Transformers: leave out "
                         "--load_in_4bit, --engine unsloth and --save_method lora")
        args.engine = "transformers"  # Unsloth's full fine-tuning runs on classes that take no streams
    if args.load_in_4bit is None:
        args.load_in_4bit = args.lora_rank > 0
    if args.fsdp:
        if count_devices() == 1 or args.engine == "unsloth":
            parser.error("--fsdp splits the weights over several GPUs, with Transformers: start it with torchrun, and "
                         "leave out --engine unsloth")
        if not args.lora_rank and args.optim not in (None, "adamw_torch", "adamw_torch_fused"):
            parser.error(f"--fsdp --lora_rank 0 splits the optimizer too, as PyTorch's alone can: leave out --optim "
                         f"{args.optim}, or give adamw_torch or adamw_torch_fused")
        args.engine = "transformers"  # Unsloth's kernels take whole weights only
    args.learning_rate = args.learning_rate or LEARNING_RATE / (1 if args.lora_rank else 10)
    if args.save_gguf and args.save_method != "merged_16bit":
        parser.error(f"--save_gguf is made from the 16-bit model: leave out --save_method {args.save_method}")
    if args.early_stopping_patience and not args.metric_for_best:
        args.metric_for_best = "exact_match"
    if args.metric_for_best:  # a checkpoint to keep must have been scored
        args.save_steps = args.save_steps or args.eval_steps
        if args.save_steps != args.eval_steps:
            parser.error("--metric_for_best keeps a checkpoint by its score: --save_steps must be --eval_steps")
    return args


# ---------------------------------------------------------------------------------------------------------------
# 2  Read: file, folder or Hub name -> (where, row) pairs, one by one; a missing key stays missing in each row
# ---------------------------------------------------------------------------------------------------------------
ROW_FILES = (".json", ".jsonl")  # what is read of a folder
NOT_ROWS = ("tools.json", "dataset_info.json", "dataset_infos.json", "state.json", "package.json")
PACKED = {  # the first bytes of a file: its kind
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet"}
HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)"
                      r"(?::(?P<config>[\w.+-]+)(?=:))?(?::(?P<split>\w[\w.]*))?", re.ASCII)
FILE_NAME = re.compile(r".*\.(jsonl?|ndjson|csv|tsv|txt|parquet|arrow|ya?ml|gz|zip|zst)", re.IGNORECASE)
SHOWN_BYTES = 2**26  # a larger file takes seconds to read, so on a terminal a bar is shown


def to_float(text: str) -> float:
    """Return the number; NaN and Infinity, which JSON does not have, and one too large for Python are ValueErrors."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not JSON" if text[-1].isalpha() else f"the number {text[:20]} is too large")
    return value


def to_object(pairs: list[tuple]) -> dict:
    """Return a JSON object; a key that stands twice is a ValueError, because Python would drop the first value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f'the key "{twice}" stands twice')
    return found


DECODER = json.JSONDecoder(parse_constant=to_float, parse_float=to_float, object_pairs_hook=to_object)


def read_value(text: str, position: int = 0) -> tuple[object, int]:
    """Return the JSON value that begins at `position`, and where it ends; ValueError or RecursionError if broken."""
    value, end = DECODER.raw_decode(text, position)
    if text.find("\\u", position, end) >= 0:  # an escape may be half a character, which can never be written again
        json.dumps(value, ensure_ascii=False).encode()
    return value, end


def explain(error: Exception) -> str:
    """Return what is wrong with a text that could not be read as JSON."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte {error.start}); save it as UTF-8 JSON or JSONL"
    if isinstance(error, UnicodeEncodeError):
        return f"not valid JSON: \\u{ord(error.object[error.start]):04x} is half a character"
    if isinstance(error, RecursionError):
        return "not valid JSON: it is nested too deeply"
    if str(error).startswith("Exceeds the limit"):  # Python's own, on the digits of an integer
        return f"not valid JSON: a number has more than {sys.get_int_max_str_digits():,} digits"
    return f"not valid JSON: {getattr(error, 'msg', error)}"


@contextlib.contextmanager
def open_file(path: str):
    """Yield a regular file opened for its bytes; one that cannot be read, is packed or plainly not UTF-8: UserError."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for its writer
            raise UserError(f"{path}: is not a regular file; expected JSON or JSONL")
        with open(path, "rb") as file:
            start = file.read(4)
            if kind := next((kind for mark, kind in PACKED.items() if start.startswith(mark)), None):
                raise UserError(f"{path}: is {kind}; expected JSON or JSONL: unpack or convert it first")
            if wide := re.search(rb"[\0\xfe\xff]", start):  # UTF-16, or no text at all
                raise UserError(f"{path}: not UTF-8 text (byte {wide.start()}); save it as UTF-8 JSON or JSONL")
            first = start.lstrip(b"\xef\xbb\xbf \r\n\t")[:1]
            if path.lower().endswith((".csv", ".tsv")) and first not in (b"", b"{", b"["):
                raise UserError(f"{path}: is a table of text; expected JSON or JSONL: convert it first")
            file.seek(0)
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_text(file) -> str:
    """Return the text of an open file; one that is empty or not UTF-8 is a UserError."""
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: {explain(error)}") from None
    if not text.strip():
        raise UserError(f"{file.name}: is empty; expected a JSON array of rows, or one JSON object a line")
    return text


def read_array(path: str, text: str):
    """Yield (file:line, element) of a JSON array, or of objects one after the other, each decoded to know its line."""
    skip = re.compile(r"\s*,?\s*")
    position = len(text) - len(text.lstrip())
    is_array = text.startswith("[", position)
    position, line, counted, index, last_line = position + is_array, 1, 0, 0, 0
    while True:
        position = skip.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}" if line > last_line else f"{path}[{index}]"  # several on one line: count them
        index, last_line = index + 1, line
        if is_array and text.startswith("]", position):
            if text[position + 1 :].strip():
                raise UserError(f"{path}:{line}: more follows the ] of the array; expected the end of the file")
            return
        if position >= len(text):
            if is_array:
                raise UserError(f"{where}: the JSON array does not end; expected ]")
            return
        try:
            element, position = read_value(text, position)
        except (ValueError, RecursionError) as error:
            line += text.count("\n", counted, getattr(error, "pos", position))
            raise UserError(f"{path}:{line}: {explain(error)}") from None
        yield where, element


def read_lines(path: str, file):
    """Yield (file:line, object) of an open JSONL file, line by line; a broken line is yielded as its ValueError."""
    for line, content in enumerate(file, start=1):  # the lines of bytes end at \n alone: U+2028 in a text is data
        try:
            text = content.decode("utf-8-sig").strip()
            if not text:
                continue
            row, end = read_value(text)
            if end < len(text):
                raise json.JSONDecodeError("Extra data", text, end)
        except UnicodeDecodeError as error:
            row = ValueError(explain(error))
        except (ValueError, RecursionError) as error:
            row = ValueError(f"{explain(error)}; expected one JSON object a line, or a JSON array")
        yield f"{path}:{line}", row


def begins_spread(line: bytes) -> bool:
    """Tell whether an object may go on after a file's first line, as pretty-printed JSON does: no more is wrong."""
    text = line.decode("utf-8", "replace").rstrip()
    try:
        read_value(text)
        return False
    except (ValueError, RecursionError) as error:
        return line.endswith(b"\n") and getattr(error, "pos", -1) >= len(text)


def show_reading(pairs, file, size: int):
    """Yield the pairs; on a terminal a bar shows how far a large file has been read."""
    if size < SHOWN_BYTES or not sys.stdout.isatty():
        yield from pairs
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("read", total=size)
        for count, pair in enumerate(pairs):
            if count % 1000 == 0:  # moving the bar costs more than reading a row
                bar.update(task, completed=file.tell())
            yield pair


def read_file(path: str):
    """Yield the (file:line, row) pairs of a JSON or JSONL file; the first character that is not blank decides which.

    JSONL is read line by line, so that its size does not matter. An array, and objects that go on over several lines,
    are read whole.
    """
    with open_file(path) as file:
        before = os.fstat(file.fileno())
        lines = (line.removeprefix(b"\xef\xbb\xbf").lstrip() for line in iter(partial(file.readline, 2**16), b""))
        first, second = next(filter(None, lines), b""), next(filter(None, lines), b"")
        file.seek(0)
        pairs = read_lines(path, file)
        if not first or first.startswith(b"["):
            pairs = read_array(path, read_text(file))
        elif begins_spread(first):
            objects = read_array(path, read_text(file))
            try:
                pairs = chain([next(objects)], objects)
            except UserError:  # a line that was cut is one bad row, and the others can be read
                if second and not second.startswith(b"{"):  # no row follows: the mistake is inside of an object
                    raise
                file.seek(0)
        yield from show_reading(pairs, file, before.st_size)
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise UserError(f"{path}: changed while it was read; start again when nothing writes to it")


def find_files(folder: str, tools_path: str) -> list[str]:
    """Return the JSON and JSONL files of a folder and those in it, sorted; not hidden ones, NOT_ROWS and the tools."""
    tools = Path(tools_path).resolve()
    found = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in ROW_FILES
             and path.name not in NOT_ROWS and not path.is_dir() and path.resolve() != tools
             and not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not found:
        raise UserError(f"{folder}: holds no .json or .jsonl file of rows; expected at least one")
    return [str(path) for path in found]


def match_hub(path: str) -> re.Match | None:
    """Return the name and split of a Hub dataset; None for what exists as a path or is named like a file."""
    match = HUB_NAME.fullmatch(path)
    if not match or os.path.exists(path) or os.path.exists(match["name"]) or FILE_NAME.fullmatch(match["name"]):
        return None
    return match


def drop_null_columns(value: object, feature: object) -> object:
    """Return a value of a table without the keys whose value is null; one that JSON cannot hold is a ValueError.

    A table has the same columns in every row: the arguments of one tool appear as nulls in the calls of all others, and
    would be trained as arguments. Only columns are treated so. An object whose keys were all null stays as {}, because
    empty arguments look the same; a null in a list, or in a column that keeps JSON text, was in the data and stays.
    """
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: drop_null_columns(inner, feature[key]) for key, inner in value.items() if inner is not None}
    if isinstance(value, list) and hasattr(feature, "feature"):
        return [drop_null_columns(inner, feature.feature) for inner in value]
    if not isinstance(value, (str, int, float, list, dict, type(None))):
        raise ValueError(f"holds the {type(value).__name__} {str(value)[:40]}; expected text or another JSON value "
                         "(a table may have made dates of texts: name the dataset's own file instead)")
    return value


def load_hub(name: str, config: str | None):
    """Return {split: table} of a dataset on the Hub or in the local cache; UserError says why it cannot be had."""
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said below, in one line
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
    if (Path(datasets.__file__).parent / "packaged_modules" / name).is_dir():  # "json" would read the working folder
        raise UserError(f"{name}: cannot be read: No such file or directory")
    try:
        return datasets.load_dataset(name, config)
    except ConnectionError:
        advice = "unset HF_HUB_OFFLINE" if datasets.config.HF_HUB_OFFLINE else "check the connection"
        reason = f"is no file or folder, not in the local cache, and the Hub cannot be reached; {advice}"
    except datasets.exceptions.DatasetNotFoundError as error:
        reason = "is no file or folder, and no public dataset on the Hub; check the name, or log in with: hf auth login"
        if "gated" in str(error):
            reason = f"is gated; accept its terms at https://huggingface.co/datasets/{name}, log in with: hf auth login"
    except Exception as error:  # whatever else can be wrong with a dataset; its message is the best there is
        reason = (f"cannot be read as a table: {' '.join(str(error.__cause__ or error).split())[:200]}; "
                  f"expected {name}, {name}:SPLIT or {name}:CONFIG:SPLIT")
    raise UserError(f"{name}: {reason}")


def read_hub(name: str, config: str | None, split: str | None):
    """Yield (name:split[index], row) of a dataset on the Hub or in the local cache, without null-filled keys."""
    splits, whole, split = load_hub(name, config), f"{name}:{config}" if config else name, split or "train"
    if split not in splits:
        raise UserError(f'{whole}: has no split "{split}"; expected '
                        + " or ".join(f"{whole}:{found}" for found in splits))
    table = splits[split]
    for index, row in enumerate(table):
        # A whole column of images or dates is none that a format reads; such a value inside an object is a problem.
        columns = {key: value for key, value in row.items() if isinstance(value, (str, int, float, list, dict))}
        try:
            yield f"{whole}:{split}[{index}]", drop_null_columns(columns, table.features)
        except ValueError as error:
            yield f"{whole}:{split}[{index}]", error


def read_source(path: str, tools_path: str):
    """Yield the (where, row) pairs of a file, of the files in a folder, or of a Hub dataset `name[[:config]:split]`."""
    if match := match_hub(path):
        sources = {path: read_hub(**match.groupdict())}
    else:
        sources = {file: read_file(file) for file in (find_files(path, tools_path) if os.path.isdir(path) else [path])}
    for name, pairs in sources.items():
        count = 0
        for count, pair in enumerate(pairs, start=1):
            yield pair
        if not count:
            raise UserError(f"{name}: holds no rows")


def read_rows(paths: list[str], max_samples: int | None = None, tools_path: str = TOOLS_PATH):
    """Yield the (where, row) pairs of files, folders and Hub datasets, at most `max_samples` in all.

    What exists as a path is never looked up on the Hub. A broken line is yielded as a ValueError in place of its row.
    """
    rows = chain.from_iterable(read_source(path, tools_path) for path in paths)
    yield from islice(rows, max_samples and min(max_samples, sys.maxsize))


# ---------------------------------------------------------------------------------------------------------------
# 3  Convert: row of any known format -> Example; FORMATS is the one place to add a format
# ---------------------------------------------------------------------------------------------------------------
ROLES = {  # roles as other formats name them; "calls" is a turn that holds nothing but calls
    "human": "user", "gpt": "assistant", "model": "assistant", "developer": "system",
    "observation": "tool", "tool_response": "tool", "function": "tool", "function-response": "tool",
    "function_call": "calls", "function-call": "calls", "tool_call": "calls",
}
TYPES = {  # types as Python, Java or Gemini write them, in lower case
    "str": "string", "string": "string", "int": "integer", "integer": "integer", "long": "integer",
    "float": "number", "double": "number", "number": "number", "bool": "boolean", "boolean": "boolean",
    "dict": "object", "object": "object", "list": "array", "tuple": "array", "array": "array",
    "none": "null", "nonetype": "null", "null": "null",
}
PLAIN_TYPES = {**{name: {"type": kind} for name, kind in TYPES.items()},
               "any": {}, "set": {"type": "array", "uniqueItems": True}}
SCHEMA_PLACES = {  # keywords of JSON Schema: what stands there
    "one": ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"),
    "list": ("anyOf", "oneOf", "allOf", "prefixItems"),
    "named": ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"),
}
SCHEMA_SUBJECTS = {"type", "properties", "patternProperties", "additionalProperties", "$ref", "anyOf", "oneOf", "allOf"}
SCHEMA_NOTES = {"$schema", "$id", "$defs", "definitions", "title", "description", "required"}  # they name no property
OPTIONAL = re.compile(r"(?:,\s*)?\(?\boptional\)?\s*$", re.IGNORECASE)  # the end of "str, optional"
QUOTED = r""" "(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*' """.strip()
OUTSIDE = re.compile(QUOTED + "|.", re.DOTALL)  # a quoted text, or one character
WORDS = re.compile(QUOTED + r"|\\.|\b(?:true|false|null)\b", re.DOTALL)  # JSON's words; and quotes, which may hold them
PYTHON_WORDS = {"true": "True", "false": "False", "null": "None"}
BRACKET_CALLS = re.compile(r"\s*\[[^\[\](){}]+\(.*\)\s*\]\s*", re.DOTALL)  # [Name(x=1), Other()]
TOOL_LIST = re.compile(r'\[\s*\{.*"(?:parameters|function)"', re.DOTALL)
BROKEN_TOOL = re.compile(r"""\{\s*["'](?:name|type|function)["']\s*:.*""", re.DOTALL)
GLAIVE_TURN = re.compile(r"(?:^|\n)[^\S\n]*(USER|ASSISTANT|FUNCTION RESPONSE):")
GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
GLAIVE_BOILERPLATE = re.compile(r"You are a helpful assistant with access to the following functions\. "
                                r"Use them if required\s*-?")
QUESTION_KEYS = ("instruction", "question", "prompt", "query", "input")
ANSWER_KEYS = ("output", "answer", "response", "completion")
TURN_KEYS = {"role", "from", "content", "value", "name", "weight", "tool_calls", "function_call", "tool_call_id",
             "reasoning_content", "thinking", "reasoning"}
TEXT_PART = {"type", "text", "annotations", "cache_control"}  # a part of content with other keys says more than a text
KIND_NAMES = {list: "a list of objects", dict: "an object", str: "text"}


def shorten(value: object, limit: int = 80) -> str:
    """Return a value as JSON for a message, cut to `limit` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def as_list(value: object) -> list:
    """Return a list as it is, and anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def to_role(role: object) -> object:
    """Return a role as OpenAI names it; one that is in no format stays as it is."""
    return ROLES.get(role, role) if isinstance(role, str) else role


def take(row: dict, key: str, kind: type):
    """Return row[key]; ValueError if it is missing or of another kind."""
    if key not in row:
        raise ValueError(f'"{key}" is missing; expected {KIND_NAMES[kind]}')
    if not isinstance(row[key], kind) or kind is list and not all(isinstance(item, dict) for item in row[key]):
        raise ValueError(f'"{key}" must be {KIND_NAMES[kind]}, got {shorten(row[key])}')
    return row[key]


def parse_json(text: str, what: str):
    """Return the value of a JSON text; ValueError names `what` is broken."""
    try:
        return DECODER.decode(text)
    except ValueError as error:
        raise ValueError(f"{what} {explain(error)}: {shorten(text)}") from None


def unpack(value: object, what: str):
    """Return the list or object that a JSON text holds, as tables keep them; anything else as it is."""
    return parse_json(value, what) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value


def parse_python(text: str) -> ast.expr:
    """Return the tree of a Python expression, which is never run; ValueError if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of "\d" in a text
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, MemoryError) as error:
        raise ValueError from error


def parse_literal(text: str, what: str):
    """Return the value of a JSON text, or of one in Python's quotes, as JSON would give it."""
    try:
        return DECODER.decode(text)
    except ValueError:
        pass
    try:
        tree = parse_python(WORDS.sub(lambda word: PYTHON_WORDS.get(word[0], word[0]), text))
        objects = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
        if any(len({*map(ast.dump, node.keys)}) < len(node.keys) for node in objects):
            raise ValueError("a key stands twice")
        return DECODER.decode(json.dumps(ast.literal_eval(tree), allow_nan=False))
    except (ValueError, TypeError, MemoryError):
        raise ValueError(f"{what} neither JSON nor a Python literal: {shorten(text)}") from None


def split_at_commas(text: str) -> list[str]:
    """Split a text at the commas that stand outside quotes and brackets; ValueError if one of them stays open."""
    parts, depth, start = [], 0, 0
    for token in OUTSIDE.finditer(text):
        depth += (token[0] in "([{") - (token[0] in ")]}")
        if depth < 0 or token[0] in "\"'":
            break
        if token[0] == "," and not depth:
            parts.append(text[start : token.start()])
            start = token.end()
    else:
        if not depth:
            return [part.strip() for part in (*parts, text[start:])]
    raise ValueError(f"a quote or bracket has no partner in {shorten(text)}")


# Tools -----------------------------------------------------------------------------------------------------------
def to_union(parts: list[dict]) -> dict:
    """Return the schema of a value that fits one of these schemas."""
    parts = [one for part in parts for one in (part["anyOf"] if part.keys() == {"anyOf"} else [part])]
    if all(part.keys() == {"type"} for part in parts):
        return {"type": [*dict.fromkeys(name for part in parts for name in as_list(part["type"]))]}
    return {"anyOf": parts}


def to_type(node: ast.expr) -> dict | None:
    """Return the schema of a type that is written as this Python expression, None if its meaning is not clear."""
    match node:
        case ast.Constant(value=None):
            return {"type": "null"}
        case ast.Name(id=name):
            return PLAIN_TYPES.get(name.lower())
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            name, parts = "union", [left, right]
        case ast.Subscript(value=ast.Name(id=name), slice=inside):
            parts = inside.elts if isinstance(inside, ast.Tuple) else [inside]
        case _:
            return None
    name = name.lower()
    if name == "tuple" and [*map(ast.unparse, parts[1:])] == ["..."]:
        name, parts = "list", parts[:1]
    schemas = [to_type(part) for part in parts]
    if None in schemas:
        return None
    match name, schemas:
        case "list" | "array", [item]:
            return {"type": "array", "items": item}
        case "set", [item]:
            return {"type": "array", "items": item, "uniqueItems": True}
        case "dict", [{"type": "string"}, value]:
            return {"type": "object", "additionalProperties": value}
        case "tuple", [_, *_]:
            return {"type": "array", "prefixItems": schemas, "minItems": len(schemas), "maxItems": len(schemas)}
        case "optional", [item]:
            return to_union([item, {"type": "null"}])
        case "union", [_, *_]:
            return to_union(schemas)
    return None


def parse_type(text: str) -> dict | None:
    """Return the schema of a type as Python or upper case writes it, None if its meaning is not clear."""
    try:
        return to_type(parse_python(OPTIONAL.sub("", text).replace("typing.", "")))
    except ValueError:
        return None


def replace_type(schema: dict, changes: Counter) -> dict:
    """Return the schema with its foreign type in JSON Schema; what the schema itself says beside it stays."""
    old, new = schema.get("type"), None
    if isinstance(old, str):
        new = parse_type(old)
    elif isinstance(old, list):  # ["STRING", "null"]
        names = [TYPES.get(name.lower(), name) if isinstance(name, str) else name for name in old]
        new = {"type": [name for index, name in enumerate(names) if name not in names[:index]]}
    if new is None or new == {"type": old}:
        return schema
    kind = new.get("type", "any of several" if new else "any")
    before, after = (" or ".join(map(str, as_list(name))) for name in (old, kind))
    changes[f"type {before[:40]} -> {after[:40]}"] += 1
    new = {name: part for name, part in new.items() if name == "type" or name not in schema}
    return {k: v for key, value in schema.items() for k, v in (new if key == "type" else {key: value}).items()}


def list_required(schema: dict, changes: Counter) -> dict:
    """Return the schema with `"required": true` inside a property moved to the list of the schema."""
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not isinstance(schema.get("required", []), list):
        return schema
    marked = {name: value["required"] for name, value in properties.items()
              if isinstance(value, dict) and isinstance(value.get("required"), bool)}
    if not marked:
        return schema
    changes["required true or false in a property -> list"] += len(marked)
    properties = {name: {key: item for key, item in value.items() if key != "required"} if name in marked else value
                  for name, value in properties.items()}
    required = [*schema.get("required", [])]
    required += [name for name, needed in marked.items() if needed and name not in required]
    return {**schema, "properties": properties, "required": required}


def replace_dialect(schema: dict, changes: Counter) -> dict:
    """Return the schema with what OpenAPI 3.0 and earlier drafts write otherwise in the words of today's JSON Schema.

    OpenAPI's `nullable` counts beside a type or alternatives (https://spec.openapis.org/oas/v3.0.3#schema-object); a
    bound was made exclusive by a flag until Draft 4, and the items of a tuple stood in `items` until 2019-09.
    """
    schema, kinds, choices = dict(schema), as_list(schema["type"]) if "type" in schema else [], schema.get("anyOf")
    if isinstance(nullable := schema.get("nullable"), bool) and (kinds or isinstance(choices, list) or not nullable):
        del schema["nullable"]
        if nullable and kinds:
            schema["type"] = [*kinds, *["null"] * ("null" not in kinds)]
        elif nullable:
            schema["anyOf"] = [*choices, {"type": "null"}]
        changes["nullable -> type null" if nullable else "nullable false -> removed"] += 1
    for bound, flag in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(schema.get(flag), bool):
            exclusive = schema.pop(flag) and bound in schema
            if exclusive:
                schema[flag] = schema.pop(bound)
            changes[f"{flag} {'true -> number' if exclusive else 'without effect -> removed'}"] += 1
    if isinstance(schema.get("items"), list) and "prefixItems" not in schema:
        if items := schema.pop("items"):
            schema["prefixItems"] = items
        if isinstance(schema.get("additionalItems"), dict | bool):
            schema["items"] = schema.pop("additionalItems")
        changes["items of a tuple -> prefixItems"] += 1
    return schema


def drop_nulls(found: dict, changes: Counter) -> dict:
    """Return the object without its nulls, which say nothing, except as a value of the argument itself."""
    kept = {key: value for key, value in found.items() if value is not None or key in ("default", "const")}
    changes.update(f"{key[:40]} null -> removed" for key in found if key not in kept)
    return kept


def to_schema(schema: object, changes: Counter) -> object:
    """Return a JSON Schema in which foreign types are replaced at every place that holds a schema."""
    if not isinstance(schema, dict):
        return schema
    for step in (drop_nulls, replace_type, replace_dialect, list_required):
        schema = step(schema, changes)
    for key, value in schema.items():
        if key in SCHEMA_PLACES["named"] and isinstance(value, dict):
            schema[key] = {name: to_schema(part, changes) for name, part in value.items() if part is not None}
            changes.update(["property null -> removed"] * (len(value) - len(schema[key])))
        elif key in SCHEMA_PLACES["list"] and isinstance(value, list):
            schema[key] = [to_schema(part, changes) for part in value]
        elif key in SCHEMA_PLACES["one"]:
            schema[key] = to_schema(value, changes)
    return schema


def is_optional(parameter: dict) -> bool:
    """Return whether a parameter of a flat list may be left out, by its own word or by its type or default."""
    if isinstance(parameter.get("required"), bool):
        return not parameter["required"]
    kind = parameter.get("type")
    by_type = isinstance(kind, str) and bool(OPTIONAL.search(kind) or re.match(r"\s*(typing\.)?optional\[", kind, re.I))
    return by_type or "default" in parameter


def to_parameters(parameters: object, changes: Counter) -> object:
    """Return a tool's parameters as JSON Schema; flat ones, {"city": {"type": "str"}}, become an object's properties.

    A parameter may itself be called `type` or `properties`: flat are parameters that are objects one and all, but for a
    list of those required, unless `properties` holds schemas one and all again, as a schema's does.
    """
    if not isinstance(parameters, dict):
        return parameters
    parameters = drop_nulls(parameters, changes)  # first, or what they leave would look flat when it is read again
    inner = parameters.get("properties")
    nested = isinstance(inner, dict) and all(isinstance(value, dict | bool | None) for value in inner.values())
    listed = parameters.get("required") if isinstance(parameters.get("required"), list) else None
    flat = {name: value for name, value in parameters.items() if name != "required" or listed is None}
    is_flat = all(isinstance(value, dict) and not name.startswith("$") for name, value in flat.items())
    if is_flat and flat and not nested:
        changes["flat parameters -> schema"] += 1
        required = [name for name, value in flat.items() if not is_optional(value)] if listed is None else listed
        properties = {name: {key: item for key, item in value.items()
                             if key != "required" or not isinstance(item, bool)} for name, value in flat.items()}
        parameters = {"type": "object", "properties": properties, "required": required}
    return to_schema(parameters, changes)


def to_tool(tool: object, changes: Counter) -> object:
    """Return one tool as {"type": "function", "function": {...}}; anything else than a tool stays as it is."""
    if not isinstance(tool, dict) or not isinstance(tool.get("function", tool), dict):
        return tool
    if "function" in tool:
        if tool.get("type") is None:
            changes["type function added"] += 1
            tool = {"type": "function", **{key: value for key, value in tool.items() if key != "type"}}
    elif "name" in tool:
        changes["bare function -> tool"] += 1
        tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    else:
        return tool
    function = drop_nulls(tool["function"], changes)
    for key in ("inputSchema", "input_schema"):  # as MCP and Anthropic name them
        if key in function and "parameters" not in function:
            changes[f"{key} -> parameters"] += 1
            function["parameters"] = function.pop(key)
    if "parameters" in function:
        function["parameters"] = to_parameters(function["parameters"], changes)
    return {**tool, "function": function}


def to_tools(tools: object) -> tuple[object, Counter]:
    """Return (tools in the OpenAI shape, Counter of what was changed); what is not clear stays for check_tools."""
    changes: Counter = Counter()
    if isinstance(tools, str):
        tools = parse_json(tools, "tools are") if tools.strip() else []
    if isinstance(tools, list):
        tools = [to_tool(unpack(tool, f"tool {index} is"), changes) for index, tool in enumerate(tools, start=1)]
    return tools, changes


def is_tool(value: object) -> bool:
    """Say whether a value looks like a tool, in the OpenAI shape or bare; a name alone may be anything's."""
    return isinstance(value, dict) and ("function" in value or "name" in value and not value.keys().isdisjoint(
        ("parameters", "description")))


def find_tools(text: str) -> tuple[list[dict], str]:
    """Return (tools that stand as JSON in a text, the text without them): its first list of tools, else all objects."""
    found, rest, end = [], "", 0
    for mark in re.finditer(r"[\[{]", text):
        if mark.start() < end:
            continue
        try:
            value, stop = read_value(text, mark.start())
        except ValueError:
            continue
        if value and all(map(is_tool, as_list(value))):
            if isinstance(value, list):
                return value, text[: mark.start()] + text[stop:]
            found.append(value)
            rest, end = rest + text[end : mark.start()], stop
    return found, rest + text[end:]


def take_tools(text: str) -> tuple[list[dict], str]:
    """Return what find_tools does; ValueError if beside the tools there is one that cannot be read."""
    found, rest = find_tools(text)
    if found and (broken := BROKEN_TOOL.search(rest)):
        raise ValueError(f"a tool beside others is not JSON: {shorten(broken[0])}")
    return found, rest


# Messages --------------------------------------------------------------------------------------------------------
def to_tool_call(call: object) -> dict:
    """Return a call in the OpenAI shape with its arguments as a dict; ValueError says what is wrong with it."""
    inner = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or "arguments" not in inner:
        raise ValueError('a call must be {"name": "...", "arguments": {...}}, got ' + shorten(inner))
    name = inner["name"]
    arguments = unpack(inner["arguments"], f"call {shorten(name)}: arguments are")
    if not isinstance(arguments, dict):
        raise ValueError(f"call {shorten(name)}: arguments must be an object, got {shorten(arguments)}")
    converted = {"type": "function", "function": {"name": name, "arguments": arguments}}
    has_id = isinstance(call.get("id"), str) and call["id"]
    return {"id": call["id"], **converted} if has_id else converted


def join_text(content: object) -> object:
    """Return content as text where it is text, nothing, or a list of text parts; other content stays as it is."""
    if content is None:
        return ""
    if content and isinstance(content, list) and all(
            isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text"
            and part.keys() <= TEXT_PART for part in content):
        return "".join(part["text"] for part in content)
    return content


def split_thought(message: dict, content: object) -> tuple[str, object]:
    """Return (thought, content) of an assistant message: the thought from its own key or from a leading think block."""
    thoughts = [join_text(message.get(key) or "") for key in ("reasoning_content", "thinking", "reasoning")]
    if wrong := [thought for thought in thoughts if not isinstance(thought, str)]:
        raise ValueError("reasoning must be text, got " + shorten(wrong[0]))
    if block := re.match(r"\s*<think>(.*?)</think>\s*", content, re.DOTALL) if isinstance(content, str) else None:
        thoughts.append(block[1].strip())
        content = content[block.end() :]
    thoughts = [thought for thought in thoughts if thought.strip()]
    if len({*map(str.strip, thoughts)}) > 1:
        raise ValueError("a message has two different thoughts, in its reasoning or in its <think> block; expected one")
    return thoughts[0] if thoughts else "", content


def find_calls(holder: dict, what: str, keys: tuple[str, ...]) -> list:
    """Return the calls under the only one of `keys` that a message has, [] if none; a `function_call` is one call."""
    given = [key for key in keys if holder.get(key)]
    if len(given) > 1:
        raise ValueError(f"{what} holds {given[0]} and {given[1]}; expected one of them")
    calls = unpack(holder[given[0]], f"{given[0]} is") if given else []
    calls = [calls] if given == ["function_call"] else calls
    if not isinstance(calls, list):
        raise ValueError(f"{given[0]} must be a list, got " + shorten(calls))
    return calls


def to_message(message: dict) -> dict:
    """Return a message with only what a chat template reads, its ids, and weight 0 if it is not to be trained."""
    role, content = to_role(message.get("role")), join_text(message.get("content"))
    if role == "tool":
        call_id = message.get("tool_call_id")
        return {"role": role, **({"tool_call_id": call_id} if isinstance(call_id, str) and call_id else {}),
                "content": content}
    if role not in ("assistant", "calls"):
        return {"role": role, "content": content}
    if message.get("weight") not in (None, 0, 1):
        raise ValueError(f"weight must be 0 or 1, got {shorten(message['weight'])}")
    thought, content = split_thought(message, content)
    calls = find_calls(message, "a message", ("tool_calls", "function_call"))
    if role == "calls":
        if calls and content:
            raise ValueError("a turn of calls holds calls in content and in another key; expected one of them")
        calls = as_list(parse_literal(content, "a turn of calls is") if isinstance(content, str) else content)
        content = ""
    calls = [*map(to_tool_call, calls)]
    return {"role": role, "content": content,
            **({"reasoning_content": thought} if thought else {}), **({"tool_calls": calls} if calls else {}),
            **({"weight": 0} if message.get("weight") == 0 else {})}


def to_messages(turns: list[dict]) -> list[dict]:
    """Return the messages of a conversation; turns of calls join those right before them, and the text there."""
    messages: list[dict] = []
    for message in map(to_message, turns):
        if message["role"] == "calls":
            message["role"] = "assistant"
            if messages and messages[-1]["role"] == "assistant":
                before = messages.pop()
                thoughts = {turn.get("reasoning_content", "").strip() for turn in (before, message)} - {""}
                if len(thoughts) > 1 or before.get("weight") != message.get("weight"):
                    raise ValueError("a turn of calls joins one that has another thought or weight; expected the same")
                calls = [*before.get("tool_calls", []), *message.get("tool_calls", [])]
                message = {**message, **before, "tool_calls": calls}
        messages.append(message)
    return messages


def add_system(row: dict, turns: list[dict]) -> list[dict]:
    """Return the turns with the row's `system` in front, if it has one that they do not begin with."""
    system, first = row.get("system"), turns[0] if turns else {}
    said = first.get("role") in ("system", "developer") and first.get("content") == system
    return [{"role": "system", "content": system}, *turns] if system and not said else turns


def read_turns(row: dict) -> list[dict]:
    """Return the turns of a ShareGPT row, {"from", "value"} or {"role", "content"}, with its `system` in front."""
    key = "messages" if "messages" in row and "conversations" not in row else "conversations"
    turns = [{**turn, "role": turn.get("from", turn.get("role")),
              "content": join_text(turn.get("value", turn.get("content")))} for turn in take(row, key, list)]
    return add_system(row, turns)


def read_request(row: dict, question: str) -> list[dict]:
    """Return the turns before a row's answer: its `history`, and its question with the text that this is about."""
    about, history = [key for key in ("input", "context") if key != question and row.get(key)], row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError('"history" must be a list of [request, answer], got ' + shorten(history))
    turns = [{"role": role, "content": text} for pair in history for role, text in zip(("user", "assistant"), pair)]
    return [*turns, {"role": "user", "content": "\n".join(take(row, key, str) for key in (question, *about))}]


def convert_native(row: dict) -> tuple[list[dict], object]:
    """{"input": "...", "output": {"function_call": {...} | "function_calls": [...], "content": "..."}}"""
    output = take(row, "output", dict)
    keys = ("function_call", "function_calls", "tool_calls")
    if not output.keys() & {*keys, "content"}:
        raise ValueError('"output" must hold function_call, function_calls or content, got ' + shorten(output))
    calls = find_calls(output, '"output"', keys)
    answer = {**output, "role": "assistant", "tool_calls": calls, "function_call": None}
    question = "instruction" if row.get("instruction") else "input"
    return add_system(row, [*read_request(row, question), answer]), None


def convert_openai(row: dict) -> tuple[list[dict], object]:
    """{"messages": [{"role": "...", "content": "...", "tool_calls": [...]}, ...], "tools": [...]}"""
    return add_system(row, take(row, "messages", list)), None


def split_tags(text: str, tag: str) -> list[str]:
    """Return a text cut at <tag>...</tag>: every other piece is what stood inside."""
    done, end, rest = text.rpartition(f"</{tag}>")  # the rest closes none: to look there from each would take too long
    *cut, last = re.split(f"<{tag}>(.*?)</{tag}>", done + end, flags=re.DOTALL)
    return [*cut, last + rest]


def split_hermes_system(text: str) -> tuple[list | None, str]:
    """Return (tools inside <tools> or None, the text without the sentences about the <tools> and <tool_call> tags)."""
    tools = None
    for block in split_tags(text, "tools")[1::2]:
        if block.strip():
            found, rest = find_tools(block)
            if rest.strip(" \n\t\r,"):  # not all of it is JSON
                found = parse_literal(block, "the text inside <tools> is")
            tools = [*(tools or []), *as_list(found)]
    tags = [*re.finditer(r"</?(?:tools|tool_call)>", text)]
    if not tags:
        return tools, text
    sentence = max((end.end() for end in re.finditer(r"[.!?]\s+|\n", text[: tags[0].start()])), default=0)
    return tools, (text[:sentence].rstrip() + "\n" + text[tags[-1].end() :].lstrip()).strip()


def split_hermes_turn(turn: dict) -> list[dict]:
    """Return a turn of a Hermes row as OpenAI messages: calls out of <tool_call>, replies out of <tool_response>."""
    role, content = to_role(turn["role"]), turn["content"]
    if role == "assistant" and isinstance(content, str):
        thought, content = split_thought(turn, content)
        tag = "TOOLCALL" if "<TOOLCALL>" in content else "tool_call"
        cut = split_tags(content, tag)
        if any(f"<{tag}>" in text for text in cut[::2]):
            raise ValueError(f"a turn has <{tag}> without </{tag}>; expected both")
        calls = [call for text in cut[1::2] for call in as_list(parse_literal(text, f"the text inside <{tag}> is"))]
        content = "\n".join(map(str.strip, cut[::2])).strip() if len(cut) > 1 else content
        if calls and turn.get("tool_calls"):
            raise ValueError(f"a turn holds tool_calls and <{tag}>; expected one of them")
        return [{**turn, "content": content, "reasoning_content": thought,
                 "tool_calls": calls or turn.get("tool_calls") or []}]
    if role == "tool" and isinstance(content, str):
        cut = split_tags(content, "tool_response")
        if len(cut) > 1 and not "".join(cut[::2]).strip():
            return [{**turn, "content": reply.strip()} for reply in cut[1::2]]
    return [turn]


def convert_hermes(row: dict) -> tuple[list[dict], object]:
    """{"conversations": [{"from": "system", "value": "... <tools>[...]</tools> ..."}, {"from": "gpt", "value":
    "<tool_call>\\n{...}\\n</tool_call>"}, {"from": "tool", "value": "<tool_response>...</tool_response>"}]}; calls may
    also stand as a list in <TOOLCALL>"""
    turns, tools = [], None
    for turn in read_turns(row):
        if turn["role"] in ("system", "developer") and isinstance(turn["content"], str):
            found, text = split_hermes_system(turn["content"])
            tools = tools if found is None else found
            turns += [{**turn, "content": text}] if text else []
        else:
            turns += split_hermes_turn(turn)
    return turns, tools


def convert_prompt_completion(row: dict) -> tuple[list[dict], object]:
    """{"prompt": [{"role": "user", "content": "..."}], "completion": [{"role": "assistant", ...}], "tools": [...]}; of
    these turns only the completion is trained."""
    prompt = [{**turn, "weight": 0} for turn in take(row, "prompt", list)]
    row = {**row, "messages": [*prompt, *take(row, "completion", list)]}
    return (convert_hermes if is_hermes(row) else convert_openai)(row)


def convert_xlam(row: dict) -> tuple[list[dict], object]:
    """{"query": "...", "answers": "[{\\"name\\": ..., \\"arguments\\": {...}}]", "tools": "[...]"}"""
    if "answers" not in row:
        raise ValueError('"answers" is missing; expected a list of calls')
    answers = unpack(row["answers"], "answers are")
    if not isinstance(answers, list):
        raise ValueError('"answers" must be a list of calls, got ' + shorten(answers))
    turns = [{"role": "user", "content": take(row, "query", str)}, {"role": "assistant", "tool_calls": answers}]
    return add_system(row, turns), None


def parse_glaive_call(text: str) -> object:
    """Return the call of a Glaive turn, whose arguments are JSON between single quotes."""
    quoted = re.fullmatch(r"""\s*\{\s*"name"\s*:\s*("[^"]*")\s*,\s*"arguments"\s*:\s*'(.*)'\s*\}\s*""", text, re.DOTALL)
    if not quoted:
        return parse_literal(text, "the text after <functioncall> is")
    return {"name": parse_json(quoted[1], "the name of a call is"), "arguments": quoted[2].replace("\\'", "'")}


def convert_glaive(row: dict) -> tuple[list[dict], object]:
    """{"system": "SYSTEM: ... -\\n{...}\\n{...}",
    "chat": "USER: ...\\n\\n\\nASSISTANT: <functioncall> {...} <|endoftext|>"}"""
    system = take(row, "system", str) if row.get("system") is not None else ""
    tools, system = take_tools(system.strip().removeprefix("SYSTEM:"))
    system = GLAIVE_BOILERPLATE.sub("", system).strip() if tools else system.strip()
    start, *parts = GLAIVE_TURN.split(take(row, "chat", str))
    if start.strip():
        raise ValueError(f'"chat" must start with "USER:", got {shorten(start)}')
    turns = add_system({"system": system}, [])
    for speaker, text in zip(parts[::2], parts[1::2]):
        turn = {"role": GLAIVE_ROLES[speaker], "content": text.replace("<|endoftext|>", "").strip()}
        if speaker == "ASSISTANT":
            content, *calls = turn["content"].split("<functioncall>")
            turn.update(content=content.strip(), tool_calls=[parse_glaive_call(call) for call in calls])
        turns.append(turn)
    return turns, tools


def parse_bracket_calls(text: str) -> list[dict]:
    """Return the calls of `[Name of a/tool(a="X", n=3), other()]`; ValueError if a part of it is anything else."""
    calls = []
    for part in split_at_commas(text.strip()[1:-1]):
        name, bracket, inner = part.partition("(")
        if not name.strip() or not bracket or not inner.endswith(")"):
            raise ValueError(f"expected calls like [name(key=value)], got {shorten(part)}")
        arguments = {}
        for pair in split_at_commas(inner[:-1]) if inner[:-1].strip() else []:
            key, equals, value = pair.partition("=")
            if not equals or not key.strip() or key.strip() in arguments:
                raise ValueError(f"call {shorten(name.strip())}: expected arguments like key=value, each key once, "
                                 f"got {shorten(pair)}")
            arguments[key.strip()] = parse_literal(value, f"call {shorten(name.strip())}: {key.strip()} is")
        calls.append({"name": name.strip(), "arguments": arguments})
    return calls


def convert_toolace(row: dict) -> tuple[list[dict], object]:
    """{"system": "... [{...}] ...", "conversations": [{"from": "assistant", "value": "[Name(key=\\"value\\")]"}]}"""
    turns, tools = [], None
    for turn in read_turns(row):
        role, content = turn["role"], turn["content"]
        if role == "system" and isinstance(content, str) and (found := take_tools(content)[0]):
            tools = found if tools is None else tools  # the text around them explains the bracket syntax: dropped
            continue
        if role in ("assistant", "gpt") and isinstance(content, str) and BRACKET_CALLS.fullmatch(content):
            turn = {**turn, "content": "", "tool_calls": parse_bracket_calls(content)}
        turns.append(turn)
    return turns, tools


def convert_alpaca(row: dict) -> tuple[list[dict], object]:
    """{"instruction": "...", "input": "", "output": "...", "system": "...", "history": [["u", "a"]]}, or a question, a
    "context" and an answer by other names: plain requests, so without tools unless the row has its own."""
    question = next((key for key in QUESTION_KEYS if key in row), None)
    answer = next((key for key in ANSWER_KEYS if key in row), None)
    if not question or not answer:
        raise ValueError(f"expected one of {', '.join(QUESTION_KEYS)} and one of {', '.join(ANSWER_KEYS)}, got "
                         + shorten(row))
    for key, others in ((question, QUESTION_KEYS), (answer, ANSWER_KEYS)):
        if more := [other for other in others if row.get(other) and other not in (key, "input")]:
            raise ValueError(f'"{key}" and "{more[0]}" both have a place in the row; expected one of them')
    turns = [*read_request(row, question), {"role": "assistant", "content": take(row, answer, str)}]
    return add_system(row, turns), []


def peek(row: dict, key: str) -> list[tuple[str, str]]:
    """Return the (role, text) pairs of a conversation as far as there are any, to recognise its format."""
    turns = [turn for turn in row[key] if isinstance(turn, dict)] if isinstance(row.get(key), list) else []
    pairs = [(turn.get("from", turn.get("role")), join_text(turn.get("value", turn.get("content")))) for turn in turns]
    return [(role, text if isinstance(text, str) else "") for role, text in pairs if isinstance(role, str)]


def is_mobile(row: dict) -> bool:
    """Return whether the row has `messages` and tools that do not say their type."""
    tools = row.get("tools") if "messages" in row else None
    return isinstance(tools, list) and bool(tools) and all(
        isinstance(tool, dict) and "function" in tool and "type" not in tool for tool in tools)


def names_tools(row: dict) -> bool:
    """Return whether a row has tools beside its turns, or says there that it has none."""
    return any(row.get(key) is not None for key in ("tools", "functions"))


def is_hermes(row: dict) -> bool:
    """Return whether calls stand between tags in the text, or tools do; in `messages`, of a row that has no others."""
    turns = [*peek(row, "messages"), *peek(row, "conversations")]
    if any("<tool_call>" in text or "<TOOLCALL>" in text for _, text in turns):
        return True
    anywhere, nowhere = "conversations" in row, names_tools(row)
    return any("<tools>" in text and (anywhere or not nowhere and role in ("system", "developer"))
               for role, text in turns)


def is_toolace(row: dict) -> bool:
    """Return whether calls are written as [Name(key=value)], or tools stand in the system text; in `messages`, both."""
    def calls(turns):
        return any(role in ("assistant", "gpt") and BRACKET_CALLS.fullmatch(text) for role, text in turns)

    turns, messages = peek(row, "conversations"), [] if names_tools(row) else peek(row, "messages")
    system = row.get("system") if isinstance(row.get("system"), str) else ""
    return bool(turns and TOOL_LIST.search(system)) or calls(turns) or calls(messages) and any(
        role == "system" and TOOL_LIST.search(text) for role, text in [*messages, ("system", system)])


def is_sharegpt_tools(row: dict) -> bool:
    """Return whether the conversation has tools beside it, or calls or replies as turns."""
    return "conversations" in row and (names_tools(row) or any(
        to_role(role) in ("calls", "tool") for role, _ in peek(row, "conversations")))


# name: (whether a row is of this format, converter to (turns, tools or None), the keys it reads beside tools and
# system); the first that fits
FORMATS = {
    "native": (lambda row: "input" in row and isinstance(row.get("output"), dict), convert_native,
               {"input", "output", "instruction", "history", "context"}),
    "swift": (lambda row: any(role in ("tool_call", "tool_response") for role, _ in peek(row, "messages")),
              convert_openai, {"messages"}),
    "hermes": (is_hermes, convert_hermes, {"messages", "conversations"}),
    "toolace": (is_toolace, convert_toolace, {"messages", "conversations"}),
    "mobile-actions": (is_mobile, convert_openai, {"messages"}),
    "openai": (lambda row: "messages" in row, convert_openai, {"messages"}),
    # {"conversations": [{"from": "human" | "gpt" | "function_call" | "observation", "value": "..."}], "tools": ...}
    "sharegpt-tools": (is_sharegpt_tools, lambda row: (read_turns(row), None), {"conversations"}),
    "sharegpt": (lambda row: "conversations" in row, lambda row: (read_turns(row), []), {"conversations"}),  # no tools
    "xlam": (lambda row: "query" in row and "answers" in row, convert_xlam, {"query", "answers"}),
    "glaive": (lambda row: "chat" in row, convert_glaive, {"chat"}),
    "prompt-completion": (lambda row: isinstance(row.get("prompt"), list) and "completion" in row,
                          convert_prompt_completion, {"prompt", "completion"}),
    "alpaca": (lambda row: any(key in row for key in QUESTION_KEYS) and any(key in row for key in ANSWER_KEYS),
               convert_alpaca, {*QUESTION_KEYS, *ANSWER_KEYS, "history", "context"}),
}
SHAPES = ('"messages"; "conversations"; "input" and "output"; "query" and "answers"; "chat"; "question" and "answer"; '
          '"prompt" and "completion"')


def list_unread(row: dict, name: str) -> list[tuple[str, str]]:
    """Return as (place, key) what holds something in a row, its output or a turn, and is not read in its format.

    Conversations must be lists already, not JSON text.
    """
    keys = FORMATS[name][2]
    places = [("row", row, {*keys, "tools", "functions", "system"})]
    if name == "native":
        places.append(("output", row["output"], {*TURN_KEYS, "function_calls"}))
    elif name != "alpaca":  # whose `prompt` and `completion` are plain text
        places += [("turn", turn, TURN_KEYS) for key in ("messages", "conversations", "prompt", "completion")
                   if key in keys and row.get(key) for turn in as_list(row[key])]
    return [(place, key) for place, holder, known in places if isinstance(holder, dict)
            for key, value in holder.items() if key not in known and value not in (None, "", [], {})]


def convert(row: object, name: str) -> tuple[str, list[dict], object, list[tuple[str, str]]]:
    """Return (format, OpenAI messages, tools as they are or None, what list_unread finds) of a row.

    ValueError if it cannot be converted.
    """
    if isinstance(row, ValueError):  # a line that was not JSON
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, got {shorten(row)}")
    row = {**row, **{key: unpack(row[key], f'"{key}" is') for key in ("messages", "conversations") if key in row}}
    if name in ("auto", "hermes", "toolace") and row.get("messages") and row.get("conversations"):
        raise ValueError('"messages" and "conversations" both have a place in the row; expected one of them')
    if "prompt" in row and "completion" in row:  # which may as well be plain text that begins with a bracket
        with contextlib.suppress(ValueError, RecursionError):
            turns = {key: unpack(row[key], key) for key in ("prompt", "completion")}
            row |= turns if all(isinstance(turn, dict) and "role" in turn for part in turns.values()
                                for turn in as_list(part)) else {}
    if name == "auto":
        name = next((found for found, (fits, *_) in FORMATS.items() if fits(row)), "")
    if not name:
        inside = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        hint = f'; if its "{inside[0]}" are the rows, give that list alone' if inside else ""
        raise ValueError(f"no known format; expected an object with {SHAPES}; got {shorten(row)}{hint}")
    turns, tools = FORMATS[name][1](row)
    # Those of the row itself count, under the newer name first, unless they are none and there are some elsewhere.
    given = [found for found in (row.get("tools"), row.get("functions"), tools) if found is not None]
    some = [found for found in given if found not in ([], "", "[]")]
    return name, to_messages(turns), (some or given or [None])[0], list_unread(row, name)


def to_row(example: Example) -> dict:
    """Return the example as an OpenAI row with arguments as JSON text; reading it gives the same example again."""
    messages = []
    for message in example.messages:
        if "tool_calls" in message:
            calls = [{**call, "function": {**call["function"], "arguments": json.dumps(
                call["function"]["arguments"], ensure_ascii=False)}} for call in message["tool_calls"]]
            message = {**message, "tool_calls": calls}
        messages.append(message)
    return {"messages": messages, "tools": example.tools}


# ---------------------------------------------------------------------------------------------------------------
# 4  Validate: example -> list of problems; a check_ returns problems, one place raises
# ---------------------------------------------------------------------------------------------------------------
# Inside content these tokens would forge turns, calls or thoughts: the tokenizer turns them into control tokens.
# The last is another model's: an answer with it is a call that was not read.
CONTROL_TOKEN = re.compile(r"<\|[a-z_]+\|>|</?(?:tool_call|tool_response|think|TOOLCALL)>")
UNREAD_CALL = re.compile(r"<functioncall>|\[TOOL_CALLS\]")  # as other models write one, in an answer
CODE_FENCE = re.compile(r"```\w*\n(.*)```", re.DOTALL)
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can write one alone, UTF-8 cannot
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


def is_trained(message: dict) -> bool:
    """Say whether a message is an answer that is supervised: only one of weight 0 keeps a weight (see to_message)."""
    return message["role"] == "assistant" and "weight" not in message


def check_roles(messages: list[dict]) -> list[str]:
    """Check that the conversation alternates as a chat does, that its replies answer its calls, and that it trains.

    Where calls and replies have ids, each reply answers an open call and none stays open. Where they have none, one
    reply may stand for several parallel calls.
    """
    state, waiting, by_id = "start", [], True  # waiting: ids (or None) of the calls without a reply
    for index, message in enumerate(messages, start=1):
        role, allowed = message["role"], NEXT_ROLES[state]
        if state == "tool" and (by_id or not waiting):
            allowed = ("tool",) if waiting else ("assistant",)
        if role not in allowed:
            reason = f"; {len(waiting)} of its calls still wait for their reply" if waiting and state == "tool" else ""
            return [f"message {index} has the role {shorten(role)}; expected {' or '.join(allowed)}{reason}"]
        if role == "assistant":
            waiting = [call.get("id") for call in message.get("tool_calls", [])]
            by_id = None not in waiting
        elif role == "tool":
            by_id = by_id and "tool_call_id" in message
            if by_id and message["tool_call_id"] not in waiting:
                return [f"message {index} answers call {shorten(message['tool_call_id'])}, which is not open"]
            waiting.remove(message["tool_call_id"] if by_id else waiting[0])
        state = "calls" if role == "assistant" and waiting else role
    if not messages or messages[-1]["role"] != "assistant":
        return ["the last message must be the assistant's: it is what is trained"]
    if not any(map(is_trained, messages)):
        return ["no turn is trained; every weight is 0"]
    return []


def to_json(value: object) -> str:
    """Return a value as JSON text; ValueError if it holds NaN or Infinity, as a table can."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise ValueError("holds NaN or Infinity; expected a number that JSON has") from None


def find_forbidden(text: str, control_token: re.Pattern = CONTROL_TOKEN) -> str | None:
    """Return what is wrong with a text that the tokenizer would take for something else, or cannot take; else None."""
    if token := control_token.search(text):
        return f"holds the control token {token[0]}, which would forge a turn; remove it"
    if not text.isascii() and (half := HALF_CHARACTER.search(text)):
        return f"holds \\u{ord(half[0]):04x}, one half of a character; remove it or write the other half too"
    return None


def is_call_text(text: str) -> bool:
    """Return whether an answer is the JSON of a call, of several, or of a message with some, or a foreign call."""
    def is_call(found: object) -> bool:
        return isinstance(found, dict) and (
            isinstance(found.get("name"), str) and isinstance(found.get("arguments"), (dict, str))
            or any(found.get(key) for key in ("function_call", "function_calls", "tool_calls")))

    fence = CODE_FENCE.fullmatch(text.strip())
    try:
        found = as_list(unpack(fence[1] if fence else text, "it is"))
    except (ValueError, RecursionError):
        found = []
    return any(map(is_call, found)) or bool(UNREAD_CALL.search(text))


def check_text(messages: list[dict]) -> list[str]:
    """Check that every content is text, that none is missing or a call, and that none holds a control token."""
    problems = []
    for index, message in enumerate(messages, start=1):
        name = f"message {index} ({message['role']})"
        content = message["content"]
        if not isinstance(content, str):
            problems.append(f"{name}: content must be text, got {shorten(content)}")
            continue
        if not content.strip() and message["role"] != "tool" and not message.get("tool_calls"):
            problems.append(f"{name}: content is empty")
        if is_trained(message) and is_call_text(content):
            problems.append(f"{name}: content is a call as text, {shorten(content, 40)}; expected it in a form that is "
                            'read as a call, such as "tool_calls"')
        for text in (content, message.get("reasoning_content", ""), to_json(message.get("tool_calls", []))):
            if problem := find_forbidden(text):
                is_call = text is content and message["role"] == "assistant" and re.search(r"</tool_?call>", text, re.I)
                problems.append(f"{name}: {problem}" + ", or read it as a call with --format hermes" * bool(is_call))
    return problems


COMBINED = ("allOf", "anyOf", "oneOf", "then", "else")  # where parts of a value's schema stand


def names_properties(schema: object) -> bool:
    """Return whether a schema lists properties, by itself or by what it is combined of."""
    return isinstance(schema, dict) and (not schema.keys().isdisjoint(("properties", "$ref")) or any(
        names_properties(part) for key in COMBINED for part in as_list(schema.get(key))))


def to_strict(schema: object, whole: bool = True) -> object:
    """Return the schema with unknown arguments refused wherever `properties` are listed and nothing else is said.

    A definition or an alternative is not the `whole` schema of a value: what is unknown is decided where these are
    combined, by `unevaluatedProperties`, which knows what each of them has let pass
    (https://json-schema.org/draft/2020-12/json-schema-core#section-11.3). So what names no property says that it lets
    any pass, but for a part that only chooses among properties beside it, as {"required": ["a"]} does.
    """
    if schema is True:
        return {"additionalProperties": True}
    if not isinstance(schema, dict):
        return schema
    strict = dict(schema)
    for key, value in schema.items():
        if key in SCHEMA_PLACES["named"] and isinstance(value, dict):
            of_values = key in ("properties", "patternProperties")
            strict[key] = {name: to_strict(part, whole=of_values) for name, part in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            strict[key] = to_strict(value)
        elif key == "prefixItems" and isinstance(value, list):
            strict[key] = [*map(to_strict, value)]
        elif key in COMBINED:
            parts = [to_strict(part, whole=False) for part in as_list(value)]
            strict[key] = parts if isinstance(value, list) else parts[0]
    if schema.keys() & {"additionalProperties", "unevaluatedProperties"}:
        return strict
    if names_properties(schema) and "patternProperties" not in schema:
        word = "unevaluatedProperties" if schema.keys() & {*COMBINED, "$ref", "if", "dependentSchemas"} else (
            "additionalProperties")  # which is faster
        return {**strict, word: False} if whole else strict
    if (whole or "patternProperties" in schema or "object" in as_list(schema.get("type"))
            or schema.keys().isdisjoint((*COMBINED, "if", "not", "required"))):
        strict["additionalProperties"] = True
    return strict


def describe(error) -> str:
    """Return a jsonschema ValidationError as `arguments.time.hour must be an integer, got "7"`."""
    path = "arguments" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
    got = f", got {shorten(error.instance)}"
    if error.validator == "type":
        types = [TYPE_NAMES.get(name, name) for name in as_list(error.validator_value)]
        return f"{path} must be {' or '.join(types)}{got}"
    if error.validator == "enum":
        return f"{path} must be one of {', '.join(shorten(value) for value in error.validator_value)}{got}"
    if error.validator == "required":
        return f"{path}.{error.message.rsplit(' is a required', 1)[0][1:-1]} is missing"
    if error.validator in ("additionalProperties", "unevaluatedProperties") and error.validator_value is False:
        unknown = next((name for name in error.instance if repr(name) in error.message), "")
        return f"{path}.{unknown} is not an argument of this tool"
    if error.validator in ("anyOf", "oneOf"):  # as {...} or null: what is wrong with the only one of the value's type
        inner = [part for part in error.context if part.validator != "type" or part.relative_path]
        if len({part.relative_schema_path[0] for part in inner}) == 1:
            return describe(inner[0])
    return f"{path}: {error.message if len(error.message) < 200 else f'{error.validator} is not met'}"


@lru_cache(maxsize=20_000)  # rows share tools: checking one takes longer than checking a row's calls
def check_tool(text: str) -> tuple[object, str | None]:
    """Return (validator of the tool's arguments, its problem or None) for the JSON text of a tool."""
    import jsonschema
    import referencing

    tool, validator = json.loads(text), jsonschema.Draft202012Validator
    if problem := find_forbidden(text):
        return validator({}), problem
    schema = tool["function"].get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(schema, dict):
        return validator({}), f"parameters must be an object, got {shorten(schema)}"
    strays = [key for key in schema if key not in SCHEMA_NOTES]
    if strays and not schema.keys() & SCHEMA_SUBJECTS:  # valid JSON Schema, by which any call would pass
        return validator({}), (f"parameters.{strays[0]} is no word of JSON Schema; expected "
                               '{"type": "object", "properties": {...}}')
    try:
        validator.check_schema(schema, format_checker=validator.FORMAT_CHECKER)
        # An empty registry: a $ref to elsewhere is a problem, never a download.
        return validator(to_strict(schema), registry=referencing.Registry()), None
    except jsonschema.SchemaError as error:
        path = ".".join(["parameters", *map(str, error.absolute_path)])
        return validator({}), f"{path} is not valid JSON Schema: {error.message[:200]}"
    except Exception as error:  # a schema is a small program out of the data: it can break the library in many ways
        return validator({}), f"parameters cannot be used as JSON Schema: {error}"[:300]


def check_tools(tools: object) -> tuple[dict, list[str]]:
    """Return ({tool name: validator of its arguments}, problems) for a list of tools in the OpenAI shape."""
    if not isinstance(tools, list):
        return {}, ["tools must be a list, got " + shorten(tools)]
    validators, problems = {}, []
    for index, tool in enumerate(tools, start=1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            problems.append(f'tool {index}: expected {{"type": "function", "function": {{"name": ...}}}}, got '
                            + shorten(tool))
            continue
        name = function["name"]
        if name in validators:
            problems.append(f"tool {index} {shorten(name)}: the name is taken by an earlier tool")
        validators[name], problem = check_tool(to_json(tool))
        problems += [f"tool {index} {shorten(name)}: {problem}"] if problem else []
    return validators, problems


@contextlib.contextmanager
def limit_time(seconds: float):
    """End what takes longer with a TimeoutError: a `pattern` out of the data can keep Python busy for years."""

    def stop(number, frame):
        raise TimeoutError

    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield  # as on Windows: there is no such timer
        return
    with handle_signals(stop, (signal.SIGALRM,)):
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def check_call(name: str, arguments: dict, validators: dict) -> list[str]:
    """Check the arguments of a call against the JSON Schema of its own tool.

    A tool whose schema took too long once is not tried again: its place in `validators` then holds what to say.
    """
    import referencing.exceptions

    if name not in validators:
        close = difflib.get_close_matches(name, validators, n=1)
        known = list_first(validators, SHOWN_PROBLEMS) or "none"
        return ["the row has no such tool; " + (f'did you mean "{close[0]}"?' if close else f"tools: {known}")]
    try:
        if not isinstance(validators[name], str):
            with limit_time(CHECK_SECONDS):
                errors = [*validators[name].iter_errors(arguments)]
            # Where something in a value fails, the part that says so has let none of the value's properties pass.
            failed = [error.json_path for error in errors if error.validator != "unevaluatedProperties"]
            return [describe(error) for error in sorted(errors, key=lambda error: error.json_path)
                    if error.validator != "unevaluatedProperties"
                    or not any(path.startswith(error.json_path) for path in failed)]
    except TimeoutError:
        validators[name] = (f"its tool's schema takes over {CHECK_SECONDS} s to apply; simplify its patterns or "
                            "alternatives")
    except referencing.exceptions.Unresolvable as error:
        return [f"its tool's schema refers to {error.ref}, which is not inside that schema"]
    except Exception as error:  # as in check_tool
        return [f"its tool's schema cannot be applied: {type(error).__name__}: {error}"[:300]]
    return [validators[name]]


def check_calls(messages: list[dict], validators: dict) -> list[str]:
    """Check every call of the conversation."""
    calls = [call["function"] for message in messages for call in message.get("tool_calls", [])]
    return [f"call {index} {shorten(call['name'])}: {problem}" for index, call in enumerate(calls, start=1)
            for problem in check_call(call["name"], call["arguments"], validators)]


def report_problems(problems: list[tuple[str, str]], on_invalid: str, total: int, noun: str = "row") -> None:
    """Raise a UserError that lists the problems, or with on_invalid "skip" print every one as a warning."""
    if not problems:
        return
    rows = len({where for where, _ in problems})
    if on_invalid == "skip":
        for where, problem in problems:
            warn(f"{where}: {problem}", "skipped")
        say("skip", f"{rows:,} of {plural(total, noun)}, named above")
        return
    lines = [f"{where}: {problem}" for where, problem in problems[:SHOWN_PROBLEMS]]
    more = f", the first {SHOWN_PROBLEMS} above" if len(problems) > SHOWN_PROBLEMS else ""
    advice = "; mend them, or leave them out with --on_invalid skip" if noun == "row" else ""
    count = f"{plural(len(problems), 'problem')} in {rows:,} of {plural(total, noun)}"
    raise UserError("\n".join([*lines, count + more + advice]))


def read_tools(path: str) -> tuple[list[dict], Counter]:
    """Return (tools of a JSON file, Counter of what to_tools changed); one that is not valid is a UserError."""
    with open_file(path) as file:
        text = read_text(file)
    if not text.lstrip().startswith("["):
        raise UserError(f'{path}: expected a JSON array of tools, [{{"type": "function", "function": {{...}}}}, ...]')
    pairs = list(read_array(path, text))
    try:
        tools, changes = to_tools([tool for _, tool in pairs])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None
    located = [(pairs[int(re.match(r"tool (\d+)", problem)[1]) - 1][0], problem) for problem in check_tools(tools)[1]]
    report_problems(located, "error", len(tools), "tool")
    return tools, changes


def to_examples(rows, tools_path: str,
                name: str = "auto") -> tuple[list[Example], list[tuple[str, str]], int, Counter, Counter]:
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
        return [example._replace(messages=[{key: value for key, value in message.items() if key != "reasoning_content"}
                                           for message in example.messages]) for example in examples], []
    problems = [(example.where, f"message {index}: has no reasoning; with --thinking on every trained answer needs it")
                for example in examples for index, message in enumerate(example.messages, start=1)
                if is_trained(message) and "reasoning_content" not in message]
    bad = {where for where, _ in problems}
    return [example for example in examples if example.where not in bad], problems


def find_first_answer(example: Example) -> int:
    """Return the index of the first assistant message."""
    return next(i for i, message in enumerate(example.messages) if message["role"] == "assistant")


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON value, in which the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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


# ---------------------------------------------------------------------------------------------------------------
# 5  Render: example -> one Sequence per assistant turn, on the prompt that serving will send
# ---------------------------------------------------------------------------------------------------------------
PARSERS = ("hermes", "llama3_json")  # as vLLM's --tool-call-parser names them
PROBE_TOOL = {"type": "function", "function": {"name": "probe_tool", "description": "Probe.", "parameters": {
    "type": "object", "properties": {"probe": {"type": "string"}}}}}
PROBE = [{"role": "user", "content": "probe"},
         {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "probe0001", "function": {
             "name": "probe_tool", "arguments": {"probe": "value"}}}]},
         {"role": "tool", "content": "probe reply", "name": "probe_tool", "tool_call_id": "probe0001"}]


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
    import jinja2

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


def render_turn(tokenizer, example: Example, turn: int, parser: str = "hermes",
                date: str | None = None) -> tuple[str, str]:
    """Return (prompt, answer) text of the assistant turn `example.messages[turn]`; ValueError if they do not fit.

    A template may render one turn differently in the middle of a conversation and at its end: Qwen3 drops the think
    block of a turn that a tool reply follows. So the prompt is what serving sends before the turn, and the answer is
    what the template adds when the turn is the last message.
    """
    turn_message, where = example.messages[turn], f"message {turn + 1}"
    render = partial(render_text, tokenizer, date=date, tools=example.tools or None)
    try:
        prompt = render(example.messages[:turn], add_generation_prompt=True,
                        enable_thinking="reasoning_content" in turn_message)
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
        raise UserError(f"{tokenizer.name_or_path}: {error}; expected that of a model whose calls vLLM's parser "
                        f"{' or '.join(PARSERS)} reads") from None


def find_control_tokens(tokenizer) -> re.Pattern | None:
    """Return what matches the tokenizer's own control tokens beyond CONTROL_TOKEN, or None if there are none."""
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()
              if token.special or str(token) in str(tokenizer.chat_template)]
    tokens = [token for token in tokens if token.strip() and not CONTROL_TOKEN.search(token)]
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def check_control_tokens(example: Example, control_token: re.Pattern) -> None:
    """Raise a ValueError if a message or a tool holds a control token."""
    parts = {"tools": example.tools} | {f"message {i}": part for i, part in enumerate(example.messages, start=1)}
    for name, part in parts.items():
        if problem := find_forbidden(json.dumps(part, ensure_ascii=False), control_token):
            raise ValueError(f"{name}: {problem}")


def describe_length(tokens: int, max_seq_length: int) -> str:
    """Return the problem of a sequence that is too long."""
    return f"{tokens:,} tokens; --max_seq_length is {max_seq_length:,} and no answer is ever cut"


def render_examples(tokenizer, examples: list[Example], max_seq_length: int, date: str | None = None):
    """Return ([sequences of example 0, ...], problems); the sequences of an example with a problem are left out."""
    from rich.progress import track

    rendered, problems, bad = [], [], set()
    parser, control_token = check_template(tokenizer, examples), find_control_tokens(tokenizer)
    for index, example in enumerate(track(examples, "render", transient=True, disable=not sys.stdout.isatty())):
        turns = [i for i, message in enumerate(example.messages) if is_trained(message)]
        try:
            check_control_tokens(example, control_token) if control_token else None
            rendered += [(index, turn, *render_turn(tokenizer, example, turn, parser, date)) for turn in turns]
        except (ValueError, RecursionError) as error:
            problems.append((example.where, str(error)))
            bad.add(index)
    # Prompt and answer are encoded apart: the model is served the prompt's tokens and then writes its own.
    encode = partial(tokenizer, add_special_tokens=False, return_attention_mask=False)
    prompts = encode([prompt for *_, prompt, _ in rendered])["input_ids"] if rendered else []
    answers = encode([answer for *_, answer in rendered])["input_ids"] if rendered else []
    groups: list[list[Sequence]] = [[] for _ in examples]
    for (index, turn, _, text), prompt, answer in zip(rendered, prompts, answers):
        example = examples[index]
        if len(prompt) + len(answer) > max_seq_length:
            bad.add(index)
            problems.append((example.where, describe_length(len(prompt) + len(answer), max_seq_length)))
        request = next((m["content"] for m in reversed(example.messages[:turn]) if m["role"] == "user"), "")
        groups[index].append(Sequence(example.where, prompt + answer, len(prompt),
                                      text.removesuffix(tokenizer.eos_token), example.tools, request, parser))
    return [[] if index in bad else group for index, group in enumerate(groups)], problems


def show_row(tokenizer, sequence: Sequence, whole: bool = False) -> None:
    """Print a row as the model sees it, cut unless `whole`; ▶ ... ◀ (green on a terminal) is what is supervised."""
    from rich.text import Text

    prompt = tokenizer.decode(sequence.input_ids[: sequence.prompt_length])
    answer = tokenizer.decode(sequence.input_ids[sequence.prompt_length :])
    if len(prompt) > 500 and not whole:
        prompt = f"{prompt[:160]} … {len(prompt) - 460:,} characters … {prompt[-300:]}"
    text = Text(f"\n{sequence.where}  ({sequence.prompt_length:,} prompt tokens, "
                f"{len(sequence.input_ids) - sequence.prompt_length} supervised)\n", style="bold")
    text += Text(prompt, style="dim") + Text(f"▶{answer}◀", style="green")
    make_console(soft_wrap=True).print(text)


def find_shown(args: argparse.Namespace, examples: list[Example]) -> str | None:
    """Return where the row of --show_row is, or None; a number beyond the last row is a UserError."""
    if args.show_row and args.show_row > len(examples):
        raise UserError(f"--show_row {args.show_row}: no such row; expected 1 to {len(examples):,}, the valid rows")
    return examples[args.show_row - 1].where if args.show_row else None


def show_rows(tokenizer, sequences: list[Sequence], shown: str | None) -> None:
    """Print every trained turn of the row `shown` whole; without it, the first two sequences, shortened."""
    chosen = [sequence for sequence in sequences if sequence.where == shown] if shown else sequences[:2]
    if not chosen:
        warn(f"--show_row: {shown} is left out; expected a row without a problem")
    for sequence in chosen:
        show_row(tokenizer, sequence, whole=shown is not None)


# ---------------------------------------------------------------------------------------------------------------
# 6  Batch: sequences -> one flat stream per micro-batch that holds every common prefix once
# ---------------------------------------------------------------------------------------------------------------
class Plan(NamedTuple):
    """How an optimizer step is computed: on each of `devices` in `accumulation` streams of `rows` rows.

    Streams are filled up to one of `lengths`, and hold at most `limit` tokens before, unless one row has more; `groups`
    are the training rows that can share (see group_rows).
    """

    rows: int
    accumulation: int
    groups: list[list[list[int]]]
    lengths: tuple[int, ...] = ()
    share_prefix: bool = True
    devices: int = 1
    limit: float = math.inf

    @property
    def rows_per_step(self) -> int:
        """The effective batch: rows per optimizer step on all devices."""
        return self.rows * self.accumulation * self.devices


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


def fill_up(size: int, lengths: tuple[int, ...]) -> int:
    """Return the first of the lengths that holds a stream of `size` tokens.

    One that is longer than all, as of held-out rows unlike those of training, goes up to the next quarter of the
    longest, in the kernel's steps of 128: attention is compiled anew for each length. Without any, nothing is filled.
    """
    step = -(-lengths[-1] // 512) * 128 if lengths else 1
    return next((length for length in lengths if length >= size), -(-size // step) * step)


def build_stream(rows: list[Sequence], lengths: tuple[int, ...] = ()) -> dict:
    """Lay rows out as one sequence in which a prefix that several rows share stands once.

    The rows form a tree of tokens, written in depth-first order: a token's descendants are the tokens after it up to
    its `subtree_end`. A token attends to its ancestors, which are all tokens k with k <= q < subtree_end[k]; so it sees
    its own row from the start and nothing of any other, and loss and gradient are those of the rows one by one.

    Args:
        rows: sequences in any order.
        lengths: the stream is filled up to one of these (see fill_up), with tokens that see only themselves.
    Returns: int64 tensors of shape [1, tokens]: input_ids, position_ids, labels (-100: not supervised), subtree_end.
    """
    import numpy as np
    import torch

    tree = to_tree(rows)
    length = fill_up(sum(len(row.input_ids) - shared for row, shared in tree), lengths)
    stream = {"input_ids": np.zeros(length, dtype=np.int64), "position_ids": np.zeros(length, dtype=np.int64),
              "labels": np.full(length, -100), "subtree_end": np.arange(1, length + 1)}  # what fills it up
    path, size = np.zeros(0, dtype=np.int64), 0  # path: where the tokens of the row before stand in the stream
    for row, shared in tree:
        stream["subtree_end"][path[shared:]] = size
        tokens, positions = np.asarray(row.input_ids, dtype=np.int64), np.arange(len(row.input_ids))
        own = slice(size, size + len(tokens) - shared)
        stream["input_ids"][own], stream["position_ids"][own] = tokens[shared:], positions[shared:]
        stream["labels"][own] = np.where(positions < row.prompt_length, -100, tokens)[shared:]
        path = np.concatenate([path[:shared], np.arange(own.start, own.stop)])
        size = own.stop
    stream["subtree_end"][path] = size
    return {name: torch.from_numpy(values)[None] for name, values in stream.items()}


def build_padded(rows: list[Sequence]) -> dict:
    """Return the rows as an ordinary batch, padded on the right: int64 [rows, longest]; for --no-share_prefix."""
    import torch

    tokens = [torch.as_tensor(row.input_ids, dtype=torch.int64) for row in rows]
    labels = [ids.masked_fill(torch.arange(len(ids)) < row.prompt_length, -100) for ids, row in zip(tokens, rows)]
    ones, pad = [*map(torch.ones_like, tokens)], partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {"input_ids": pad(tokens), "labels": pad(labels, padding_value=-100), "attention_mask": pad(ones)}


def build_batch(rows: list[Sequence], plan: Plan) -> dict:
    """Return the tensors of one micro-batch as the plan says."""
    return build_stream(rows, plan.lengths) if plan.share_prefix else build_padded(rows)


def group_rows(sequences: list[Sequence]) -> list[list[list[int]]]:
    """Return indices of sequences: groups (the same tools) of conversations (the same row of the file) of turns.

    Rows whose prompts share at least half of their tokens are of one group.
    """
    index_of = {id(sequence): i for i, sequence in enumerate(sequences)}
    groups: list[dict[str, list[int]]] = []
    for sequence, shared in to_tree(sequences):
        if not groups or shared < sequence.prompt_length / 2:
            groups.append({})
        groups[-1].setdefault(sequence.where, []).append(index_of[id(sequence)])
    return [list(group.values()) for group in groups]


def order_rows(plan: Plan, seed: int, epoch: int) -> list[int]:
    """Return the order of the training rows in one epoch: random, yet with rows of the same tools in small runs.

    With one list of tools this is a plain shuffle. With many, rows that can share their prefix meet in a step: half of
    it is of one list, so that it mixes several. The same seed and epoch give the same order for the same rows per step,
    however these are cut into streams, so a resumed run goes on as planned, also on another number of devices.
    """
    generator, piece = random.Random(f"{seed} {epoch}"), max(1, plan.rows_per_step // 2)
    pieces = []
    for group in plan.groups:
        conversations = generator.sample(group, len(group))
        rows = [row for conversation in conversations for row in conversation]
        pieces += [rows[i : i + piece] for i in range(0, len(rows), piece)]
    generator.shuffle(pieces)
    return [row for rows in pieces for row in rows]


def cut_streams(plan: Plan, args: argparse.Namespace, epoch: int) -> list[list[int]]:
    """Return the rows of each stream of one epoch, step by step; within a step the devices take turns.

    What is left for the last step is spread evenly. With fewer rows than devices, some of its streams have no row.
    """
    order, streams, size = order_rows(plan, args.seed, epoch), [], plan.rows_per_step
    for rows in (order[i : i + size] for i in range(0, len(order), size)):
        count = plan.devices * math.ceil(len(rows) / (plan.rows * plan.devices))
        streams += [rows[len(rows) * i // count : len(rows) * (i + 1) // count] for i in range(count)]
    return streams


class StreamSampler:
    """The rows of one stream after the other, as a batch sampler of PyTorch's DataLoader.

    A stream without a row is given as the index after the last row, which stands for one that trains nothing.
    """

    def __init__(self, plan: Plan, args: argparse.Namespace, rows: int, find_epoch):
        self.plan, self.args, self.rows, self.find_epoch = plan, args, rows, find_epoch

    def __len__(self):
        return len(cut_streams(self.plan, self.args, epoch=0))

    def __iter__(self):
        return iter([stream or [self.rows] for stream in cut_streams(self.plan, self.args, self.find_epoch())])


def measure_batches(sequences: list[Sequence], plan: Plan, batches: list[list[int]]) -> list[int]:
    """Return how many tokens are computed for each batch, given as the indices of its rows; empty ones are left out."""
    batches = [[sequences[i] for i in batch] for batch in batches if batch]
    if not plan.share_prefix:
        return [len(batch) * max(len(row.input_ids) for row in batch) for batch in batches]
    return [fill_up(count_tokens(batch), plan.lengths) for batch in batches]


def count_measured_epochs(args: argparse.Namespace, sequences: list[Sequence]) -> int:
    """Return of how many epochs a run is measured: of all that it begins, but not of hundreds."""
    steps, per_epoch = count_steps(args, sequences)
    return min(MEASURED_EPOCHS, math.ceil(steps / per_epoch))


def measure_run(sequences: list[Sequence], plan: Plan, args: argparse.Namespace) -> list[int]:
    """Return how many tokens are computed for each stream of the epochs that are measured."""
    import numpy as np

    rows = [row._replace(input_ids=np.asarray(row.input_ids, dtype=">u4")) for row in sequences]  # once for all epochs
    return [size for epoch in range(count_measured_epochs(args, sequences))
            for size in measure_batches(rows, plan, cut_streams(plan, args, epoch))]


def to_padded(plan: Plan, args: argparse.Namespace) -> Plan:
    """Return the plan of the same steps in ordinary batches of --batch_size."""
    return plan._replace(rows=args.batch_size, accumulation=args.gradient_accumulation_steps, share_prefix=False)


def plan_streams(sequences: list[Sequence], args: argparse.Namespace, engine: str) -> Plan:
    """Fuse accumulation steps into one stream as far as the flags' memory allows, for every stream of the run.

    A stream may hold batch_size x max_seq_length tokens: what the flags allow a padded batch to hold.
    """
    batch_size, steps = args.batch_size, args.gradient_accumulation_steps
    plan = Plan(batch_size, steps, group_rows(sequences), share_prefix=args.share_prefix, devices=count_devices())
    if not args.share_prefix:
        return plan
    for fused in range(steps, 0, -1):
        if steps % fused == 0:
            plan = plan._replace(rows=batch_size * fused, accumulation=steps // fused,
                                 limit=batch_size * args.max_seq_length)
            sizes = measure_run(sequences, plan, args)
            if fused == 1 or max(sizes) <= plan.limit:
                return plan._replace(lengths=choose_lengths(sizes)) if engine == "unsloth" else plan


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


def split_rows(rows: list[Sequence], size: int, limit: float = math.inf) -> list[list[Sequence]]:
    """Return rows in parts of at most `size`, and of `limit` tokens if they share; neighbours share the most."""
    ordered = [row for row, _ in to_tree(rows)]
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [half for part in parts for half in (
        [part] if limit == math.inf or len(part) == 1 or count_tokens(part) <= limit
        else split_rows(part, -(-len(part) // 2), limit))]


def divide_plan(plan: Plan, size: int, sequences: list[Sequence], args: argparse.Namespace) -> Plan:
    """Return the plan by which each of its streams is computed in parts of at most `size` rows.

    The parts have lengths of their own: filled up to those of whole streams they would need as much memory.
    """
    if not plan.lengths:
        return plan._replace(rows=size)
    sizes = [count_tokens(part) for epoch in range(count_measured_epochs(args, sequences))
             for stream in cut_streams(plan, args, epoch) if stream
             for part in split_rows([sequences[i] for i in stream], size)]
    return plan._replace(rows=size, lengths=choose_lengths(sizes))


def to_batches(sequences: list[Sequence], plan: Plan) -> list[dict]:
    """Return the batches of sequences for scoring, where order does not matter."""
    return [build_batch(part, plan) for part in split_rows(sequences, plan.rows, plan.limit)]


def to_small_batches(sequences: list[Sequence], plan: Plan) -> list[dict]:
    """Return the batches on which losses of saved models are compared: small, as less memory may be left by then."""
    small = plan._replace(rows=min(plan.rows, READ_BACK_BATCH), lengths=())
    return to_batches(sequences[:READ_BACK_ROWS], small)


# ---------------------------------------------------------------------------------------------------------------
# 7  Model: model id -> model with LoRA, by Unsloth or by Transformers + PEFT
# ---------------------------------------------------------------------------------------------------------------
UNSLOTH_TREES = ("llama", "qwen2", "qwen3")  # config.model_type of the models whose layers take prefix_seg_info


def refuse_telemetry() -> None:
    """Keep the libraries from reporting home: Hugging Face's count their use, Unsloth sends what machine this is.

    They look at these variables when they are imported, so this comes before everything else. A user who wants to be
    counted sets one to 0; it is removed then, because Unsloth asks only whether its variable is there.
    """
    for name in ("UNSLOTH_DISABLE_STATISTICS", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY"):
        if os.environ.setdefault(name, "1") == "0":
            del os.environ[name]


def return_pages() -> None:
    """Let PyTorch give GPU memory back by the page, not only once all that was taken together is free.

    Otherwise 8 MiB that Unsloth keeps for good hold 1.2 GiB, and the process that merges finds as much less. Unsloth
    sets this too, but PyTorch reads it when it is imported, and that is before. Not where the driver has no pages to
    give: on Windows, also under Linux (WSL), and on Jetson boards.
    """
    if sys.platform != "linux" or "microsoft" in os.uname().release.lower() or os.path.exists("/etc/nv_tegra_release"):
        return
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its former name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def start_engine(args: argparse.Namespace) -> str:
    """Import the engine and return its name; Unsloth patches trl, transformers and peft, so it must come first."""
    import torch

    if torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise UserError(f"{here} processes for {plural(gpus, 'GPU')}; expected --nproc_per_node {gpus}")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    engine = args.engine if args.engine != "auto" else "unsloth" if torch.cuda.is_available() else "transformers"
    if engine == "unsloth":
        if not torch.cuda.is_available():
            raise UserError("--engine unsloth needs a CUDA GPU, and torch sees none; use --engine transformers")
        late = sorted({"trl", "transformers", "peft"} & sys.modules.keys())
        if late and "unsloth" not in sys.modules:
            raise RuntimeError(f"Unsloth must be imported before {', '.join(late)}: it patches them")
        # Its generated trainers belong with the run, not into the folder the user happens to stand in.
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(args.output_dir).resolve() / COMPILED))
        if args.share_prefix:
            os.environ.setdefault("UNSLOTH_BLOCK_COMPILE", "0")  # compiled blocks serve padded batches, for ten seconds
            os.environ.setdefault("UNSLOTH_LOGPROB_CHUNK_GB", "0.0625")  # scratch for logits and for cuBLAS: with
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # 0.3 GB more they are no faster
            if torch.cuda.get_device_capability() < (8, 0):  # 64 KiB of shared memory, of which Unsloth's tiles take 96
                os.environ.setdefault("PG_FLEX_BF16_BLOCK_M", "64")
                os.environ.setdefault("PG_FLEX_BF16_BLOCK_N", "32")
        import unsloth  # noqa: F401
    import transformers

    quiet_libraries()
    transformers.set_seed(args.seed)
    return engine


def quiet_libraries() -> None:
    """Keep the libraries' advice off the screen: errors still show."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("bitsandbytes", "datasets", "peft", "trl", "torch.utils._pytree", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="peft")  # of ranks of experts, which it does set


def check_report_to(name: str) -> None:
    """Refuse a tracker whose library is not installed, before a model is loaded for it."""
    from transformers.integrations import get_available_reporting_integrations

    known = ["none", "all", *get_available_reporting_integrations()]
    if name not in known:
        raise UserError(f"--report_to {name}: not installed, or unknown to Transformers; here: {', '.join(known)}")


def check_optim(args: argparse.Namespace) -> None:
    """Refuse an optimizer that Transformers does not know, before a model is loaded for it."""
    from transformers.training_args import OptimizerNames

    known = [optimizer.value for optimizer in OptimizerNames]
    if find_optim(args) not in known:
        raise UserError(f"--optim {args.optim}: unknown to Transformers{suggest(args.optim, known)}")


def explain_hub_error(message: str, folder: Path) -> str:
    """Return what a user can do about a model that could not be loaded."""
    text = message.lower()
    if folder.is_file():
        return "is a file; expected the folder of a model"
    if (folder / "adapter_config.json").is_file():
        return "is an adapter; expected the model that it belongs to, its base"
    if "trust_remote_code" in text:
        return "brings Python code of its own, which is not run; if you know who wrote it, add --trust_remote_code"
    if folder.is_dir() or "model type" in text or "model_type" in text:
        return f"nothing that Transformers can load: {cut_text(message)}"
    if "gated" in text or "401" in text or "403" in text:
        return "gated or private; accept its terms on the Hub, then run `hf auth login`"
    if "connect" in text or "offline" in text or "cached" in text or "resolve" in text:
        return "no such folder, not in the cache, and the Hub cannot be reached; check the network, or give a folder"
    return "no such folder and no such model on the Hub; check the spelling"


def load_config(model_id: str, flag: str = "--model_id", trust: bool = False):
    """Return the config of a model; whatever is wrong with the id becomes one line that says so.

    Here as in every load, Python code that comes with a model is run only with `trust`.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_id, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{flag} {model_id}: {explain_hub_error(str(error), Path(model_id))}") from None


def check_model(model_id: str, flag: str = "--model_id", trust: bool = False):
    """Return the config of a causal language model with weights; anything else is a UserError."""
    folder = Path(model_id)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise UserError(f"{flag} {model_id}: the folder holds no *.safetensors; give a folder saved by save_pretrained")
    config = load_config(model_id, flag, trust)
    check_kind(config, model_id, flag)
    check_weights(folder, f"{flag} {model_id}")
    return config


def check_weights(folder: Path, what: str) -> None:
    """Refuse a folder that lacks a file its index names, or holds one cut off, or git-lfs' pointer in place of one."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    try:
        parts = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()} if index.is_file() else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{what}: {index.name} does not say which weights are where; download it again") from None
    if missing := sorted(name for name in parts if not (folder / name).is_file()):
        raise UserError(f"{what}: has no {list_first(missing, 3)}; download it again")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{what}: {file.name} holds no whole weights ({error}); download it again") from None


def check_kind(config, model_id: str, flag: str = "--model_id") -> None:
    """Refuse what is no causal language model, or one whose layers do not all look back on all tokens."""
    names = config.architectures or []
    if not any(name.endswith("ForCausalLM") for name in names):
        raise UserError(f"{flag} {model_id}: not a causal language model ({', '.join(names) or config.model_type})")
    layers = getattr(config, "layer_types", None) or []
    kinds, window = {*layers} - {"full_attention"}, not layers and getattr(config, "sliding_window", None)
    if kinds or window and window < getattr(config, "max_position_embeddings", math.inf):
        raise UserError(f"{flag} {model_id}: has layers of {', '.join(sorted(kinds)) or 'sliding_attention'}, which do "
                        "not look back on all tokens; expected full attention in every layer")


def check_dropout(args: argparse.Namespace, config) -> None:
    """Refuse dropout for a mixture of experts: PEFT has none for experts, whose weights are one tensor per layer."""
    if args.lora_dropout and (getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)):
        raise UserError(f"--lora_dropout {args.lora_dropout}: {args.model_id} is a mixture of experts, whose adapters "
                        "have no dropout; expected 0")


def can_share(engine: str, config) -> bool:
    """Say whether an engine's attention for a kind of model takes trees; print one line if not."""
    if engine != "unsloth" or config.model_type in UNSLOTH_TREES:
        return True
    say("plan", f"ordinary padded batches: with Unsloth, only {', '.join(UNSLOTH_TREES)} share prefixes, and this is "
                f"{config.model_type}; --engine transformers shares them, too")
    return False


def find_end_token(tokenizer) -> str | None:
    """Return the token with which the chat template ends an answer, or None if there is none."""
    answer = {"role": "assistant", "content": "probe answer"}
    try:
        tail = render_text(tokenizer, [PROBE[0], answer]).rpartition(answer["content"])
    except ValueError:
        return None
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token) in tail[2]]
    return min(tokens, key=tail[2].find, default=None) if tail[1] else None


def load_tokenizer(model_id: str, trust: bool = False, flag: str = "--model_id"):
    """Return the base model's own tokenizer, whose eos_token is the one that ends the answers of its chat template.

    Bases have the template of their chat models and another eos_token, which would never be written.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        reason = explain_hub_error(str(error), Path(model_id))
        raise UserError(f"{flag} {model_id}: its tokenizer cannot be loaded: {reason}") from None
    if not tokenizer.chat_template:
        raise UserError(f"{flag} {model_id}: has no chat template; use a chat model such as {MODEL_ID}")
    end = find_end_token(tokenizer)
    if end is None:
        raise UserError(f"{flag} {model_id}: its chat template does not end an answer with a token of its own, so "
                        f"the model could not stop; use a chat model such as {MODEL_ID}")
    if end != tokenizer.eos_token:
        tokenizer.eos_token = end
    return tokenizer


def to_dtype(device: str):
    """Return the compute type of a device: bf16 where a GPU has it, fp16 on older ones, fp32 on CPU."""
    import torch

    if device != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def find_optim(args: argparse.Namespace, cuda: bool = False) -> str:
    """Return the optimizer of a run as it is here, or on CUDA with `cuda`, also if it names none."""
    import torch

    if args.optim or not (cuda or torch.cuda.is_available()):
        return args.optim or "adamw_torch"
    # The moments of a whole model that --fsdp splits, bitsandbytes' optimizers cannot hold.
    return CUDA_OPTIM if args.lora_rank or args.fsdp else FULL_CUDA_OPTIM


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
    """Return for each block of queries the blocks of keys it sees anything of, from a mask [1, 1, tokens, tokens]."""
    import torch

    size, length = block_size(attention_mask), attention_mask.shape[-1]
    blocks, fill = -(-length // size), -length % size
    padded = torch.nn.functional.pad(attention_mask[0, 0], (0, fill, 0, fill))
    return [row.nonzero()[:, 0].tolist() for row in padded.view(blocks, size, blocks, size).any(dim=3).any(dim=1).cpu()]


def block_size(tensor) -> int:
    """Return how many tokens a block of attention has: few on CPU, to skip much; many on a GPU, to launch little."""
    return 128 if tensor.device.type == "cpu" else 1024


def attend_with_prefix(query, key, value, attention_mask, scaling: float, prefix_key, prefix_value):
    """Return the attention [rows, tokens, heads, head_dim] of rows whose common prefix is held once, not row by row.

    query is [rows, heads, tokens, head_dim]; key and value are [rows, key heads, keys, head_dim], those of the prefix
    [1, key heads, prefix, head_dim]; attention_mask is bool [rows, 1, tokens, keys]. Every token sees the whole prefix.
    """
    import torch

    rows, heads, tokens, _ = query.shape
    query = query.view(rows, key.shape[1], -1, tokens, query.shape[-1])  # query heads grouped by their key head
    own = torch.einsum("bgrqd,bgkd->bgrqk", query, key).masked_fill(~attention_mask[:, :, None], -math.inf)
    shared = torch.einsum("bgrqd,gpd->bgrqp", query, prefix_key[0])
    weights = (torch.cat([shared, own], dim=-1) * scaling).softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    shared, own = weights.split([shared.shape[-1], own.shape[-1]], dim=-1)
    output = torch.einsum("bgrqp,gpd->bgrqd", shared, prefix_value[0]) + torch.einsum("bgrqk,bgkd->bgrqd", own, value)
    return output.reshape(rows, heads, tokens, -1).transpose(1, 2)


def attend_in_blocks(module, query, key, value, attention_mask, scaling=None, key_blocks=None, prefix_cache=None,
                     **kwargs):
    """Return PyTorch's attention [rows, tokens, heads, head_dim] without the blocks in which nothing is seen.

    A stream of many rows is mostly such blocks. With `prefix_cache` the rows have a prefix in common whose keys and
    values stand there. With neither, this is the attention of Transformers' "sdpa".
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if prefix_cache is not None:
        layer = prefix_cache.layers[module.layer_idx]
        scores = query[0, :, :, 0].numel() * (layer.keys.shape[2] + key.shape[2])  # of one row
        parts = [tensor.split(max(1, HELD_SCORES // scores)) for tensor in (query, key, value, attention_mask)]
        return torch.cat([attend_with_prefix(*part, scaling, layer.keys, layer.values) for part in zip(*parts)]), None
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


def load_base(model_id: str, load_in_4bit: bool, trust: bool = False, dtype=None, place: str | None = None,
              storage=None):
    """Return a model with plain Transformers, in 4 bits if asked, on the GPU if there is one or where `place` says.

    4-bit numbers are held as bytes, or several of them in a number of the type `storage`. Here as in every load,
    weights are read from safetensors alone, because a pickle can run code.
    """
    import torch
    from accelerate.utils import get_max_memory
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.masking_utils import sdpa_mask

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or to_dtype(device)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=storage)
    AttentionInterface.register("blocks", attend_in_blocks)
    AttentionMaskInterface.register("blocks", sdpa_mask)
    options = {"quantization_config": four_bit} if load_in_4bit else {}  # None would undo that of the folder
    if place == "auto" and getattr(load_config(model_id, trust=trust), "quantization_config", None):
        place = device  # Transformers counts on far too little room, and would leave a part of it on the CPU
    if place == "auto":  # of the GPUs' free memory a quarter is left, for what answers need
        free_gpu()  # or what PyTorch keeps of the model before this one would not count as free
        room = {name: int(0.75 * size) if isinstance(name, int) else size for name, size in get_max_memory().items()}
        options |= {"max_memory": room}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            model_id, dtype=dtype, attn_implementation="blocks", device_map=place or device, use_safetensors=True,
            trust_remote_code=trust, output_loading_info=True, **options)
    except (OSError, RuntimeError) as error:
        if is_disk_full(error) or isinstance(error, RuntimeError) and "mismatched" not in str(error):
            raise
        raise UserError(f"{model_id}: its weights cannot be loaded: {str(error).splitlines()[0]}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{model_id}: has no weights for {list_first(missing, 3)}; download it again")
    for module in model.modules():
        # On CPU, the first inference makes bitsandbytes repack 4-bit weights for bf16, in training from then on too.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_adapter(model, adapter: str):
    """Return a model with its adapter, each part where it is.

    PEFT would spread it anew by what is free now, and so count weights twice that are there already.
    """
    from peft import PeftModel

    places = getattr(model, "hf_device_map", {})
    return PeftModel.from_pretrained(model, adapter, device_map={
        f"base_model.model.{name}".rstrip("."): place for name, place in places.items()})


def load_model(args: argparse.Namespace, engine: str, plan: Plan):
    """Return the base model, in 4 bits if asked, with fresh LoRA adapters on --target_modules.

    With --lora_rank 0 it is the base alone, in fp32: late, small updates round to nothing in 16 bits. The trainer's
    autocast computes in 16 bits on CUDA all the same, so only memory is the price. (TRL and Unsloth do so too.)
    """
    lora = dict(r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, bias="none",
                use_rslora=args.use_rslora, target_modules=args.target_modules)
    import torch

    if engine == "unsloth":
        from torch.nn.attention.flex_attention import flex_attention
        from trl.trainer.utils import add_fused_lm_head
        from unsloth import FastLanguageModel
        from unsloth.utils import prefix_grouper_kernel

        model, _ = FastLanguageModel.from_pretrained(
            args.model_id, max_seq_length=args.max_seq_length, load_in_4bit=args.load_in_4bit, dtype=None,
            use_safetensors=True, trust_remote_code=args.trust_remote_code,
            use_exact_model_name=True)  # not a copy of it in Unsloth's own repositories
        model = FastLanguageModel.get_peft_model(
            model, **lora, random_state=args.seed,
            use_gradient_checkpointing="unsloth" if use_checkpointing(args) else False)
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "is_top1"))
        # Streams have few lengths, so attention compiled for exactly these is worth it: half the time of "any length".
        # By fullgraph, what cannot be compiled is an error (see check_sharing), and not run uncompiled as by Unsloth.
        prefix_grouper_kernel._flex_attention_compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        read_streams(model, find_recorded(args, plan, model.config))
        return model

    from peft import LoraConfig, get_peft_model

    dtype, split = None if args.lora_rank else torch.float32, {}
    if args.fsdp:  # from the CPU; but to quantise there takes minutes, so a 4-bit base is on each GPU whole at first
        cuda = torch.cuda.is_available()
        # Held as fp32: PyTorch gathers bf16 through fp32, by which 4-bit numbers that look like NaN become others.
        split = {"place": None if args.load_in_4bit and cuda else "cpu", "storage": torch.float32}
        if not args.lora_rank:  # whole, it is held in the type that it was saved in
            dtype = load_config(args.model_id, trust=args.trust_remote_code).dtype
    model = load_base(args.model_id, args.load_in_4bit, args.trust_remote_code, dtype, **split)
    model.config.use_cache = False
    if args.lora_rank:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    return split_model(model) if args.fsdp else model


def warn_of_frozen_experts(model) -> None:
    """Say if the experts of a mixture get no adapter: PEFT knows under what names only for some kinds of models."""
    experts = [weight.requires_grad for name, weight in model.named_parameters() if ".experts." in name]
    if experts and not any(experts):
        warn(f"the experts of this {model.config.model_type} get no adapter: the layers beside them alone are trained")


def split_model(model):
    """Return the model with its weights split over all devices (FSDP2); they must be floats or stored as such.

    Each device gathers a layer when it computes it, and then lets it go. An adapter, which is small, stays whole on
    each device, and its gradients are averaged as those of a whole model would be (DDP, told to leave the rest alone).
    Without an adapter all weights are trained in fp32, and what belongs to them is split like them: gradients, which
    FSDP averages, and the optimizer's moments. What is saved is whole, and what is loaded may be: so checkpoints,
    resuming and results are those of a run without FSDP (up to rounding: norms, too, are then computed in 16 bits).
    """
    import torch
    from accelerate import PartialState
    from peft import PeftModel
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if any(not weight.is_floating_point() for weight in model.parameters()):
        raise UserError("--fsdp splits floating-point weights, and those of --model_id are quantised; use the 16-bit "
                        "original")
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=PATIENCE))
    # After forward too, or the one device that saves a checkpoint after an evaluation would let go alone.
    how = {"mesh": init_device_mesh(state.device.type, (state.num_processes,)), "reshard_after_forward": True}
    adapter = isinstance(model, PeftModel)
    if adapter:
        how["ignored_params"] = {parameter for parameter in model.parameters() if parameter.requires_grad}
        for parameter in how["ignored_params"]:
            parameter.data = parameter.data.to(state.device)
        model._ddp_params_and_buffers_to_ignore = [name for name, weight in model.named_parameters()
                                                   if not weight.requires_grad]
    else:
        how["mp_policy"] = MixedPrecisionPolicy(to_dtype(state.device.type), torch.float32)  # computed in, averaged in
        model.register_load_state_dict_pre_hook(split_weights)
    for module in (*(model.get_base_model() if adapter else model).model.layers, model):
        fully_shard(module if adapter else module.float(), **how)
    return model


def held_part(tensor):
    """Return the part of a split tensor that this device holds; of any other the whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def split_as(weight, value):
    """Return a whole tensor split over the devices as a weight of its shape is; others as they are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(weight, DTensor) or weight.shape != value.shape:
        return value
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)  # each has the whole


def split_weights(model, weights: dict, *_) -> None:
    """Split whole weights as the model's are, before it loads them (a hook of load_state_dict)."""
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name in weights:
            weights[name] = split_as(weight, weights[name])


def gather_whole(state):
    """Return a state of split tensors with each of them whole, on the CPU of the first process; all must call this."""
    from torch.distributed.tensor import DTensor
    from torch.utils._pytree import tree_map_only

    def gather(tensor):
        whole = tensor.full_tensor()
        return whole.cpu() if is_main() else None

    return tree_map_only(DTensor, gather, state)


def gather_weights(model) -> dict:
    """Return a split model's weights by name, as gather_whole does; one that has two names stands there once."""
    again = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return gather_whole({name: value for name, value in model.state_dict().items() if name not in again})


def to_prefix_seg_info(subtree_end):
    """Return the object by which Unsloth's attention finds the block mask of this stream in its cache.

    Unsloth's FlexAttention kernel shares one prefix per group (unsloth/utils/prefix_grouper_kernel.py). The tree is
    more general and its mask simpler, so the mask is made here and put where the kernel looks first.
    """
    from unsloth.utils import prefix_grouper_kernel as kernel

    def sees(batch, head, query, key):
        return (key <= query) & (query < subtree_end[key])

    length = len(subtree_end)
    seg_info = SimpleNamespace(signature=object(), T=length, T_pad=length)
    kernel.clear_block_mask_cache()  # one stream at a time
    kernel._BLOCK_MASK_CACHE[(seg_info.signature, str(subtree_end.device))] = kernel._create_block_mask_compiled(
        sees, B=1, H=None, Q_LEN=length, KV_LEN=length, device=subtree_end.device)
    return seg_info


# Held while training, measured with Unsloth on Qwen3-0.6B: GiB that no stream needs but every run has, and the work of
# one layer as a multiple of what its backward pass keeps. A recorded graph frees nothing between its kernels.
EAGER_MEMORY, RECORDED_MEMORY = (0.11, 0.7), (0.27, 1.25)


def count_token_bytes(args: argparse.Namespace, config, working: float) -> float:
    """Return the bytes of GPU memory that a token of a stream takes in training.

    A layer's backward pass keeps the inputs of its norms and projections, 2 bytes each. With checkpointing that is so
    for one layer at a time, `working` times with what is computed from them, and of the others only the input is kept.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = 4 * config.hidden_size + 3 * head_dim * (heads + config.num_key_value_heads) + 2 * config.intermediate_size
    if args.gradient_checkpointing == "off":
        return 2 * config.num_hidden_layers * kept
    return 2 * config.num_hidden_layers * config.hidden_size + working * 2 * kept


def can_record(args: argparse.Namespace, plan: Plan) -> bool:
    """Return whether streams may be recorded as CUDA graphs (see read_streams).

    A recorded gradient lies where the next one will be written, so there must be one stream per step; and dropout would
    be the recorded one.
    """
    return args.cuda_graphs and plan.share_prefix and plan.accumulation == 1 and not args.lora_dropout


def find_recorded(args: argparse.Namespace, plan: Plan, config) -> tuple[int, ...]:
    """Return the lengths of streams that are recorded: all of the plan's, or none if they hold over RECORDED_SHARE.

    Each recorded length holds for good what it needs.
    """
    import torch

    if not can_record(args, plan):
        return ()
    free_gpu()
    held = sum(plan.lengths) * count_token_bytes(args, config, RECORDED_MEMORY[1])
    return plan.lengths if held <= RECORDED_SHARE * torch.cuda.mem_get_info()[0] else ()


def read_streams(model, recorded: tuple[int, ...]) -> None:
    """Make Unsloth's decoder take streams (`subtree_end`), and replay those of some lengths as CUDA graphs.

    Most of a small model's step is spent launching 6,000 kernels one by one; and on several GPUs, the processes launch
    more slowly than one does, so that large models wait too. Forward and backward of each length of `recorded` are
    therefore recorded when it first comes in training, and from then on replayed by two launches. Layers are then
    checkpointed without Unsloth's copies to the CPU, which a graph cannot hold.
    """
    import torch.utils.checkpoint
    from transformers.modeling_outputs import BaseModelOutputWithPast

    decoder = model.get_base_model().model
    eager, pool = decoder.forward, torch.cuda.graph_pool_handle()
    decoder.graphs = {} if recorded else None  # see drop_graphs

    class Stream(torch.nn.Module):
        captured = False

        def __init__(self, length: int):
            super().__init__()
            self.decoder, self.packed_seq_lengths = decoder, torch.tensor([length])

        def forward(self, input_ids, position_ids, subtree_end):
            self.captured = torch.cuda.is_current_stream_capturing()
            # Given packed_seq_lengths, Unsloth need not wait for the GPU to find them, which a graph cannot.
            return eager(input_ids=input_ids, position_ids=position_ids, packed_seq_lengths=self.packed_seq_lengths,
                         prefix_seg_info=to_prefix_seg_info(subtree_end)).last_hidden_state

    def to_graph(*tensors):
        checkpoint = getattr(torch.utils.checkpoint, "_old_checkpoint", torch.utils.checkpoint.checkpoint)
        unsloth_checkpoint = getattr(decoder.layers[0], "_gradient_checkpointing_func", None)
        torch.cuda.empty_cache()
        stream = Stream(len(tensors[-1]))
        try:
            for layer in decoder.layers:
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False):
                graph = torch.cuda.make_graphed_callables(
                    stream, tuple(t.clone() for t in tensors), num_warmup_iters=1, pool=pool)
            # A stream longer than Unsloth's tables of rotations replaces them, but the graph goes on reading these.
            graph.rotations = [module.get_cached() for module in decoder.modules() if hasattr(module, "get_cached")]
            return graph
        except RuntimeError as error:
            if not stream.captured:  # in the trial before the recording, after which the run can go on
                raise
            if isinstance(error, torch.OutOfMemoryError):  # now CUDA's allocator is in a state not to be trusted
                raise UserError("out of GPU memory while the step was recorded as a CUDA graph; run again with "
                                "--no-cuda_graphs, slower, or lower --batch_size") from None
            raise UserError(f"the step cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}); "
                            "run again with --no-cuda_graphs, slower") from None
        finally:
            for layer in decoder.layers:
                layer._gradient_checkpointing_func = unsloth_checkpoint

    def forward(*inputs, subtree_end=None, **kwargs):
        if subtree_end is None:
            return eager(*inputs, **kwargs)
        length, tensors = len(subtree_end), (kwargs["input_ids"], kwargs["position_ids"], subtree_end)
        stream = None
        if decoder.graphs is not None and length in recorded:
            if length not in decoder.graphs and decoder.training and torch.is_grad_enabled():
                decoder.graphs[length] = to_graph(*tensors)
            stream = decoder.graphs.get(length)
        return BaseModelOutputWithPast(last_hidden_state=(stream or Stream(length))(*tensors))

    decoder.forward = forward


def drop_graphs(model) -> None:
    """Free the recorded CUDA graphs of a model; from then on its streams are launched kernel by kernel.

    Where memory ran out, that of the graphs is needed; and a step of several streams cannot use them (see can_record).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(base, "model", None)
    if getattr(decoder, "graphs", None) is not None:
        decoder.graphs = None


def compute_token_losses(model, batch: dict, engine: str):
    """Return (loss in nats, fp32 with gradient; whether greedy decoding would choose it) per supervised token.

    Both are of shape [supervised tokens]. In a stream, attention is limited to each token's ancestors. The vocabulary
    projection, the largest of all multiplications, is computed only where a token is supervised.
    """
    import torch

    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "subtree_end")}
    labels = batch["labels"][:, 1:]
    supervised = labels != -100
    if engine == "unsloth":  # TRL's head: a Triton kernel that never holds all logits
        if "subtree_end" in batch:
            inputs["subtree_end"] = batch["subtree_end"][0]
        outputs = model(**inputs, labels=batch["labels"], fused_lm_head=True)
        return -outputs.log_probs[supervised].float(), outputs.is_top1[supervised]
    if "subtree_end" in batch:
        inputs["attention_mask"] = to_attention_mask(batch["subtree_end"][0])
        inputs["key_blocks"] = to_key_blocks(inputs["attention_mask"])
    columns = supervised.any(dim=0).nonzero()[:, 0].tolist()  # a tensor would be on another GPU if layers are spread
    logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits[supervised[:, columns]]
    losses = torch.nn.functional.cross_entropy(logits.float(), labels[supervised], reduction="none")
    return losses, logits.detach().argmax(dim=-1) == labels[supervised]


def autocast(model):
    """Return the mixed-precision context that the trainer uses too."""
    import torch

    dtype = to_dtype(model.device.type)
    return torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)


def find_stop_tokens(model, tokenizer) -> list[int]:
    """Return the tokens at which servers end an answer: the tokenizer's, and those of generation_config.json."""
    return sorted({tokenizer.eos_token_id, *as_list(model.generation_config.eos_token_id)} - {None})


def generate_tokens(model, prompts: list[list[int]], stops: list[int], max_new_tokens: int) -> list[list[int]]:
    """Return the greedy answers to prompts, as tokens without the one of `stops` that ended them.

    What all prompts have in common is computed once and held once; the rest of each is padded on the left. A row that
    is done leaves the batch.
    """
    import torch
    from transformers import DynamicCache

    tree = to_tree([Sequence("", prompt, len(prompt)) for prompt in prompts])
    shared = min((length for _, length in tree[1:]), default=len(prompts[0]) - 1)
    prefix, cache = DynamicCache(), DynamicCache()
    if shared:
        model(torch.tensor([prompts[0][:shared]], device=model.device), past_key_values=prefix, logits_to_keep=1)
    rests = [torch.tensor(prompt[shared:]) for prompt in prompts]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    ids, filled = (pad(rows).to(model.device) for rows in (rests, [*map(torch.ones_like, rests)]))
    positions = (shared + filled.cumsum(dim=1) - 1).clamp(min=0)
    # Padding sees itself, so that no token sees nothing; nothing else sees padding.
    own = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
    mask = (filled[:, None, :].bool() & torch.ones_like(own).tril() | own)[:, None]
    answers, open_rows = [[] for _ in prompts], range(len(prompts))
    for _ in range(max_new_tokens):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                       prefix_cache=prefix if shared else None, logits_to_keep=1).logits
        tokens = logits[:, -1].argmax(dim=-1)
        going = []  # on the CPU, whence it can index the caches of layers on any GPU
        for index, (row, token) in enumerate(zip(open_rows, tokens.tolist())):
            if token not in stops:
                answers[row].append(token)
                going.append(index)
        if not going:
            break
        if len(going) < len(tokens):
            cache.batch_select_indices(torch.tensor(going))
            open_rows, filled = [open_rows[index] for index in going], filled[going]
        ids, positions = tokens[going, None], positions[going, -1:] + 1
        filled = torch.cat([filled, torch.ones_like(ids)], dim=1)
        mask = filled[:, None, None, :].bool()
    return answers


def generate_answers(model, tokenizer, sequences: list[Sequence], args: argparse.Namespace, name: str) -> list[str]:
    """Return the greedy answer of a model of plain Transformers to the prompt of each sequence."""
    import torch
    from rich.progress import track

    stops, answers = find_stop_tokens(model, tokenizer), {}
    model.eval()
    batches = split_rows(sequences, args.eval_batch_size)
    bar = track(batches, f"answers of {name}", transient=True, disable=not sys.stdout.isatty())
    with contextlib.closing(bar):
        for batch in bar:
            prompts = [list(sequence.input_ids[: sequence.prompt_length]) for sequence in batch]
            with torch.inference_mode(), autocast(model):
                tokens = generate_tokens(model, prompts, stops, args.max_new_tokens)
            answers |= {id(sequence): tokenizer.decode(answer) for sequence, answer in zip(batch, tokens)}
    return [answers[id(sequence)] for sequence in sequences]


# ---------------------------------------------------------------------------------------------------------------
# 8  Train: SFTTrainer over the streams
# ---------------------------------------------------------------------------------------------------------------
def score_batches(model, batches, engine: str):
    """Return sums over batches, float64 [4]: loss in nats, supervised tokens, sequences reproduced, sequences.

    Greedy decoding writes an answer exactly if and only if each of its tokens is the most likely one after those before
    it. So this forward pass, which knows the answer, counts exact matches without generating.
    """
    import torch

    losses, exact, tokens, sequences = [], [], 0, 0
    was_training = model.training
    model.eval()
    for batch in batches:
        supervised = batch["labels"] != -100
        starts = supervised & ~supervised.roll(1, dims=1)  # before each answer stands its prompt
        answer = starts.flatten().cumsum(dim=0)[supervised.flatten()] - 1  # which answer a supervised token is of
        with torch.no_grad(), autocast(model):
            loss, hits = compute_token_losses(model, {n: t.to(model.device) for n, t in batch.items()}, engine)
        misses = torch.zeros(int(starts.sum()), device=hits.device).index_add_(
            0, answer.to(hits.device), (~hits).float())
        losses.append(loss.sum(dtype=torch.float64))
        exact.append((misses == 0).sum(dtype=torch.float64))
        tokens, sequences = tokens + len(loss), sequences + len(misses)
    model.train(was_training)
    zero = torch.zeros((), dtype=torch.float64, device=model.device)
    return torch.stack([sum(losses, zero), zero + tokens, sum(exact, zero), zero + sequences])


def to_metrics(sums) -> dict:
    """Return the mean loss in nats per supervised token, and the share of sequences that greedy decoding reproduces."""
    loss, tokens, exact, sequences = sums.tolist()
    return {"loss": loss / tokens, "exact_match": exact / sequences}


def measure_loss(model, batches, engine: str) -> float:
    """Return the mean loss in nats per supervised token over batches."""
    return to_metrics(score_batches(model, batches, engine))["loss"]


def free_gpu() -> None:
    """Give the GPU memory of models that are no longer held back to the driver, for the next process."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def empty_weights(model) -> None:
    """Free the memory of a model's weights, also if a library holds on to them, as after training with Unsloth."""
    drop_graphs(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.untyped_storage().resize_(0)


def make_room(model) -> None:
    """Free all that a computation that ran out of memory left behind; gradients are dropped too."""
    model.zero_grad()
    drop_graphs(model)
    free_gpu()


def compute_gradient(model, batches: list[dict], engine: str):
    """Return (loss summed over the supervised tokens, its gradient as one fp32 vector on the CPU) of the batches.

    Of a large model's gradient, every n-th number: its errors are not in a few of them. Of a split one, the part that
    is here.
    """
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = -(-sum(parameter.numel() for parameter in parameters) // COMPARED_NUMBERS)
    total, gradient = 0.0, 0.0
    for batch in batches:
        model.zero_grad()
        with autocast(model):
            loss = compute_token_losses(model, {n: t.to(model.device) for n, t in batch.items()}, engine)[0].sum()
        loss.backward()
        total += loss.item()
        # Added here and not in .grad, where a CUDA graph writes the next gradient over the last.
        gradient += torch.cat([held_part(parameter.grad).flatten()[::step].float() for parameter in parameters]).cpu()
    model.zero_grad()
    return total, gradient


def compute_lengths(model, train: list[Sequence], plan: Plan, engine: str) -> None:
    """Compute a stream of each length of the plan, by which Unsloth's are recorded as CUDA graphs before training.

    On several GPUs later is too late: DistributedDataParallel ties the gradients to the stream that it is built on, and
    CUDA refuses to record what belongs to another. Where memory runs out, nothing stays recorded.
    """
    import torch

    model.train()
    shortest, fits = min(train, key=lambda row: len(row.input_ids)), True  # no stream is shorter
    try:
        for length in plan.lengths:
            compute_gradient(model, [build_stream([shortest], (length,))], engine)
    except torch.OutOfMemoryError:
        fits = False
    if not fits:  # not above, where the failed computation is still held
        make_room(model)


def relative_difference(gradient, other) -> float:
    """Return how much a gradient differs from another, as a share of the other's norm; of all devices' parts."""
    from accelerate.utils import gather_object

    norms = gather_object([((gradient - other).norm().item(), other.norm().item())])
    return math.hypot(*(norm for norm, _ in norms)) / max(math.hypot(*(norm for _, norm in norms)), sys.float_info.min)


def compare_sharing(model, rows: list[Sequence], lengths: tuple[int, ...], engine: str) -> tuple[float, float]:
    """Return the relative difference of the loss, and of the gradient, between rows in one stream and by themselves.

    By themselves: as ordinary padded batches through the model's own causal attention, with nothing of the stream.
    """
    import torch

    was_training = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # each way would draw masks of its own
            module.eval()
    shared = compute_gradient(model, [build_stream(rows, lengths)], engine)
    single = compute_gradient(model, [build_padded(rows[i : i + 2]) for i in range(0, len(rows), 2)], engine)
    model.train(was_training)
    loss = abs(shared[0] - single[0]) / max(abs(single[0]), sys.float_info.min)
    return loss, relative_difference(shared[1], single[1])


def check_sharing(args: argparse.Namespace, model, train: list[Sequence], plan: Plan, engine: str) -> bool:
    """Compute the first rows of the run shared and by themselves; print how they differ, return whether by rounding.

    Rounding changes gradients by less than 1e-4 in fp32, and in 16 bits by less than 2 % as a rule; but by up to 11 %
    was seen where a trained model's loss is near zero. A mask that is not used, or positions that run on, change that
    of the embedded base by 180 % and more: hence a limit of 20 %.
    """
    import torch
    from accelerate.utils import broadcast_object_list

    start = time.perf_counter()
    count, lengths = min(CHECKED_ROWS, plan.rows), plan.lengths  # no more than a stream of the run holds
    rows = [train[i] for i in order_rows(plan, args.seed, epoch=0)[:count]]
    while True:
        try:
            loss, gradient = compare_sharing(model, rows, lengths, engine)
            break
        except torch.OutOfMemoryError:
            if len(rows) == 1 or args.fsdp:  # one device alone cannot try again
                raise
        except RuntimeError as error:  # as a rule of the compiler, which Unsloth's attention alone needs
            if engine != "unsloth" or plan.devices > 1:
                raise
            warn(f"attention with a shared prefix cannot be computed here ({str(error).splitlines()[0]}): sharing is "
                 "switched off")
            return False
        make_room(model)  # not above, where the failed computation is still held
        rows = rows[: len(rows) // 2]
        lengths = choose_lengths([count_tokens(rows)]) if lengths else ()
    if plan.devices > 1:
        compute_lengths(model, train, plan, engine)
    free_gpu()
    limit = 1e-4 if to_dtype(model.device.type) == torch.float32 else 0.2
    if broadcast_object_list([gradient <= limit])[0]:  # all devices do as the first one finds
        verdict = "rounding" if gradient <= 0.02 else "more than usual, as rounding can where the loss is near zero"
        say("check", f"sharing changes the loss of {plural(len(rows), 'row')} by {loss:.1e} and their gradient by "
                     f"{gradient:.1e} of its norm: {verdict} ({time.perf_counter() - start:.1f} s)")
        return True
    warn(f"sharing the prefix changes the loss by {loss:.1e} and the gradient by {gradient:.1e} of its norm, "
         f"more than rounding ({limit:.0e}): sharing is switched off")
    return False


def explain_memory(row: Sequence, step: int) -> str:
    """Return why training cannot go on when even one row does not fit into memory, and what to change."""
    import torch

    memory = ""
    if torch.cuda.is_available():
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        memory = f", with {free:.1f} of {total:.1f} GiB free for it"
    tokens = f"{len(row.input_ids):,} tokens"
    return (f"{row.where}: out of GPU memory at step {step:,} on this row alone, {tokens}{memory}; lower "
            "--max_seq_length, use --load_in_4bit, --gradient_checkpointing on and --no-cuda_graphs, or choose a "
            "smaller --model_id")


def explain_numbers(step: int, loss: float, norm: float, rows: list[Sequence]) -> str:
    """Return what is not finite in a step, its rows, and what to do."""
    wrong = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    names = dict.fromkeys(row.where for row in rows if row.prompt_length < len(row.input_ids))  # not an empty stream's
    return (f"step {step:,}: {wrong}; expected a finite number. Nothing of it is saved, and a checkpoint written "
            f"before is good. Lower --learning_rate, or look at the rows of this step: {list_first(names, NAMED_ROWS)}")


def find_overfitting(history: list[dict]) -> str | None:
    """Return a line of advice if the held-out loss rose clearly above its best while the training loss went on falling.

    Args:
        history: what the trainer logged: training losses ("loss") and held-out ones ("eval_loss") with step and epoch.
    """
    held = [log for log in history if "eval_loss" in log]
    if not held:
        return None
    best, last = min(held, key=lambda log: log["eval_loss"]), held[-1]
    steps = [0, *(log["step"] for log in held)]

    def train_loss(evaluation: int) -> float:
        """Return the mean training loss between an evaluation and the one before it; NaN if none was logged."""
        losses = [log["loss"] for log in history
                  if "loss" in log and steps[evaluation] < log["step"] <= steps[evaluation + 1]]
        return sum(losses) / len(losses) if losses else math.nan

    rise = last["eval_loss"] - best["eval_loss"]
    if rise <= max(CLEAR_RISE, 0.1 * best["eval_loss"]) or not train_loss(len(held) - 1) < train_loss(held.index(best)):
        return None
    return (f"held-out loss rose from {best['eval_loss']:.3f} (epoch {best['epoch']:.3g}) to {last['eval_loss']:.3f} "
            f"(epoch {last['epoch']:.3g}) while the training loss fell: fewer epochs, or --metric_for_best loss keeps "
            "the best checkpoint")


def build_progress():
    """Return a TrainerCallback that draws a progress bar and prints about twenty losses and every held-out loss."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import TrainerCallback

    class ProgressBar(TrainerCallback):
        def __init__(self):
            columns = ("train    ", BarColumn(), MofNCompleteColumn(), "steps", TextColumn("{task.fields[loss]}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), transient=True, disable=not sys.stdout.isatty())

        def on_train_begin(self, args, state, control, **kwargs):
            self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, loss="")
            self.logged = state.global_step
            self.bar.start()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                step, text, every = state.global_step, f"loss {float(logs['loss']):.4f}", max(1, state.max_steps // 20)
                self.bar.update(self.task, completed=step, loss=text)
                if step == 1 or step // every > self.logged // every or step == state.max_steps:
                    say("", f"step {step:>5,} of {state.max_steps:,}  {text}")
                self.logged = step

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            say("", f"step {state.global_step:>5,} of {state.max_steps:,}  epoch {state.epoch:.3g}: "
                    f"held-out loss {metrics['eval_loss']:.4f}, exact match {metrics['eval_exact_match']:.1%}")

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.stop()

    return ProgressBar()


def build_stopper(checkpoint: str | None = None):
    """Return a TrainerCallback whose `note` handles signals: the first ends training after its step and a checkpoint.

    A step that ends an epoch leaves the checkpoint to the end of the epoch, after the held-out rows are scored, as in
    a run that goes on. The second signal ends everything at once. Signals reach several processes at several moments:
    wherever one decides by them, all first `agree`, or one would stop while another waits for it in the next step.
    """
    import torch
    import torch.distributed as distributed
    from transformers import TrainerCallback

    class Stopper(TrainerCallback):
        number, noted, group = None, 0.0, None

        def note(self, number, frame):
            # What signals all processes may reach one directly and by torchrun: that is one signal, not two.
            if self.number and (count_devices() == 1 or time.monotonic() > self.noted + 2):
                raise_interrupted(number, frame)
            if not self.number and is_main():
                # Not print: the signal may come while a print is going on.
                os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")
            self.number, self.noted = self.number or number, self.noted or time.monotonic()

        def on_train_begin(self, args, state, control, **kwargs):
            state.compute_steps(args, state.max_steps)  # a resumed run has the intervals of its own flags
            if checkpoint and state.best_global_step and not find_best(checkpoint):  # else its score would rule on
                warn(f"the best checkpoint, of step {state.best_global_step:,}, is gone: the best is sought anew")
                state.best_metric = state.best_global_step = None
            if count_devices() > 1:
                self.group = distributed.new_group(backend="gloo")  # so that no GPU has to wait

        def is_within_epoch(self, state):
            return state.epoch % 1 != 0 and state.global_step < state.max_steps

        def agree(self) -> int | None:
            """Return the signal that this process, or before this moment any other, has got."""
            if not self.group:
                return self.number
            number = torch.tensor(self.number or 0)
            distributed.all_reduce(number, distributed.ReduceOp.MAX, self.group)
            if number and not self.number:
                self.note(number.item(), None)
            return number.item() or None

        def on_step_end(self, args, state, control, **kwargs):
            if self.agree():
                control.should_training_stop = True
                control.should_save = control.should_save or self.is_within_epoch(state)

        def on_evaluate(self, args, state, control, **kwargs):
            if self.agree():
                control.should_training_stop = control.should_save = True

        def on_epoch_end(self, args, state, control, **kwargs):
            if not self.agree():
                return
            if self.is_within_epoch(state):  # the library takes every stop for the end of an epoch
                control.should_evaluate = control.should_save = False
            else:
                control.should_training_stop = control.should_save = True

    return Stopper()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Write the size and the SHA-256 of every file of a checkpoint into it."""
    files = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": hash_file(path)}
             for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, by its manifest; None if it is whole."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
            if hash_file(path) != expected["sha256"]:
                return f"{name} is not as it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return f"{MANIFEST} cannot be read"
    return None


def read_state(checkpoint: str | Path) -> dict:
    """Return what the trainer wrote of its state into a checkpoint."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))


def to_step(checkpoint: str | Path) -> int:
    """Return the optimizer step that a checkpoint was written after."""
    return read_state(checkpoint)["global_step"]


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoint folders in `folder`, the oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def to_sft_config(args: argparse.Namespace, plan: Plan, evaluate: bool):
    """Return the settings of a run as TRL names them."""
    import torch
    from trl import SFTConfig

    cuda = torch.cuda.is_available()
    dtype = to_dtype("cuda" if cuda else "cpu")
    config = SFTConfig(
        output_dir=args.output_dir, per_device_train_batch_size=plan.rows, per_device_eval_batch_size=plan.rows,
        gradient_accumulation_steps=plan.accumulation, num_train_epochs=args.num_epochs, max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate, lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps if args.warmup_ratio is None else args.warmup_ratio,  # below 1: a share
        weight_decay=args.weight_decay, optim=find_optim(args), seed=args.seed,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, gradient_checkpointing=use_checkpointing(args),
        logging_steps=args.logging_steps, report_to=args.report_to, run_name=args.run_name, disable_tqdm=True,
        save_strategy="steps" if args.save_steps else "epoch", save_steps=args.save_steps or 500,
        eval_strategy="no" if not evaluate else "steps" if args.eval_steps else "epoch", eval_steps=args.eval_steps,
        load_best_model_at_end=bool(args.metric_for_best), metric_for_best_model=args.metric_for_best,
        greater_is_better=args.metric_for_best == "exact_match", dataloader_pin_memory=cuda, use_cpu=not cuda,
        logging_nan_inf_filter=False,  # it hides what StreamTrainer looks for
        router_aux_loss_coef=0.0,  # routers of experts are not trained, and the loss is that of the answers alone
        restore_callback_states_from_checkpoint=True, max_length=None, remove_unused_columns=False,
        ddp_timeout=PATIENCE, ddp_find_unused_parameters=False, ddp_broadcast_buffers=False,
        accelerator_config={"even_batches": False, "non_blocking": cuda},
        dataset_kwargs={"skip_prepare_dataset": True})
    if not cuda:
        config.__dict__["_setup_devices"] = torch.device("cpu")  # of several "cpu:0", which torch cannot load to
    else:
        config._n_gpu = 1  # of several visible GPUs a process uses its own
    return config


class StreamTrainer:
    """What this script does otherwise than TRL's SFTTrainer, which goes behind it in build_trainer.

    It is no subclass here, because Unsloth must change TRL's classes before they are imported.
    """

    def __init__(self, run: argparse.Namespace, engine: str, plan: Plan, train, held_out, **settings):
        import numpy as np

        self.run, self.engine, self.plan, self.train_rows, self.held_out_rows = run, engine, plan, train, held_out
        self.streams = plan  # what is computed at once: as planned, or smaller streams once that did not fit in memory
        self.held_out_batches = to_batches(held_out, plan) if held_out else []
        self.step_rows, self.step_loss, self.step_norm = [], 0.0, 0.0  # of the optimizer step in hand
        self.epoch_batches, self.next_batches = iter(()), []  # the micro-batches of the epoch, and of the next step
        self.tokens_computed, self.staging = 0, None
        # As arrays: lists would be turned into arrays anew in every step.
        self.arrays = [row._replace(input_ids=np.asarray(row.input_ids)) for row in train]
        last = self.arrays[0]
        self.arrays.append(last._replace(prompt_length=len(last.input_ids)))  # trains nothing: see StreamSampler
        super().__init__(data_collator=self.collate, **settings)

    def create_model_card(self, *args, **kwargs):
        """Write none: TRL's knows no scores. hand_over writes one beside each model that is kept."""

    def collate(self, indices):
        return {**build_batch([self.arrays[index] for index in indices], self.plan), "rows": indices}

    def get_train_dataloader(self):
        import torch

        sampler = StreamSampler(self.plan, self.run, len(self.train_rows), lambda: int(self.state.epoch or 0))
        return self.accelerator.prepare(torch.utils.data.DataLoader(
            range(len(self.arrays)), batch_sampler=sampler, collate_fn=self.collate,
            pin_memory=self.args.dataloader_pin_memory))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step, and how many tokens all devices supervise in it."""
        if epoch_iterator is not self.epoch_batches:  # what was fetched of another, that was left early, is not of it
            self.epoch_batches, self.next_batches = epoch_iterator, []
        batches = self.next_batches or list(islice(epoch_iterator, num_batches))
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        return batches, self.accelerator.reduce(tokens, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the micro-batch's share of the mean over all supervised tokens of the optimizer step.

        Gradients become the mean over the devices, hence the factor: they are to be the sum.
        """
        self.tokens_computed += inputs["input_ids"].numel()
        loss = compute_token_losses(model, inputs, self.engine)[0].sum() / num_items_in_batch
        return loss * self.accelerator.num_processes

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Return the loss of a micro-batch, its gradient added to what was there.

        If memory runs out, the rows are computed anew in smaller streams, each divided by the same number of items:
        loss and gradient are sums over the streams, so they stay what they are.
        """
        import torch

        rows, lost, loss = [self.arrays[index] for index in inputs.pop("rows")], [], None
        while loss is None:
            whole, losses = self.streams is self.plan, []
            again = split_rows(lost, self.streams.rows) if lost else []
            try:
                for part in (*again, *([rows] if whole else split_rows(rows, self.streams.rows))):
                    batch = inputs if whole else build_batch(part, self.streams)
                    losses.append(super().training_step(model, batch, num_items_in_batch))
                loss = sum(losses[len(again) :])
            except torch.OutOfMemoryError:
                pass  # here the failed computation is still held; below it is let go
            if loss is None:
                self.divide_streams(part, batch["input_ids"].numel())
                lost = self.step_rows  # the rows of this step before these: their gradient went to make room
        self.step_rows, self.step_loss = [*self.step_rows, *rows], self.step_loss + loss
        return loss

    def divide_streams(self, rows, tokens):
        """Halve the streams after one of these rows did not fit into memory; a row alone is a UserError."""
        step = self.state.global_step + 1
        make_room(self.model)
        if len(rows) == 1:
            raise UserError(explain_memory(rows[0], step))
        if self.accelerator.num_processes > 1:  # the others wait for one gradient, not for two halves
            raise UserError(f"out of GPU memory at step {step:,} with a stream of {tokens:,} tokens; lower "
                            "--batch_size and raise --gradient_accumulation_steps as much")
        size = -(-len(rows) // 2)
        self.streams = divide_plan(self.plan, size, self.train_rows, self.run)
        self.held_out_batches = to_batches(self.held_out_rows, self.streams) if self.held_out_rows else []
        warn(f"out of GPU memory at step {step:,} with a stream of {tokens:,} tokens: from here on each step is "
             f"computed in {self.plan.accumulation * -(-self.plan.rows // size)} streams of at most "
             f"{plural(size, 'row')}; the result is the same")

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of split weights
        # With fp16, gradients that overflow are nothing special: the scaler leaves such a step out.
        self.step_norm = norm if self.accelerator.scaler is None else 0.0
        return norm

    def _maybe_log_save_evaluate(self, *arguments, **more):
        """Look at the step's numbers before anything of it is saved; to look earlier, the GPU would stand still.

        To look is to wait for the GPU, so the next step's micro-batches are made before, while it computes.
        """
        from accelerate.utils import gather_object

        self.next_batches = list(islice(self.epoch_batches, self.plan.accumulation))
        loss, norm, rows = self.step_loss, self.step_norm, self.step_rows
        self.step_rows, self.step_loss = [], 0.0
        if not math.isfinite(loss + norm):
            if self.accelerator.scaler is None:  # or else only the loss of one device may be wrong
                rows = gather_object(rows)
            raise UserError(explain_numbers(self.state.global_step, float(loss), float(norm), rows))
        super()._maybe_log_save_evaluate(*arguments, **more)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """Return the held-out loss as a mean over tokens (the library's is one over batches), and exact match."""
        from transformers.trainer_utils import EvalLoopOutput

        devices, batches = self.accelerator.num_processes, self.held_out_batches
        # With --fsdp all devices must compute as often, so that some get a batch that supervises nothing.
        batches = [*batches, *[build_batch(self.arrays[-1:], self.plan)] * (-len(batches) % devices)]
        share = batches[self.accelerator.process_index :: devices]
        scores = self.accelerator.reduce(score_batches(self.model, share, self.engine), "sum")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in to_metrics(scores).items()}
        return EvalLoopOutput(None, None, metrics, num_samples=len(self.held_out_rows))

    def _get_output_dir(self, trial):
        return str(self.staging or self.run.output_dir)

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint out of sight, and give it its name when it is whole; then remove what is too many."""
        output, state, wait = Path(self.run.output_dir), self.state, self.accelerator.wait_for_everyone
        final, best = (output / f"checkpoint-{step}" for step in (state.global_step, state.best_global_step))
        with discard_partial(final) as self.staging:
            wait()
            super()._save_checkpoint(model, trial)
            wait()
            if best == final or best.is_dir():  # where it will be, not where it is being written
                state.best_model_checkpoint = str(best)
            if is_main():
                state.save_to_json(str(self.staging / final.name / "trainer_state.json"))
                write_manifest(self.staging / final.name)
                put_in_place(final, self.staging / final.name)
        self.staging = None
        if is_main() and self.run.save_total_limit:
            for old in list_checkpoints(output)[: -self.run.save_total_limit]:
                if old != best:
                    shutil.rmtree(move_aside(old), ignore_errors=True)
        wait()


class SplitTrainer:
    """What StreamTrainer does otherwise with --fsdp: the model comes split (see split_model), and is saved whole."""

    def _wrap_model(self, model, training=True, dataloader=None):
        """Return the model with averaged gradients; without an adapter, FSDP has averaged them."""
        import torch

        if not training or model is not self.model:
            return super()._wrap_model(model, training, dataloader)
        model._is_accelerate_prepared = True  # accelerate would refuse a model split in part, and average once more
        if not self.run.lora_rank:
            return model
        return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def autocast_smart_context_manager(self, cache_enabled=True):
        return autocast(self.model)

    def save_model(self, output_dir=None, _internal_call=False):
        weights = None if self.run.lora_rank else gather_weights(self.model)
        if is_main():
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir):
        import torch

        whole = gather_whole(self.optimizer.state_dict())
        if is_main():
            torch.save(whole, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Load what was saved whole; each device takes its part from the file, so that none needs to hold all."""
        import torch

        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        state["state"] = {number: {name: split_as(weights[number], value) for name, value in moments.items()}
                          for number, moments in state["state"].items()}
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


def build_trainer(args: argparse.Namespace, engine: str, model, tokenizer, train, held_out, plan: Plan):
    """Return a StreamTrainer on TRL's SFTTrainer over the pre-tokenised sequences, batched as planned.

    TRL would render and truncate conversations in its own way, and it asks for a dataset: it is given the numbers of
    the rows.
    """
    from datasets import Dataset
    from transformers import EarlyStoppingCallback, PrinterCallback
    from trl import SFTTrainer

    classes = (*[SplitTrainer] * args.fsdp, StreamTrainer, SFTTrainer)
    numbers = [Dataset.from_dict({"index": range(len(rows))}) if rows else None for rows in (train, held_out)]
    trainer = type("StreamTrainer", classes, {})(
        args, engine, plan, train, held_out, model=model, args=to_sft_config(args, plan, bool(held_out)),
        processing_class=tokenizer, train_dataset=numbers[0], eval_dataset=numbers[1])
    trainer.accelerator.ddp_handler.gradient_as_bucket_view = True  # or each gradient is copied back from its bucket
    trainer.remove_callback(PrinterCallback)
    trainer.progress = build_progress()
    trainer.add_callback(trainer.progress)
    if args.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    if not args.lora_rank:  # checkpoints hold weights as the model names them: experts as one, not one by one
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    # TRL makes the adapter of a 4-bit base bf16, in which late, small updates round to nothing.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # The trainer would turn checkpointing on only in train(), after the self-check.
    if engine == "unsloth":
        trainer.model.for_training(use_gradient_checkpointing=use_checkpointing(args))
    elif use_checkpointing(args):
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


def find_checkpoint(args: argparse.Namespace) -> str | None:
    """Return the checkpoint to resume from, the newest that is whole, or None; if there is none, a UserError."""
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint != "newest":
        path = Path(args.resume_from_checkpoint)
        if not (path / "trainer_state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {path}: not a checkpoint; expected a folder checkpoint-N")
        if damage := find_damage(path):
            raise UserError(f"--resume_from_checkpoint {path}: is damaged: {damage}; expected a whole checkpoint")
        return str(path)
    found = list_checkpoints(args.output_dir)
    for path in reversed(found):
        damage = find_damage(path)
        if not damage:
            return str(path)
        warn(f"{path} is damaged: {damage}; the one before is used")
    raise UserError(f"--resume_from_checkpoint: {args.output_dir} holds no {'whole ' if found else ''}checkpoint; "
                    "leave the flag out to start")


def hash_rows(sequences: list[Sequence]) -> str:
    """Return a SHA-256 over tokens and prompt lengths of the sequences, in order."""
    import numpy as np

    found = hashlib.sha256()
    for row in sequences:
        found.update(np.array([row.prompt_length, len(row.input_ids), *row.input_ids], dtype="<i8").tobytes())
    return found.hexdigest()


def read_run(checkpoint: str | None) -> dict:
    """Return settings and facts of the run that a checkpoint is from; a run.yaml that cannot be read is a UserError."""
    import yaml

    if checkpoint is None:
        return {}
    path = Path(checkpoint).absolute().parent / "run.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: cannot be read; expected the settings of the run that {checkpoint} is from")
    # A flag that came with a later version of this script had its default.
    return vars(parse_args([])) | settings | (settings.get("facts") or {})


def count_rows_per_step(args: argparse.Namespace) -> int:
    """Return how many rows an optimizer step has: the effective batch."""
    return args.batch_size * args.gradient_accumulation_steps * count_devices()


def count_steps(args: argparse.Namespace, train: list[Sequence]) -> tuple[int, int]:
    """Return (optimizer steps of the whole run, of one epoch)."""
    per_epoch = math.ceil(len(train) / count_rows_per_step(args))
    return args.max_steps or args.num_epochs * per_epoch, per_epoch


def check_resume(args: argparse.Namespace, checkpoint: str | None, former: dict, train: list[Sequence]) -> None:
    """Refuse to go on from a checkpoint of a run with other rows or settings: the result would be of neither run."""
    if checkpoint is None:
        return
    settings = vars(args) | {"optim": find_optim(args)}
    former = former | {"optim": former.get("optimizer") or find_optim(argparse.Namespace(**former))}
    problems = [f"--{name} is {settings[name]}, and {former.get(name)} in the run that {checkpoint} is from; "
                "expected the same" for name in AGREED if settings[name] != former.get(name)]
    if former.get("rows_per_step") != count_rows_per_step(args):
        problems.append(f"--batch_size x --gradient_accumulation_steps x devices is {count_rows_per_step(args)}, and "
                        f"{former.get('rows_per_step')} in the run that {checkpoint} is from; expected the same")
    if former.get("training_rows") != hash_rows(train):
        problems.append(f"the training rows are not those of the run that {checkpoint} is from; "
                        "expected the same rows in the same order")
    best = find_best(checkpoint) if args.metric_for_best else None
    if best and (damage := find_damage(best)):
        problems.append(f"{best}, the best so far, is damaged: {damage}; remove it to go on without")
    steps, done = count_steps(args, train)[0], to_step(checkpoint)
    planned = count_steps(argparse.Namespace(**vars(args) | {name: former[name] for name in former.keys() & {
        "max_steps", "num_epochs"}}), train)[0]
    if done > steps:
        problems.append(f"{checkpoint} is from step {done:,}, and --max_steps or --num_epochs ends at "
                        f"{steps:,}; expected no fewer steps")
    if problems:
        raise UserError("\n".join(problems))
    if steps != planned and not args.lr_scheduler_type.startswith("constant"):
        warn(f"{checkpoint} is from a run of {planned:,} steps, and this one has {steps:,}: from here on the learning "
             "rate is that of the latter")


def is_complete(args: argparse.Namespace, checkpoint: str, train: list[Sequence]) -> bool:
    """Say whether training had ended with this checkpoint: at its last step, or early for want of improvement."""
    state = read_state(checkpoint)
    stopping = state["stateful_callbacks"].get("EarlyStoppingCallback", {})
    waited = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return state["global_step"] >= count_steps(args, train)[0] or waited >= (args.early_stopping_patience or math.inf)


def find_best(checkpoint: str) -> Path | None:
    """Return the best checkpoint up to this one: beside it, or where the run began that went on in another folder."""
    state = read_state(checkpoint)
    beside = Path(checkpoint).with_name(f"checkpoint-{state.get('best_global_step')}")
    places = [Path(place) for place in (beside, state.get("best_model_checkpoint")) if place]
    return next((place for place in places if place.is_dir()), None)


def load_trained(trainer, checkpoint: str) -> None:
    """Put the weights that training ended with into the trainer's model: of the best checkpoint, or of this one.

    The library would first make one more step: it looks only after a step whether that was the last.
    """
    from transformers import TrainerState

    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    wanted = trainer.args.load_best_model_at_end and trainer.state.best_global_step
    best = find_best(checkpoint) if wanted else None
    if wanted and not best:
        warn(f"the best checkpoint, of step {trainer.state.best_global_step:,}, is gone: {checkpoint} is kept instead")
        trainer.state.best_global_step = None
    trainer._load_from_checkpoint(str(best or checkpoint))


def report_gpu() -> None:
    """Print the GPU's name and memory use; on CPU print nothing."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        peak = torch.cuda.max_memory_reserved() / 2**30
        say("gpu", f"{torch.cuda.get_device_name(0)}, {total:.1f} GiB; {peak:.2f} GiB reserved at peak "
                   f"({peak / total:.1%} of the card)")


# ---------------------------------------------------------------------------------------------------------------
# 9  Score: answers -> verdicts -> scores
# ---------------------------------------------------------------------------------------------------------------
NO_CALL, BROKEN = "(no call)", "(broken)"  # labels beside the names of the tools
MAX_CLASSES = 20  # plain answers that take at most so many values are classes
JSON_TYPES = {dict: {"object"}, list: {"array"}, str: {"string"}, int: {"integer", "number"}, float: {"number"},
              bool: {"boolean"}, type(None): {"null"}}  # what a value may serve as: 5.0 is no integer
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
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)
               for call in calls):
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
        name in full_got and name in full_expected
        and is_alike(full_got[name], full_expected[name], rules.get(name, schema.get("additionalProperties")))
        for name in got.keys() | expected.keys())


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
        alike = exact or can_pair(calls, wanted, lambda call, other: call["name"] == other["name"]
                                  and is_alike(call["arguments"], other["arguments"], schemas.get(call["name"])))
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
            table[label] = {"support": len(rows), "tool": divide(sum(called), len(rows)),
                            "exact": divide(sum(row.exact for row in rows), len(rows))}
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


# ---------------------------------------------------------------------------------------------------------------
# 10  Save: adapter, then the merged model, read back and checked by a fresh process; GGUF; upload
# ---------------------------------------------------------------------------------------------------------------
def check_folder(path: str, flag: str) -> None:
    """Refuse a folder that holds anything and was not written by this script."""
    folder, marker = Path(path), Path(path) / "run.yaml"
    if os.path.lexists(path) and not folder.is_dir():
        raise UserError(f"{flag} {path}: is a file, or a link to nothing; expected a folder")
    nearest = find_existing(path)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{flag} {path}: {nearest} cannot be written; choose another folder")
    ours = marker.is_file() and marker.read_text(encoding="utf-8", errors="replace").startswith(WRITTEN_BY)
    early = {LOCK, COMPILED}  # there also of a run that ended before it trained
    if folder.is_dir() and any(file.name not in early for file in folder.iterdir()) and not ours:
        raise UserError(f"{flag} {path}: holds files that this script did not write; choose another folder or empty it")


def check_final(args: argparse.Namespace) -> None:
    """Refuse a final folder that cannot be replaced as a whole, or would take with it what the run still needs."""
    final = Path(args.final_model_dir)
    for flag in ("output_dir", "model_id", "merge_model_id", "dataset_path", "eval_dataset_path", "tools_path",
                 "resume_from_checkpoint"):
        for kept in as_list(getattr(args, flag) or []):
            is_path = flag == "output_dir" or Path(kept).exists()  # not a name on the Hub
            if is_path and Path(kept).resolve().is_relative_to(final.resolve()):
                raise UserError(f"--final_model_dir {final}: is replaced as a whole, and --{flag} {kept} is in it; "
                                "choose another folder")
    inside = final.resolve().parent == Path(args.output_dir).resolve()
    if inside and re.fullmatch(r"adapter|eval_only|checkpoint-\d+", final.name):
        raise UserError(f"--final_model_dir {final}: is where --output_dir has its {final.name}; choose another folder")
    if list_checkpoints(final) or (final / "adapter").exists():
        raise UserError(f"--final_model_dir {final}: is replaced as a whole, and is the --output_dir of a run; choose "
                        "another folder")
    if (not final.name or final.is_symlink() or final.is_mount()
            or not os.access(find_existing(final.parent), os.W_OK)):
        raise UserError(f"--final_model_dir {final}: cannot be written and renamed there; choose another folder")


def lock_folder(folder: str, flag: str = "--output_dir"):
    """Return the locked file for a folder of that flag, to be closed when the run ends; one in use is a UserError.

    The lock dies with the process that holds it. Where there are no such locks, as on Windows, the run does without.
    Of several processes only the one that writes locks. The final folder is replaced as a whole: its lock lies outside.
    """
    if not is_main() or os.name == "nt":
        return contextlib.nullcontext()
    import fcntl

    name = f"qwen3-{os.getuid()}-{digest(str(Path(folder).resolve()))[:16]}{LOCK}"
    path = Path(folder) / LOCK if flag == "--output_dir" else Path(tempfile.gettempdir()) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written: {error.strerror}; choose another folder") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{flag} {folder}: in use by another run (process {file.read().strip() or 'unknown'}); "
                        "wait for its end or choose another folder") from None
    except OSError:  # a file system without locks
        pass
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def list_saves(args: argparse.Namespace, train: list[Sequence]) -> list[int]:
    """Return the steps after which a run writes a checkpoint."""
    steps, per_epoch = count_steps(args, train)
    every = args.save_steps or per_epoch
    return [*range(every, steps, every), steps]


def count_checkpoints(args: argparse.Namespace, train: list[Sequence], checkpoint: str | None = None) -> int:
    """Return how many checkpoints this run will have on the disk at once, at most, beside those that are there."""
    start = to_step(checkpoint) if checkpoint else 0
    written = sum(step > start for step in list_saves(args, train))
    # A new one is written before the oldest is removed, and the best is kept beside the newest.
    kept = args.save_total_limit + 1 + bool(args.metric_for_best) if args.save_total_limit else written
    return min(written, kept)


def build_skeleton(config, trust: bool):
    """Return the model that a config describes, with the shapes of its weights and no memory for them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


def count_parameters(config, rank: int, trust: bool = False, targets=TARGET_MODULES) -> dict[str, int]:
    """Return how many weights are in linear layers (those that 4 bits hold), elsewhere, and in an adapter.

    A name of --target_modules that no linear layer has is a UserError.
    """
    import torch

    skeleton = build_skeleton(config, trust)
    layers = {name: module for name, module in skeleton.named_modules()
              if isinstance(module, torch.nn.Linear) and not name.startswith("lm_head")}
    experts = [(name, *weight.shape[1:], weight.shape[0]) for name, weight in skeleton.named_parameters()
               if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    names = {name.rsplit(".", 1)[-1] for name in layers} | ({"gate_proj", "up_proj", "down_proj"} if experts else set())
    if rank and (missing := sorted({*targets} - names)):
        raise UserError(f"--target_modules {' '.join(missing)}: no linear layer of the model is named so; "
                        f"expected some of {', '.join(sorted(names))}")
    linear = sum(layer.weight.numel() for layer in layers.values())
    adapter = sum(rank * (layer.in_features + layer.out_features) for name, layer in layers.items()
                  if name.rsplit(".", 1)[-1] in targets)
    for name, rows, columns, count in experts:  # gate and up are one weight, and their adapter has twice the rank
        adapter += count * rank * (1 + name.endswith("gate_up_proj")) * (rows + columns)
    return {"linear": linear, "other": sum(weight.numel() for weight in skeleton.parameters()) - linear,
            "adapter": adapter}


def find_existing(path: str) -> Path:
    """Return a folder, or if it is not there yet, the nearest above it: where its disk can be asked."""
    folder = Path(path).resolve()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def count_final_bytes(args: argparse.Namespace, parameters: dict[str, int]) -> int:
    """Return the bytes that --final_model_dir takes at most, while it is made too; 0 if only the adapter is saved."""
    whole = parameters["linear"] + parameters["other"]
    sizes = [2]  # bytes per weight
    if args.save_method == "merged_4bit":
        sizes.append((0.53 * parameters["linear"] + 2 * parameters["other"]) / whole)
    names = args.save_gguf.split(",") if args.save_gguf else []
    if not set(names) <= set(CONVERTED_GGUF):
        sizes.append(2)  # what the others are made from
    sizes += [{"f32": 4, "f16": 2, "bf16": 2}.get(name, 1.1) for name in names]
    return 0 if args.save_method == "lora" else math.ceil(sum(sizes) * whole)


def count_moment_bytes(optim: str) -> int:
    """Return the bytes of Adam's two moments of one weight."""
    return 2 if "8bit" in optim else 8


def estimate_disk(args: argparse.Namespace, parameters: dict[str, int], optim: str, checkpoints: int) -> dict[str, int]:
    """Return the bytes of the weights that a run saves at most, without the SMALL_FILES beside each."""
    trained = parameters["adapter"] or parameters["linear"] + parameters["other"]
    return {"merged_model": count_final_bytes(args, parameters),
            "adapter": 4 * parameters["adapter"],
            "checkpoints": checkpoints * trained * (4 + count_moment_bytes(optim))}


def check_disk(args: argparse.Namespace, config, checkpoints: int) -> None:
    """Refuse to start when adapter, checkpoints and merged model would not fit beside what is on their disks."""
    parameters = count_parameters(config, args.lora_rank, args.trust_remote_code, args.target_modules)
    sizes, lora = estimate_disk(args, parameters, find_optim(args), checkpoints), parameters["adapter"]
    needs = [("--output_dir", args.output_dir, "the adapter and " * bool(lora) + plural(checkpoints, "checkpoint"),
              sizes["adapter"] + sizes["checkpoints"] + (1 + checkpoints) * SMALL_FILES)]
    if args.save_method != "lora":
        needs.append(("--final_model_dir", args.final_model_dir, f"the {'merged' if lora else 'trained'} model",
                      sizes["merged_model"] + SMALL_FILES))
    disks: dict[int, list] = {}
    for need in needs:
        folder = find_existing(need[1])
        disks.setdefault(folder.stat().st_dev, []).append((*need, shutil.disk_usage(folder).free))
    for wanted in disks.values():
        flags, folders, names, sizes, free = zip(*wanted)
        if free[0] < sum(sizes):
            fewer = ", or keep fewer checkpoints with --save_total_limit" * ("--output_dir" in flags)
            raise UserError(f"{' and '.join(map(' '.join, zip(flags, folders)))}: for {' and '.join(names)} "
                            f"{sum(sizes) / 1e9:.2f} GB are needed and the disk has {free[0] / 1e9:.2f} GB free; free "
                            f"some space or choose another disk{fewer}")


def check_merge_base(args: argparse.Namespace, config) -> str:
    """Return the id of the 16-bit model that the adapter will be merged into, settled before training."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and (method := quantised.get("quant_method", "bitsandbytes")) != "bitsandbytes":
        raise UserError(f"--model_id {args.model_id}: is quantised by {method}, on which no adapter is trained here; "
                        "expected the original, which is put into 4 bits while it is loaded")
    if quantised is None or args.save_method == "lora":
        return args.merge_model_id or args.model_id
    if not args.lora_rank:
        raise UserError(f"--model_id {args.model_id}: is quantised, and --lora_rank 0 trains 16-bit weights; give the "
                        "original, or train an adapter")
    if args.merge_model_id is None:
        raise UserError(f"--model_id {args.model_id}: is already quantised, and a merge needs the 16-bit weights; "
                        "name the original with --merge_model_id")
    return args.merge_model_id


def check_same_shape(config, merge_model_id: str, trust: bool) -> None:
    """Refuse a merge base whose layers are not those of the model that is trained."""
    other = check_model(merge_model_id, "--merge_model_id", trust)
    if getattr(other, "quantization_config", None) is not None:
        raise UserError(f"--merge_model_id {merge_model_id}: is quantised too; expected the 16-bit original")
    for name in ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"):
        if getattr(config, name, None) != getattr(other, name, None):
            raise UserError(f"--merge_model_id {merge_model_id}: {name} is {getattr(other, name, None)}, "
                            f"and {getattr(config, name, None)} in --model_id; expected the same model in 16 bits")


def write_run(args: argparse.Namespace, folder: str | Path, **facts) -> None:
    """Write the resolved settings, and facts of the run, to `folder`/run.yaml, whose first line marks it as ours.

    --config reads it: the settings are those of the same run once more, and the facts are left out.
    """
    import yaml

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
    settings = {name: value for name, value in vars(args).items() if name not in ONCE}
    settings = hide_secrets(yaml.safe_dump(settings | ({"facts": facts} if facts else {}), sort_keys=False))
    write_file(Path(folder) / "run.yaml", WRITTEN_BY + settings)


def mark_output(args: argparse.Namespace) -> None:
    """Mark the output folder as ours by a run.yaml, unless it has that of an earlier run."""
    if not (Path(args.output_dir) / "run.yaml").exists():
        write_run(args, args.output_dir)


def save_adapter(model, output_dir: str) -> str:
    """Save the LoRA weights to `output_dir`/adapter and return that path."""
    adapter = str(Path(output_dir) / "adapter")
    with discard_partial(adapter) as folder:
        model.save_pretrained(folder)
        (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's empty form: hand_over writes a card with scores
        put_in_place(adapter)
    return adapter


def save_whole(args: argparse.Namespace, model) -> Path:
    """Save a model with its tokenizer and the run's settings, and return its folder, not yet the final one."""
    folder = partial_folder(args.final_model_dir)
    shutil.rmtree(folder, ignore_errors=True)
    model.config.use_cache = True  # off during training only
    tokenizer = load_tokenizer(args.model_id, args.trust_remote_code)
    model.generation_config.eos_token_id = find_stop_tokens(model, tokenizer)
    model.save_pretrained(folder, save_original_format=True)
    tokenizer.save_pretrained(folder)
    write_run(args, folder)
    return folder


def sum_weights(model) -> dict[str, float]:
    """Return the sum of each of a model's weights by name, of those that are in memory."""
    return {name: sum(part.double().sum().item() for part in parameter.detach().flatten().split(ROUNDED_WEIGHTS))
            for name, parameter in model.named_parameters() if parameter.device.type != "meta"}


def refuse_unchanged(sums: dict[str, float], model) -> None:
    """Refuse a model that equals the base, whose sum_weights these are."""
    if sums == sum_weights(model):
        raise UserError("the trained model equals the base: training changed nothing that 16-bit weights can hold; "
                        "train longer or raise --learning_rate")


def find_place(args: argparse.Namespace, four_bit: bool = False) -> str:
    """Return the device map of a trained model: all GPUs and, for what they cannot hold, the machine's memory.

    In 16 bits it may be too large for the GPU that trained it in 4. Weights in 4 bits must be on GPUs; a model that is
    saved so is loaded on one (see load_base).
    """
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if four_bit and not args.fsdp else "auto"


def warn_if_spread(model) -> None:
    """Say that a part of a model is not on the GPU."""
    places = set(getattr(model, "hf_device_map", {}).values())
    if "cpu" in places and len(places) > 1:
        warn("the 16-bit model is larger than the GPU's memory: a part of it stays in the machine's, and answers take "
             "longer; a smaller --eval_samples writes fewer")


def round_at_random(weights) -> None:
    """Round fp32 weights in place to numbers that bf16 has: up or down at random, the likelier the nearer.

    What training adds to a weight is often less than half the way to bf16's next number. Rounded to the nearest it is
    lost in all weights alike; at random, their sum keeps it. A number that bf16 has stays as it is.
    """
    import torch

    for part in weights.view(-1).split(ROUNDED_WEIGHTS):
        bits = part.view(torch.int32)  # bf16 is the upper half of fp32, and the lower half decides how often it carries
        carry = torch.randint_like(bits, 2**16).masked_fill_(~part.isfinite(), 0)
        bits.add_(carry).bitwise_and_(-(2**16))


def merge_layers(model) -> None:
    """Merge the adapter into each layer in fp32; then bf16 weights are rounded at random, others to the nearest."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        weights = [*layer.get_base_layer().parameters(recurse=False)]
        types = [weight.dtype for weight in weights]
        for weight in weights:
            weight.data = weight.data.float()
        layer.merge()
        for weight, dtype in zip(weights, types):
            if dtype == torch.bfloat16:
                round_at_random(weight.data)
            weight.data = weight.data.to(dtype)


def merge_adapter(args: argparse.Namespace, base_id: str, adapter: str) -> Path:
    """Merge the adapter into the 16-bit base, save the model whole, and return its folder, not yet the final one."""
    import torch
    from transformers import AutoModelForCausalLM

    def load(place):
        return AutoModelForCausalLM.from_pretrained(base_id, dtype="auto", device_map=place, use_safetensors=True,
                                                    trust_remote_code=args.trust_remote_code)

    base = load(find_place(args))
    if any(weight.device.type == "meta" for weight in base.parameters()):  # more than the GPUs hold
        del base
        free_gpu()
        base = load("cpu")
    sums = sum_weights(base)
    model = load_adapter(base, adapter)
    torch.manual_seed(args.seed)
    merge_layers(model)
    merged = model.unload()
    refuse_unchanged(sums, merged)
    return save_whole(args, merged)


def quantise_folder(folder: Path, trust: bool, place: str) -> None:
    """Put the model of a folder, saved in 16 bits, into 4 bits as bitsandbytes has them; the rest stays as it was."""
    model = load_base(str(folder), True, trust, load_config(str(folder), trust=trust).dtype, place)
    for file in folder.glob("model*.safetensors*"):  # the model may still read it: removed, not written over
        file.unlink()
    model.save_pretrained(folder)


def read_back(folder: Path, trust: bool = False, place: str | None = None):
    """Return the saved model, loaded with plain Transformers and checked: no stray weights, all finite."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, use_safetensors=True, trust_remote_code=trust)
    strays = [*info["missing_keys"], *info["unexpected_keys"], *(n for n, _ in model.named_parameters() if "lora" in n)]
    if strays:
        raise UserError(f"{folder}: missing or unknown weights: {', '.join(sorted(strays)[:5])}")
    if bad := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        raise UserError(f"{folder}: weights that are not finite: {', '.join(bad[:5])}")
    del model
    return load_base(str(folder), False, trust, place=place)


def merge_and_score(args: argparse.Namespace, base_id: str, adapter: str | None, sequences: list[Sequence],
                    plan: Plan) -> dict:
    """Answer the sequences with base, adapter, and the model to keep read back; return {name: result} of each.

    Runs in a fresh process, because Unsloth changes Transformers' classes for good, and the proof must hold where no
    Unsloth is. The adapter stands on the base that it was trained on, in 4 bits if that was so; the others have 16.
    Without an adapter, the trained model is in its partial folder.
    """
    quiet_libraries()
    trust, place, small_place = args.trust_remote_code, find_place(args), find_place(args, four_bit=True)
    tokenizer, results = load_tokenizer(args.model_id, trust), {}
    batches = to_small_batches(sequences, plan)

    def score(name, model):
        answers = generate_answers(model, tokenizer, sequences, args, name)
        free_gpu()  # of what answers needed; a loss needs larger pieces
        results[name] = {"answers": answers, "loss": measure_loss(model, batches, "transformers")}

    base = load_base(base_id, False, trust, place=place)
    warn_if_spread(base)
    results["base"] = {"answers": generate_answers(base, tokenizer, sequences, args, "base")}
    sums = None if adapter else sum_weights(base)
    if adapter:
        if args.load_in_4bit:
            del base
            free_gpu()
            base = load_base(args.model_id, True, trust, place=small_place)
        score("adapter", load_adapter(base, adapter))
    del base
    free_gpu()
    if args.save_method == "lora":
        return results
    folder = merge_adapter(args, base_id, adapter) if adapter else partial_folder(args.final_model_dir)
    model = read_back(folder, trust, place)
    if not adapter:  # merge_adapter has seen to that
        refuse_unchanged(sums, model)
    if args.save_method == "merged_4bit":
        del model
        free_gpu()
        quantise_folder(folder, trust, small_place)
        model = read_back(folder, trust, small_place)
    score("merged" if adapter else "trained", model)
    return results


def send_result(sender, function, arguments: tuple) -> None:
    """Send function(*arguments), or the error that it ends with, to the process that waits for it."""
    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    if hasattr(os, "fork"):  # locks that libraries make here then have no name that a killed process leaves behind
        multiprocessing.set_start_method("fork", force=True)
    try:
        result = function(*arguments)
    except Exception as error:
        # Errors of libraries often cannot be sent as they are.
        plain = isinstance(error, UserError) or type(error).__module__ in ("builtins", "torch")
        result = error if plain else RuntimeError(f"{type(error).__name__}: {error}")
    sender.send(result)


@contextlib.contextmanager
def block_signals():
    """Block SIGINT and SIGTERM for what is started meanwhile: a Ctrl-C is for this process alone. Not on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # or it is started with the process, and unblocks them
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def run_fresh(function, *arguments):
    """Return function(*arguments), computed in a new Python process that ends when this one is stopped or dies."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(sender, function, arguments))
    # A new process begins by importing the main module: a program that calls main() would call it there again.
    caller, sys.modules["__main__"] = sys.modules["__main__"], sys.modules[__name__]
    noted: list[int] = []
    try:
        with handle_signals(lambda number, frame: noted.append(number)):
            with block_signals():
                process.start()
    finally:
        sys.modules["__main__"] = caller
    sender.close()
    try:
        if noted:
            raise Interrupted(noted[0])
        result = receiver.recv()
        process.join()
    except EOFError:
        raise UserError("the process that merges was killed; it needs memory for the whole 16-bit model") from None
    finally:
        process.kill()
        process.join()
    if isinstance(result, Exception):
        raise result
    return result


def is_worse(loss: float, expected: float) -> bool:
    """Say whether a held-out loss is above the expected one by more than rounding explains, or is no number."""
    return not loss <= expected + MERGE_SLACK * max(1, expected)


def check_merged(args: argparse.Namespace, adapter: str, results: dict, scores: dict, exact: list[bool]) -> None:
    """Compare the merged model read back with the adapter it came from; a mismatch is a UserError.

    After 16-bit training both are the same model up to the rounding of the merge and must answer alike wherever the
    adapter's answer is `exact`; where it is not, the model is unsure, and rounding decides what wrong answer it gives.
    After 4-bit training the merged model stands on the unquantised base, a little different and as a rule better, so
    loss and score decide. A merged model in 4 bits may be worse than its adapter; the user who asked for it is told by
    how much. One answer alone proves nothing, however few there are: rounding may tip it.
    """
    expected, got = results["adapter"], results["merged"]
    slack = max(MERGE_SLACK, 1 / len(exact))
    # Rounded to whole rows: a difference of two shares can be a little more than the share that it is.
    worse = round((scores["adapter"]["exact_match"] - scores["merged"]["exact_match"]) * len(exact)) / len(exact)
    different = sum(sure and a != b for sure, a, b in zip(exact, expected["answers"], got["answers"])) / len(exact)
    wrong = is_worse(got["loss"], expected["loss"]) or worse > slack
    found = (f"held-out loss {got['loss']:.4f}, adapter {expected['loss']:.4f}; exact "
             f"{scores['merged']['exact_match']:.1%}, adapter {scores['adapter']['exact_match']:.1%}")
    if args.save_method == "merged_4bit" and math.isfinite(got["loss"]):
        return warn(f"4 bits cost something: {found}") if wrong else None
    if wrong or not math.isfinite(got["loss"]) or (not args.load_in_4bit and different > slack):
        shutil.rmtree(partial_folder(args.final_model_dir), ignore_errors=True)
        advice = ("; what is learned on a base in 4 bits may be worth less on it in 16: train longer, or with "
                  "--no-load_in_4bit")
        raise UserError(f"the merged model does not do what the adapter does: {found}; {different:.1%} of the answers "
                        f"are no longer its exact ones; nothing was written to {args.final_model_dir}, the adapter is "
                        f"safe in {adapter}" + advice * args.load_in_4bit)


def gather_model(model, dtype, trust: bool):
    """Return a split model whole, in `dtype` and on the CPU, on the first process; all must call this."""
    weights = gather_weights(model)
    if not is_main():
        return None
    whole = build_skeleton(model.config, trust)
    whole.load_state_dict(weights, strict=False, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole.to(dtype)


def round_trained(args: argparse.Namespace, model, dtype, batches: list[dict], engine: str) -> tuple:
    """Put fully trained fp32 weights into the type of their base; return (the model whole, the held-out loss it has).

    In a short run with a low rate, 16 bits may not hold what the steps changed: that is warned of. All processes must
    call this, and the first one gets the model.
    """
    import torch

    before, dtype = measure_loss(model, batches, engine), dtype or model.dtype
    torch.manual_seed(args.seed)
    for parameter in model.parameters():
        if dtype == torch.bfloat16:
            round_at_random(held_part(parameter.data))
        parameter.data.copy_(parameter.data.to(dtype))
    after = measure_loss(model, batches, engine)
    if is_worse(after, before):
        warn(f"{dtype} holds less than training changed: held-out loss {after:.4f}, in 32 bits {before:.4f}; train "
             "longer or raise --learning_rate")
    return gather_model(model, dtype, args.trust_remote_code) if args.fsdp else model.to(dtype), after


def check_trained(args: argparse.Namespace, loss: float, expected: float) -> None:
    """Compare the held-out loss of the trained model read back with that of the weights it was saved from."""
    if not is_worse(loss, expected):
        return
    found = f"held-out loss {loss:.4f}, before it was saved {expected:.4f}"
    if args.save_method == "merged_4bit" and math.isfinite(loss):
        return warn(f"4 bits cost something: {found}")
    raise UserError(f"the trained model read back does not do what it did: {found}; nothing was written to "
                    f"{args.final_model_dir}, the checkpoints are safe in {args.output_dir}")


def show_saved(args: argparse.Namespace, results: dict, before: float | None, seconds: float) -> None:
    """Print how the model that is kept scores beside what it was made from: the adapter, or the weights in memory."""
    name, answers = list(results)[-1], sum(len(result["answers"]) for result in results.values())
    text = f"held-out loss {results[name]['loss']:.4f}"
    if name != "adapter":
        text = f"{'4' if args.save_method == 'merged_4bit' else '16'}-bit, read back by a fresh process: {text}, "
        text += f"adapter {results['adapter']['loss']:.4f}" if name == "merged" else f"before saving {before:.4f}"
    say("merge" if name == "merged" else "save", f"{text} ({seconds:.0f} s with {answers:,} answers)")


def find_llama_tool(name: str) -> list[str]:
    """Return the command of a program of llama.cpp, from PATH or from where it is built or Unsloth puts it; or []."""
    if found := shutil.which(name):
        return [found]
    unsloth = os.environ.get("UNSLOTH_LLAMA_CPP_PATH") or Path.home() / ".unsloth" / "llama.cpp"
    for path in (Path(folder) / inner / name for folder in ("llama.cpp", unsloth) for inner in ("", "build/bin")):
        if path.is_file():
            return [sys.executable, str(path)] if path.suffix == ".py" else [str(path)]
    return []


def run_llama_tool(command: list[str], what: str) -> None:
    """Run a program of llama.cpp; if it fails, the last line that it wrote becomes a UserError."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        failed, lines = result.returncode != 0, (result.stderr or result.stdout).strip().splitlines()
    except OSError as error:
        failed, lines = True, [str(error)]
    if failed:
        raise UserError(f"{what}: {shlex.join(command[:2])} failed: {lines[-1] if lines else 'it says nothing'}")


def find_gguf_tools(names: str | None) -> tuple[list[str], list[str]]:
    """Return the commands of llama.cpp's (converter, quantizer) for these GGUF files; a missing one is refused."""
    if names is None:
        return [], []
    tools = {"convert_hf_to_gguf.py": find_llama_tool("convert_hf_to_gguf.py")}
    if not set(names.split(",")) <= set(CONVERTED_GGUF):
        tools["llama-quantize"] = find_llama_tool("llama-quantize")
    if missing := [name for name, command in tools.items() if not command]:
        raise UserError(f"--save_gguf {names}: {' and '.join(missing)} of llama.cpp not found; expected on PATH, in "
                        "./llama.cpp, or where Unsloth installs it: $UNSLOTH_LLAMA_CPP_PATH or ~/.unsloth/llama.cpp")
    return tools["convert_hf_to_gguf.py"], tools.get("llama-quantize", [])


def check_gguf(args: argparse.Namespace, converter: list[str], config, tokenizer) -> None:
    """Refuse a model that llama.cpp's converter does not know, by having it convert the tokenizer alone."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        run_llama_tool([*converter, folder, "--vocab-only", "--outfile", str(Path(folder) / "vocabulary.gguf")],
                       f"--save_gguf {args.save_gguf}: --model_id {args.model_id}")


OLLAMA_TEMPLATE = """\
{{ if or .System .Tools }}<|im_start|>system
{{ .System }}{{ if .Tools }}{{ if .System }}

{{ end }}<BEFORE>{{ range .Tools }}
{"type": "function", "function": {{ .Function }}}{{ end }}<AFTER>{{ end }}<|im_end|>
{{ end }}{{ $replies := false }}{{ range $i, $message := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}\
{{ if and $replies (ne .Role "tool") }}<|im_end|>
{{ $replies = false }}{{ end }}\
{{ if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}{{ $calls := .ToolCalls }}{{ if and .Content $calls }}
{{ end }}{{ if .ToolCalls }}{{ range $n, $call := .ToolCalls }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>{{ if ne (len (slice $calls $n)) 1 }}
{{ end }}{{ end }}{{ end }}{{ if not $last }}<|im_end|>
{{ end }}\
{{ else if eq .Role "tool" }}{{ if not $replies }}<|im_start|>user{{ $replies = true }}{{ end }}
<tool_response>
{{ .Content }}
</tool_response>{{ if $last }}<|im_end|>
{{ end }}{{ end }}{{ if and $last (ne .Role "assistant") }}<OPENING>{{ end }}{{ end }}"""


def to_modelfile(tokenizer, file: str, context: int, thinks: bool) -> str:
    """Return an Ollama Modelfile for a GGUF file, whose template writes what the chat template writes.

    Its fixed texts are cut out of a rendered prompt, so they are those of training. Only the JSON of tools is spaced
    and ordered as Ollama does it. A chat format other than Qwen's is left to Ollama, which knows the common ones.
    """
    render = partial(render_text, tokenizer, add_generation_prompt=True, enable_thinking=thinks)
    user, tool = {"role": "user", "content": "USER"}, {"type": "function", "function": {"name": "x"}}
    before, _, after = render([{"role": "system", "content": "SYSTEM"}, user], tools=[tool]).partition(json.dumps(tool))
    lines = [f"FROM ./{file}", "PARAMETER temperature 0", f"PARAMETER num_ctx {context}"]
    if before.startswith("<|im_start|>system\nSYSTEM\n\n") and "<tool_call>" in after:
        template = OLLAMA_TEMPLATE.replace("<BEFORE>", before.partition("SYSTEM\n\n")[2].rstrip("\n"))
        template = template.replace("<AFTER>", after.partition("<|im_end|>")[0])
        template = template.replace("<OPENING>", after.rpartition("<|im_end|>\n")[2])
        lines += [f'PARAMETER stop "{token}"' for token in ("<|im_start|>", "<|im_end|>")]
        lines += [f'TEMPLATE """{template}"""']
        system = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", render([user]), re.DOTALL)
        lines += [f'SYSTEM """{system[1]}"""'] if system else []  # Qwen2.5 says who it is where nobody else does
    return "\n".join(lines) + "\n"


def write_gguf(args: argparse.Namespace, tools: tuple[list[str], list[str]], tokenizer, thinks: bool) -> Path:
    """Write the final 16-bit model as GGUF files with a Modelfile for the first to its folder `gguf`; return that."""
    model, (converter, quantizer) = Path(args.final_model_dir), tools
    what = f"--save_gguf (the model is whole in {model})"
    with discard_partial(model / "gguf") as folder:
        folder.mkdir()
        whole = folder / "whole.gguf"
        files = {name: folder / f"{model.resolve().name}-{name}.gguf" for name in args.save_gguf.split(",")}
        if quantizer:
            run_llama_tool([*converter, str(model), "--outfile", str(whole), "--outtype", "bf16"], what)
        for name, file in files.items():
            convert = [*converter, str(model), "--outfile", str(file), "--outtype", name]
            quantize = [*quantizer, str(whole), str(file), name.upper()]
            run_llama_tool(convert if name in CONVERTED_GGUF else quantize, what)
            if not file.is_file():
                raise UserError(f"{what}: llama.cpp wrote no {file.name}")
        whole.unlink(missing_ok=True)
        first = next(iter(files.values())).name
        (folder / "Modelfile").write_text(
            to_modelfile(tokenizer, first, max(4096, args.max_seq_length), thinks), encoding="utf-8")
        put_in_place(model / "gguf")
    return model / "gguf"


def check_hub(repo: str | None) -> None:
    """Refuse an upload that has no token that may write there, before anything is trained for it."""
    if repo is None:
        return
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        user = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise UserError(f"--push_to_hub {repo}: no token; run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        raise UserError(f"--push_to_hub {repo}: the Hub answers {error.response.status_code} to the token; expected "
                        "one that may write") from None
    except ValueError as error:
        raise UserError(f"--push_to_hub {repo}: {str(error).splitlines()[0]}") from None
    except (OSError, httpx.HTTPError) as error:
        raise UserError(f"--push_to_hub {repo}: the Hub cannot be reached: {str(error).splitlines()[0]}") from None
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if "/" in repo and repo.split("/")[0] not in owners:
        raise UserError(f"--push_to_hub {repo}: the token is of {', '.join(owners)}; expected a repository of these")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"--push_to_hub {repo}: the token may only read; expected one that may write")


def push_folder(repo: str, folder: str) -> str:
    """Upload a folder to the Hub, to a private repository if it is new, and return its address."""
    from huggingface_hub import HfApi

    try:
        repo = HfApi().create_repo(repo, private=True, exist_ok=True).repo_id
        # run.yaml has the paths of this machine.
        return HfApi().upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=["run.yaml"],
                                     commit_message="Upload by train_qwen3_tool_calling.py").repo_url
    except Exception as error:  # of whatever kind: what was trained is there, and must not look lost
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--push_to_hub {repo}: {reason}; everything is whole in {folder}, push it with: "
                        f"hf upload {repo} {shlex.quote(folder)} . --private --exclude run.yaml") from None


def to_vllm_command(config, model: str, parser: str, thinks: bool) -> str:
    """Return the command by which vLLM serves a model with tools, on the prompts that it was trained on.

    A model that was never trained to think gets no reasoning parser: it would take an answer for a thought.
    """
    command = f"vllm serve {model} --enable-auto-tool-choice --tool-call-parser {parser}"
    if not config.model_type.startswith("qwen3"):
        return command
    return command + (" --reasoning-parser qwen3" if thinks else
                      """ --default-chat-template-kwargs '{"enable_thinking": false}'""")


# ---------------------------------------------------------------------------------------------------------------
# 11  Report: what a person sees at the end
# ---------------------------------------------------------------------------------------------------------------
def score_results(sequences: list[Sequence], results: dict) -> tuple[dict, dict]:
    """Return ({model: scores}, {model: verdicts}) of the answers of each model."""
    verdicts = {name: [score_answer(answer, sequence.answer, sequence.tools, sequence.parser)
                       for answer, sequence in zip(result["answers"], sequences)] for name, result in results.items()}
    return {name: count_scores(of_model) for name, of_model in verdicts.items()}, verdicts


def cut_text(text: str, limit: int = 200) -> str:
    """Return a text on one line, cut to `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def show_answers(sequences: list[Sequence], results: dict, verdicts: dict) -> None:
    """Print of the first sequences request, expected answer, and the answer of the first and of the last model."""
    first, *_, last = results if len(results) > 1 else ["", *results]
    for index, sequence in enumerate(sequences[:SHOWN_ROWS]):
        print(f"\n{sequence.where}  {cut_text(sequence.request)}")
        print(f"  {'expected':<9}{cut_text(sequence.answer)}")
        for label, name in (("before", first), ("after", last)):
            if name:
                answer = cut_text(results[name]["answers"][index])
                print(f"  {label:<9}{answer} {'✓' if verdicts[name][index].exact else '✗'}")
    print()


def show_scores(scores: dict) -> None:
    """Print one line of scores for each model."""
    say("score", f"{'':<9}{'exact':>8}{'AST':>8}{'tool F1':>9}{'calls: precision':>18}{'recall':>8}{'broken':>8}"
                 f"{'rows':>7}")
    for name, score in scores.items():
        say("", f"{name:<9}{score['exact_match']:>8.1%}{score['ast_match']:>8.1%}{score['tool_macro_f1']:>9.1%}"
                f"{score['call_precision']:>18.1%}{score['call_recall']:>8.1%}{score['broken_json']:>8}{score['n']:>7}")


def count_origins(sequences: list[Sequence]) -> int:
    """Return of how many rows these sequences are: one with several trained turns makes several."""
    return len({sequence.where for sequence in sequences})


def name_unit(*sides: list[Sequence]) -> str:
    """Return what sequences are to be called: rows, or turns where rows have several."""
    return "rows" if all(count_origins(side) == len(side) for side in sides) else "turns"


def to_report(args, command, sequences, results, scores, verdicts, data, lengths, train) -> dict:
    """Return all that is known of the run as one dict, with what report.json promises."""
    import numpy as np
    import torch

    last = list(results)[-1]
    shares = {name: count_per_tool(of_model) for name, of_model in verdicts.items()}
    per_tool = {tool: {"support": row["support"], **{name: {key: shares[name][tool][key] for key in ("tool", "exact")}
                                                     for name in shares}} for tool, row in shares[last].items()}
    labels, counts = count_confusion(verdicts[last])
    before, got = results[next(iter(results))]["answers"], results[last]["answers"]
    failures = [{"where": sequence.where, "request": sequence.request, "expected": sequence.answer,
                 "got": got[index], **({"before": before[index]} if len(results) > 1 else {})}
                for index, sequence in enumerate(sequences) if not verdicts[last][index].exact]
    paths = [*args.dataset_path * bool(train or not args.eval_dataset_path), *(args.eval_dataset_path or [])]
    data = {"path": " ".join(paths), "rows": data["train"] + data["held_out"], **data}
    if lengths:
        bins, edges = np.histogram(lengths, bins=min(30, max(lengths) - min(lengths) + 1))
        data |= {"tokens": {"mean": sum(lengths) / len(lengths), "max": max(lengths)},
                 "lengths": {"edges": [round(float(edge), 1) for edge in edges], "counts": bins.tolist()}}
    classes = count_classes([(sequence.answer, answer) for sequence, answer in zip(sequences, got)])
    if not any(sequence.tools for sequence in sequences) and classes is not None:
        scores[last]["macro_f1"] = classes
    report = {"scores": scores, "per_tool": per_tool, "confusion": {"labels": labels, "counts": counts}, "data": data,
              "failures": failures, "versions": find_versions(), "args": vars(args), "git": find_commit(),
              "command": command,
              "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
              "finished": time.strftime("%Y-%m-%d %H:%M")}
    return report | ({"train": train} if train else {})


def find_versions() -> dict:
    """Return {library: version or None} of what a run depends on."""
    from importlib import metadata

    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth")
    found = {name: next(metadata.distributions(name=name), None) for name in names}  # of two, the first is imported
    return {"python": sys.version.split()[0], **{name: library and library.version for name, library in found.items()}}


def find_commit() -> str | None:
    """Return the commit of the folder that the script is in, with "(changed)" where files differ from it, or None."""
    try:
        return subprocess.run(["git", "describe", "--always", "--exclude=*", "--dirty= (changed)"], text=True,
                              cwd=Path(__file__).parent, capture_output=True).stdout.strip() or None
    except OSError:  # no git here
        return None


SHOWN_CHARACTERS = 2000  # of any one text in the report; the rest is counted, not shown
INVISIBLE = r"[\0-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufffe\uffff]"
SCORE_NAMES = {"exact_match": "Exact match", "ast_match": "AST match", "tool_macro_f1": "Tool macro-F1",
               "call_precision": "Call precision", "call_recall": "Call recall", "broken_json": "Broken JSON"}

REPORT_TEMPLATE = """<!doctype html>
{% macro section(title, note="") %}<section><div><h2>{{ title }}</h2><p class="note">{{ note }}</p></div>
<div>{{ caller() }}</div></section>{% endmacro %}
{% macro listed(kind, pairs) %}<dl class="{{ kind }}">{% for name, value in pairs if value or kind == "pairs" %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>{% endmacro %}
{% macro chart(curve, label) %}<figure role="img" aria-label="{{ label }} by step">
<div class="y"><span>{{ curve.top }}</span><span>{{ curve.half }}</span><span>0</span></div>
<svg viewBox="0 0 100 100" preserveAspectRatio="none"><path class="grid" d="M0 0H100M0 50H100M0 100H100"/>
{% for line in curve.lines %}<polyline class="{{ line.kind }}" points="{{ line.points }}"/>
{% if line.dots %}<path class="dots" d="{{ line.dots }}"/>{% endif %}{% endfor %}</svg>
<div class="x"><span>step 0</span><span>{{ curve.steps | number }}</span></div>
<figcaption>{{ label }}: {% for line in curve.lines %}{{ ", " if not loop.first }}
<span class="{{ line.kind }}">{{ line.name }} {{ line.last }}</span>{% endfor %}</figcaption></figure>{% endmacro %}
{% macro bar(score, kind) %}<div class="bar {{ kind }}"><i style="--exact:{{ score.exact | share }};
--tool:{{ score.tool | share }}"></i><span>{{ score.exact | percent }}</span></div>{% endmacro %}
{% set unit = data.unit or "rows" %}{% set tested = "training" if data and not data.held_out else "held-out" %}
{% macro named(name) %}{{ name if name == "model" else name ~ " model" }}{% endmacro %}
{% set fell = scores and scores[last].exact_match < scores[first].exact_match %}
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ headline }}</title><style>
:root { --paper:#fdfcfa; --ink:#1f1e1c; --mute:#67635d; --line:#e4e0d8; --soft:#f4f1eb; --base:#8b867e;
  --accent:#0b6e5f; --bad:#b3261e; color-scheme:light dark; print-color-adjust:exact; -webkit-print-color-adjust:exact }
@media screen and (prefers-color-scheme:dark) { :root { --paper:#171716; --ink:#e9e6e0; --mute:#a19c94; --line:#33312e;
  --soft:#21201e; --base:#88837b; --accent:#5fc9b1; --bad:#ff9186 } } * { box-sizing:border-box } body { margin:0 auto;
  max-width:74rem; padding:clamp(2rem,6vw,5.5rem) clamp(1.1rem,5vw,4rem); background:var(--paper); color:var(--ink);
  font:1rem/1.55 system-ui,sans-serif; font-variant-numeric:tabular-nums; overflow-wrap:anywhere }
h1 { font-size:clamp(2.1rem,6.5vw,4rem); line-height:1.08; letter-spacing:-.025em; font-weight:600; margin:0 0 1.2rem;
  text-wrap:balance } h1 span, .lead span { display:inline-block } .scores td { white-space:nowrap } .after {
  color:var(--accent) } .fell, .bad { color:var(--bad) } .bad { margin:.6rem 0 0; font-weight:600 } .lead {
  font-size:1.15rem; max-width:44rem; color:var(--mute); margin:0 } h2 { font-size:1rem; font-weight:600; margin:0 0
  .4rem } .note, dt { color:var(--mute); font-size:.84rem; margin:0 } section > div { min-width:0 } section {
  display:grid; grid-template-columns:12rem minmax(0,1fr); gap:1rem 3rem; margin-top:clamp(2rem,4vw,3rem);
  padding-top:1.5rem; border-top:1px solid var(--line) }
table { border-collapse:collapse; width:100%; font-size:.94rem } th { font-weight:400; text-align:left } td, .scores
  thead th:not(:first-child) { text-align:right } thead th { color:var(--mute); font-size:.84rem } th, td {
  padding:.42rem 0 .42rem .6rem } tr > :first-child { padding-left:0 } tbody tr { border-top:1px solid var(--line) }
  .scores tr > :last-child { color:var(--accent); font-weight:600 } .tools thead th { white-space:nowrap } .tools tr >
  :last-child { width:58%; padding-left:1.5rem } .bar { --c:var(--base); display:flex; align-items:center; gap:.6rem;
  font-size:.8rem; line-height:1.3; color:var(--mute) } .bar i { flex:1; height:.5rem; border-radius:2px;
  background:linear-gradient(90deg, var(--c) var(--exact), color-mix(in srgb,var(--c) 32%,transparent) 0 var(--tool),
  var(--soft) 0) } .bar span { width:3.2rem } .bar.last { --c:var(--accent); color:var(--ink) } .wide { overflow-x:auto
  } .matrix { width:auto; font-size:.8rem } .matrix tr { border:0 } .matrix tbody td { text-align:center;
  min-width:1.9rem; height:1.9rem; padding:.1rem; border:1px solid var(--paper); background:color-mix(in
  srgb,var(--c,var(--soft)) var(--heat,0%),var(--soft)) } .hit { --c:var(--accent); font-weight:600 } .miss {
  --c:var(--bad) } .matrix thead th { writing-mode:vertical-rl; rotate:180deg; max-height:10rem; padding:.4rem 0;
  line-height:1.1 } .matrix tbody th { min-width:6rem; max-width:13rem; padding-right:.7rem; line-height:1.2 }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr)); gap:2rem } figure {
  margin:0; display:grid; grid-template-columns:auto 1fr; gap:.2rem .6rem; font-size:.8rem; color:var(--mute) } .y, .x {
  display:flex; justify-content:space-between } .y { flex-direction:column; text-align:right; margin:-.6rem 0 } .x,
  figcaption { grid-column:2 } figcaption { font-size:.9rem; color:var(--ink) } figcaption .held { color:var(--accent) }
  svg { width:100%; height:11rem; overflow:visible } svg * { fill:none; stroke:var(--base); stroke-width:1.5px;
  vector-effect:non-scaling-stroke } svg .grid { stroke:var(--line); stroke-width:1px } svg .held, svg .dots {
  stroke:var(--accent) } svg .dots { stroke-width:6px; stroke-linecap:round } .bins { grid-column:1/3; display:flex;
  align-items:flex-end; gap:1px; height:7rem; margin-top:1.8rem } .bins + .x { grid-column:1/3 } .bins i { flex:1;
  background:var(--accent) }
dl, dd { margin:0 } .facts { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,10.5rem),1fr));
  gap:1.6rem 1.5rem } .facts div { display:flex; flex-direction:column-reverse; justify-content:flex-end } .facts dd {
  font-size:1.5rem; line-height:1.2; letter-spacing:-.01em } .pairs { columns:2 19rem; column-gap:3rem; font-size:.88rem
  } .pairs div { display:flex; gap:1rem; padding:.28rem 0; justify-content:space-between; border-bottom:1px solid
  var(--line); break-inside:avoid } .pairs dt { flex:none; max-width:50% } .pairs dd { text-align:right } details {
  border-bottom:1px solid var(--line) } summary { cursor:pointer; padding:.6rem 0; display:flex; gap:.2rem 1rem;
  align-items:baseline } summary::before { content:"+"; color:var(--accent); width:.7rem } [open] > summary::before {
  content:"–" } summary .note { flex:none; max-width:45% } bdi { flex:1; min-width:0; overflow:hidden;
  white-space:nowrap; text-overflow:ellipsis } [open] bdi { white-space:pre-wrap } .answers { padding:.2rem 0 1.4rem
  1.7rem; display:grid; gap:.7rem; color:var(--mute); font-size:.84rem } pre { margin:.15rem 0 0; padding:.7rem .9rem;
  background:var(--soft); color:var(--ink); border-radius:4px; white-space:pre-wrap; max-height:32rem; overflow:auto;
  unicode-bidi:isolate; font:.84rem/1.55 ui-monospace,monospace } .command { user-select:all } ins, del {
  --c:var(--accent); color:var(--c); background:color-mix(in srgb,var(--c) 10%,transparent); text-underline-offset:.2em
  } del { --c:var(--bad) } @media (max-width:50rem) { section { grid-template-columns:minmax(0,1fr) } } @media
  (max-width:34rem) { summary { flex-wrap:wrap } summary .note { max-width:85% } bdi { flex-basis:100% } .answers {
  padding-left:0 } .tools tr > :last-child { padding-left:.9rem; width:52% } }
@media print { @page { margin:16mm } body { padding:0; font-size:10pt; background:none } section {
  grid-template-columns:minmax(0,1fr) } section > :first-child { break-after:avoid } tr, figure, .facts div {
  break-inside:avoid } details::details-content { content-visibility:visible } bdi { white-space:pre-wrap }
  summary::before { content:none } .wide, pre { overflow:visible; max-height:none } .matrix { width:100% } .matrix tbody
  td { min-width:0 } .answers { padding-left:0 } }
</style></head><body><main><h1>{% if scores %}
{% if first != last %}<span>{{ scores[first].exact_match | percent }}</span> → {% endif %}
<span class="{{ "fell" if fell else "after" }}">{{ scores[last].exact_match | percent }}</span> of calls exact
{% else %}{{ headline }}{% endif %}</h1>
{% if data %}<p class="lead">{{ args.eval_only or args.model_id }}
{%- if train %}, trained on {{ data.train | number }} {{ unit }}{% endif %}
{% if scores %}, measured on {{ scores[last].n | number }} {{ tested }} {{ unit }}{% endif %} of {{ data.path }}
{%- if device %}, on {{ device }}{% endif %}{% if finished %}, <span>{{ finished }}</span>{% endif %}.</p>{% endif %}
{% if fell %}<p class="bad">The {{ last }} model does worse than the {{ first }} model.</p>{% endif %}
{% if scores %}{% call section("Scores", "On the " ~ tested ~ " " ~ unit ~ ".") %}<table class="scores">
<thead><tr><td></td>{% for name in scores %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for key, label in score_names.items() %}<tr><th scope="row">{{ label }}</th>{% for score in scores.values() %}
<td>{{ score[key] | number if key == "broken_json" else score[key] | percent(1) }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>{% endcall %}{% endif %}
{% if curves %}{% call section("Learning") %}<div class="charts">
{% for label, curve in curves.items() %}{{ chart(curve, label) }}{% endfor %}</div>{% endcall %}{% endif %}
{% if tools %}{% call section("Tools", "Full colour: exact. Pale: the right tool, other arguments. " ~
("Grey is " ~ first ~ ", green " ~ last ~ ". " if first != last else "") ~ "Weakest first.") %}<table class="tools">
<thead><tr><th scope="col">tool</th><th scope="col">rows</th><th scope="col">exact</th></tr></thead><tbody>
{% for name, tool in tools %}<tr><th scope="row">{{ name | breakable }}</th><td>{{ tool.support | number }}</td><td>
{% if first != last %}{{ bar(tool[first], "first") }}{% endif %}{{ bar(tool[last], "last") }}</td></tr>
{% endfor %}</tbody></table>{% endcall %}{% endif %}
{% if matrix.rows %}
{% call section("Confusion", "Rows: the tool expected. Columns: the tool called by the " ~ named(last) ~ ".") %}
<div class="wide" tabindex="0" role="region" aria-label="Confusion table"><table class="matrix">
<thead><tr><td></td>{% for name in matrix.columns %}<th scope="col">{{ name | breakable }}</th>{% endfor %}</tr></thead>
<tbody>{% for name, cells in matrix.rows %}<tr><th scope="row">{{ name | breakable }}</th>
{% for kind, heat, n in cells %}<td class="{{ kind }}" style="--heat:{{ heat }}%">{{ n or "" }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endcall %}{% endif %}
{% if data %}{% call section("Data", data.path) %}
{{ listed("facts", [(unit, data.rows | number), ("for training", data.train | number),
("held out", data.held_out | number), ("skipped", data.skipped | number),
("tokens in each on average", data.tokens.mean | number), ("tokens at most", data.tokens.max | number)]) }}
{% set bins = data.lengths %}{% if bins.counts %}
<figure role="img" aria-label="Rows by length"><div class="bins">{% for count in bins.counts %}
<i style="height:{{ (count / (bins.counts | max or 1)) | share }}"></i>{% endfor %}</div>
<div class="x"><span>{{ bins.edges[0] | number }} tokens</span><span>{{ bins.edges[-1] | number }}</span>
</div></figure>{% endif %}{% endcall %}{% endif %}
{% if train %}{% call section("Training") %}
{% set computed, padded, memory = train.tokens_computed, train.tokens_padded, train.peak_memory_gib | number %}
{{ listed("facts", [("samples per second", train.samples_per_second | number),
("tokens per second", train.tokens_per_second | number), ("tokens computed: " ~ computed | number ~ " instead of " ~
padded | number, computed and "%.1f times fewer" % (padded / computed)), ("peak memory", memory and memory ~ " GiB"),
("for " ~ train.steps | plural("step"), "%d min %d s" % (train.seconds // 60, train.seconds % 60)),
("mean loss", train.loss | number), ("the step that is kept", train.kept_step < train.last_step and
train.kept_step | number), ("resumed from", train.resumed_from)]) }}{% endcall %}{% endif %}
{% if failures or scores and scores[last].exact_match == 1 %}
{% call section("Failures (" ~ failures | length | number ~ ")", failures and "Answers of the " ~ named(last) ~ " that
are not the expected ones. Underlined: only expected. Struck: only answered." or "Every answer is the expected one.") %}
{% for failure in failures %}{% set expected, got = mark_difference(failure.expected, failure.got) %}
<details><summary><span class="note">{{ failure.where }}</span> <bdi dir="auto">{{ failure.request }}</bdi></summary>
<div class="answers"><div>expected<pre>{{ expected }}</pre></div><div>{{ last }}<pre>{{ got }}</pre></div>
{% if failure.before %}<div>{{ first }}<pre>{{ failure.before }}</pre></div>{% endif %}</div></details>
{% endfor %}{% endcall %}{% endif %}
{% for title, pairs in [("Settings", args | items), ("Versions", (versions | items | list) + [("git", git)])] if data %}
{% call section(title) %}{{ listed("pairs", pairs) }}{% endcall %}{% endfor %}
{% if command %}{% call section("Repeat this run", "A click selects it all.") %}
<pre class="command" tabindex="0">{{ command | whole }}</pre>{% endcall %}{% endif %}
</main></body></html>
"""


def show_text(value: object, limit: int = SHOWN_CHARACTERS) -> object:
    """Return what the page shows for a value: a long text cut, and characters that act instead of showing by number."""
    if value is None or hasattr(value, "__html__"):
        return "–" if value is None else value
    text = str(value)
    rest = f"… {len(text) - limit:,} more characters" if len(text) > limit else ""
    return re.sub(INVISIBLE, lambda match: f"⟨U+{ord(match[0]):04X}⟩", text[:limit]) + rest


def mark_difference(expected: str, got: str) -> list:
    """Return both texts as markup: <ins> around what only `expected` has, <del> around what only `got` has."""
    from markupsafe import Markup, escape

    cut = [show_text(text[:SHOWN_CHARACTERS]) for text in (expected, got)]
    left, right = (re.findall(r'[^\s"{}\[\],<>]+|\s+|.', text) for text in cut)
    marked = [Markup(""), Markup("")]
    for change, a, b, c, d in difflib.SequenceMatcher(None, left, right).get_opcodes():
        for side, tag, words in ((0, "ins", left[a:b]), (1, "del", right[c:d])):
            text = escape("".join(words))
            marked[side] += text if change == "equal" or not words else Markup(f"<{tag}>{text}</{tag}>")
    return [mark + show_text(text)[len(shown):] for mark, text, shown in zip(marked, (expected, got), cut)]


def show_number(value: float | None) -> str | None:
    """Return a number with thousands separated, and three digits of one that is not whole."""
    if not isinstance(value, (int, float)):
        return None
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 999.5 else f"{value:.3g}"


def show_percent(share: float | None, digits: int = 0) -> str | None:
    """Return a share in percent with one decimal, which is left out when 0 unless `digits` asks for it."""
    return f"{100 * share:.1f}".removesuffix("" if digits else ".0") + " %" if share is not None else None


def draw_curve(history: list[dict], names: dict[str, str], show=show_number, top: float | None = None) -> dict:
    """Return the lines of a chart for the log's keys in `names`, in percent of its width and height."""
    from markupsafe import Markup

    logged = {key: [(entry["step"], entry[key]) for entry in history
                    if isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key])] for key in names}
    steps = max((entry["step"] for entry in history), default=1) or 1
    highest = max((value for points in logged.values() for _, value in points), default=1)
    unit = 10 ** math.floor(math.log10(highest)) if highest > 0 else 1
    top = top or next(n * unit for n in (1, 1.5, 2, 3, 4, 6, 8, 10, 11) if n * unit >= highest)
    lines = []
    for key, points in logged.items():
        thin = points[:: -(len(points) // 400 + 1)]  # from the last; more points than pixels make the page heavy
        drawn = [f"{100 * step / steps:.2f},{100 - 100 * value / top:.2f}" for step, value in thin]
        if points:
            held = key.startswith("eval")
            lines.append({"kind": "held" if held else "fitted", "name": names[key], "last": show(points[-1][1]),
                          "points": Markup(" ".join(drawn)),
                          "dots": Markup("".join(f"M{point}h0" for point in drawn)) if held else ""})
    return {"lines": lines, "top": show(top), "half": show(top / 2), "steps": steps}


def shade_confusion(confusion: dict) -> dict:
    """Return the rows and columns that hold a count, each cell as (kind, heat in percent, count)."""
    labels, counts = confusion["labels"], confusion["counts"]
    used = [column for column in range(len(labels)) if any(row[column] for row in counts)]
    rows = []
    for label, row in zip(labels, counts):
        if total := sum(row):
            kinds = ["" if not row[column] else "hit" if labels[column] == label else "miss" for column in used]
            heats = [12 + 30 * row[column] // total for column in used]  # at most 42: the text stays readable
            rows.append((label, list(zip(kinds, heats, (row[column] for column in used)))))
    return {"columns": [labels[column] for column in used], "rows": rows}


def render_report(report: dict) -> str:
    """Return the report of a run as one HTML page that needs nothing from outside; absent parts are left out."""
    from jinja2 import ChainableUndefined, Environment
    from markupsafe import Markup, escape

    page = Environment(autoescape=True, undefined=ChainableUndefined, finalize=show_text, trim_blocks=True)
    page.filters |= {"percent": show_percent, "number": show_number, "plural": plural,
                     "share": lambda part: f"{100 * (part or 0):.1f}%",
                     "breakable": lambda name: Markup("_<wbr>").join(show_text(name).split("_")),
                     "whole": lambda text: Markup(escape(show_text(text, sys.maxsize)))}  # not cut: it is to be copied
    scores, train, tools = report.get("scores") or {}, report.get("train") or {}, report.get("per_tool") or {}
    first, last = (next(iter(names), None) for names in (scores, reversed(scores)))
    headline = " → ".join(show_percent(scores[name]["exact_match"]) for name in dict.fromkeys([first, last]) if name)
    curves = {"Loss": draw_curve(train.get("history") or [], {"loss": "training", "eval_loss": "held out"}),
              "Exact match": draw_curve(train.get("history") or [], {"eval_exact_match": "held out"}, show_percent, 1)}
    return page.from_string(REPORT_TEMPLATE).render(
        report, first=first, last=last, score_names=SCORE_NAMES,
        headline=headline + " of calls exact" if scores else "Trained, not measured", mark_difference=mark_difference,
        tools=sorted(tools.items(), key=lambda item: (item[1].get(last, {}).get("exact", 0), item[0])),
        curves={name: curve for name, curve in curves.items() if curve["lines"]},
        matrix=shade_confusion(report["confusion"]) if report.get("confusion") else {})


def write_report(folder: str, report: dict) -> dict:
    """Write report.json and report.html into `folder` and return what report.json holds."""
    path = Path(folder)
    text = hide_secrets(json.dumps(report, ensure_ascii=False, default=str))
    report = json.loads(text, parse_constant=lambda name: None)  # NaN is no JSON; in fp16 a norm may be one
    write_file(path / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    write_file(path / "report.html", render_report(report))
    return report


def hide_folders(text: str) -> str:
    """Return a word of a command line, or the name of a file or model, without the folders of this machine."""
    return re.sub(r"(^|=)[/~].*/(?=[^/])", r"\1", text)


def to_card(report: dict, adapter: bool, name: str, command: str) -> str:
    """Return the model card of an adapter or of a whole model: what it is, how well it calls tools, how to use it."""
    import yaml

    args, data, train = report["args"], report["data"], report["train"]
    steps = f"{train['kept_step']:,} steps" + (f" of {train['last_step']:,}, the best on held-out rows" if
                                               train["kept_step"] < train["last_step"] else "")
    losses = [log["loss"] for log in train["history"] if "loss" in log]  # also of before the run was resumed
    loss = f", mean loss {sum(losses) / len(losses):.4f}" if losses else ""
    base, rank = hide_folders(args["model_id"].rstrip("/")), args["lora_rank"]
    how = f"LoRA of rank {rank}" if rank else "full fine-tuning"
    what = "the adapter alone" if adapter else {"merged_16bit": "16-bit weights", "merged_4bit": "4-bit weights "
                                                "(bitsandbytes, nf4)"}[args["save_method"]]
    head = yaml.safe_dump({"base_model": base, "library_name": "peft" if adapter else "transformers",
                           "pipeline_tag": "text-generation", "tags": ["tool-calling", "function-calling"]})
    scores = [f"| {model} | {show_percent(row['exact_match'], 1)} | {show_percent(row['ast_match'], 1)} | "
              f"{show_percent(row['tool_macro_f1'], 1)} | {row['broken_json']} | {row['n']} |"
              for model, row in report["scores"].items()]
    settings = [f"| `{key}` | {args[key]} |" for key in (
        "num_epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "max_seq_length", *AGREED[1:])
                if args[key] is not None and not (key == "num_epochs" and args["max_steps"])]
    words = [shlex.quote(hide_folders(word)) for word in shlex.split(report["command"])]
    paths = ", ".join(f"`{hide_folders(path)}`" for path in args["dataset_path"])
    return hide_secrets(f"""---
{head}---
# {name}

`{base}` taught to call tools by {how}: {what}.

| | exact match | AST match | tool macro-F1 | broken JSON | {'held-out' if data['held_out'] else 'training'} requests |
|---|---|---|---|---|---|
{chr(10).join(scores)}

Each model wrote its answers greedily. *Exact* compares calls as JSON values, in any order; a request that needs no
call is right when none is made, and one without tools when the text is the same.

## Use

```bash
{command}
```

## Training

{data['train']:,} sequences of {paths}, {data['held_out']:,} held out; {steps}{loss};
{report['device']}, {report['finished']}.

```bash
{' '.join(words)}
```

| setting | value |
|---|---|
{chr(10).join(settings)}
""")


# ---------------------------------------------------------------------------------------------------------------
# 12  Audit: what a run would do, before it is paid for
# ---------------------------------------------------------------------------------------------------------------
LISTED = 1000  # rows that audit.json names for each finding; all are counted
SHOWN_PAIRS = 5  # rows that the screen names for each finding
SHOWN_TOOLS = 8
REPEATS = {"duplicates": "exact duplicates", "conflicts": "equal requests with different answers",
           "held_out_in_training": "held-out rows that also occur in training"}


class Characters:
    """Stands in for a tokenizer that cannot be had: each character is a token, in a plain form of Qwen3's template."""

    eos_token, name_or_path, chat_template, added_tokens_decoder = "<|im_end|>", "", "", {}

    def __call__(self, texts: list[str], **options) -> dict:
        return {"input_ids": [[ord(character) for character in text] for text in texts]}

    def apply_chat_template(self, messages: list[dict], tools=None, add_generation_prompt=False, **options) -> str:
        text = "".join(["<tools>\n", *(json.dumps(tool) + "\n" for tool in tools), "</tools>\n"]) if tools else ""
        for message in messages:
            thought = message.get("reasoning_content")
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
            text += f"<|im_start|>{message['role']}\n" + (f"<think>\n{thought}\n</think>\n\n" if thought else "")
            text += message["content"] + "".join(f"\n<tool_call>\n{call}\n</tool_call>" for call in calls)
            text += self.eos_token + "\n"
        return text + "<|im_start|>assistant\n" * add_generation_prompt


def find_model(args: argparse.Namespace) -> tuple:
    """Return (tokenizer, or what counts characters instead; why so; the config, or None where there is none)."""
    try:
        tokenizer = load_tokenizer(args.model_id, args.trust_remote_code)
    except UserError as error:
        return Characters(), str(error), None
    try:
        config = load_config(args.model_id, trust=args.trust_remote_code)
    except UserError:
        return tokenizer, "", None
    check_kind(config, args.model_id)
    return tokenizer, "", config


def digest_tools(examples: list[Example]) -> list[str]:
    """Return the digest of each example's tools; most examples share one list, which is digested once."""
    lists = {id(example.tools): example.tools for example in examples}
    digests = {key: digest(tools) for key, tools in lists.items()}
    return [digests[id(example.tools)] for example in examples]


def list_calls(example: Example) -> list[list[str]]:
    """Return the names of the tools that each trained turn of a row calls; turns without a call are left out."""
    turns = [[call["function"]["name"] for call in message.get("tool_calls", [])]
             for message in filter(is_trained, example.messages)]
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
        found.append(f"{len(leaks):,} of {len(held_out):,} held-out rows also occur in training ({leaks[0][0]} is "
                     f"{leaks[0][1]}): their score says nothing about new requests")
    return found


def audit_calls(examples: list[Example]) -> dict:
    """Return how many tools and calls the rows have, and the shares of rows without a call and with parallel calls."""
    calls = [list_calls(example) for example in examples]
    counts = Counter(name for turns in calls for names in turns for name in names)
    lists = dict(zip(digest_tools(examples), (example.tools for example in examples)))
    tools = {digest(tool): tool["function"]["name"] for listed in lists.values() for tool in listed}
    return {"formats": dict(Counter(example.format for example in examples)),
            "tools": {"distinct": len(tools), "lists": len(lists)},
            "calls_per_tool": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
            "never_called": sorted({*tools.values()} - counts.keys()),
            "no_call_share": sum(not turns for turns in calls) / len(examples),
            "parallel_share": sum(any(len(names) > 1 for names in turns) for turns in calls) / len(examples)}


def count_tool_tokens(tokenizer, examples: list[Example]) -> list[int]:
    """Return for each example how much longer its tools make the prompt; computed once for each list of tools."""
    keys, sizes = [*zip(digest_tools(examples), (example.messages[0]["role"] for example in examples))], {}
    for example, key in zip(examples, keys):
        if key not in sizes:
            messages = example.messages[: find_first_answer(example)]
            prompts = [render_text(tokenizer, messages, tools=tools, add_generation_prompt=True)
                       for tools in (example.tools or None, None)]
            long, short = tokenizer(prompts, add_special_tokens=False)["input_ids"]
            sizes[key] = len(long) - len(short)
    return [sizes[key] for key in keys]


def summarise(values: list[int]) -> dict:
    """Return mean, percentiles (between two values: in proportion) and maximum."""
    import numpy as np

    percentiles = {f"p{share}": round(float(np.percentile(values, share)), 1) for share in (50, 90, 95, 99)}
    return {"mean": round(float(np.mean(values)), 1), **percentiles, "max": max(values)}


def audit_sizes(tokenizer, examples: list[Example], groups: list[list[Sequence]]) -> dict:
    """Return how many tokens each part of a trained turn has: tools, prompt without them, answer, and all."""
    rendered = [(example, group) for example, group in zip(examples, groups) if group]
    counts = count_tool_tokens(tokenizer, [example for example, _ in rendered])
    turns = [(count, turn) for count, (_, group) in zip(counts, rendered) for turn in group]
    parts = {"tools": [count for count, _ in turns], "prompt": [turn.prompt_length - count for count, turn in turns],
             "answer": [len(turn.input_ids) - turn.prompt_length for _, turn in turns],
             "all": [len(turn.input_ids) for _, turn in turns]}
    return {name: summarise(values) for name, values in parts.items()} if turns else {}


def audit_lengths(examples: list[Example], groups: list[list[Sequence]], limit: int) -> tuple[list, dict]:
    """Return (groups without those that are too long, which these are and the smallest limit that loses none)."""
    longest = [max((len(turn.input_ids) for turn in group), default=0) for group in groups]
    too_long = [(example.where, size) for example, size in zip(examples, longest) if size > limit]
    kept = [group if size <= limit else [] for group, size in zip(groups, longest)]
    return kept, {"max_seq_length": limit, "smallest": max(longest), "too_long": too_long}


def list_some(found: list) -> dict:
    """Return how many were found, and as many of them as audit.json lists."""
    return {"count": len(found), "rows": found[:LISTED]}


def drop_ids(message: dict) -> dict:
    """Return a message without the ids of its calls, which no prompt shows."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    rest = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    return rest | ({"tool_calls": calls} if calls else {})


def audit_repeats(examples: list[Example], held_out: list[Example]) -> dict:
    """Return pairs of places: equal rows, equal requests with different first answers, requests on both sides."""
    rows, requests, duplicates, conflicts, both = {}, {}, [], [], [*examples, *held_out]
    for example, tools in zip(both, digest_tools(both)):
        messages = [*map(drop_ids, example.messages)]
        answer = messages[find_first_answer(example)]
        earlier = rows.setdefault((tools, digest(messages)), example)
        if earlier is not example:
            duplicates.append((earlier.where, example.where))
        where, expected = requests.setdefault((tools, digest_prompt(example)), (example.where, answer))
        if answer != expected:
            conflicts.append((where, example.where))
    return {"duplicates": list_some(duplicates), "conflicts": list_some(conflicts),
            "held_out_in_training": list_some(find_leaks(examples, held_out))}


def audit_epoch(train: list[Sequence], args: argparse.Namespace, plan: Plan) -> dict:
    """Return how many tokens the first epoch computes as padded batches, as rows without padding, and as streams."""
    def measure(plan):
        return sum(measure_batches(train, plan, cut_streams(plan, args, epoch=0)))

    return {"padded": measure(to_padded(plan, args)), "packed": sum(len(row.input_ids) for row in train),
            "shared_prefix": measure(plan._replace(lengths=(), share_prefix=True))}


def audit_plan(train: list[Sequence], args: argparse.Namespace, plan: Plan) -> dict:
    """Return steps, streams and checkpoints of the run; the sizes are those of the streams measured, filled up."""
    sizes = measure_run(train, plan, args)
    steps, per_epoch = count_steps(args, train)
    return {"rows_per_step": plan.rows_per_step, "streams_per_step": plan.accumulation,
            "steps_per_epoch": per_epoch, "steps": steps, "share_prefix": plan.share_prefix,
            "stream_sizes": {"min": min(sizes), "mean": round(sum(sizes) / len(sizes), 1), "max": max(sizes)},
            "checkpoints": list_saves(args, train)}


def estimate_memory(args: argparse.Namespace, config, parameters: dict[str, int], tokens: int, plan: Plan) -> dict:
    """Return the GiB of GPU memory that training holds at its peak when the longest micro-batch has so many tokens.

    "without_graphs" is the total when no stream is recorded, by wish or for want of memory. CUDA's own memory is not
    in it.
    """
    def hold(recorded: bool) -> float:
        fixed, working = RECORDED_MEMORY if recorded else EAGER_MEMORY
        held = sum(plan.lengths) if recorded and plan.lengths else tokens  # each recorded length has memory of its own
        return held * count_token_bytes(args, config, working) / 2**30 + fixed

    base = parameters["linear"] * (0.53 if args.load_in_4bit else 2) + 2 * parameters["other"]
    # Without an adapter all weights are trained in fp32, and "base" is their copy in 16 bits that autocast holds.
    trained = parameters["adapter"] or parameters["linear"] + parameters["other"]
    trained *= 8 + count_moment_bytes(find_optim(args, cuda=True))
    if args.fsdp:
        base, trained = base / plan.devices, trained / (1 if args.lora_rank else plan.devices)
    stream = hold(args.engine != "transformers" and can_record(args, plan))
    parts = {"base": base / 2**30, "adapter": trained / 2**30, "longest_stream": stream}
    total = sum(parts.values())
    found = {"total": total, **parts, "without_graphs": total - stream + hold(False)}
    return {name: round(part, 2) for name, part in found.items()}


def list_writes(args: argparse.Namespace, checkpoints: list[int]) -> dict:
    """Return the paths that a run would write, and what is there now that it would remove or replace."""
    output = Path(args.output_dir)
    written = [output / "run.yaml", *(output / f"checkpoint-{step}" for step in checkpoints),
               *[output / "adapter"] * (args.lora_rank > 0), output / "report.json", output / "report.html",
               *[Path(args.final_model_dir)] * (args.save_method != "lora")]
    earlier = list_checkpoints(output)
    replaced = [path for path in written if path.exists() and path not in earlier and path.name != "run.yaml"]
    return {"written": [str(path) for path in written], "replaced": [str(path) for path in (*earlier, *replaced)]}


def audit_run(args: argparse.Namespace, train: list[Sequence], config) -> dict:
    """Return plan, tokens of an epoch and files of a run on CUDA; with a config also its memory and disk."""
    engine = "transformers" if args.engine == "transformers" else "unsloth"
    share = args.share_prefix and (config is None or can_share(engine, config))
    plan = plan_streams(train, argparse.Namespace(**{**vars(args), "share_prefix": share}), engine)
    facts = audit_plan(train, args, plan)
    audit = {"epoch": audit_epoch(train, args, plan), "plan": facts, "files": list_writes(args, facts["checkpoints"])}
    if config is None:
        return audit
    parameters = count_parameters(config, args.lora_rank, args.trust_remote_code, args.target_modules)
    kept = count_checkpoints(args, train)
    disk = {name: round(size / 1e9, 2)
            for name, size in estimate_disk(args, parameters, find_optim(args, cuda=True), kept).items()}
    free = round(shutil.disk_usage(find_existing(args.final_model_dir)).free / 1e9, 1)
    return audit | {"memory_gib": estimate_memory(args, config, parameters, facts["stream_sizes"]["max"], plan),
                    "disk_gb": disk | {"free": free, "checkpoints_kept": kept}}


def show_table(columns: list[str], rows: list[list]) -> None:
    """Print a table under the lines of `say`; all columns but the first are numbers."""
    from rich.padding import Padding
    from rich.table import Table

    table = Table(box=None, header_style="dim", padding=(0, 0, 0, 2), pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for name, *values in rows:
        table.add_row(name, *(f"{value:,.0f}" for value in values))
    # Piped, the width would be taken for 80 whatever the reader has.
    console = make_console(width=None if sys.stdout.isatty() else 120)
    console.print(Padding(table, (0, 0, 0, 9), expand=False))


def show_data(audit: dict) -> None:
    """Print what the rows are, what they call, how long they are, and which repeat or contradict others."""
    rows, tools, counts = audit["rows"], audit["tools"], audit["calls_per_tool"]
    formats = ", ".join(f"{count:,} {name}" for name, count in audit["formats"].items())
    say("rows", f"{rows['valid']:,} valid ({formats}), {rows['with_problems']:,} with problems; "
                f"{rows['training']:,} for training, {rows['held_out']:,} held out")
    say("calls", f"{sum(counts.values()):,} in {audit['turns']:,} trained turns; {audit['no_call_share']:.1%} of the "
                 f"rows without a call, {audit['parallel_share']:.1%} with parallel calls; "
                 f"{plural(tools['distinct'], 'tool')} in {plural(tools['lists'], 'list')}")
    if counts:
        say("", list_first((f"{name} {count:,}" for name, count in counts.items()), SHOWN_TOOLS))
    if audit["never_called"]:
        say("", f"never called: {list_first(audit['never_called'], SHOWN_TOOLS)}")
    if audit["unit"] != "tokens":
        say("sizes", f"characters instead of tokens: {audit['tokenizer_missing']}")
    if audit["sizes"]:
        say("sizes", f"{audit['unit']} of a trained turn")
        show_table(["", *audit["sizes"]["all"]], [[name, *sizes.values()] for name, sizes in audit["sizes"].items()])
    if length := audit["length"]:
        long = [f"{where} ({size:,})" for where, size in length["too_long"]]
        say("length", f"{plural(len(long), 'row')} over --max_seq_length {length['max_seq_length']:,}"
                      f"{': ' * bool(long)}"
                      f"{list_first(long, SHOWN_PAIRS)}; the smallest that loses nothing is {length['smallest']:,}")
    found = {name: audit["repeats"][key] for key, name in REPEATS.items()}
    say("repeats", ", ".join(f"{pairs['count']:,} {name}" for name, pairs in found.items()))
    for name, pairs in found.items():
        for where, other in pairs["rows"][:SHOWN_PAIRS]:
            say("", f"{name}: {where} and {other}")


def show_run(audit: dict) -> None:
    """Print what a run would compute, hold and write."""
    epoch, plan, unit = audit["epoch"], audit["plan"], audit["unit"]
    say("epoch", f"{epoch['padded']:,} {unit} in padded batches, {epoch['packed']:,} packed, "
                 f"{epoch['shared_prefix']:,} with shared prefix ({epoch['padded'] / epoch['shared_prefix']:.1f} times "
                 "fewer than padded)")
    name, sizes = "stream" if plan["share_prefix"] else "padded batch", plan["stream_sizes"]
    span = " to ".join(f"{size:,}" for size in sorted({sizes["min"], sizes["max"]}))
    say("plan", f"{plan['steps']:,} steps, {plan['steps_per_epoch']:,} an epoch, of {plan['rows_per_step']:,} rows in "
                f"{plural(plan['streams_per_step'], name)} of {span} {unit}")
    if "memory_gib" in audit:
        memory, disk = audit["memory_gib"], audit["disk_gb"]
        graphs = f"; without CUDA graphs {memory['without_graphs']:.2f}" * (memory["without_graphs"] < memory["total"])
        say("memory", f"about {memory['total']:.2f} GiB of GPU memory (an estimate): base {memory['base']:.2f}, "
                      f"trained weights and optimizer {memory['adapter']:.2f}, longest {name} "
                      f"{memory['longest_stream']:.2f}{graphs}")
        say("disk", f"{disk['merged_model']:.2f} GB for the final model, {disk['checkpoints']:.2f} GB for "
                    f"{plural(disk['checkpoints_kept'], 'checkpoint')}; {disk['free']:,.1f} GB free")
    else:
        say("memory", "not estimated, nor disk: that takes tokenizer and config.json of the model")
    written, replaced = audit["files"]["written"], audit["files"]["replaced"]
    names = {f"checkpoint-{step}" for step in plan["checkpoints"]}
    say("writes", ", ".join([path for path in written if Path(path).name not in names]
                            + [plural(len(plan["checkpoints"]), "checkpoint")]))
    if replaced:
        say("", f"instead of: {list_first(replaced, SHOWN_PAIRS)}")


def write_audit(args: argparse.Namespace, audit: dict) -> Path:
    """Write audit.json into the output folder and return its path; the run.yaml of an earlier run stays."""
    mark_output(args)
    path = Path(args.output_dir) / "audit.json"
    write_file(path, hide_secrets(json.dumps(audit, indent=1, ensure_ascii=False)))
    return path


# ---------------------------------------------------------------------------------------------------------------
# The run, one stage after the other
# ---------------------------------------------------------------------------------------------------------------
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
    say("read", f"{plural(len(examples), 'valid row')}, {plural(calls, 'turn')} that call{'s' * (calls == 1)}, from "
                f"{' '.join(paths)} ({time.perf_counter() - start:.1f} s)")
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


def to_sides(args: argparse.Namespace, examples: list[Example], held_out: list[Example],
             groups: list[list[Sequence]]) -> list[list[Sequence]]:
    """Return the training and held-out sequences of rendered examples, split here if none are held out yet."""
    sequences = {id(example): group for example, group in zip([*examples, *held_out], groups) if group}
    sides = [[example for example in side if id(example) in sequences] for side in (examples, held_out)]
    if not held_out:
        sides = split_examples(sides[0], args.train_test_split)
    return [[sequence for example in side for sequence in sequences[id(example)]] for side in sides]


NOT_HELD_OUT = "no row is held out: the scores will be those of training rows, and say nothing about new requests"


def check_sides(args: argparse.Namespace, train: list[Sequence], held_out: list[Sequence]) -> None:
    """Refuse a run without a training row, and one that keeps its best by scores of no row."""
    if not train:
        paths = " ".join(args.dataset_path)
        raise UserError(f"{paths}: no row is left to train on; lower --train_test_split or add rows")
    if not held_out and args.metric_for_best:
        flag = "--early_stopping_patience" if args.early_stopping_patience else "--metric_for_best"
        raise UserError(f"{flag}: no row is held out to choose a checkpoint by; raise --train_test_split, or give "
                        "--eval_dataset_path")


def render_all(args: argparse.Namespace, tokenizer, examples: list[Example], held_out: list[Example] = [],
               date: str | None = None) -> tuple[list[Sequence], list[Sequence]]:
    """Return the training and held-out sequences of the valid examples, split here if none are held out yet."""
    start = time.perf_counter()
    both = [*examples, *held_out]
    groups, problems = render_examples(tokenizer, both, args.max_seq_length, date)
    report_problems(problems, args.on_invalid, len(both))
    train, test = to_sides(args, examples, held_out, groups)
    check_sides(args, train, test)
    if not test:
        warn(NOT_HELD_OUT)
    tokens = [len(sequence.input_ids) for sequence in (*train, *test)]
    say("render", f"{len(train):,} training and {len(test):,} held-out sequences of {sum(tokens) // len(tokens):,} "
                  f"tokens on average, {max(tokens):,} at most ({time.perf_counter() - start:.1f} s)")
    if date:
        say("", f"the chat template writes the date into prompts: {date}, the day this run began, also when resumed")
    return train, test


def show_plan(train: list[Sequence], args: argparse.Namespace, plan: Plan) -> None:
    """Print how many tokens the first step computes, beside what padded batches would."""
    ways = plan, to_padded(plan, args)
    firsts = [cut_streams(way, args, epoch=0)[: way.accumulation * way.devices] for way in ways]
    rows = sum(map(len, firsts[0]))
    streams, batches = (measure_batches(train, way, first) for way, first in zip(ways, firsts))
    computed, padded = sum(streams), sum(batches)
    devices = f" on {plan.devices} devices" * (plan.devices > 1)
    if not plan.share_prefix:
        say("plan", f"{plural(rows, 'row')} per step{devices} in {plural(len(batches), 'padded batch')} of about "
                    f"{padded // len(batches):,} tokens")
        return
    say("plan", f"{plural(rows, 'row')} per step{devices} in {plural(len(streams), 'stream')} of about "
                f"{computed // len(streams):,} tokens instead of {plural(len(batches), 'batch')} of "
                f"{padded // len(batches):,} ({padded / computed:.1f} times fewer)")


def start_output(args: argparse.Namespace, checkpoint: str | None, train: list[Sequence], plan: Plan,
                 date: str | None = None) -> None:
    """Mark the output folder as this run's, and remove what is not of it: checkpoints and unfinished folders.

    Of the checkpoints there, only the one to go on from stays, and those before it.
    """
    if not is_main():
        return
    output = Path(args.output_dir)
    resumed = checkpoint is not None and Path(checkpoint).resolve().parent == output.resolve()
    last = to_step(checkpoint) if resumed else 0
    for old in list_checkpoints(output):
        if int(old.name[11:]) > last:
            shutil.rmtree(move_aside(old), ignore_errors=True)
    for leftover in (*output.glob(".*.partial"), *output.glob(".*.old")):
        shutil.rmtree(leftover, ignore_errors=True)
    write_run(args, output, training_rows=hash_rows(train), rows_per_step=plan.rows_per_step,
              optimizer=find_optim(args), **({"prompt_date": date} if date else {}))


def leave_group() -> bool:
    """End the work that several processes share; return whether this is the one that goes on, alone."""
    import torch.distributed as distributed

    main = is_main()
    if distributed.is_initialized():
        distributed.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if main else ():
        os.environ.pop(name, None)  # or else the libraries of the process that merges would wait for the others
    return main


def count_trained(step: int, rows: int, rows_per_step: int) -> int:
    """Return how many rows are trained on up to a step; the last step of an epoch has what is left of the `rows`."""
    epochs, more = divmod(step, math.ceil(rows / rows_per_step))
    return epochs * rows + more * rows_per_step


def train_model(trainer, checkpoint: str | None, complete: bool) -> dict:
    """Train, from a checkpoint if there is one; print and return the facts of the steps made now.

    After a signal this ends with Interrupted, when the step is done and its checkpoint written.
    """
    import torch
    from accelerate.utils import gather_object

    first = to_step(checkpoint) if checkpoint else 0
    if checkpoint:
        say("resume", f"from {checkpoint}" + ", where training had ended" * complete)
    start, loss = time.perf_counter(), None
    if complete:
        load_trained(trainer, checkpoint)
    else:
        stopper = build_stopper(checkpoint)
        trainer.add_callback(stopper)
        with handle_signals(stopper.note):
            try:
                loss = trainer.train(resume_from_checkpoint=checkpoint).training_loss
            finally:  # or an error would be printed through the bar: wrapped, on stdout, without a cursor after it
                trainer.progress.bar.stop()
            number = stopper.agree()
        if number:
            raise Interrupted(number)
    seconds, last, train = time.perf_counter() - start, trainer.state.global_step, trainer.train_rows
    before, after = (count_trained(step, len(train), trainer.plan.rows_per_step) for step in (first, last))
    steps, rows = last - first, after - before
    tokens = rows * sum(len(sequence.input_ids) for sequence in train) / len(train)
    history = trainer.state.log_history
    losses = [log["loss"] for log in history if "loss" in log and (complete or log["step"] > first)]
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    facts = {"loss": sum(losses) / len(losses) if losses else loss, "seconds": seconds, "steps": steps,
             "last_step": last, "kept_step": best or last, "resumed_from": checkpoint,
             "samples_per_second": rows / seconds, "tokens_per_second": tokens / seconds,
             "peak_memory_gib": torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None,
             "tokens_computed": sum(gather_object([trainer.tokens_computed])), "history": history}
    if steps:
        say("train", f"{steps:,} steps in {seconds:.0f} s: {facts['samples_per_second']:.1f} samples/s, "
                     f"{facts['tokens_per_second']:,.0f} tokens/s of the rows; loss {facts['loss']:.4f}")
    if best:
        say("keep", f"step {best:,}, the best on held-out rows; training ended at step {last:,} of "
                    f"{trainer.state.max_steps:,}")
    facts["advice"] = None if trainer.args.load_best_model_at_end else find_overfitting(history)
    if facts["advice"]:
        say("advice", facts["advice"])
    return facts


def count_padded(args: argparse.Namespace, train: list[Sequence], plan: Plan, steps: range) -> int:
    """Return how many tokens padded batches of --batch_size would have computed in these steps of the run."""
    padded, total, per_epoch = to_padded(plan, args), 0, count_steps(args, train)[1]
    for epoch in range(steps.start // per_epoch, -(-steps.stop // per_epoch)):
        made = (padded.accumulation * padded.devices * max(0, step - epoch * per_epoch)  # the last step may have fewer
                for step in (steps.start, min(steps.stop, (epoch + 1) * per_epoch)))
        total += sum(measure_batches(train, padded, cut_streams(padded, args, epoch)[slice(*made)]))
    return total


def dry_run(args: argparse.Namespace) -> dict:
    """Print, write and return what a run would do, without a GPU and without weights; problems of rows come last."""
    start = time.perf_counter()
    examples, problems, total = check_rows(args, args.dataset_path)
    held_out, more, more_total = check_rows(args, args.eval_dataset_path) if args.eval_dataset_path else ([], [], 0)
    both, total = [*examples, *held_out], total + more_total
    shown = find_shown(args, both)
    quiet_libraries()
    tokenizer, missing, config = find_model(args)
    limit = sys.maxsize if missing else args.max_seq_length  # a limit in tokens says nothing about characters
    groups, unrendered = render_examples(tokenizer, both, sys.maxsize)
    kept, lengths = audit_lengths(both, groups, limit)
    too_long = [(where, describe_length(size, limit)) for where, size in lengths["too_long"]]
    problems = [*problems, *more, *unrendered, *too_long]
    sides = to_sides(args, examples, held_out, kept)
    unmeasured = bool(sides[0]) and not sides[1] and args.train_test_split > 0  # 0 says that it is so wished

    bad, rows = len({where for where, _ in problems}), [*map(count_origins, sides)]
    audit = {
        "rows": {"total": total, "valid": total - bad, "with_problems": bad, "training": rows[0], "held_out": rows[1]},
        **audit_calls(both), "problems": list_some(problems),
        "unit": "characters" if missing else "tokens", "tokenizer_missing": missing, "turns": sum(map(len, groups)),
        "sizes": audit_sizes(tokenizer, both, groups), "length": {} if missing else lengths,
        "repeats": audit_repeats(examples, held_out),
        "warnings": find_warnings(examples, held_out) + [NOT_HELD_OUT] * unmeasured}
    if sides[0]:
        limited = argparse.Namespace(**{**vars(args), "max_seq_length": limit})
        audit |= audit_run(limited, sides[0], config)
    show_data(audit)
    if "plan" in audit:
        show_run(audit)
    for warning in audit["warnings"]:
        warn(warning)
    if shown and missing:
        warn("--show_row: without the tokenizer a row cannot be shown as the model sees it")
    elif shown:
        show_rows(tokenizer, [turn for group in groups for turn in group], shown)
    path = write_audit(args, audit)
    say("audit", f"{path} ({time.perf_counter() - start:.1f} s)")
    report_problems(problems, args.on_invalid, total)
    check_sides(args, *sides)
    return json.loads(path.read_text(encoding="utf-8"))


def evaluate_only(args: argparse.Namespace, command: str) -> dict:
    """Score a model or an adapter on --eval_dataset_path, or on the held-out rows of --dataset_path; train nothing."""
    examples, skipped = read_examples(args, args.eval_dataset_path or args.dataset_path)
    args.engine = "transformers"
    start_engine(args)
    base_id, flag, given = args.eval_only, "--eval_only", f"--eval_only {args.eval_only}"
    settings = Path(args.eval_only) / "adapter_config.json"
    if is_adapter := settings.is_file():
        try:
            base_id, flag = json.loads(settings.read_text())["base_model_name_or_path"], f"{given}: its base"
        except (ValueError, KeyError, TypeError):
            base_id = None
        if not base_id:
            raise UserError(f"{given}: adapter_config.json names no base; expected one saved by PEFT")
        if not list(settings.parent.glob("*.safetensors")):
            raise UserError(f"{given}: the adapter holds no *.safetensors; expected one saved by PEFT")
        check_weights(settings.parent, given)
    check_model(base_id, flag, args.trust_remote_code)
    tokenizer = load_tokenizer(base_id, args.trust_remote_code, flag)
    groups, problems = render_examples(tokenizer, examples, args.max_seq_length)
    report_problems(problems, args.on_invalid, len(groups))
    sides = to_sides(args, *(([], examples) if args.eval_dataset_path else (examples, [])), groups)
    sequences = (sides[1] or sides[0])[: args.eval_samples]
    if not sequences:
        raise UserError(f"{' '.join(args.eval_dataset_path or args.dataset_path)}: no row is left to score; add rows")
    four_bit = is_adapter and args.load_in_4bit
    model = load_base(base_id, four_bit, args.trust_remote_code, place=find_place(args, four_bit))
    if is_adapter:
        import torch

        try:
            model = load_adapter(model, args.eval_only)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:  # the last line names the first layer
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{flag} {base_id} is another model than it was trained on ({reason})") from None
        say("load", f"adapter on its base {base_id} in {4 if four_bit else 16} bits")
    results = {"model": {"answers": generate_answers(model, tokenizer, sequences, args, args.eval_only)}}
    held_out = len(sequences) if sides[1] else 0
    if not held_out:
        warn(NOT_HELD_OUT)
    data = {"train": len(sequences) - held_out, "held_out": held_out, "skipped": skipped + groups.count([]),
            "unit": name_unit(sequences)}
    mark_output(args)
    folder = str(Path(args.output_dir) / "eval_only")  # beside a training run's report, not in its place
    write_run(args, folder)
    args.output_dir = folder
    return finish(args, command, sequences, results, *score_results(sequences, results), data, [])


def finish(args: argparse.Namespace, command: str, sequences: list[Sequence], results: dict, scores: dict,
           verdicts: dict, data: dict, lengths: list[int], train: dict | None = None) -> dict:
    """Show the first answers and the scores; write and return the report."""
    report = to_report(args, command, sequences, results, scores, verdicts, data, lengths, train)
    show_answers(sequences, results, verdicts)
    show_scores(scores)
    report = write_report(args.output_dir, report)
    say("report", f"{Path(args.output_dir) / 'report.html'}")
    return report


def hand_over(args: argparse.Namespace, config, tokenizer, adapter: str | None, report: dict, parser: str,
              thinks: bool, gguf: tuple[list[str], list[str]]) -> None:
    """Write model cards and GGUF files, upload, and say how to serve; what was proven stays, whatever fails here."""
    only_adapter = args.save_method == "lora"
    result = adapter if only_adapter else args.final_model_dir
    lora = f"--enable-lora --max-lora-rank {max(16, 1 << (args.lora_rank - 1).bit_length())} --lora-modules tools="
    for folder in {adapter, result} - {None}:
        is_adapter = folder == adapter
        name = args.push_to_hub if args.push_to_hub and folder == result else Path(folder).resolve().name
        quoted = shlex.quote(name)
        served = f"{shlex.quote(hide_folders(args.model_id))} {lora}{quoted}" if is_adapter else quoted
        serve = to_vllm_command(config, served, parser, thinks)
        write_file(f"{folder}/README.md", to_card(report, is_adapter, name, serve))
    if args.save_gguf:
        folder = write_gguf(args, gguf, tokenizer, thinks)
        say("gguf", f"{folder}: {args.save_gguf}; for Ollama: ollama create NAME -f "
                    f"{shlex.quote(str(folder / 'Modelfile'))}")
    if args.push_to_hub:
        say("push", push_folder(args.push_to_hub, result))
    say("done", f"{'adapter' if only_adapter else 'merged model' if adapter else 'trained model'}: {result}")
    served = f"{shlex.quote(args.model_id)} {lora}{shlex.quote(result)}" if only_adapter else shlex.quote(result)
    say("serve", to_vllm_command(config, served, parser, thinks))


def main(argv: list[str] | None = None) -> dict | None:
    """Run the whole job: read, check, render, train, save, score, report.

    Args:
        argv: the words of a command line without the program's name; None: those that this process was started with.
    Returns: what report.json holds; with --dry_run, audit.json; with --convert_to, None.
    Raises: UserError (FlagError if in a flag), Interrupted after a signal in training.
    """
    argv = [*map(str, sys.argv[1:] if argv is None else argv)]
    args, command = parse_args(argv), shlex.join([*LAUNCHER, PROGRAM, *drop_resume(argv)])  # to repeat it
    refuse_telemetry()
    return_pages()
    if not is_main() and (args.convert_to or args.dry_run or args.eval_only):
        return None  # these the first process does alone
    if args.convert_to:
        return write_converted(args)
    if not is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    check_folder(args.output_dir, "--output_dir")
    if args.eval_only:
        return evaluate_only(args, command)
    with contextlib.ExitStack() as locks:  # let go of when the run ends, however it does
        return train_and_prove(args, command, locks)


def train_and_prove(args: argparse.Namespace, command: str, locks: contextlib.ExitStack) -> dict | None:
    """Train, save, score and report as `args` say, with the folders locked; or do all of it that --dry_run does."""
    if args.save_method != "lora":
        check_folder(args.final_model_dir, "--final_model_dir")
        check_final(args)
    if existed := Path(args.output_dir).is_dir():
        locks.enter_context(lock_folder(args.output_dir))
    checkpoint = find_checkpoint(args)
    if args.dry_run:
        return dry_run(args)
    former = read_run(checkpoint)
    examples, skipped = read_examples(args, args.dataset_path)
    held_out, more_skipped = read_examples(args, args.eval_dataset_path) if args.eval_dataset_path else ([], 0)
    rows = len(examples) + len(held_out) + skipped + more_skipped
    shown = find_shown(args, [*examples, *held_out])
    for warning in find_warnings(examples, held_out):
        warn(warning)
    thinks = any("reasoning_content" in message for example in examples
                 for message in filter(is_trained, example.messages))
    gguf = find_gguf_tools(args.save_gguf)
    check_hub(args.push_to_hub)

    engine = start_engine(args)
    check_report_to(args.report_to)
    check_optim(args)
    config = check_model(args.model_id, trust=args.trust_remote_code)
    check_dropout(args, config)
    merge_base = check_merge_base(args, config)
    check_same_shape(config, merge_base, args.trust_remote_code) if merge_base != args.model_id else None
    tokenizer = load_tokenizer(args.model_id, args.trust_remote_code)
    check_gguf(args, gguf[0], config, tokenizer) if args.save_gguf else None
    date = former.get("prompt_date") or find_date(tokenizer)  # a resumed run has the prompts that it began with
    train, held_out = render_all(args, tokenizer, examples, held_out, date)
    show_rows(tokenizer, [*train, *held_out] if shown else train, shown)
    args.share_prefix = args.share_prefix and former.get("share_prefix", True)  # a run that did without goes on without
    args.share_prefix = args.share_prefix and can_share(engine, config)
    check_resume(args, checkpoint, former, train)
    check_disk(args, config, count_checkpoints(args, train, checkpoint))
    plan = plan_streams(train, args, engine)
    show_plan(train, args, plan)

    if not existed:
        locks.enter_context(lock_folder(args.output_dir))
    if args.save_method != "lora":
        locks.enter_context(lock_folder(args.final_model_dir, "--final_model_dir"))
    model = load_model(args, engine, plan)
    warn_of_frozen_experts(model)
    report_gpu()
    trainer = build_trainer(args, engine, model, tokenizer, train, held_out, plan)
    if plan.share_prefix and not check_sharing(args, trainer.model, train, plan, engine):
        args.share_prefix = False
        make_room(trainer.model)  # of what the check has recorded
        plan = plan_streams(train, args, engine)
        trainer = build_trainer(args, engine, model, tokenizer, train, held_out, plan)
    start_output(args, checkpoint, train, plan, date)
    complete = checkpoint is not None and is_complete(args, checkpoint, train)
    facts = train_model(trainer, checkpoint, complete)
    end = trainer.state.global_step
    facts["tokens_padded"] = count_padded(args, train, plan, range(end - facts["steps"], end))
    report_gpu()

    plan, tested = trainer.streams, (held_out or train)[: args.eval_samples]
    start = time.perf_counter()
    with discard_partial(args.final_model_dir) if args.save_method != "lora" else contextlib.nullcontext():
        batches = to_small_batches(tested, plan)
        adapter = trained = before = None
        if not args.lora_rank:
            trained, before = round_trained(args, trainer.model, config.dtype, batches, engine)
        if not leave_group():
            return
        if args.lora_rank:
            adapter = save_adapter(trainer.model, args.output_dir)
            say("save", f"adapter: {adapter}")
        else:
            save_whole(args, trained)
        if engine == "unsloth":
            empty_weights(trainer.model)
        del trainer, model, trained
        free_gpu()
        results = run_fresh(merge_and_score, args, merge_base, adapter, tested, plan)
        scores, verdicts = score_results(tested, results)
        if not adapter:
            check_trained(args, results["trained"]["loss"], before)
        elif "merged" in results:
            check_merged(args, adapter, results, scores, [verdict.exact for verdict in verdicts["adapter"]])
        if args.save_method != "lora":
            put_in_place(args.final_model_dir)
    show_saved(args, results, before, time.perf_counter() - start)
    used = count_origins(train) + count_origins(held_out)
    data = {"train": len(train), "held_out": len(held_out), "skipped": rows - used,
            "unit": name_unit(train, held_out)}
    lengths = [len(row.input_ids) for row in train]
    report = finish(args, command, tested, results, scores, verdicts, data, lengths, facts)
    hand_over(args, config, tokenizer, adapter, report, train[0].parser, thinks, gguf)
    return report


def drop_resume(argv: list[str]) -> list[str]:
    """Return the words of a command line without --resume_from_checkpoint and its value."""
    flag = "--resume_from_checkpoint"
    return [word for before, word in zip(["", *argv], argv)
            if word.split("=")[0] != flag and (before != flag or word.startswith("--"))]


def to_command(argv: list[str], output_dir: str) -> str:
    """Return the command that goes on from the newest checkpoint of the run that `argv` started.

    With --config it is the run's own run.yaml that is named: the file given may have been changed since.
    """
    kept = drop_resume(argv)
    if any(word.split("=")[0] == "--config" for word in argv):
        kept = [argv[0], "--config", str(Path(output_dir) / "run.yaml")]
    return shlex.join([*LAUNCHER, *kept, "--resume_from_checkpoint"])


def explain_interrupt(args: argparse.Namespace, argv: list[str], number: int, began: float) -> str:
    """Return one line: what ended the run that began then (seconds since 1970), and how to go on."""
    name, marker = signal.Signals(number).name, Path(args.output_dir) / "run.yaml"
    if args.eval_only or args.dry_run:
        return f"interrupted by {name}"
    # run.yaml is written when training starts; before that, checkpoints in the folder are of an earlier run.
    started = marker.is_file() and marker.stat().st_mtime >= began
    if started and list_checkpoints(args.output_dir):
        return f"interrupted by {name}; go on with: {to_command([PROGRAM, *argv], args.output_dir)}"
    return f"interrupted by {name} before a checkpoint was written; start again with the same command"


def unwrap_interrupt(error: BaseException | None) -> None:
    """Raise the Interrupted that a library has turned into this error of its own, if there is one."""
    while error is not None:
        if isinstance(error, Interrupted):
            raise error
        error = error.__cause__ or error.__context__


def run_command_line() -> int:
    """Run main; return 0, or 1 (2 for flags) with one line per problem, or 128 + the signal that ended the run."""
    began, argv, code = time.time(), sys.argv[1:], 1
    for stream in (sys.stdout, sys.stderr):  # not all terminals have every character
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parse_args(argv)  # as they are now: a file of settings may change while the run lasts
        with handle_signals(raise_interrupted):
            try:
                main(argv)
            except Exception as error:
                unwrap_interrupt(error)
                raise
        return 0
    except UserError as error:
        if not is_main():  # the first process has as a rule found the same, says so, and ends all
            time.sleep(5)
        lines, code = str(error).splitlines(), 2 if isinstance(error, FlagError) else 1
    except Interrupted as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more finds the process ending anyway
        print("\033[?25h" * sys.stdout.isatty(), end="")  # a progress bar that is cut off leaves the cursor hidden
        if is_main():
            print(explain_interrupt(args, argv, stop.args[0], began), file=sys.stderr)
        return 128 + stop.args[0]
    except BrokenPipeError:
        drop_output()
        lines = ["nobody reads the output any more: the run ends here"]
    except OSError as error:
        reason = error.strerror
        if is_disk_full(error):
            reason = "the disk is full; free some space and run again"
        elif not error.filename or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
            raise
        lines = [f"{error.filename or 'output'}: {reason}"]
    except (MemoryError, RuntimeError) as error:
        kinds = {"MemoryError": "memory", "OutOfMemoryError": "GPU memory"}  # torch's by its name, without its import
        if type(error).__name__ not in kinds:
            raise
        lines = [f"out of {kinds[type(error).__name__]}; lower --batch_size or --max_seq_length (while answers are "
                 "written, --eval_batch_size), or choose a smaller --model_id"]
    for line in lines:
        print(f"error: {hide_secrets(line)}", file=sys.stderr)
    return code


def leave(code: int) -> NoReturn:
    """End this process; of several that torchrun started, those beside the first one late, and none with a tear-down.

    Late, because the first may not have read yet what they sent last. Without tearing Python down, because a thread of
    Gloo that then lets go of a tensor aborts its process (PyTorch issue 190489), and torchrun would end the others.
    """
    if len(LAUNCHER) == 1:
        sys.exit(code)
    if not is_main():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(2)
    atexit._run_exitfuncs()  # as multiprocessing ends its processes
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(run_command_line())
