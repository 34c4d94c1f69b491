"""JSON and Python literals, with errors that say what is wrong."""

import ast
import contextlib
import json
import math
import re
import sys
import warnings
from collections import Counter

from tool_calling.terminal import shorten

QUOTED = r""" "(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*' """.strip()
TOKEN = re.compile(QUOTED + "|.", re.DOTALL)  # a quoted text, or one character
WORD = re.compile(QUOTED + r"|\\.|\b(?:true|false|null)\b", re.DOTALL)  # quoted first: a text may hold these words
PYTHON_WORDS = {"true": "True", "false": "False", "null": "None"}


def as_list(value: object) -> list:
    """Return a list as it is, and anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def to_float(text: str) -> float:
    """Return the number; ValueError for one too large, and for NaN and Infinity, which JSON does not have."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not JSON" if text[-1].isalpha() else f"the number {text[:20]} is too large")
    return value


def to_object(pairs: list[tuple]) -> dict:
    """Return a JSON object; a duplicate key is a ValueError, because Python would drop the first value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f'duplicate key "{Counter(name for name, _ in pairs).most_common(1)[0][0]}"')
    return found


DECODER = json.JSONDecoder(parse_constant=to_float, parse_float=to_float, object_pairs_hook=to_object)


def read_value(text: str, position: int = 0) -> tuple[object, int]:
    """Return the JSON value that begins at `position`, and its end; ValueError or RecursionError if it is broken."""
    value, end = DECODER.raw_decode(text, position)
    if text.find("\\u", position, end) >= 0:  # an escape may be half a character, which UTF-8 cannot write
        json.dumps(value, ensure_ascii=False).encode()
    return value, end


def explain(error: Exception) -> str:
    """Return why a text could not be read as JSON."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte {error.start}); save it as UTF-8 JSON or JSONL"
    reason = getattr(error, "msg", error)
    if isinstance(error, UnicodeEncodeError):
        reason = f"\\u{ord(error.object[error.start]):04x} is half a character"
    elif isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    elif str(error).startswith("Exceeds the limit"):  # Python's own, on the digits of an integer
        reason = f"a number has more than {sys.get_int_max_str_digits():,} digits"
    return f"not valid JSON: {reason}"


def parse_json(text: str, what: str):
    """Return the value of a JSON text; the ValueError begins with `what`, as in `arguments are`."""
    try:
        return DECODER.decode(text)
    except ValueError as error:
        raise ValueError(f"{what} {explain(error)}: {shorten(text)}") from None


def unpack(value: object, what: str):
    """Return the list or object that a JSON text holds, as tables keep them; anything else as it is."""
    return parse_json(value, what) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value


def try_unpack(value: object):
    """Return what `unpack` does, and text that is no JSON as it is."""
    with contextlib.suppress(ValueError, RecursionError):
        return unpack(value, "it is")
    return value


def parse_python(text: str) -> ast.expr:
    """Return the tree of a Python expression, which is never run; ValueError if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of "\d" in a text
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, MemoryError) as error:
        raise ValueError from error


def parse_literal(text: str, what: str):
    """Return the JSON value of a JSON text or a Python literal, in which JSON's words may stand too."""
    with contextlib.suppress(ValueError):
        return DECODER.decode(text)
    try:
        tree = parse_python(WORD.sub(lambda word: PYTHON_WORDS.get(word[0], word[0]), text))
        objects = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
        if any(len({*map(ast.dump, node.keys)}) < len(node.keys) for node in objects):
            raise ValueError("duplicate key")
        return DECODER.decode(json.dumps(ast.literal_eval(tree), allow_nan=False))
    except (ValueError, TypeError, MemoryError):
        raise ValueError(f"{what} neither JSON nor a Python literal: {shorten(text)}") from None


def split_at_commas(text: str) -> list[str]:
    """Return the parts between the commas outside quotes and brackets; ValueError if a quote or bracket is unpaired."""
    cuts, depth = [-1], 0
    for token in TOKEN.finditer(text):
        depth += (token[0] in "([{") - (token[0] in ")]}")
        if depth < 0 or token[0] in "\"'":  # a quote alone: the one that closes it is missing
            break
        if token[0] == "," and not depth:
            cuts.append(token.start())
    else:
        if not depth:
            return [text[cut + 1 : end].strip() for cut, end in zip(cuts, [*cuts[1:], len(text)])]
    raise ValueError(f"unpaired quote or bracket in {shorten(text)}")


def to_json(value: object) -> str:
    """Return a value as JSON text; ValueError if it holds NaN or Infinity, as a table can."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise ValueError("holds NaN or Infinity; expected a number that JSON has") from None


def split_between(text: str, opening: str, closing: str) -> list[str]:
    """Return a text cut at what stands between two marks: every other piece is what stood inside."""
    done, end, rest = text.rpartition(closing)  # no mark closes in the rest: searching it at each would be slow
    *cut, last = re.split(f"{re.escape(opening)}(.*?){re.escape(closing)}", done + end, flags=re.DOTALL)
    return [*cut, last + rest]


def split_tags(text: str, tag: str) -> list[str]:
    """Return a text cut at <tag>...</tag>: every other piece is what stood inside."""
    return split_between(text, f"<{tag}>", f"</{tag}>")
