"""Rows of any known format to conversations; FORMATS is the one place to add a format."""

import contextlib
import re
from collections.abc import Callable
from typing import NamedTuple

from tool_calling.data.literals import as_list, parse_json, parse_literal, split_at_commas, unpack
from tool_calling.data.messages import (
    CALL_KEYS,
    add_system,
    join_text,
    list_unread,
    split_thought,
    take,
    to_messages,
    to_role,
)
from tool_calling.data.tools import find_tools, take_tools
from tool_calling.terminal import shorten

BRACKET_CALLS = re.compile(r"\s*\[[^\[\](){}]+\(.*\)\s*\]\s*", re.DOTALL)  # [Name(x=1), Other()]
TOOL_LIST = re.compile(r'\[\s*\{.*"(?:parameters|function)"', re.DOTALL)
GLAIVE_TURN = re.compile(r"(?:^|\n)[^\S\n]*(USER|ASSISTANT|FUNCTION RESPONSE):")
GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
GLAIVE_CALL = re.compile(r"""\s*\{\s*"name"\s*:\s*("[^"]*")\s*,\s*"arguments"\s*:\s*'(.*)'\s*\}\s*""", re.DOTALL)
GLAIVE_BOILERPLATE = re.compile(
    r"You are a helpful assistant with access to the following functions\. Use them if required\s*-?"
)
Talk = tuple[list[dict], object]  # turns, and the tools that stand in them or None
QUESTION_KEYS = ("instruction", "question", "prompt", "query", "input")
ANSWER_KEYS = ("output", "answer", "response", "completion")


def to_pair(turn: dict) -> tuple[object, object]:
    """Return (role, content) of a turn, by ShareGPT's names or OpenAI's."""
    return turn.get("from", turn.get("role")), join_text(turn.get("value", turn.get("content")))


def read_turns(row: dict) -> list[dict]:
    """Return the turns of a ShareGPT row with OpenAI's names, with its `system` in front."""
    key = "messages" if "messages" in row and "conversations" not in row else "conversations"
    turns = [turn | dict(zip(("role", "content"), to_pair(turn))) for turn in take(row, key, list)]
    return add_system(row, turns)


def read_request(row: dict, question: str) -> list[dict]:
    """Return the turns before a row's answer: its `history`, and its question with the text that this is about."""
    about, history = [key for key in ("input", "context") if key != question and row.get(key)], row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f'"history" must be a list of [request, answer], got {shorten(history)}')
    turns = [{"role": role, "content": text} for pair in history for role, text in zip(("user", "assistant"), pair)]
    return [*turns, {"role": "user", "content": "\n".join(take(row, key, str) for key in (question, *about))}]


def convert_native(row: dict) -> Talk:
    """{"input": "...", "output": {"function_call": {...} | "function_calls": [...], "content": "..."}}"""
    output, question = take(row, "output", dict), "instruction" if row.get("instruction") else "input"
    if output.keys().isdisjoint((*CALL_KEYS, "content")):
        raise ValueError(f'"output" must hold function_call, function_calls or content, got {shorten(output)}')
    return add_system(row, [*read_request(row, question), {**output, "role": "assistant"}]), None


def convert_openai(row: dict) -> Talk:
    """{"messages": [{"role": "...", "content": "...", "tool_calls": [...]}, ...], "tools": [...]}"""
    return add_system(row, take(row, "messages", list)), None


def split_tags(text: str, tag: str) -> list[str]:
    """Return a text cut at <tag>...</tag>: every other piece is what stood inside."""
    done, end, rest = text.rpartition(f"</{tag}>")  # no tag closes in the rest: searching it at each would be slow
    *cut, last = re.split(f"<{tag}>(.*?)</{tag}>", done + end, flags=re.DOTALL)
    return [*cut, last + rest]


def split_hermes_system(text: str) -> tuple[list | None, str]:
    """Return (tools inside <tools> or None, the text without the sentences about the <tools> and <tool_call> tags)."""
    tools = None
    for block in filter(str.strip, split_tags(text, "tools")[1::2]):
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
        if calls and turn.get("tool_calls"):
            raise ValueError(f"a turn holds tool_calls and <{tag}>; expected one of them")
        content = "\n".join(map(str.strip, cut[::2])).strip() if len(cut) > 1 else content
        calls = calls or turn.get("tool_calls") or []
        return [{**turn, "content": content, "reasoning_content": thought, "tool_calls": calls}]
    if role == "tool" and isinstance(content, str):
        cut = split_tags(content, "tool_response")
        if len(cut) > 1 and not "".join(cut[::2]).strip():
            return [{**turn, "content": reply.strip()} for reply in cut[1::2]]
    return [turn]


def convert_hermes(row: dict) -> Talk:
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


def convert_prompt_completion(row: dict) -> Talk:
    """{"prompt": [{"role": "user", "content": "..."}], "completion": [{"role": "assistant", ...}], "tools": [...]}; of
    these turns only the completion is trained."""
    prompt = [{**turn, "weight": 0} for turn in take(row, "prompt", list)]
    row = {**row, "messages": [*prompt, *take(row, "completion", list)]}
    return (convert_hermes if is_hermes(row) else convert_openai)(row)


def convert_xlam(row: dict) -> Talk:
    """{"query": "...", "answers": "[{\\"name\\": ..., \\"arguments\\": {...}}]", "tools": "[...]"}"""
    calls, question = take(row, "answers", list), take(row, "query", str)
    return add_system(row, [{"role": "user", "content": question}, {"role": "assistant", "tool_calls": calls}]), None


def parse_glaive_call(text: str) -> object:
    """Return the call of a Glaive turn, whose arguments are JSON between single quotes."""
    quoted = GLAIVE_CALL.fullmatch(text)
    if not quoted:
        return parse_literal(text, "the text after <functioncall> is")
    return {"name": parse_json(quoted[1], "the name of a call is"), "arguments": quoted[2].replace("\\'", "'")}


def convert_glaive(row: dict) -> Talk:
    """{"system": "SYSTEM: ... -\\n{...}\\n{...}",
    "chat": "USER: ...\\n\\n\\nASSISTANT: <functioncall> {...} <|endoftext|>"}"""
    system = take(row, "system", str) if row.get("system") is not None else ""
    tools, system = take_tools(system.strip().removeprefix("SYSTEM:"))
    system = GLAIVE_BOILERPLATE.sub("", system) if tools else system
    start, *parts = GLAIVE_TURN.split(take(row, "chat", str))
    if start.strip():
        raise ValueError(f'"chat" must start with "USER:", got {shorten(start)}')
    turns = []
    for speaker, text in zip(parts[::2], parts[1::2]):
        turn = {"role": GLAIVE_ROLES[speaker], "content": text.replace("<|endoftext|>", "").strip()}
        if speaker == "ASSISTANT":
            content, *calls = turn["content"].split("<functioncall>")
            turn |= {"content": content.strip(), "tool_calls": [*map(parse_glaive_call, calls)]}
        turns.append(turn)
    return add_system({"system": system.strip()}, turns), tools


def parse_bracket_calls(text: str) -> list[dict]:
    """Return the calls of `[Name of a/tool(a="X", n=3), other()]`; ValueError if a part of it is anything else."""
    calls = []
    for part in split_at_commas(text.strip()[1:-1]):
        name, bracket, inner = part.partition("(")
        name, arguments = name.strip(), {}
        if not name or not bracket or not inner.endswith(")"):
            raise ValueError(f"expected calls like [name(key=value)], got {shorten(part)}")
        call = f"call {shorten(name)}:"
        for pair in split_at_commas(inner[:-1]) if inner[:-1].strip() else []:
            key, equals, value = pair.partition("=")
            key = key.strip()
            if not equals or not key or key in arguments:
                raise ValueError(f"{call} expected arguments like key=value, each key once, got {shorten(pair)}")
            arguments[key] = parse_literal(value, f"{call} {key} is")
        calls.append({"name": name, "arguments": arguments})
    return calls


def convert_toolace(row: dict) -> Talk:
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


def convert_alpaca(row: dict) -> Talk:
    """{"instruction": "...", "input": "", "output": "...", "system": "...", "history": [["u", "a"]]}, or a question, a
    "context" and an answer by other names: plain requests, so without tools unless the row has its own."""
    question, answer = (next((key for key in keys if key in row), None) for keys in (QUESTION_KEYS, ANSWER_KEYS))
    if not question or not answer:
        questions, answers = ", ".join(QUESTION_KEYS), ", ".join(ANSWER_KEYS)
        raise ValueError(f"expected one of {questions} and one of {answers}, got {shorten(row)}")
    for key, others in ((question, QUESTION_KEYS), (answer, ANSWER_KEYS)):
        if more := [other for other in others if row.get(other) and other not in (key, "input")]:
            raise ValueError(f'the row holds "{key}" and "{more[0]}"; expected one of them')
    turns = [*read_request(row, question), {"role": "assistant", "content": take(row, answer, str)}]
    return add_system(row, turns), []


def peek(row: dict, key: str) -> list[tuple[str, str]]:
    """Return the (role, text) pairs of a conversation as far as there are any, to recognise its format."""
    turns = row[key] if isinstance(row.get(key), list) else []
    pairs = [to_pair(turn) for turn in turns if isinstance(turn, dict)]
    return [(role, text if isinstance(text, str) else "") for role, text in pairs if isinstance(role, str)]


def names_tools(row: dict) -> bool:
    """Return whether a row has tools beside its turns, or says there that it has none."""
    return any(row.get(key) is not None for key in ("tools", "functions"))


def is_mobile(row: dict) -> bool:
    """Return whether the row has `messages` and tools that do not say their type."""
    tools = row.get("tools") if "messages" in row and isinstance(row.get("tools"), list) else []
    untyped = [isinstance(tool, dict) and "function" in tool and "type" not in tool for tool in tools]
    return bool(untyped) and all(untyped)


def is_hermes(row: dict) -> bool:
    """Return whether calls stand between tags in the text, or tools do; in `messages`, of a row that has no others."""
    is_sharegpt, named = "conversations" in row, names_tools(row)
    for role, text in [*peek(row, "messages"), *peek(row, "conversations")]:
        if "<tool_call>" in text or "<TOOLCALL>" in text:
            return True
        if "<tools>" in text and (is_sharegpt or (not named and role in ("system", "developer"))):
            return True
    return False


def is_toolace(row: dict) -> bool:
    """Return whether calls are written as [Name(key=value)], or tools stand in the system text; in `messages`, both."""

    def has_calls(turns):
        return any(role in ("assistant", "gpt") and BRACKET_CALLS.fullmatch(text) for role, text in turns)

    def has_tools(turns):
        return any(role == "system" and TOOL_LIST.search(text) for role, text in turns)

    turns, messages = peek(row, "conversations"), [] if names_tools(row) else peek(row, "messages")
    system = [("system", row["system"])] if isinstance(row.get("system"), str) else []
    in_turns = has_calls(turns) or (bool(turns) and has_tools(system))
    return in_turns or (has_calls(messages) and has_tools([*messages, *system]))


def is_sharegpt_tools(row: dict) -> bool:
    """Return whether the conversation has tools beside it, or calls or replies as turns."""
    has_turns = any(to_role(role) in ("calls", "tool") for role, _ in peek(row, "conversations"))
    return has_turns or ("conversations" in row and names_tools(row))


class Format(NamedTuple):
    """How rows of a format are recognised and converted."""

    fits: Callable[[dict], bool]
    convert: Callable[[dict], Talk]
    keys: set[str]  # that are read of a row, beside tools and system


# fmt: off
FORMATS = {  # the first that fits a row
    "native": Format(
        lambda row: "input" in row and isinstance(row.get("output"), dict),
        convert_native, {"input", "output", "instruction", "history", "context"}),
    "swift": Format(
        lambda row: any(role in ("tool_call", "tool_response") for role, _ in peek(row, "messages")),
        convert_openai, {"messages"}),
    "hermes": Format(is_hermes, convert_hermes, {"messages", "conversations"}),
    "toolace": Format(is_toolace, convert_toolace, {"messages", "conversations"}),
    "mobile-actions": Format(is_mobile, convert_openai, {"messages"}),
    "openai": Format(lambda row: "messages" in row, convert_openai, {"messages"}),
    # {"conversations": [{"from": "human" | "gpt" | "function_call" | "observation", "value": "..."}], "tools": ...}
    "sharegpt-tools": Format(is_sharegpt_tools, lambda row: (read_turns(row), None), {"conversations"}),
    "sharegpt": Format(  # plain requests, so without tools
        lambda row: "conversations" in row, lambda row: (read_turns(row), []), {"conversations"}),
    "xlam": Format(lambda row: "query" in row and "answers" in row, convert_xlam, {"query", "answers"}),
    "glaive": Format(lambda row: "chat" in row, convert_glaive, {"chat"}),
    "prompt-completion": Format(
        lambda row: isinstance(row.get("prompt"), list) and "completion" in row,
        convert_prompt_completion, {"prompt", "completion"}),
    "alpaca": Format(
        lambda row: not row.keys().isdisjoint(QUESTION_KEYS) and not row.keys().isdisjoint(ANSWER_KEYS),
        convert_alpaca, {*QUESTION_KEYS, *ANSWER_KEYS, "history", "context"}),
}
# fmt: on
SHAPES = (
    '"messages"; "conversations"; "input" and "output"; "query" and "answers"; "chat"; "question" and "answer"; '
    '"prompt" and "completion"'
)


def unpack_turns(row: dict) -> dict:
    """Return the row with lists for conversations that are JSON text."""
    row = {**row, **{key: unpack(row[key], f'"{key}" is') for key in ("messages", "conversations") if key in row}}
    if "prompt" in row and "completion" in row:  # which may as well be plain text that begins with a bracket
        with contextlib.suppress(ValueError, RecursionError):
            turns = {key: unpack(row[key], key) for key in ("prompt", "completion")}
            if all(isinstance(turn, dict) and "role" in turn for part in turns.values() for turn in as_list(part)):
                row |= turns
    return row


def convert(row: object, name: str) -> tuple[str, list[dict], object, list[tuple[str, str]]]:
    """Return (format, OpenAI messages, tools as they are or None, what list_unread finds) of a row; or a ValueError."""
    if isinstance(row, ValueError):  # a line that was not JSON
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, got {shorten(row)}")
    row = unpack_turns(row)
    if name in ("auto", "hermes", "toolace") and row.get("messages") and row.get("conversations"):
        raise ValueError('the row holds "messages" and "conversations"; expected one of them')
    if name == "auto":
        name = next((found for found, format in FORMATS.items() if format.fits(row)), None)
    if name is None:
        inside = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        hint = f'; if its "{inside[0]}" are the rows, give that list alone' if inside else ""
        raise ValueError(f"no known format; expected an object with {SHAPES}; got {shorten(row)}{hint}")
    turns, tools = FORMATS[name].convert(row)
    # The row's own tools count first, under the newer name first, unless they are none and there are some elsewhere.
    given = [found for found in (row.get("tools"), row.get("functions"), tools) if found is not None]
    some = [found for found in given if found not in ([], "", "[]")]
    return name, to_messages(turns), (some or given or [None])[0], list_unread(row, FORMATS[name].keys)
