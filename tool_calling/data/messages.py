"""Messages of a conversation: whole answers of consecutive turns, one reply a message, and the checks of both."""

import re
from collections import Counter

from tool_calling.data.literals import to_json
from tool_calling.data.special_tokens import find_forbidden
from tool_calling.data.tools import check_call
from tool_calling.data.turns import ANSWERING, set_calls
from tool_calling.terminal import shorten

NEXT_ROLES = {  # who may speak after whom; here "calls" is an assistant's turn that waits for replies
    "start": ("system", "user", "assistant"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("tool", "assistant"),
}


def is_trained(message: dict) -> bool:
    """Return whether a message is a supervised answer: no weight but 0 is kept."""
    return message["role"] == "assistant" and "weight" not in message


def settle_turns(messages: list[dict], changes: Counter) -> list[dict]:
    """Return the messages with consecutive ones of the assistant as one, and one for each reply of a tool."""
    messages = split_replies(join_turns(messages, changes), changes)
    if messages and is_trained(messages[0]):  # no server renders a prompt for it
        changes["greeting before any message -> not trained"] += 1
        messages[0] = {**messages[0], "weight": 0}
    return messages


def join_turns(messages: list[dict], changes: Counter) -> list[dict]:
    """Return the messages with consecutive ones of the assistant as one: their texts and calls in order."""
    joined: list[dict] = []
    for message in messages:
        if message["role"] in ANSWERING:
            if joined and goes_on(joined[-1], message):
                if message["role"] == "assistant":  # else the format itself writes them one by one
                    changes["consecutive assistant turns joined"] += 1
                message = join_two(joined.pop(), message)
            elif message["role"] != "assistant":
                message = {**message, "role": "assistant"}
        joined.append(message)
    return joined


def goes_on(before: dict, message: dict) -> bool:
    """Return whether an answer goes on with the one before; text after calls does not: their replies are missing."""
    is_late = "tool_calls" in before and "tool_calls" not in message
    texts = (before["content"], message["content"])
    return before["role"] == "assistant" and not is_late and all(isinstance(text, str) for text in texts)


def join_two(first: dict, second: dict) -> dict:
    """Return two messages of the assistant as one; ValueError if their thoughts or weights differ."""
    thoughts = {message.get("reasoning_content", "").strip() for message in (first, second)} - {""}
    if len(thoughts) > 1 or first.get("weight") != second.get("weight"):
        noun = "a turn of calls" if second["role"] == "calls" else "an assistant's turn"
        raise ValueError(f"{noun} follows one with another thought or weight; expected the same")
    weight = {"weight": 0} if "weight" in first else {}
    content = "\n\n".join(text for text in (first["content"], second["content"]) if text.strip())
    calls = [*first.get("tool_calls", []), *second.get("tool_calls", [])]
    thought = {"reasoning_content": thoughts.pop()} if thoughts else {}
    return set_calls({"role": "assistant", "content": "", **thought, **weight}, content, calls)


def split_replies(messages: list[dict], changes: Counter) -> list[dict]:
    """Return the messages with one for each reply of a tool: of joined ones, and of those that a user's turn holds."""
    split: list[dict] = []
    waiting = 0  # calls without a reply
    for message in messages:
        role, pieces = message["role"], None
        if role in ("user", "tool") and split and split[-1]["role"] in ("assistant", "tool"):
            pieces = cut_replies(message["content"], role, waiting)
        if pieces is None:
            waiting = len(message.get("tool_calls", ())) if role == "assistant" else waiting - (role == "tool")
            split.append(message)
            continue
        if role == "user":
            changes["reply of a tool in a user's turn -> tool turn"] += 1
        elif len(pieces) > 1:
            changes["joined replies of tools split"] += 1
        waiting -= len(pieces)
        ids = {"tool_call_id": message["tool_call_id"]} if "tool_call_id" in message and len(pieces) == 1 else {}
        split += [{"role": "tool", **ids, "content": piece} for piece in pieces]
    return split


def cut_replies(content: object, role: str, waiting: int) -> list[str] | None:
    """Return the replies that a text holds between tags; None if it is one as it stands, or something else."""
    if not isinstance(content, str):
        return None
    if role == "user" and waiting and content.startswith("Observation:"):
        return [content.removeprefix("Observation:").strip()]
    text = content.strip()
    inner = text.removeprefix("<tool_response>").removesuffix("</tool_response>")
    pieces = re.split(r"</tool_response>\s*<tool_response>", inner)
    if "tool_response>" not in text or any("tool_response>" in piece for piece in pieces):
        return None
    is_tagged = text.startswith("<tool_response>") and text.endswith("</tool_response>")
    is_joined = role == "tool" and len(pieces) == waiting  # by tags between them alone
    return [*map(str.strip, pieces)] if is_tagged or is_joined else None


def cut_tail(messages: list[dict], changes: Counter) -> list[dict]:
    """Return the messages up to the last of the assistant: nothing after it is trained, or read for what is."""
    answers = [index for index, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    if answers and answers[-1] < len(messages):
        changes["tail without an answer cut"] += 1
        return messages[: answers[-1]]
    return messages


def check_roles(messages: list[dict]) -> list[str]:
    """Return what is wrong with the order of the roles, with replies to calls, or with what there is to train.

    Where calls and replies have ids, each reply answers an open call and none stays open. Where they have none, one
    reply may stand for several parallel calls. A user may speak before the replies are answered.
    """
    state, waiting, by_id = "start", [], True  # waiting: ids (or None) of the calls without a reply
    for index, message in enumerate(messages, start=1):
        role, allowed = message["role"], NEXT_ROLES[state]
        if state == "tool" and (by_id or not waiting):
            allowed = ("tool",) if waiting else ("assistant",)
        if role not in allowed and not (role == "user" and state == "tool" and not (by_id and waiting)):
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
    if all(message["role"] != "assistant" for message in messages):
        return ["the last message must be the assistant's: it is what is trained"]
    if len(messages) == 1:
        return ["message 1 answers nothing; expected a message of the system or user before it"]
    if not any(map(is_trained, messages)):
        return ["no turn is trained; every weight is 0"]
    return []


def check_text(messages: list[dict]) -> list[str]:
    """Return the problems of contents: one that is not text, or is empty, or holds a special token."""
    problems = []
    for index, message in enumerate(messages, start=1):
        name, content = f"message {index} ({message['role']}):", message["content"]
        if not isinstance(content, str):
            problems.append(f"{name} content must be text, got {shorten(content)}")
            continue
        if not content.strip() and message["role"] != "tool" and not message.get("tool_calls"):
            problems.append(f"{name} content is empty")
        calls = to_json(message["tool_calls"]) if "tool_calls" in message else ""
        for text in (content, message.get("reasoning_content", ""), calls):
            if problem := find_forbidden(text):
                problems.append(f"{name} {problem}")
    return problems


def check_calls(messages: list[dict], validators: dict) -> tuple[list[str], list[str]]:
    """Return the problems of trained calls: (of tools that the row does not have, of those that a schema refuses)."""
    calls = [(call["function"], is_trained(message)) for message in messages for call in message.get("tool_calls", [])]
    unknown, refused = [], []
    for index, (call, is_supervised) in enumerate(calls, start=1):
        name = call["name"]
        if is_supervised and not validators:
            return [f'the row calls {shorten(name)} and has no tools; give them with "tools" or --tools_path'], []
        if is_supervised:
            problems = refused if name in validators else unknown
            found = check_call(name, call["arguments"], validators)
            problems += [f"call {index} {shorten(name)}: {problem}" for problem in found]
    return unknown, refused
