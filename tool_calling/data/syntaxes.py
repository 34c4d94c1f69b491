"""Calls that stand in the text of an answer; SYNTAXES is the one place to add a way of writing them."""

import contextlib
import re
from collections import Counter
from collections.abc import Callable
from itertools import islice

from tool_calling.data.calls import are_same_calls, to_tool_call
from tool_calling.data.known_tools import ARGUMENT_KEYS, NAME_KEYS, Known, to_known, type_arguments
from tool_calling.data.literals import (
    TOKEN,
    as_list,
    parse_json,
    parse_literal,
    read_value,
    split_at_commas,
    split_tags,
)
from tool_calling.data.turns import ANSWERING, HERMES_MARKS, LATE_TEXT, set_calls
from tool_calling.terminal import shorten

Found = tuple[str, list]  # the text without its calls, and the calls
READ_AS = "calls read from text as "  # in the count of what was normalised
TRIES = 100  # how many brackets of a text are tried as the start of JSON: each may cost a look at all that follows
LIST_KEYS = ("tool_calls", "function_calls", "function_call", "calls")
BRACKET_CALLS = re.compile(r"\s*\[[^\[\](){}]+\(.*\)\s*\]\s*", re.DOTALL)  # [Name(x=1), Other()]
KEYED_CALL = re.compile(r"\s*\[\s*[\w.]+\(\s*(?:\)|\w+\s*=)")  # a call even where no tools are known
ANY_CALL = re.compile(r"\s*\[(?:\s*[\w.]+\(|[^\[\](){}]+\(\s*(?:\)|\w+\s*=))")
CODE_FENCE = re.compile(r"```\w*\n(.*)```", re.DOTALL)
# What stood around the calls, or before them
EMPTY_TAGS = re.compile(r"<([\w:.-]+)>\s*</\1>|^[ \t]*(?:functools|Action:)\s*\Z", re.MULTILINE)
EMPTY_FENCE = re.compile(r"```\w*\s*```")
GLAIVE_CALL = re.compile(r"""\s*\{\s*"name"\s*:\s*("[^"]*")\s*,\s*"arguments"\s*:\s*'(.*)'\s*\}\s*""", re.DOTALL)
FUNCTION = re.compile(r"""<function=([^<>\n]+)>|<invoke name=["']([^<>"'\n]+)["']>""")
PARAMETER = re.compile(r"""<parameter=([^<>\n]+)>|<parameter name=["']([^<>"'\n]+)["'][^<>\n]*>""")
ARGUMENT_KEY = re.compile(r"<arg_key>([^<>\n]*)</arg_key>\s*<arg_value>")
ACTION = re.compile(r"^[ \t]*Action[ \t]*:[ \t]*([^\n]+)\n\s*Action[ \t]*Input[ \t]*:[ \t]*", re.MULTILINE)
LINE_END = re.compile(r"[ \t]*\)?[ \t]*[;,]?[ \t]*(?=\n|$|```)")  # after a call that stands alone
BETWEEN = re.compile(r"[\s,;]*")  # JSON values


def cut_blocks(text: str, opening: re.Pattern, closing: Callable[[re.Match], str]) -> tuple[str, list[tuple[str, str]]]:
    """Return (the text outside, [(what the opening names, inside)]); ValueError for an opening that is not closed."""
    outside, blocks, position = [], [], 0
    for start in opening.finditer(text):
        if start.start() < position:
            continue
        end = text.find(closing(start), start.end())
        if end < 0:
            raise ValueError(f"a turn has {start[0]} without {closing(start)}; expected both")
        outside.append(text[position : start.start()])
        blocks.append((start[start.lastindex], text[start.end() : end]))
        position = end + len(closing(start))
    return "".join([*outside, text[position:]]), blocks


def parse_functions(text: str, known: Known) -> Found:
    """<function=f><parameter=k>v</parameter></function>, as Qwen3-Coder writes it, or <invoke name="f">, as Claude."""
    rest, blocks = cut_blocks(text, FUNCTION, lambda start: "</function>" if start[0][1] == "f" else "</invoke>")
    calls = []
    for name, inside in blocks:
        if inside.lstrip().startswith("{"):  # Llama's <function=f>{...}</function>
            calls.append({"name": name.strip(), "arguments": parse_literal(inside, "the text inside <function> is")})
            continue
        between, pairs = cut_blocks(inside, PARAMETER, lambda _: "</parameter>")
        if between.strip() or len(dict(pairs)) < len(pairs):
            raise ValueError(f"a call must hold each <parameter> once and nothing else, got {shorten(inside)}")
        texts = {key.strip(): value.removeprefix("\n").removesuffix("\n") for key, value in pairs}
        calls.append(type_arguments(name.strip(), texts, known))
    return re.sub("</?(?:tool_call|function_calls)>", "", rest).strip(), calls


def parse_inside(text: str, tag: str, known: Known) -> list:
    """Return the calls between <tool_call> tags: JSON, or what Qwen3-Coder or GLM write there."""
    if FUNCTION.search(text):
        return parse_functions(text, known)[1]
    if "<arg_key>" in text:
        name, pairs = cut_blocks(text, ARGUMENT_KEY, lambda _: "</arg_value>")
        return [type_arguments(name.strip(), dict(pairs), known)]
    fence = CODE_FENCE.fullmatch(text.strip())
    text = fence[1] if fence else text
    found = read_values(text.strip()) or [parse_literal(text, f"the text inside <{tag}> is")]
    return [call for value in found for call in as_list(value)]


def parse_hermes(text: str, known: Known) -> Found:
    """<tool_call>{...}</tool_call>, or a list of calls in <TOOLCALL>"""
    tag = "TOOLCALL" if "<TOOLCALL>" in text else "tool_call"
    cut = split_tags(text, tag)
    if any(f"<{tag}>" in outside for outside in cut[::2]):
        raise ValueError(f"a turn has <{tag}> without </{tag}>; expected both")
    calls = [call for inside in cut[1::2] for call in parse_inside(inside, tag, known)]
    return "\n".join(map(str.strip, cut[::2])).strip(), calls


def parse_glaive(text: str, known: Known) -> Found:
    """<functioncall> {"name": "f", "arguments": '{...}'}, whose arguments are JSON between single quotes"""
    content, *parts = text.split("<functioncall>")
    calls = []
    for part in parts:
        part = part.replace("<|endoftext|>", "")
        if quoted := GLAIVE_CALL.fullmatch(part):
            name = parse_json(quoted[1], "the name of a call is")
            calls.append({"name": name, "arguments": quoted[2].replace("\\'", "'")})
        else:
            calls.append(parse_literal(part, "the text after <functioncall> is"))
    return content.strip(), calls


def parse_mistral(text: str, known: Known) -> Found:
    """[TOOL_CALLS] [{...}], or [TOOL_CALLS]f[ARGS]{...} for each call"""
    content, *parts = text.split("[TOOL_CALLS]")
    calls = []
    for part in parts:
        name, found, arguments = part.removesuffix("</s>").partition("[ARGS]")
        value = parse_literal(arguments if found else name, "the text after [TOOL_CALLS] is")
        calls += [{"name": name.strip(), "arguments": value}] if found else as_list(value)
    return content.strip(), calls


def parse_llama(text: str, known: Known) -> Found:
    """<|python_tag|>{"name": "f", "parameters": {...}}; several with ; between them, or f.call(x=1)"""
    content, _, code = text.partition("<|python_tag|>")
    code = code.strip().removesuffix("<|eom_id|>").removesuffix("<|eot_id|>").strip()
    found = parse_json_calls(code, known) or parse_python(code.replace(".call(", "("), known)
    if not found or found[0]:
        raise ValueError(f"the text after <|python_tag|> is neither JSON nor calls: {shorten(code)}")
    return content.strip(), found[1]


def parse_react(text: str, known: Known) -> Found | None:
    """Action: f, then a line Action Input: {...}, as ReAct agents write them"""
    starts, rest, calls, position = [*ACTION.finditer(text)], "", [], 0
    for start, end in zip(starts, [*(after.start() for after in starts[1:]), len(text)]):
        name, tail = start[1].strip().strip("`[]"), text[start.end() : end]
        lead = len(tail) - len(tail.removeprefix("```json").removeprefix("```").lstrip())
        try:
            arguments, stop = read_value(tail, lead)
        except (ValueError, RecursionError):
            line, names = tail.partition("\n")[0], [*known.parameters.get(name, {})]
            if len(names) != 1 or tail.startswith(("{", "[")):
                raise ValueError(f"the text after Action Input: is not JSON: {shorten(line)}") from None
            arguments = type_arguments(name, {names[0]: line.strip().strip('"')}, known)["arguments"]
            stop = len(line)
        if name not in known.parameters and not isinstance(arguments, dict):
            return None
        calls.append({"name": name, "arguments": arguments})
        rest += text[position : start.start()]
        position = start.end() + stop
    rest = (rest + text[position:].removeprefix("\n```")).strip().removesuffix("Observation:").strip()
    if calls and re.search(r"^[ \t]*Observation:", rest, re.MULTILINE):
        raise ValueError('an answer holds the "Observation:" to its own call; expected a turn of its own for it')
    return (rest, calls) if calls else None


def to_calls(values: list, known: Known, whole: bool) -> list:
    """Return the calls that JSON values are, or that messages among them hold; [] if one of the values is no call."""
    calls = []
    for value in values:
        held = [value[key] for key in LIST_KEYS if value.get(key)] if isinstance(value, dict) else []
        if held and isinstance(held[0], dict | list):
            made = to_calls(as_list(held[0]), known, whole)
        else:
            made = [value] if is_call(value, known, whole) else []
        if not made:
            return []
        calls += made
    return calls


def is_call(found: object, known: Known, whole: bool) -> bool:
    """Return whether a JSON value is a call; as the `whole` answer it may be one of a tool that is not known."""
    found = found["function"] if isinstance(found, dict) and isinstance(found.get("function"), dict) else found
    key = next((key for key in NAME_KEYS if isinstance(found.get(key), str)), None) if isinstance(found, dict) else None
    if key is None or "description" in found:
        return False
    given = [key for key in ARGUMENT_KEYS if key in found]
    arguments = found[given[0]] if given else None
    is_tool = isinstance(arguments, dict) and isinstance(arguments.get("properties"), dict) and "type" in arguments
    if is_tool or not isinstance(arguments, dict | str | None):
        return False
    if found[key] in known.parameters:
        return bool(given) or (whole and found.keys() <= {key, "id", "type"})
    is_plain = given[:1] == ["arguments"] or (known.parameters and found.keys() == {key, "parameters"})
    return bool(whole and key == "name" and arguments is not None and is_plain)


def read_values(text: str) -> list:
    """Return the JSON values that a text consists of, with blanks, commas or semicolons between; or a Python one."""
    values, position = [], 0
    with contextlib.suppress(ValueError, RecursionError):
        while position < len(text):
            value, position = read_value(text, position)
            values.append(value)
            position = BETWEEN.match(text, position).end()
        return values
    with contextlib.suppress(ValueError, RecursionError):
        return [parse_literal(text, "it is")] if len(text) < 100_000 else []
    return []


def parse_json_calls(text: str, known: Known) -> Found | None:
    """{"name": "f", "arguments" or "parameters": {...}}, a list of them, or a message with some; alone, in a block of
    code, or inside a text if the tool is known"""
    whole = text.strip()
    fence = CODE_FENCE.fullmatch(whole)
    whole = fence[1].strip() if fence else whole
    if whole.startswith(("{", "[")):
        values = [item for value in read_values(whole) for item in as_list(value)]
        if calls := to_calls(values, known, True):
            content = values[0].get("content") if len(values) == 1 else ""
            return content.strip() if isinstance(content, str) else "", calls
    if not known.name.search(text):
        return None
    rest, found, position = "", [], 0
    for mark in islice(re.finditer(r"[\[{]", text), TRIES):
        if mark.start() < position:
            continue
        try:
            value, stop = read_value(text, mark.start())
        except (ValueError, RecursionError):
            continue
        if calls := to_calls(as_list(value), known, False):
            found += calls
            rest, position = rest + text[position : mark.start()], stop
    return (EMPTY_FENCE.sub("", rest + text[position:]).strip(), found) if found else None


def parse_bracket_calls(text: str) -> list[dict]:
    """Return the calls of `[Name of a/tool(a="X", n=3), other()]`; ValueError if a part of it is anything else."""
    calls = []
    for part in split_at_commas(text.strip()[1:-1].strip().removesuffix(",")):
        name, bracket, inner = part.partition("(")
        name, arguments = name.strip(), {}
        if not name or not bracket or not inner.endswith(")"):
            raise ValueError(f"expected calls like [name(key=value)], got {shorten(part)}")
        call, inner = f"call {shorten(name)}:", inner[:-1].strip().removesuffix(",")
        for pair in split_at_commas(inner) if inner else []:
            key, equals, value = pair.partition("=")
            key = key.strip()
            if not equals or not key or key in arguments:
                raise ValueError(f"{call} expected arguments like key=value, each key once, got {shorten(pair)}")
            arguments[key] = parse_literal(value, f"{call} {key} is")
        calls.append({"name": name, "arguments": arguments})
    return calls


def parse_toolace(text: str, known: Known) -> Found | None:
    """[f(x='1'), g()]"""
    if not text.lstrip().startswith("[") or not BRACKET_CALLS.fullmatch(text):
        return None
    is_call = (ANY_CALL if known.parameters else KEYED_CALL).match(text)
    return ("", parse_bracket_calls(text)) if is_call else None


def find_close(text: str, position: int) -> int:
    """Return where the bracket at `position` closes, behind it; ValueError if it does not."""
    depth = 0
    for token in TOKEN.finditer(text, position):
        depth += (token[0] in "([{") - (token[0] in ")]}")
        if not depth:
            return token.end()
    raise ValueError(f"unpaired quote or bracket in {shorten(text[position:])}")


def parse_python(text: str, known: Known) -> Found | None:
    """f(x='1') alone on its line, in a block of code too, or [f(x='1')] inside a text"""
    rest, found, position = "", [], 0
    for start in known.call.finditer(text):
        begin, calls = start.start(), ""
        if begin < position:
            continue
        if begin and text[begin - 1] == "[":
            begin -= 1
            end = find_close(text, begin)
            calls = text[begin:end]
        else:
            call, parts = start, []
            while call:
                end = find_close(text, call.end() - 1)
                parts.append(call["name"] + text[call.end() - 1 : end])
                call = known.more.match(text, end)
            tail = LINE_END.match(text, end)
            if not tail:  # talk about it
                continue
            calls, end = f"[{', '.join(parts)}]", tail.end()
        found += parse_bracket_calls(calls)
        rest, position = rest + text[position:begin], end
    return (EMPTY_FENCE.sub("", rest + text[position:]).strip(), found) if found else None


SYNTAXES = {  # name: (marks, one of which a text must hold for it, parser); the first that finds calls
    "hermes": (HERMES_MARKS, parse_hermes),
    "qwen3_coder": (("<function=", "<invoke "), parse_functions),
    "glaive": (("<functioncall>",), parse_glaive),
    "mistral": (("[TOOL_CALLS]",), parse_mistral),
    "llama": (("<|python_tag|>",), parse_llama),
    "react": (("Action",), parse_react),
    "toolace": (("[",), parse_toolace),
    "json": (("{",), parse_json_calls),
    "python": (("(",), parse_python),
}


def read_syntax(text: str, known: Known, only: str | None = None) -> tuple[str, str, list] | None:
    """Return (syntax, the text without its calls, calls) by the first syntax that finds calls, or None."""
    for name, (marks, parse) in SYNTAXES.items():
        if only in (None, name) and any(mark in text for mark in marks):
            found = parse(text, known)
            if found and found[1]:
                return name, *found
    return None


def find_calls(text: str, known: Known, only: str | None) -> tuple[str, str, list] | None:
    """Return what read_syntax does; ValueError if the text calls a tool in a syntax that is not read."""
    if found := read_syntax(text, known, only):
        return found
    if known.name.search(text) and (unread := known.unread.search(text)):
        called = known.name.search(unread[0]) or known.name.search(text)
        expected = 'expected it in a syntax that is read, such as "tool_calls"'
        raise ValueError(f"an answer calls {shorten(called[0])} as text, {shorten(text, 40)}; {expected}")
    return None


def read_message(message: dict, known: Known, changes: Counter, only: str | None) -> dict:
    """Return an assistant's message with the calls out of its text."""
    content, trained = message["content"], "weight" not in message
    try:
        found = find_calls(content, known, only) if content.strip() else None
        if message["role"] == "calls" and not found:
            found = "calls", "", as_list(parse_literal(content, "a turn of calls is"))
        if not found:
            return message
        name, text, calls = found
        text = EMPTY_TAGS.sub(lambda found: found[0] if found[1] and found[0] in content else "", text).strip()
        if more := read_syntax(text, known) if text else None:
            raise ValueError(f"an answer writes calls in two ways, {name} and {more[0]}; expected one of them")
        calls = [to_tool_call(call, changes, trained) for call in calls]
    except (ValueError, RecursionError):
        if trained:
            raise
        return message  # a wrong turn: context, as it stands
    given = message.get("tool_calls")
    if given and not are_same_calls(given, calls):
        raise ValueError(f"a turn holds tool_calls and {SYNTAXES[name][0][0]}; expected one of them")
    if message["role"] != "calls" or name not in ("calls", "json"):
        changes[f"{READ_AS}{name}"] += 1
    if text and content.lstrip()[:1] not in ("{", "[") and not content.lstrip().startswith(text):
        changes[LATE_TEXT] += 1
    return set_calls(message, text, given or calls)


def read_calls(messages: list[dict], tools: list[dict], changes: Counter, syntax: str | None = None) -> list[dict]:
    """Return the messages with all calls of the assistant in `tool_calls`, read in the named syntax or in any.

    Talk about a tool is no call. Answers of weight 0 stay text where they cannot be read.
    """
    known, read = None, []
    for message in messages:
        if may_call(message):
            known = known or to_known(tools)
            message = read_message(message, known, changes, syntax)
        read.append(message)
    return read


def may_call(message: dict) -> bool:
    """Return whether a message's text is to be read for calls: cheaply, as most texts hold none."""
    role, content = message["role"], message["content"]
    if role not in ANSWERING or not isinstance(content, str):
        return False
    marks = HERMES_MARKS if "tool_calls" in message else ("{", "[", "(", "<", "Action")
    return any(mark in content for mark in marks) or (role == "calls" and "tool_calls" not in message)
