"""Messages as a chat template reads them, and the checks of a conversation."""

import re

from tool_calling.data.literals import as_list, parse_literal, to_json, unpack
from tool_calling.data.special_tokens import find_forbidden
from tool_calling.data.tools import check_call
from tool_calling.terminal import shorten

# fmt: off
ROLES = {  # a role as other formats name it: OpenAI's; "calls" is a turn that holds nothing but calls
    "human": "user", "gpt": "assistant", "model": "assistant", "developer": "system",
    "observation": "tool", "tool_response": "tool", "function": "tool", "function-response": "tool",
    "function_call": "calls", "function-call": "calls", "tool_call": "calls",
}
NEXT_ROLES = {  # who may speak after whom; here "calls" is an assistant's turn that waits for replies
    "start": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",),
    "calls": ("tool",), "tool": ("tool", "assistant"),
}
# fmt: on
CALL_KEYS = ("tool_calls", "function_calls", "function_call")
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
TURN_KEYS = {"role", "from", "content", "value", "name", "weight", "tool_call_id", *CALL_KEYS, *THOUGHT_KEYS}
TALK_KEYS = ("messages", "conversations", "prompt", "completion")  # of a row, for a list of turns
TEXT_PART = {"type", "text", "annotations", "cache_control"}  # a part of content with other keys says more than a text
KIND_NAMES = {list: "a list of objects", dict: "an object", str: "text"}
UNREAD_CALL = re.compile(r"<functioncall>|\[TOOL_CALLS\]")  # as other models write one, in an answer
CODE_FENCE = re.compile(r"```\w*\n(.*)```", re.DOTALL)


def to_role(role: object) -> object:
    """Return a role as OpenAI names it; an unknown one stays as it is."""
    return ROLES.get(role, role) if isinstance(role, str) else role


def take(row: dict, key: str, kind: type):
    """Return row[key], which for a list may be JSON text; ValueError if it is missing or of another kind."""
    if key not in row:
        raise ValueError(f'"{key}" is missing; expected {KIND_NAMES[kind]}')
    value = unpack(row[key], f'"{key}" is') if kind is list else row[key]
    if not isinstance(value, kind) or (kind is list and not all(isinstance(item, dict) for item in value)):
        raise ValueError(f'"{key}" must be {KIND_NAMES[kind]}, got {shorten(value)}')
    return value


def to_tool_call(call: object) -> dict:
    """Return a call in the OpenAI shape with its arguments as a dict; ValueError says what is wrong with it."""
    inner = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or "arguments" not in inner:
        raise ValueError(f'a call must be {{"name": "...", "arguments": {{...}}}}, got {shorten(inner)}')
    name = inner["name"]
    arguments = unpack(inner["arguments"], f"call {shorten(name)}: arguments are")
    if not isinstance(arguments, dict):
        raise ValueError(f"call {shorten(name)}: arguments must be an object, got {shorten(arguments)}")
    call_id = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
    return {**call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def is_text_part(part: object) -> bool:
    """Return whether a part of a message's content holds nothing but text."""
    is_text = isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text"
    return is_text and part.keys() <= TEXT_PART


def join_text(content: object) -> object:
    """Return content as text where it is text, nothing, or a list of text parts; other content stays as it is."""
    if content and isinstance(content, list) and all(map(is_text_part, content)):
        return "".join(part["text"] for part in content)
    return "" if content is None else content


def split_thought(message: dict, content: object) -> tuple[str, object]:
    """Return (thought, content) of an assistant message: the thought from its own key or from a leading think block."""
    thoughts = [join_text(message.get(key) or "") for key in THOUGHT_KEYS]
    if wrong := [thought for thought in thoughts if not isinstance(thought, str)]:
        raise ValueError(f"reasoning must be text, got {shorten(wrong[0])}")
    if block := re.match(r"\s*<think>(.*?)</think>\s*", content, re.DOTALL) if isinstance(content, str) else None:
        thoughts.append(block[1].strip())
        content = content[block.end() :]
    thoughts = [thought for thought in thoughts if thought.strip()]
    if len({*map(str.strip, thoughts)}) > 1:
        raise ValueError("a message has two different thoughts, in its reasoning or in its <think> block; expected one")
    return thoughts[0] if thoughts else "", content


def find_calls(message: dict) -> list:
    """Return the calls under the one of CALL_KEYS that a message has, [] if none; a `function_call` is a single one."""
    given = [key for key in CALL_KEYS if message.get(key)]
    if not given:
        return []
    if len(given) > 1:
        raise ValueError(f"a message holds {given[0]} and {given[1]}; expected one of them")
    calls = unpack(message[given[0]], f"{given[0]} is")
    calls = [calls] if given == ["function_call"] else calls
    if not isinstance(calls, list):
        raise ValueError(f"{given[0]} must be a list, got {shorten(calls)}")
    return calls


def to_message(message: dict) -> dict:
    """Return a message with only what a chat template reads, its ids, and weight 0 if it is not to be trained."""
    role, content = to_role(message.get("role")), join_text(message.get("content"))
    if role == "tool":
        call_id = message.get("tool_call_id")
        replied = {"tool_call_id": call_id} if isinstance(call_id, str) and call_id else {}
        return {"role": role, **replied, "content": content}
    if role not in ("assistant", "calls"):
        return {"role": role, "content": content}
    if message.get("weight") not in (None, 0, 1):
        raise ValueError(f"weight must be 0 or 1, got {shorten(message['weight'])}")
    (thought, content), calls = split_thought(message, content), find_calls(message)
    if role == "calls":
        if calls and content:
            raise ValueError("a turn of calls holds calls in content and in another key; expected one of them")
        calls = as_list(parse_literal(content, "a turn of calls is") if isinstance(content, str) else content)
        content = ""
    parts = {"reasoning_content": thought, "tool_calls": [*map(to_tool_call, calls)]}
    parts = {key: part for key, part in parts.items() if part}
    return {"role": role, "content": content, **parts, **({"weight": 0} if message.get("weight") == 0 else {})}


def to_messages(turns: list[dict]) -> list[dict]:
    """Return the messages of a conversation; turns of calls join those right before them, and the text there."""
    messages: list[dict] = []
    for message in map(to_message, turns):
        if message["role"] == "calls":
            message["role"] = "assistant"
            if messages and messages[-1]["role"] == "assistant":
                before = messages.pop()
                thoughts = {turn.get("reasoning_content", "").strip() for turn in (before, message)} - {""}
                if len(thoughts) > 1 or before.get("weight") != message.get("weight"):
                    raise ValueError("a turn of calls follows one with another thought or weight; expected the same")
                calls = [*before.get("tool_calls", []), *message.get("tool_calls", [])]
                message = {**message, **before, "tool_calls": calls}
        messages.append(message)
    return messages


def list_unread(row: dict, keys: set[str]) -> list[tuple[str, str]]:
    """Return (place, key) of what holds something and is not read, in a row of which `keys` are read and its turns."""
    places = [("row", row, {*keys, "tools", "functions", "system"})]
    places += [("output", row["output"], TURN_KEYS)] if "output" in keys and "output" in row else []
    places += [("turn", turn, TURN_KEYS) for key in TALK_KEYS if key in keys for turn in as_list(row.get(key))]
    return [
        (place, key)
        for place, holder, known in places
        if isinstance(holder, dict)
        for key, value in holder.items()
        if key not in known and value not in (None, "", [], {})
    ]


def add_system(row: dict, turns: list[dict]) -> list[dict]:
    """Return the turns with the row's `system` in front, if it has one that they do not begin with."""
    system, first = row.get("system"), turns[0] if turns else {}
    said = first.get("role") in ("system", "developer") and first.get("content") == system
    return [{"role": "system", "content": system}, *turns] if system and not said else turns


def is_trained(message: dict) -> bool:
    """Return whether a message is a supervised answer: to_message keeps no weight but 0."""
    return message["role"] == "assistant" and "weight" not in message


def check_roles(messages: list[dict]) -> list[str]:
    """Return what is wrong with the order of the roles, with replies to calls, or with what there is to train.

    Where calls and replies have ids, each reply answers an open call and none stays open. Where they have none, one
    reply may stand for several parallel calls.
    """
    state, waiting, by_id = "start", [], True  # waiting: ids (or None) of the calls without a reply
    for index, message in enumerate(messages, start=1):
        role, allowed = message["role"], NEXT_ROLES[state]
        if state == "tool" and (by_id or not waiting):
            allowed = ("tool",) if waiting else ("assistant",)
        if role not in allowed:
            reason = f"; {len(waiting)} of its calls still wait for their reply" if waiting and state == "tool" else ""
            return [f"message {index} has the role {shorten(role)}; expected {' or '.join(allowed)}{reason}"]
        if role == "assistant":
            waiting = [call.get("id") for call in message.get("tool_calls", [])]
            by_id = None not in waiting
        elif role == "tool":
            by_id = by_id and "tool_call_id" in message
            if by_id and message["tool_call_id"] not in waiting:
                return [f"message {index} answers call {shorten(message['tool_call_id'])}, which is not open"]
            waiting.remove(message["tool_call_id"] if by_id else waiting[0])
        state = "calls" if role == "assistant" and waiting else role
    if not messages or messages[-1]["role"] != "assistant":
        return ["the last message must be the assistant's: it is what is trained"]
    if not any(map(is_trained, messages)):
        return ["no turn is trained; every weight is 0"]
    return []


def is_call(found: object) -> bool:
    """Return whether a JSON value is a call, or a message that holds some."""
    if not isinstance(found, dict):
        return False
    bare = isinstance(found.get("name"), str) and isinstance(found.get("arguments"), dict | str)
    return bare or any(found.get(key) for key in ("function_call", "function_calls", "tool_calls"))


def is_call_text(text: str) -> bool:
    """Return whether an answer is the JSON of a call, of several, or of a message with some, or a foreign call."""
    fence = CODE_FENCE.fullmatch(text.strip())
    try:
        found = as_list(unpack(fence[1] if fence else text, "it is"))
    except (ValueError, RecursionError):
        found = []
    return any(map(is_call, found)) or bool(UNREAD_CALL.search(text))


def check_text(messages: list[dict]) -> list[str]:
    """Return the problems of contents: one that is not text, empty or a call as text, or holds a special token."""
    problems = []
    for index, message in enumerate(messages, start=1):
        name, content = f"message {index} ({message['role']}):", message["content"]
        if not isinstance(content, str):
            problems.append(f"{name} content must be text, got {shorten(content)}")
            continue
        if not content.strip() and message["role"] != "tool" and not message.get("tool_calls"):
            problems.append(f"{name} content is empty")
        if is_trained(message) and is_call_text(content):
            expected = 'expected it in a form that is read as a call, such as "tool_calls"'
            problems.append(f"{name} content is a call as text, {shorten(content, 40)}; {expected}")
        calls = to_json(message["tool_calls"]) if "tool_calls" in message else ""
        for text in (content, message.get("reasoning_content", ""), calls):
            if problem := find_forbidden(text):
                tagged = text is content and message["role"] == "assistant" and re.search(r"</tool_?call>", text, re.I)
                problems.append(f"{name} {problem}{', or read it as a call with --format hermes' if tagged else ''}")
    return problems


def check_calls(messages: list[dict], validators: dict) -> list[str]:
    """Return the problems of all calls of the conversation by the schemas of their tools."""
    calls = [call["function"] for message in messages for call in message.get("tool_calls", [])]
    return [
        f"call {index} {shorten(call['name'])}: {problem}"
        for index, call in enumerate(calls, start=1)
        for problem in check_call(call["name"], call["arguments"], validators)
    ]
