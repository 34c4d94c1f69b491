"""Rows of any known format to conversations; FORMATS is the one place to add a format."""

import contextlib
import re

from tool_calling.data.literals import as_list, parse_json, parse_literal, split_at_commas, unpack
from tool_calling.data.messages import (
    TURN_KEYS,
    add_system,
    find_calls,
    join_text,
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
GLAIVE_BOILERPLATE = re.compile(
    r"You are a helpful assistant with access to the following functions\. "
    r"Use them if required\s*-?"
)
QUESTION_KEYS = ("instruction", "question", "prompt", "query", "input")
ANSWER_KEYS = ("output", "answer", "response", "completion")


def read_turns(row: dict) -> list[dict]:
    """Return the turns of a ShareGPT row, {"from", "value"} or {"role", "content"}, with its `system` in front."""
    key = "messages" if "messages" in row and "conversations" not in row else "conversations"
    turns = [
        {
            **turn,
            "role": turn.get("from", turn.get("role")),
            "content": join_text(turn.get("value", turn.get("content"))),
        }
        for turn in take(row, key, list)
    ]
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
        return [
            {
                **turn,
                "content": content,
                "reasoning_content": thought,
                "tool_calls": calls or turn.get("tool_calls") or [],
            }
        ]
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
                raise ValueError(
                    f"call {shorten(name.strip())}: expected arguments like key=value, each key once, "
                    f"got {shorten(pair)}"
                )
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
        raise ValueError(
            f"expected one of {', '.join(QUESTION_KEYS)} and one of {', '.join(ANSWER_KEYS)}, got " + shorten(row)
        )
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
    return (
        isinstance(tools, list)
        and bool(tools)
        and all(isinstance(tool, dict) and "function" in tool and "type" not in tool for tool in tools)
    )


def names_tools(row: dict) -> bool:
    """Return whether a row has tools beside its turns, or says there that it has none."""
    return any(row.get(key) is not None for key in ("tools", "functions"))


def is_hermes(row: dict) -> bool:
    """Return whether calls stand between tags in the text, or tools do; in `messages`, of a row that has no others."""
    turns = [*peek(row, "messages"), *peek(row, "conversations")]
    if any("<tool_call>" in text or "<TOOLCALL>" in text for _, text in turns):
        return True
    anywhere, nowhere = "conversations" in row, names_tools(row)
    return any(
        "<tools>" in text and (anywhere or not nowhere and role in ("system", "developer")) for role, text in turns
    )


def is_toolace(row: dict) -> bool:
    """Return whether calls are written as [Name(key=value)], or tools stand in the system text; in `messages`, both."""

    def calls(turns):
        return any(role in ("assistant", "gpt") and BRACKET_CALLS.fullmatch(text) for role, text in turns)

    turns, messages = peek(row, "conversations"), [] if names_tools(row) else peek(row, "messages")
    system = row.get("system") if isinstance(row.get("system"), str) else ""
    return (
        bool(turns and TOOL_LIST.search(system))
        or calls(turns)
        or calls(messages)
        and any(role == "system" and TOOL_LIST.search(text) for role, text in [*messages, ("system", system)])
    )


def is_sharegpt_tools(row: dict) -> bool:
    """Return whether the conversation has tools beside it, or calls or replies as turns."""
    return "conversations" in row and (
        names_tools(row) or any(to_role(role) in ("calls", "tool") for role, _ in peek(row, "conversations"))
    )


# name: (whether a row is of this format, converter to (turns, tools or None), the keys it reads beside tools and
# system); the first that fits
FORMATS = {
    "native": (
        lambda row: "input" in row and isinstance(row.get("output"), dict),
        convert_native,
        {"input", "output", "instruction", "history", "context"},
    ),
    "swift": (
        lambda row: any(role in ("tool_call", "tool_response") for role, _ in peek(row, "messages")),
        convert_openai,
        {"messages"},
    ),
    "hermes": (is_hermes, convert_hermes, {"messages", "conversations"}),
    "toolace": (is_toolace, convert_toolace, {"messages", "conversations"}),
    "mobile-actions": (is_mobile, convert_openai, {"messages"}),
    "openai": (lambda row: "messages" in row, convert_openai, {"messages"}),
    # {"conversations": [{"from": "human" | "gpt" | "function_call" | "observation", "value": "..."}], "tools": ...}
    "sharegpt-tools": (is_sharegpt_tools, lambda row: (read_turns(row), None), {"conversations"}),
    "sharegpt": (lambda row: "conversations" in row, lambda row: (read_turns(row), []), {"conversations"}),  # no tools
    "xlam": (lambda row: "query" in row and "answers" in row, convert_xlam, {"query", "answers"}),
    "glaive": (lambda row: "chat" in row, convert_glaive, {"chat"}),
    "prompt-completion": (
        lambda row: isinstance(row.get("prompt"), list) and "completion" in row,
        convert_prompt_completion,
        {"prompt", "completion"},
    ),
    "alpaca": (
        lambda row: any(key in row for key in QUESTION_KEYS) and any(key in row for key in ANSWER_KEYS),
        convert_alpaca,
        {*QUESTION_KEYS, *ANSWER_KEYS, "history", "context"},
    ),
}
SHAPES = (
    '"messages"; "conversations"; "input" and "output"; "query" and "answers"; "chat"; "question" and "answer"; '
    '"prompt" and "completion"'
)


def list_unread(row: dict, name: str) -> list[tuple[str, str]]:
    """Return as (place, key) what holds something in a row, its output or a turn, and is not read in its format.

    Conversations must be lists already, not JSON text.
    """
    keys = FORMATS[name][2]
    places = [("row", row, {*keys, "tools", "functions", "system"})]
    if name == "native":
        places.append(("output", row["output"], {*TURN_KEYS, "function_calls"}))
    elif name != "alpaca":  # whose `prompt` and `completion` are plain text
        places += [
            ("turn", turn, TURN_KEYS)
            for key in ("messages", "conversations", "prompt", "completion")
            if key in keys and row.get(key)
            for turn in as_list(row[key])
        ]
    return [
        (place, key)
        for place, holder, known in places
        if isinstance(holder, dict)
        for key, value in holder.items()
        if key not in known and value not in (None, "", [], {})
    ]


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
            row |= (
                turns
                if all(isinstance(turn, dict) and "role" in turn for part in turns.values() for turn in as_list(part))
                else {}
            )
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
