"""Structured calls of a turn, in any of the shapes that people and APIs write, as OpenAI writes them."""

from collections import Counter

from tool_calling.data.known_tools import ARGUMENT_KEYS, NAME_KEYS
from tool_calling.data.literals import unpack
from tool_calling.terminal import shorten

CALL_KEYS = ("tool_calls", "function_calls", "function_call")
NO_CALL = ({"name": None, "arguments": None}, {"name": "", "arguments": ""})  # of a table, or of a stream
REPLY_ID_KEYS = ("call_id", "tool_call_id", "tool_use_id", "toolCallId", "toolUseId")
ID_KEYS = (*REPLY_ID_KEYS, "id")  # of a call; in the Responses API the id is that of the item
CALL_MEMBERS = {*ID_KEYS, *NAME_KEYS, *ARGUMENT_KEYS, "type", "index", "function"}


def first_of(found: dict, keys) -> object:
    """Return the value of the first of these keys that is there and not null."""
    return next((found[key] for key in keys if found.get(key) is not None), None)


def to_tool_call(call: object, changes: Counter, trained: bool = True) -> dict:
    """Return a call in the OpenAI shape; ValueError if its arguments are no object, unless it is not trained."""
    inner = call["function"] if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
    name = first_of(inner, NAME_KEYS) if isinstance(inner, dict) else None
    if not isinstance(name, str):
        raise ValueError(f'a call must be {{"name": "...", "arguments": {{...}}}}, got {shorten(inner)}')
    given = {key: value for key, value in {**call, **inner}.items() if key in ARGUMENT_KEYS and value is not None}
    arguments = first_of(given, ARGUMENT_KEYS)
    if others := [key for key, value in given.items() if value and value != arguments]:
        raise ValueError(f'call {shorten(name)}: has other arguments in "{others[0]}"; expected one object of them')
    strays = [key for key in inner if key not in CALL_MEMBERS and inner[key] not in (None, "", [], {})]
    if strays and arguments is None and trained:
        raise ValueError(f'call {shorten(name)}: has "{strays[0]}" and no arguments; expected them in "arguments"')
    changes.update(f"{key[:40]} of a call -> dropped" for key in strays)
    if arguments in (None, [], "null", "[]") or (isinstance(arguments, str) and not arguments.strip()):
        changes["call without arguments -> {}"] += 1
        arguments = {}
    try:
        arguments = unpack(arguments, "arguments are")
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments must be an object, got {shorten(arguments)}")
    except ValueError as error:
        if trained or not isinstance(arguments, str):
            raise ValueError(f"call {shorten(name)}: {error}") from None
    call_id = first_of(call, ID_KEYS)
    call_id = {"id": call_id} if isinstance(call_id, str) and call_id else {}
    return {**call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def get_calls(message: dict) -> list | str:
    """Return the calls under the one of CALL_KEYS that a message has, [] if none; as text if they are no JSON."""
    given = [key for key in CALL_KEYS if message.get(key) and message[key] not in NO_CALL]
    if not given:
        return []
    if len(given) > 1:
        raise ValueError(f"a message holds {given[0]} and {given[1]}; expected one of them")
    calls = unpack(message[given[0]], f"{given[0]} is")
    calls = [calls] if given == ["function_call"] and isinstance(calls, dict) else calls
    if not isinstance(calls, list | str):
        raise ValueError(f"{given[0]} must be a list, got {shorten(calls)}")
    return calls


def are_same_calls(calls: list[dict], others: list[dict]) -> bool:
    """Return whether two lists of calls are the same but for their ids."""
    return [call["function"] for call in calls] == [call["function"] for call in others]
