"""The tools of a row as calls in a text need them: patterns of their names, and the types of their parameters."""

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from tool_calling.data.literals import as_list, parse_literal

# Under which keys a call holds its tool's name, and its arguments.
NAME_KEYS = ("name", "toolName", "tool_name", "tool", "function", "function_name", "action", "recipient_name")
ARGUMENT_KEYS = ("arguments", "args", "input", "parameters", "params", "kwargs", "tool_input", "tool_args")
ARGUMENT_KEYS += ("action_input", "tool_arguments")
KEY = "|".join(NAME_KEYS)
UNREAD = (  # of names: calls in syntaxes that are not known
    rf"""(?<![\w])(?:NAME)["'`>]?:?\d*\s*(?:<[^<>\n]{{1,40}}>\s*)*(?:```\w*\s*)?\{{\s*["'}}]"""  # f{"a": 1}
    rf"""|<(?:NAME)[\s>/]|<\w+[= ][^<>\n]{{0,40}}["'=](?:NAME)["']?[\s/>]"""  # <f>, <call name="f">
    rf"""|["'](?:{KEY})["']\s*:\s*["'](?:NAME)["']\s*,\s*["'](?:{"|".join(ARGUMENT_KEYS)})["']\s*:"""
    rf"""|\A\s*(?:```\w*\s*)?[\[{{](?s:.)*?["'](?:{KEY})["']\s*:\s*["'](?:NAME)["']"""  # JSON that names a tool
    rf"""|\bto=[\w.]{{0,40}}(?:NAME)(?!\w)|\bcall:(?:NAME)\{{"""  # Harmony, FunctionGemma
    rf"""|FUNCTION\W{{0,3}}:\s*(?:NAME)(?!\w)"""  # Qwen-Agent
    rf"""|(?<!\w)(?:NAME)\(\s*\w+\s*=\s*(?:["'\[{{\d-]|(?:true|false|null|None)\b)"""  # f(a=1) in a sentence
    rf"""|^[ \t]*Action[ \t]*:[ \t]*(?:NAME)(?!\w)"""
    rf"""|^[ \t]*\w+[ \t]*=[ \t]*(?:await[ \t]+)?(?:NAME)\("""  # a = f(1), in code
)


@lru_cache(maxsize=8000)
def compile_names(pattern: str, names: tuple[str, ...]) -> re.Pattern:
    """Return a pattern with NAME in it, compiled for any of these names."""
    one = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"  # which is nowhere
    return re.compile(pattern.replace("NAME", one), re.MULTILINE)


@dataclass(frozen=True)
class Known:
    """The tools that an answer may call, and patterns of their names, compiled when first asked for.

    Where each row has tools of its own, compiling all of them would take longer than reading the rows.
    """

    parameters: dict[str, dict]  # {tool: {parameter: its schema}}

    def compile(self, pattern: str) -> re.Pattern:
        """Return a pattern for the names of these tools."""
        return compile_names(pattern, tuple(self.parameters))

    @cached_property
    def name(self) -> re.Pattern:
        """Any of the names."""
        return self.compile(r"(?<!\w)(?:NAME)(?!\w)")

    @cached_property
    def call(self) -> re.Pattern:
        """A line, or a list in brackets, that begins with a call."""
        return self.compile(r"(?:^|(?<=\[))[ \t]*(?:print\()?(?:default_api\.|functions\.)?(?P<name>NAME)[ \t]*\(")

    @cached_property
    def more(self) -> re.Pattern:
        """The next call on that line."""
        return self.compile(r"[ \t]*[,;][ \t]*(?P<name>NAME)[ \t]*\(")

    @cached_property
    def unread(self) -> re.Pattern:
        """A call in a syntax that is not known."""
        return self.compile(UNREAD)


def to_known(tools: list[dict]) -> Known:
    """Return what checked tools say about calls in text."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    parameters = {name: schema.get("properties") for name, schema in schemas.items() if name.strip()}
    return Known({name: found if isinstance(found, dict) else {} for name, found in parameters.items()})


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
