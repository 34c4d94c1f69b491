"""The tools of a row as calls in a text need them: patterns of their names, and the types of their parameters."""

import re
from functools import lru_cache
from typing import NamedTuple

from tool_calling.data.literals import as_list, parse_literal

# Under which keys a call holds its tool's name, and its arguments.
NAME_KEYS = ("name", "toolName", "tool_name", "tool", "function", "function_name", "action", "recipient_name")
ARGUMENT_KEYS = ("arguments", "args", "input", "parameters", "params", "kwargs", "tool_input", "tool_args")
ARGUMENT_KEYS += ("action_input", "tool_arguments")


class Known(NamedTuple):
    """The tools that an answer may call, and patterns of their names."""

    parameters: dict[str, dict]  # {tool: {parameter: its schema}}
    name: re.Pattern  # any of the names
    call: re.Pattern  # a line, or a list in brackets, that begins with a call
    more: re.Pattern  # the next call on that line
    unread: re.Pattern  # a call in a syntax that is not known


@lru_cache(maxsize=2000)
def compile_names(names: tuple[str, ...]) -> tuple[re.Pattern, ...]:
    """Return the patterns of Known."""
    one = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"  # which is nowhere
    name = rf"(?<!\w)(?:{one})(?!\w)"
    call = rf"(?:^|(?<=\[))[ \t]*(?:print\()?(?:default_api\.|functions\.)?(?P<name>{one})[ \t]*\("
    key = "|".join(NAME_KEYS)
    unread = (
        rf"""(?<![\w])(?:{one})["'`>]?:?\d*\s*(?:<[^<>\n]{{1,40}}>\s*)*(?:```\w*\s*)?\{{\s*["'}}]"""  # f{"a": 1}
        rf"""|<(?:{one})[\s>/]|<\w+[= ][^<>\n]{{0,40}}["'=](?:{one})["']?[\s/>]"""  # <f>, <call name="f">
        rf"""|["'](?:{key})["']\s*:\s*["'](?:{one})["']\s*,\s*["'](?:{"|".join(ARGUMENT_KEYS)})["']\s*:"""
        rf"""|\A\s*(?:```\w*\s*)?[\[{{](?s:.)*?["'](?:{key})["']\s*:\s*["'](?:{one})["']"""  # JSON that names a tool
        rf"""|\bto=[\w.]{{0,40}}(?:{one})(?!\w)|\bcall:(?:{one})\{{"""  # Harmony, FunctionGemma
        rf"""|FUNCTION\W{{0,3}}:\s*(?:{one})(?!\w)"""  # Qwen-Agent
        rf"""|(?<!\w)(?:{one})\(\s*\w+\s*=\s*(?:["'\[{{\d-]|(?:true|false|null|None)\b)"""  # f(a=1) in a sentence
        rf"""|^[ \t]*Action[ \t]*:[ \t]*(?:{one})(?!\w)"""
        rf"""|^[ \t]*\w+[ \t]*=[ \t]*(?:await[ \t]+)?(?:{one})\("""  # a = f(1), in code
    )
    more = rf"[ \t]*[,;][ \t]*(?P<name>{one})[ \t]*\("
    return tuple(re.compile(pattern, re.MULTILINE) for pattern in (name, call, more, unread))


def to_known(tools: list[dict]) -> Known:
    """Return what checked tools say about calls in text."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    parameters = {name: schema.get("properties") for name, schema in schemas.items() if name.strip()}
    parameters = {name: found if isinstance(found, dict) else {} for name, found in parameters.items()}
    return Known(parameters, *compile_names(tuple(parameters)))


def list_kinds(schema: object) -> list[str]:
    """Return the types that a schema names, itself or in its alternatives."""
    if not isinstance(schema, dict):
        return []
    kinds = [kind for kind in as_list(schema.get("type")) if isinstance(kind, str)]
    parts = [part for key in ("anyOf", "oneOf") for part in as_list(schema.get(key))]
    return kinds + [kind for part in parts for kind in list_kinds(part)]


def to_typed(text: str, schema: object) -> object:
    """Return the value that a text stands for by its parameter's schema; the text itself where it may be one."""
    kinds = list_kinds(schema)
    if "null" in kinds and text.strip() in ("null", "None"):
        return None
    if "string" in kinds or (not kinds and text.lstrip()[:1] not in ("[", "{")):
        return text
    try:
        return parse_literal(text.strip(), "it is")
    except (ValueError, RecursionError):
        return text  # which its schema then refuses


def type_arguments(name: str, texts: dict[str, str], known: Known) -> dict:
    """Return {"name", "arguments"} of a call whose values are texts."""
    schemas = known.parameters.get(name, {})
    return {"name": name, "arguments": {key: to_typed(text, schemas.get(key)) for key, text in texts.items()}}
