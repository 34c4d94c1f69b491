"""Rows of any known format to conversations: FORMATS pairs containers of turns with syntaxes of calls."""

from collections import Counter
from typing import NamedTuple

from tool_calling.data.containers import ANSWER_KEYS, CONTAINERS, unpack_turns
from tool_calling.data.declarations import NO_TOOLS, find_beside, is_declaring, spread_read, take_declarations
from tool_calling.data.literals import as_list
from tool_calling.data.syntaxes import BRACKET_CALLS
from tool_calling.data.turns import (
    HERMES_MARKS,
    SYSTEM_TEXTS,
    TALK_KEYS,
    TOOL_KEYS,
    list_unread,
    peek,
    spread_flags,
    to_messages,
    unwrap,
)
from tool_calling.terminal import shorten


class Format(NamedTuple):
    """The containers that a format may come in, and the syntax of calls in its texts (None: any)."""

    containers: tuple[str, ...]
    syntax: str | None = None


FORMATS = {
    "native": Format(("native",)),
    "swift": Format(("messages",)),
    "hermes": Format(("messages", "conversations"), "hermes"),
    "toolace": Format(("messages", "conversations"), "toolace"),
    "mobile-actions": Format(("messages",)),
    "openai": Format(("messages",)),
    "sharegpt-tools": Format(("conversations", "messages")),
    "sharegpt": Format(("conversations", "messages")),
    "xlam": Format(("xlam",)),
    "glaive": Format(("glaive",), "glaive"),
    "prompt-completion": Format(("prompt-completion",)),
    "responses": Format(("responses",)),
    "gemini": Format(("gemini",)),
    "alpaca": Format(("alpaca",)),
}
NULL_TEXTS = ("null", "None", "nan")  # as tables write that there are no tools
SHAPES = (
    '"messages"; "conversations"; "input" and "output"; "query" and "answers"; "chat"; "contents"; '
    '"question" and "answer"; "prompt" and "completion"'
)


class Conversation(NamedTuple):
    """A row as messages whose texts may still hold calls, with its tools as they are or None."""

    format: str
    messages: list[dict]
    tools: object
    unread: list[tuple[str, str]]  # (place, key) of what holds something and is not read
    changes: Counter  # what was normalised


def choose_container(row: dict, name: str) -> str:
    """Return the container of a row: the one that fits, among those of the named format."""
    talks = [key for key in row if key in TALK_KEYS and row[key] and isinstance(row[key], list)]
    if name in ("auto", "hermes", "toolace") and len(talks) > 1 and not isinstance(row.get("output"), dict):
        raise ValueError(f'the row holds "{talks[0]}" and "{talks[1]}"; expected one of them')
    if name != "auto":
        names = FORMATS[name].containers
        return next((found for found in names if CONTAINERS[found].fits(row)), names[0])
    found = next((found for found, container in CONTAINERS.items() if container.fits(row)), None)
    if found is None:
        inside = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        hint = f'; if its "{inside[0]}" are the rows, give that list alone' if inside else ""
        raise ValueError(f"no known format; expected an object with {SHAPES}; got {shorten(row)}{hint}")
    return found


def add_beside(row: dict, turns: list[dict], read: set[str], changes: Counter) -> tuple[list[dict], set[str]]:
    """Return (turns with the system text and the answer that stand beside them, the keys of these)."""
    keys: set[str] = set()
    system = next((key for key in SYSTEM_TEXTS if isinstance(row.get(key), str) and row[key]), None)
    if system and all(unwrap(turn)[0] != "system" for turn in turns):
        turns, keys = [{"role": "system", "content": row[system]}, *turns], {system}
    answer = next((key for key in ANSWER_KEYS if key not in read and row.get(key)), None)
    if answer and turns and unwrap(turns[-1])[0] in ("user", "tool"):
        said = [{"role": "assistant", "content": row[answer]}] if isinstance(row[answer], str) else as_list(row[answer])
        if all(isinstance(turn, dict) and unwrap(turn)[0] == "assistant" for turn in said):
            turns, keys = [*turns, *said], {*keys, answer}
            changes[f"{answer} beside the turns -> last turn"] += 1
    return turns, keys


def name_talk(row: dict, roles: set, messages: list[dict], declared: str, named: bool) -> str:
    """Return the format of a row of `messages` or `conversations`, by the roles as the row names them, by how a system
    text declares tools ("tags", "list" or ""), and by whether tools are named beside the turns."""
    texts = [(message["role"], message["content"]) for message in messages if isinstance(message["content"], str)]
    is_openai = "messages" in row
    if is_openai and roles & {"tool_call", "tool_response"}:
        return "swift"
    if declared == "tags" or any(mark in text for _, text in texts for mark in HERMES_MARKS):
        return "hermes"
    in_brackets = any(role == "assistant" and BRACKET_CALLS.fullmatch(text) for role, text in texts if not named)
    if declared == "list" or in_brackets:
        return "toolace"
    if is_openai:
        tools = row.get("tools") if isinstance(row.get("tools"), list) else []
        untyped = [isinstance(tool, dict) and "function" in tool and "type" not in tool for tool in tools]
        return "mobile-actions" if untyped and all(untyped) else "openai"
    has_calls = any(message["role"] in ("calls", "tool") for message in messages)
    return "sharegpt-tools" if named or has_calls else "sharegpt"


def convert(row: object, name: str = "auto") -> Conversation:
    """Return the conversation of a row of the named format, or of the one that it is recognised as; or a ValueError."""
    if isinstance(row, ValueError):  # a line that was not JSON
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, got {shorten(row)}")
    nulls = {key for key, value in row.items() if value is None or (key in TOOL_KEYS and value in NULL_TEXTS)}
    row = unpack_turns({key: value for key, value in row.items() if key not in nulls})  # a table has keys of others
    container_name, changes = choose_container(row, name), Counter()
    container = CONTAINERS[container_name]
    turns, more = add_beside(row, container.read(row), container.keys, changes)
    turns = spread_flags(row, turns)
    beside, keys = find_beside(row, turns, container.keys)
    messages = to_messages([turn for turn in turns if not is_declaring(turn)], changes)
    messages, declared, how = take_declarations(messages, beside, changes)
    tools = declared if beside in NO_TOOLS and declared else beside
    unread = list_unread(spread_read(row, keys), container.keys | keys | more)
    if name == "auto" and container_name in ("messages", "conversations"):
        roles = {role for role, _ in map(peek, turns) if isinstance(role, str)}
        name = name_talk(row, roles, messages, how, beside is not None)
    return Conversation(container_name if name == "auto" else name, messages, tools, unread, changes)
