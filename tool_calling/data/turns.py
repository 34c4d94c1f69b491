"""Turns of a row, in any of the shapes that people and APIs write, to messages as a chat template reads them."""

import re
from collections import Counter, defaultdict

from tool_calling.data.calls import CALL_KEYS, ID_KEYS, REPLY_ID_KEYS, are_same_calls, first_of, get_calls, to_tool_call
from tool_calling.data.known_tools import ARGUMENT_KEYS, NAME_KEYS
from tool_calling.data.literals import as_list, to_json, unpack
from tool_calling.terminal import shorten

# fmt: off
ROLES = {  # a role as other formats name it: OpenAI's; "calls" is a turn that holds nothing but calls
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "ai": "assistant", "bot": "assistant", "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool", "tool_response": "tool", "function": "tool", "function-response": "tool",
    "function_response": "tool", "tool_result": "tool", "tool_results": "tool",
    "environment": "tool", "ipython": "tool",
    "calls": "calls", "function_call": "calls", "function-call": "calls", "tool_call": "calls",
}
HERMES_MARKS = ("<tool_call>", "<TOOLCALL>")  # of calls in a text
ANSWERING = ("assistant", "calls", "item")  # roles of an answer, or of a part of one
PARTS = {  # type of a part of a message: what it is, and the keys that hold its text or its reply
    "text": ("text", "text"), "input_text": ("text", "text"), "output_text": ("text", "text"),
    "refusal": ("text", "refusal"),
    "thinking": ("thought", "thinking"), "reasoning": ("thought", "text", "reasoning", "content", "summary"),
    "reasoning_text": ("thought", "text"), "summary_text": ("thought", "text"),
    "redacted_thinking": ("nothing",), "step-start": ("step",),
    "tool_use": ("call",), "tool-call": ("call",), "function_call": ("call",), "functionCall": ("call",),
    "tool-invocation": ("call", "result", "output", "errorText"),  # which may hold its reply
    "dynamic-tool": ("call", "result", "output", "errorText"),
    "tool_result": ("reply", "content"), "tool-result": ("reply", "result", "output"),
    "function_call_output": ("reply", "output"), "functionResponse": ("reply", "response", "content"),
}
KEYED_PARTS = {  # a key of a part, as of Gemini's or Bedrock's, which have no type: the type of what it holds
    "functionCall": "functionCall", "function_call": "functionCall", "toolUse": "functionCall",
    "functionResponse": "functionResponse", "function_response": "functionResponse", "toolResult": "functionResponse",
    "toolInvocation": "tool-invocation",  # Vercel's
}
# fmt: on
TOOL_KEYS = ("tools", "functions", "tool_defs", "available_tools", "tool_definitions", "function_definitions")
TOOL_KEYS += ("tool_list", "function_list", "tool_schemas", "toolDefinitions", "availableTools", "tools_json")
TOOL_KEYS += ("functionDeclarations", "function_declarations")
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
# Whether a turn is trained, as different trainers say it: true or 1 if it is; or if it is not.
LOSS_KEYS = {"weight", "loss", "train", "trainable", "training", "loss_mask", "train_mask", "loss_weight", "loss_scale"}
LOSS_KEYS |= {"train_on_turn", "calculate_loss", "compute_loss", "is_trained", "train_detail", "supervised"}
MASKED_KEYS = {"masked", "ignore_loss", "no_loss", "mask_loss"}
UNCLEAR_KEYS = {"mask", "masks"}  # 1 means trained to some, and left out to others
FLAG_KEYS = LOSS_KEYS | MASKED_KEYS | UNCLEAR_KEYS
ROW_FLAGS = {"weights": "weight", "loss_weights": "weight", "train_masks": "train_mask", "loss_masks": "loss_mask"}
ROW_FLAGS |= {key: key for key in FLAG_KEYS}
TURN_KEYS = {"role", "from", "content", "value", "parts", "name", "type", "toolInvocations", *FLAG_KEYS, *ID_KEYS}
TURN_KEYS |= {*CALL_KEYS, *THOUGHT_KEYS, "lc", "kwargs", "data", "additional_kwargs", "status"}
TURN_KEYS |= {"arguments", "output", "summary", *TOOL_KEYS}
SHAREGPT_KEYS = ("conversations", "conversation", "dialogue", "dialog", "turns", "trajectory", "traj")
TALK_KEYS = ("messages", *SHAREGPT_KEYS)  # of a row, for all of its turns
TURN_LISTS = (*TALK_KEYS, "prompt", "completion", "input", "output", "contents")
TEXT_PART = {"type", "text", "annotations", "cache_control", "citations", "logprobs", "thought", "thoughtSignature"}
TEXT_PART |= {"state", "index", "id", "providerMetadata", "providerOptions", "extras"}
WRAPPED_REPLIES = ("text", "json", "content", "error-text", "error-json")  # of Vercel's SDK: {"type", "value"}
MEDIA = re.compile(r"(?:input_)?(?:image|audio|video|file|document|media|resource)(?:[_-]\w+)?")
MEDIA_KEYS = set("source data file file_id url image_url image audio input_audio resource".split())
SYSTEM_TEXTS = ("system_prompt", "system_message")  # read where the turns have none
SYSTEM_KEYS = ("system", "instructions", "systemInstruction", "system_instruction", *SYSTEM_TEXTS)  # of a row
LATE_TEXT = "text after a call -> before it"  # where the chat template has its place
KIND_NAMES = {list: "a list of objects", dict: "an object", str: "text"}


def to_role(role: object) -> object:
    """Return a role as OpenAI names it; an unknown one stays as it is."""
    return ROLES.get(role) or ROLES.get(role.lower(), role) if isinstance(role, str) else role


def take(row: dict, key: str, kind: type):
    """Return row[key], a list also out of JSON text and its objects without nulls; else a ValueError."""
    if key not in row:
        raise ValueError(f'"{key}" is missing; expected {KIND_NAMES[kind]}')
    value = unpack(row[key], f'"{key}" is') if kind is list else row[key]
    if not isinstance(value, kind) or (kind is list and not all(isinstance(item, dict) for item in value)):
        raise ValueError(f'"{key}" must be {KIND_NAMES[kind]}, got {shorten(value)}')
    return [{k: v for k, v in item.items() if v is not None} for item in value] if kind is list else value


def peek(turn: dict) -> tuple[object, object]:
    """Return (role, content) of a turn as its row writes them."""
    return turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))


def is_text_part(part: object) -> bool:
    """Return whether a part of a message's content holds nothing but text."""
    if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("thought"):
        return False
    kind = part.get("type") or "text"
    is_text = isinstance(kind, str) and PARTS.get(kind) == ("text", "text")
    return is_text and all(key in TEXT_PART or value is None for key, value in part.items())


def join_parts(texts: list[str], role: object) -> str:
    """Return the texts of a turn as one: of a prompt on lines of their own, as vLLM does, of an answer as written."""
    return ("" if role in ANSWERING else "\n").join(texts)


def join_text(content: object, role: object = "user") -> object:
    """Return content as text where it is text, nothing, or a list of text parts; other content stays as it is."""
    if content and isinstance(content, list) and all(map(is_text_part, content)):
        return join_parts([part["text"] for part in content], role)
    return "" if content is None else content


def is_media(part: object) -> bool:
    """Return whether a part holds an image, a file or the like; what a tool answers may have a `type` of its own."""
    kind = part.get("type") if isinstance(part, dict) and not MEDIA_KEYS.isdisjoint(part) else None
    return isinstance(kind, str) and bool(MEDIA.fullmatch(kind))


def to_reply(found: dict, value: object, changes: Counter) -> dict:
    """Return the message of a tool that replied `value`, with the id in `found` of the call that it answers."""
    if isinstance(value, dict) and value.keys() == {"type", "value"} and value["type"] in WRAPPED_REPLIES:
        value = value["value"]
    content = join_text(value)
    if not isinstance(content, str) and not any(map(is_media, as_list(content))):
        changes["reply of a tool -> JSON text"] += 1
        content = to_json(content)
    call_id = first_of(found, REPLY_ID_KEYS)
    call_id = {"tool_call_id": call_id} if isinstance(call_id, str) and call_id else {}
    return {"role": "tool", **call_id, "content": content}


def name_part(part: dict) -> tuple[object, dict]:
    """Return (type, part) of a part of a message, whose type may be told by a key, or may be the name of a tool."""
    for key, kind in KEYED_PARTS.items():
        if isinstance(part.get(key), dict):
            return kind, {"call_id": part[key].get("id"), **part[key]}
    kind = part.get("type", "tool-invocation" if "state" in part else None)
    if part.get("thought") is True:
        kind = "reasoning"
    if isinstance(kind, str) and kind not in PARTS and kind.startswith("tool-"):
        return "tool-invocation", {"toolName": kind.removeprefix("tool-"), **part}
    return kind, part


def read_part(part: object, changes: Counter) -> list[tuple[str, object]] | None:
    """Return what a part of a message says, as (text | thought | call | reply | step, value); None if it is unknown."""
    if is_text_part(part):
        return [("text", part["text"])]
    if not isinstance(part, dict):
        return None
    kind, part = name_part({key: value for key, value in part.items() if value is not None})
    if not isinstance(kind, str) or kind not in PARTS:
        return None
    what, *keys = PARTS[kind]
    if what == "thought":
        value = next(filter(None, map(part.get, keys)), "")
        if isinstance(value, list) and all(isinstance(text, dict) for text in value):  # as of the Responses API
            value = [text.get("text") for text in value]
            value = "\n\n".join(value) if all(isinstance(text, str) for text in value) else None
        return [(what, value)] if isinstance(value, str) else None
    value = first_of(part, keys)
    if what == "text":  # a refusal; other text with more keys is not known
        return [(what, value)] if isinstance(value, str) and part.keys() <= {"type", *keys} else None
    reply = [("reply", to_reply(part, value, changes))] if what == "reply" or value is not None else []
    if what == "reply":
        return reply
    if kind != "functionCall":
        arguments = {key: value for key, value in part.items() if key in ARGUMENT_KEYS}
        part = {"id": first_of(part, ID_KEYS), "name": first_of(part, NAME_KEYS), **arguments}
    return [(what, part), *reply]


def split_thought(message: dict, content: object) -> tuple[str, object]:
    """Return (thought, content) of an assistant message: the thought from its own key or from a leading think block."""
    text = content.lstrip() if isinstance(content, str) else ""
    thoughts = [join_text(message[key], "assistant") for key in THOUGHT_KEYS if message.get(key)]
    if wrong := [thought for thought in thoughts if not isinstance(thought, str)]:
        raise ValueError(f"reasoning must be text, got {shorten(wrong[0])}")
    if text.startswith("<think>") and "</think>" in text:
        inside, _, content = text.removeprefix("<think>").partition("</think>")
        thoughts.append(inside.strip())
        content = content.lstrip()
    thoughts = [thought for thought in thoughts if thought.strip()]
    if len({*map(str.strip, thoughts)}) > 1:
        raise ValueError("a message has two different thoughts, in its reasoning or in its <think> block; expected one")
    return thoughts[0] if thoughts else "", content


def read_weight(turn: dict, role: object, changes: Counter) -> dict:
    """Return {"weight": 0} for an assistant's turn that is not to be trained, else {}; ValueError if unclear."""
    if FLAG_KEYS.isdisjoint(turn):
        return {}
    flags = {key: turn[key] for key in sorted(FLAG_KEYS & turn.keys()) if turn[key] is not None}
    for key, value in flags.items():
        if key in UNCLEAR_KEYS:
            raise ValueError(f'"{key}" of a turn may mean that it is trained or that it is not; rename it to "weight"')
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"{key} must be 0 or 1, got {shorten(value)}")
    trained = {bool(value) is (key in LOSS_KEYS) for key, value in flags.items()}
    if len(trained) > 1:
        raise ValueError(f"{' and '.join(flags)} of a turn do not agree; expected one of them")
    if role not in ANSWERING and True in trained:
        changes[f"{role} turn marked as trained -> not trained"] += 1
    return {"weight": 0} if role in ANSWERING and False in trained else {}


def unwrap(turn: dict) -> tuple[object, dict]:
    """Return (role, turn) of a turn in LangChain's shapes, {"type": "ai", "data": {...}}, or any other; "item" is the
    role of an item of the Responses API that is part of an assistant's turn. Loss flags stand around it."""
    kind = turn.get("type")
    flags = {} if FLAG_KEYS.isdisjoint(turn) else {key: turn[key] for key in turn if key in FLAG_KEYS}
    if isinstance(turn.get("kwargs"), dict) and isinstance(turn.get("id"), list) and turn["id"]:
        kind, turn = str(turn["id"][-1]).removesuffix("Chunk").removesuffix("Message"), turn["kwargs"]
    elif isinstance(turn.get("data"), dict):
        turn = turn["data"]
    role = peek(turn)[0]
    if role is None and isinstance(kind, str) and kind in PARTS:
        return "tool" if PARTS[kind][0] == "reply" else "item", {"content": [turn], **flags}
    role = to_role(kind if role is None else role)
    return ("item" if role == "assistant" and kind == "message" else role), {**turn, **flags} if flags else turn


def read_turn(turn: dict, changes: Counter) -> list[dict]:
    """Return the messages of a turn, which may hold calls and replies; the content of "calls" is yet to be read."""
    role, turn = unwrap(turn)
    content = peek(turn)[1]
    parts = next((found for found in (content, turn.get("parts")) if isinstance(found, list) and found), [])
    made_calls = turn.get("toolInvocations")
    if isinstance(made_calls, list) and made_calls and not turn.get("parts"):
        said = parts or ([{"type": "text", "text": content}] if content else [])
        answered = any(isinstance(call, dict) and "result" in call for call in made_calls)
        parts = [*made_calls, *said] if answered else [*said, *made_calls]  # the text is about the results
    if not parts or all(map(is_text_part, parts)):
        return [make_message(role, turn, join_text(parts or content, role), [], changes)]
    read = [read_part(part, changes) for part in parts]
    if None in read:
        return [make_message(role, turn, parts, [], changes)]
    groups: list[dict] = [defaultdict(list)]
    for what, value in (pair for pairs in read for pair in pairs):
        if what in ("text", "thought", "step") and groups[-1]["reply"]:
            groups.append(defaultdict(list))  # what follows a reply is another message
        if what == "text" and value.strip() and groups[-1]["call"]:
            changes[LATE_TEXT] += 1
        groups[-1][what].append(value)
    made: list[dict] = []
    for group in groups:
        if group["text"] or group["thought"] or group["call"] or not (made or group["reply"]):
            said = {**turn, "reasoning": "\n\n".join(group["thought"])} if group["thought"] else turn
            made.append(make_message(role, said, join_parts(group["text"], role), group["call"], changes))
        made += group["reply"]
    return made


def make_message(role: object, turn: dict, content: object, calls: list, changes: Counter) -> dict:
    """Return one message of a turn, whose content and calls in its parts have been read."""
    if role == "tool":
        return to_reply(turn, content, changes)
    weight = read_weight(turn, role, changes)
    if role not in ANSWERING:
        return {"role": role, "content": content}
    (thought, content), given = split_thought(turn, content), get_calls(turn)
    more = turn.get("additional_kwargs")
    if isinstance(more, dict):
        given, thought = given or get_calls(more), thought or split_thought(more, "")[0]
    if isinstance(given, str):  # calls that are no JSON
        if content:
            raise ValueError("a message holds text and calls as text; expected the calls in the text")
        role, content, given = "calls", given, []
    if role == "calls" and given and content:
        raise ValueError("a turn of calls holds calls in content and in another key; expected one of them")
    if role == "calls" and not isinstance(content, str):
        given, content = given or as_list(content), ""
    if calls or given:
        calls, given = ([to_tool_call(call, changes, not weight) for call in found] for found in (calls, given))
    if calls and given and not are_same_calls(calls, given):
        raise ValueError("a message holds calls in its content and in another key; expected one of them")
    thought = {"reasoning_content": thought} if thought else {}
    return set_calls({"role": role, **thought, **weight}, content, given or calls)


def set_calls(message: dict, content: object, calls: list) -> dict:
    """Return an assistant's message with this content and these calls; its weight stands last."""
    made = {"role": message["role"], "content": content}
    if "reasoning_content" in message:
        made["reasoning_content"] = message["reasoning_content"]
    if calls:
        made["tool_calls"] = calls
    if "weight" in message:
        made["weight"] = 0
    return made


def spread_flags(row: dict, turns: list[dict]) -> list[dict]:
    """Return the turns with the row's own loss flags: one for all, one for each turn, or one for each answer."""
    for key in () if ROW_FLAGS.keys().isdisjoint(row) else sorted(ROW_FLAGS.keys() & row.keys()):
        value, name = row[key], ROW_FLAGS[key]
        if key in UNCLEAR_KEYS and to_role(value) == "assistant":
            raise ValueError(f'"{key}" names the assistant: no turn would be trained')  # NeMo names who is left out
        if value is None or isinstance(value, str | dict):
            continue
        answers = [index for index, turn in enumerate(turns) if unwrap(turn)[0] in ANSWERING]
        values = value if isinstance(value, list) else [value] * len(answers)
        own = range(any(map(row.get, SYSTEM_KEYS)) and len(values) == len(turns) - 1, len(turns))
        places = own if len(values) == len(own) else answers
        if len(values) != len(places):
            counts = f"{len(turns)} messages or {len(answers)} answers"
            raise ValueError(f'"{key}" has {len(values)} entries; expected one for each of {counts}')
        turns = [*turns]
        for index, flag in zip(places, values):
            if turns[index].get(name) not in (None, flag):
                raise ValueError(f'"{key}" of the row and "{name}" of a turn do not agree; expected one of them')
            turns[index] = {**turns[index], name: flag}
    return turns


def to_messages(turns: list[dict], changes: Counter) -> list[dict]:
    """Return the messages of a conversation, one or several for each turn; join_turns makes whole answers of them."""
    messages = [message for turn in turns for message in read_turn(turn, changes)]
    kept = [message for message in messages if message["role"] != "system" or str(message["content"]).strip()]
    changes.update(["empty system text dropped"] * (len(messages) - len(kept)))
    return kept


def list_unread(row: dict, keys: set[str]) -> list[tuple[str, str]]:
    """Return (place, key) of what holds something and is not read, in a row of which `keys` are read and its turns."""
    flags = [key for key in row if key in ROW_FLAGS and not isinstance(row[key], str | dict)]
    places = [("row", row, {*keys, "tools", "functions", "system", *flags})]
    for key in (key for key in TURN_LISTS if key in keys):
        value = row.get(key)
        turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
        turns += [turn.get(inner) for turn in turns for inner in ("data", "kwargs")]  # LangChain's
        places += [("turn", turn, TURN_KEYS) for turn in turns] or [(key, value, TURN_KEYS)]
    return [
        (place, key)
        for place, holder, known in places
        if isinstance(holder, dict)
        for key, value in holder.items()
        if key not in known and value not in (None, "", [], {})
    ]


def add_system(row: dict, turns: list[dict]) -> list[dict]:
    """Return the turns with the row's `system` in front, if it has one that they do not begin with."""
    system, (role, content) = row.get("system"), peek(turns[0] if turns else {})
    said = to_role(role) == "system" and join_text(content) == join_text(system)
    return [{"role": "system", "content": system}, *turns] if system and not said else turns
