"""Tools that a row brings: under its keys, in its turns, or declared in a system text, and the words around these."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from tool_calling.data.literals import as_list, parse_literal, split_between, split_tags, try_unpack
from tool_calling.data.tools import DECLARATIONS, PLAIN_KEYS, WRAPPERS, find_tools, take_tools, to_tools
from tool_calling.data.turns import TOOL_KEYS, peek

DECLARED = {  # what opens and closes a list of tools in a text
    "<tools>": "</tools>",
    "<|im_system|>tool_declare<|im_middle|>": "<|im_end|>",  # Kimi
    "[AVAILABLE_TOOLS]": "[/AVAILABLE_TOOLS]",  # Mistral
    "<|tool_list_start|>": "<|tool_list_end|>",  # LFM
    "<available_tools>": "</available_tools>",
}
HINT = re.compile("|".join(map(re.escape, (*DECLARED, "tool_call>", "TOOLCALL>", '"name"', "'name'"))))
HELD = re.compile("|".join((*PLAIN_KEYS, *DECLARATIONS, "function")))  # what the JSON text of a tool holds
TOOL_SET = {*TOOL_KEYS}
DECLARING = {"tools", "functions", "tool_declare", "tool_definitions", "function_list"}  # roles
NO_TOOLS = (None, [], "", "[]", {})
CUT = "\0"  # stands for what was cut out of a text
# Sentences of Hermes, Qwen, ToolACE, SmolTalk and Glaive that tell how to write a call: the chat template has its own.
BOILERPLATE = re.compile(
    r"""\#\ Tools\s*$|You\ (?:are\ provided\ with\ function\ signatures|may\ call\ one\ or\ more\ functions)
    |You\ are\ an\ expert\ in\ composing\ functions|You\ are\ given\ a\ question\ and\ a\ set\ of\ possible\ functions
    |Based\ on\ the\ question,\ you\ will\ need\ to\ make\ one\ or\ more\ function
    |If\ none\ of\ the\ functions?\ can\ be\ used|If\ the\ given\ question\ lacks\ the\ parameters
    |You\ should\ only\ return\ the\ function\ calls?|You\ SHOULD\ NOT\ include\ any\ other\ text
    |Here\ (?:is\ a\ list\ of|are\ the\ available)\ (?:functions|tools)|NO\ other\ text\ MUST\ be\ included
    |(?:Should|If)\ you\ decide\ to\ (?:return|invoke)\ |Put\ it\ in\ the\ format\ of\ |Don'?t\ make\ assumptions
    |For\ each\ function\ call,?\ return\ a\ json\ object|Each\ (?:function\ )?call\ should\ be\ enclosed
    |Use\ the\ following\ (?:pydantic\ model\ )?json\ schema|\{\s*['"](?:title|properties|name|type)['"]\s*:
    |also\ point\ it\ out|You\ have\ access\ to\ the\ following\ (?:functions|tools)|The\ output\ MUST\ strictly
    |The\ example\ format\ is\ as\ follows|Please\ make\ sure\ the\ parameter\ type|If\ no\ function\ call\ is\ needed
    |You\ are\ a\ helpful\ assistant\ with\ access\ to\ the\ following\ functions|Use\ them\ if\ required
    |SYSTEM:\s*$|-$|.*\[func\w*\(""",
    re.VERBOSE | re.IGNORECASE,
)
PYTHON_TOOLS = re.compile(r"\[\s*\{\s*'(?:name|type|function)'\s*:.*\}\s*\]", re.DOTALL)
TAG = re.compile(r"</?(?:tools|tool_call|TOOLCALL)>|" + CUT)
SENTENCE_END = re.compile(r"((?<=[.!?])[ \t]+|\n)")


class Declaration(NamedTuple):
    """What a system text says about tools."""

    tools: list | None = None
    text: str = ""  # without them, and without what tells how to call
    dropped: int = 0  # characters, without those of the tools themselves
    tagged: bool = False  # whether marks told of tools or calls, not just a list
    alone: bool = False  # whether the text is nothing but a declaration


def looks_like_tool(value: object) -> bool:
    """Return whether a value is plainly a tool: it has a name, and a schema or the key `function`."""
    if not isinstance(value, dict):
        return False
    for key in (*WRAPPERS, *DECLARATIONS):
        if isinstance(value.get(key), dict | list):
            return "name" in value[key] or key in DECLARATIONS
    return "name" in value and any(map(value.get, PLAIN_KEYS))


def is_tool_list(value: object) -> bool:
    """Return whether a value plainly is a list of tools, or JSON text of one."""
    if isinstance(value, str):
        schemas = (*PLAIN_KEYS, *DECLARATIONS, '"function"')
        return '"name"' in value and any(key in value for key in schemas) and is_tool_text(value)
    return isinstance(value, list) and bool(value) and all(map(looks_like_tool, map(try_unpack, value)))


@lru_cache(maxsize=1000)  # rows share their tools
def is_tool_text(text: str) -> bool:
    """Return whether a text is the JSON of a list of tools."""
    found = try_unpack(text)
    return isinstance(found, list) and is_tool_list(found)


@lru_cache(maxsize=1000)
def normalise(text: str) -> str:
    """Return the JSON text of a list of tools in the OpenAI shape; of one that cannot be read as it is."""
    try:
        return json.dumps(to_tools(json.loads(text))[0], sort_keys=True)
    except (ValueError, RecursionError):
        return text


def are_same_tools(tools: object, others: object) -> bool:
    """Return whether two lists of tools are the same in the OpenAI shape."""
    return normalise(json.dumps(tools)) == normalise(json.dumps(others))


def is_declaring(turn: dict) -> bool:
    """Return whether a turn is nothing but a list of tools."""
    role, content = peek(turn)
    return isinstance(role, str) and role in DECLARING and is_tool_list(content)


def spread(key: str, value: object, depth: int = 3) -> Iterator[tuple[str, object]]:
    """Yield (path, value) of what stands under a key: of an object, or of JSON text of one, what is in it."""
    if isinstance(value, str) and value.startswith("{") and HELD.search(value):  # or it holds no tools
        value = try_unpack(value)
    if isinstance(value, dict) and depth:
        for name, inner in value.items():
            yield from spread(f"{key}.{name}", inner, depth - 1)
    else:
        yield key, value


def spread_read(row: dict, keys: set[str]) -> dict:
    """Return the row with what stands beside tools inside of an object under a path of its own: it is not read."""
    opened = {key.partition(".")[0] for key in keys if key not in row and "." in key}
    pairs = ((key, spread(key, value) if key in opened else [(key, value)]) for key, value in row.items())
    return {path: value for _, inner in pairs for path, value in inner}


def find_beside(row: dict, turns: list[dict], read: set[str]) -> tuple[object, set[str]]:
    """Return (the tools beside a row's texts or None, the keys or paths that hold them); ValueError if lists differ."""
    places = [(key, row[key], key) for key in TOOL_KEYS if key not in read and row.get(key) is not None]
    for key, value in row.items():
        if key not in read and key not in TOOL_SET:
            places += [(path, one, path) for path, one in spread(key, value) if is_tool_list(one)]
    for turn in turns:
        places += [("a turn of tools", peek(turn)[1], "")] if is_declaring(turn) else []
        for key in () if TOOL_SET.isdisjoint(turn) else sorted(TOOL_SET & turn.keys()):
            places += [(f"{key} of a turn", turn[key], "")] if is_tool_list(turn[key]) else []
    if len(places) == 1:
        return places[0][1], {places[0][2]}
    some = [found for found in places if found[1] not in NO_TOOLS]
    some = [found for found in some if found[0] in ("tools", "functions") or is_tool_list(found[1])] or some
    for place, tools, _ in some[1:]:
        if not are_same_tools(some[0][1], tools):
            raise ValueError(f'the row has tools in "{some[0][0]}" and others in "{place}"; expected one list of tools')
    chosen = some or places
    return (chosen[0][1] if chosen else None), {key for _, _, key in chosen}


@lru_cache(maxsize=1000)  # rows share their system texts
def read_declaration(text: str) -> Declaration:
    """Return what a system text says about tools; ValueError if they cannot be read.

    Cut are the tools, and whole sentences: those around them, those with a tag for calls, and those of BOILERPLATE.
    """
    text = PYTHON_TOOLS.sub(to_json_list, text)
    tools, rest, size = None, text, 0
    for opening, closing in DECLARED.items():
        cut = split_between(rest, opening, closing) if opening in rest else [rest]
        for inside in filter(str.strip, cut[1::2]):
            tools = [*(tools or []), *parse_tools(inside, opening)]
            size += len(inside)
        rest = CUT.join(cut[::2])
    tagged = tools is not None
    if not tagged and '"name"' in rest and any(f'"{key}"' in rest for key in (*PLAIN_KEYS, "function")):
        found, left = find_tools(rest)
        if found and any(map(looks_like_tool, found)):
            tools, left = take_tools(rest)
            size += len(rest) - len(left)
            begin = len(os.path.commonprefix([rest, left]))
            after = re.sub(r"^[ \t]+(?=[A-Z])", "\n", left[begin:])  # where another sentence begins
            rest = left[:begin] + CUT + after
    speaks = "tool_call>" in text or "TOOLCALL>" in text
    if tools is None and not speaks:
        return Declaration()
    for tag in ("tool_call", "TOOLCALL"):
        rest = CUT.join(split_tags(rest, tag)[::2])
    kept, sentences = keep_sentences(rest, tools is not None), SENTENCE_END.split(TAG.sub("", rest))[::2]
    alone = not any(sentence.strip() and not BOILERPLATE.match(sentence.strip()) for sentence in sentences)
    return Declaration(tools, kept, max(len(text) - len(kept) - size, 0), tagged or speaks, alone)


def to_json_list(found: re.Match) -> str:
    """Return a list of tools that Python has written, as in ToolBench, as JSON; anything else as it is."""
    try:
        return json.dumps(parse_literal(found[0], "it is"), ensure_ascii=False)
    except (ValueError, RecursionError):
        return found[0]


def parse_tools(text: str, opening: str) -> list:
    """Return the tools between two marks: JSON, or a Python literal."""
    found, rest = find_tools(text)
    if rest.strip(" \n\t\r,"):  # not all of it is JSON
        return as_list(parse_literal(text, f"the text inside {opening} is"))
    return found


def keep_sentences(text: str, declares: bool) -> str:
    """Return the sentences of a text that do not tell how to call, with the blanks between them."""
    pieces = SENTENCE_END.split(text)
    kept, gap, cut = [], "", False
    for sentence, blank in zip(pieces[::2], [*pieces[1::2], ""]):
        if TAG.search(sentence) or (declares and BOILERPLATE.match(sentence.strip())):
            cut = True
        elif sentence.strip() or not cut:
            kept += [("\n" if "\n" in gap else " " if gap else "") if cut else gap, sentence]
            gap, cut = "", False
        gap += blank
    return "".join(kept).strip()


def take_declarations(messages: list[dict], beside: object, changes: Counter) -> tuple[list[dict], object, str]:
    """Return (messages without declarations of tools, the tools declared or None, "tags", "list" or "" for how).

    A row with structured calls keeps its system texts, save for one that is nothing but a declaration.
    """
    structured = any("tool_calls" in message or message["role"] == "calls" for message in messages)
    kept, tools, how, named = [], None, "", beside not in NO_TOOLS
    for message in messages:
        content, found = message["content"], Declaration()
        if message["role"] == "system" and isinstance(content, str) and HINT.search(content):
            try:
                found = read_declaration(content)
            except ValueError:
                if not named:
                    raise
        # A list without marks declares tools only where no others stand beside the row.
        mine = found.tagged or (found.tools is not None and (not named or are_same_tools(beside, found.tools)))
        if mine and found.tools is not None:
            if tools is not None and not are_same_tools(tools, found.tools):
                raise ValueError("two system texts declare other tools; expected one list of tools")
            tools = found.tools
        how = how or ("" if structured or not mine else "tags" if found.tagged else "list")
        if not mine or (structured and not found.alone):
            kept.append(message)
            continue
        if structured:
            changes["system text that only declares tools dropped"] += 1
        elif found.dropped:
            changes["system text on calls cut: characters"] += found.dropped
        kept += [{**message, "content": found.text}] if found.text else []
    return kept, tools, how
