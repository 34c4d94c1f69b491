"""JSON and Python literals, with errors that say what is wrong."""

import ast
import json
import math
import re
import sys
import warnings
from collections import Counter

from tool_calling.terminal import shorten


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


QUOTED = r""" "(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*' """.strip()
OUTSIDE = re.compile(QUOTED + "|.", re.DOTALL)  # a quoted text, or one character
WORDS = re.compile(QUOTED + r"|\\.|\b(?:true|false|null)\b", re.DOTALL)  # JSON's words; and quotes, which may hold them
PYTHON_WORDS = {"true": "True", "false": "False", "null": "None"}


def as_list(value: object) -> list:
    """Return a list as it is, and anything else as a list of one."""
    return value if isinstance(value, list) else [value]


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


def to_json(value: object) -> str:
    """Return a value as JSON text; ValueError if it holds NaN or Infinity, as a table can."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise ValueError("holds NaN or Infinity; expected a number that JSON has") from None
