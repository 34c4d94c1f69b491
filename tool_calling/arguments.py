"""Argument types, and the settings file of --config as words of a command line."""

import argparse
import math
import re
from itertools import chain
from pathlib import Path

import yaml

from tool_calling.terminal import FlagError, suggest

SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)  # those of Transformers that need nothing but the number of steps
CONVERTED_GGUF = ("f32", "f16", "bf16", "q8_0")  # what llama.cpp's converter writes by itself
GGUF_NAMES = (
    *CONVERTED_GGUF,
    "q6_k",
    "q5_k_m",
    "q5_k_s",
    "q5_1",
    "q5_0",
    "q4_k_m",
    "q4_k_s",
    "q4_1",
    "q4_0",
    "q3_k_l",
    "q3_k_m",
    "q3_k_s",
    "q2_k",
)  # of the others, those that need no importance matrix


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
        raise FlagError(
            f"{name}: "
            + (
                "a file of settings cannot name another"
                if name == "config"
                else f"no flag is named so{suggest(name, actions)}"
            )
        )
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
    if not Path(path).is_file():
        raise FlagError(f"--config {path}: not a file; expected YAML, `flag: value` a line")
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise FlagError(
            f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML: "
            f"{getattr(error, 'problem', None) or str(error).splitlines()[0]}"
        ) from None
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
