"""Argument types, the settings file of --config, and the commands to repeat or resume a run."""

import argparse
import math
import re
import shlex
from dataclasses import fields
from pathlib import Path

import yaml

from tool_calling.processes import LAUNCHER
from tool_calling.terminal import FlagError, suggest

# Those of Transformers that need nothing but the number of steps.
SCHEDULERS = "linear cosine cosine_with_restarts polynomial constant constant_with_warmup inverse_sqrt".split()
CONVERTED_GGUF = ["f32", "f16", "bf16", "q8_0"]  # written by llama.cpp's converter itself
# Of the others, those that need no importance matrix.
GGUF_NAMES = CONVERTED_GGUF + "q6_k q5_k_m q5_k_s q5_1 q5_0 q4_k_m q4_k_s q4_1 q4_0 q3_k_l q3_k_m q3_k_s q2_k".split()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises a FlagError instead of exiting."""

    def error(self, message: str):
        unknown = re.match("unrecognized arguments: (--[^ =]+)", message)
        raise FlagError(message + (suggest(unknown[1], self._option_string_actions) if unknown else ""))


def number(kind, low, high=math.inf, low_open=False, high_open=True):
    """Return an argparse type for an int or float from low to high; `open` ends are out of reach."""
    expected = f"{'above' if low_open else 'at least'} {low}"
    expected += f" and {'below' if high_open else 'at most'} {high}" if high < math.inf else ""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or (low_open and value == low) or (high_open and value == high):
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def one_of(names: list[str], several: bool = False):
    """Return an argparse type for one of the names, or for several of them, in any case and separated by commas."""

    def parse(text: str) -> str:
        given = [name.strip() for name in text.lower().split(",")] if several else [text]
        for name in given:
            if name not in names:
                hint = suggest(name, names)
                raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, got {name}{hint}")
        return ",".join(given)

    return parse


def split_names(text: str) -> str:
    """Return names separated by commas without spaces around them; an argparse type."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected names, separated by commas")
    return ",".join(dict.fromkeys(names))


def read_config(parser: Parser, path: str) -> list[str]:
    """Return the settings of a YAML file as words of a command line; its mistakes are one FlagError, a line each.

    argparse checks and converts each value as on the command line. null is no value, and `facts` tells of a past run.
    """
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    words, seen, problems = [], set(), []
    for key, node in read_settings(path):
        name = key.value if key.id == "scalar" else key.id
        try:
            if name in seen:
                raise FlagError(f"{name}: duplicate setting")
            seen.add(name)
            if name != "facts":
                more = to_words(actions, name, node)
                parser.parse_args([*words, *more])
                words += more
        except FlagError as error:
            problems.append(f"{path}:{key.start_mark.line + 1}: {error}")
    if problems:
        raise FlagError("\n".join(problems))
    return words


def read_settings(path: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """Return the keys and values of a YAML mapping as nodes, which know their lines."""
    if not Path(path).is_file():
        raise FlagError(f"--config {path}: not a file; expected YAML, `flag: value` a line")
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise FlagError(f"{path}{line}: not valid YAML: {reason}") from None
    if not isinstance(root, yaml.MappingNode):
        raise FlagError(f"{path}: expected lines `flag: value`, such as batch_size: 4")
    return root.value


def to_words(actions: dict, name: str, node: yaml.Node) -> list[str]:
    """Return the words of a command line that set the flag `name` to the text of a YAML node."""
    if name not in actions:
        raise FlagError(f"{name}: unknown setting{suggest(name, actions)}")
    (flag, *negative), nargs = actions[name].option_strings, actions[name].nargs
    kind = node.tag.rsplit(":", 1)[-1]
    if kind == "null":
        return []
    if nargs == "+" and kind == "seq" and all(item.id == "scalar" and item.value[:1] != "-" for item in node.value):
        return [flag, *(item.value for item in node.value)]
    if node.id != "scalar":
        expected = "one value, or a list of values without - in front" if nargs == "+" else "one value"
        raise FlagError(f"argument {flag}: must be {expected}")
    if nargs != 0:
        return [f"{flag}={node.value}"]
    if kind != "bool":
        raise FlagError(f"argument {flag}: must be true or false, got {node.value}")
    return [flag] if node.value.lower() in ("true", "yes", "on") else negative  # --no-x, if there is one


def pick(kind: type, args):
    """Return the settings `kind`, a dataclass, with the values of the flags of the same names."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


def drop_resume(argv: list[str]) -> list[str]:
    """Return the words of a command line without --resume_from_checkpoint and its value."""
    flag = "--resume_from_checkpoint"
    return [
        word
        for before, word in zip(["", *argv], argv)
        if word.split("=")[0] != flag and (before != flag or word.startswith("--"))
    ]


def to_command(argv: list[str], output_dir: str) -> str:
    """Return the command that goes on from the newest checkpoint of the run that `argv` started.

    It names the run's own run.yaml in place of --config, whose file may have changed since.
    """
    kept = drop_resume(argv)
    if any(word.split("=")[0] == "--config" for word in argv):
        kept = [argv[0], "--config", str(Path(output_dir) / "run.yaml")]
    return shlex.join([*LAUNCHER, *kept, "--resume_from_checkpoint"])
