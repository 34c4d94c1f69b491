"""Turns of a row, in any of the shapes that people and APIs write, to messages as a chat template reads them."""

import re
from collections import Counter

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
PARTS = {  # type of a part of a message: what it is, and the keys that hold its text, or the reply or call and its id
    "text": ("text", "text"), "input_text": ("text", "text"), "output_text": ("text", "text"),
    "refusal": ("text", "refusal"),
    "thinking": ("thought", "thinking"), "reasoning": ("thought", "text", "reasoning", "content", "summary"),
    "reasoning_text": ("thought", "text"), "summary_text": ("thought", "text"),
    "redacted_thinking": ("nothing",), "step-start": ("step",),
    "tool_use": ("call", "input"), "tool-call": ("call", "args", "input"), "function_call": ("call", "arguments"),
    "tool_result": ("reply", "content"), "tool-result": ("reply", "result", "output"),
    "function_call_output": ("reply", "output"), "tool-invocation": ("both", "args", "input"),
}
# fmt: on
TOOL_KEYS = ("tools", "functions", "tool_defs", "available_tools", "tool_definitions", "function_definitions")
TOOL_KEYS += ("tool_list", "function_list", "tool_schemas", "toolDefinitions", "availableTools", "tools_json")
TOOL_KEYS += ("functionDeclarations", "function_declarations")
CALL_KEYS = ("tool_calls", "function_calls", "function_call")
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
CALL_SET, THOUGHT_SET = {*CALL_KEYS}, {*THOUGHT_KEYS}
NO_CALL = ({"name": None, "arguments": None}, {"name": "", "arguments": ""})  # of a table, or of a stream
ID_KEYS = ("id", "call_id", "tool_call_id", "tool_use_id", "toolCallId", "toolUseId")
NAME_KEYS = ("name", "toolName", "tool_name")
ARGUMENT_KEYS = ("arguments", "args", "input", "parameters", "params", "kwargs", "tool_input", "tool_args")
CALL_MEMBERS = {*ID_KEYS, *NAME_KEYS, *ARGUMENT_KEYS, "type", "index", "function"}
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
TALK_KEYS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "trajectory", "traj")
TALK_KEYS += ("prompt", "completion", "input", "output", "contents")  # of a row, for a list of turns
TEXT_PART = {"type", "text", "annotations", "cache_control", "citations", "logprobs", "thought", "thoughtSignature"}
TEXT_PART |= {"state", "index", "id", "providerMetadata", "providerOptions", "extras"}
WRAPPED_REPLIES = ("text", "json", "content", "error-text", "error-json")  # of Vercel's SDK: {"type", "value"}
MEDIA = re.compile(r"(?:input_)?(?:image|audio|video|file|document|media|resource)(?:[_-]\w+)?")
MEDIA_KEYS = set("source data file file_id url image_url image audio input_audio resource".split())
SYSTEM_KEYS = ("system", "instructions", "systemInstruction", "system_instruction")  # of a row
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


def first_of(found: dict, keys) -> object:
    """Return the value of the first of these keys that is there and not null."""
    return next((found[key] for key in keys if found.get(key) is not None), None)


def to_tool_call(call: object, changes: Counter, trained: bool = True) -> dict:
    """Return a call in the OpenAI shape with its arguments as a dict; ValueError says what is wrong with it.

    Missing arguments are none. In a turn that is not trained, those that are no JSON object stay the text they are.
    """
    inner = call.get("function", call) if isinstance(call, dict) else call
    inner = {**call, "name": inner} if isinstance(inner, str) and isinstance(call, dict) else inner
    name = first_of(inner, NAME_KEYS) if isinstance(inner, dict) else None
    if not isinstance(name, str):
        raise ValueError(f'a call must be {{"name": "...", "arguments": {{...}}}}, got {shorten(inner)}')
    arguments = first_of({**call, **inner}, ARGUMENT_KEYS)
    strays = [key for key in inner if key not in CALL_MEMBERS and inner[key] not in (None, "", [], {})]
    if strays and arguments is None:
        raise ValueError(f'call {shorten(name)}: has "{strays[0]}" and no arguments; expected them in "arguments"')
    changes.update(f"{key[:40]} of a call -> dropped" for key in strays)
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
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


def is_text_part(part: object) -> bool:
    """Return whether a part of a message's content holds nothing but text."""
    is_text = isinstance(part, dict) and isinstance(part.get("text"), str) and not part.get("thought")
    kind = part.get("type") or "text" if is_text else None
    is_text = isinstance(kind, str) and PARTS.get(kind, "")[:2] == ("text", "text")
    return is_text and all(key in TEXT_PART or value is None for key, value in part.items())


def join_text(content: object) -> object:
    """Return content as text where it is text, nothing, or a list of text parts; other content stays as it is."""
    if content and isinstance(content, list) and all(map(is_text_part, content)):
        return "".join(part["text"] for part in content)
    return "" if content is None else content


def is_media(part: object) -> bool:
    """Return whether a part holds an image, a file or the like; what a tool answers may have a `type` of its own."""
    kind = part.get("type") if isinstance(part, dict) and not MEDIA_KEYS.isdisjoint(part) else None
    return isinstance(kind, str) and bool(MEDIA.fullmatch(kind))


def to_reply(found: object, changes: Counter) -> object:
    """Return what a tool answered as text: JSON stays JSON; an image or another part without text stays as it is."""
    if isinstance(found, dict) and found.keys() == {"type", "value"} and found["type"] in WRAPPED_REPLIES:
        found = found["value"]
    text = join_text(found)
    if isinstance(text, str) or any(map(is_media, as_list(text))):
        return text
    changes["reply of a tool -> JSON text"] += 1
    return to_json(text)


def to_reply_message(found: dict, value: object, changes: Counter) -> dict:
    """Return the message of a tool, with the id of the call that it answers if `found` has one."""
    call_id = first_of(found, ID_KEYS[1:])
    replied = {"tool_call_id": call_id} if isinstance(call_id, str) and call_id else {}
    return {"role": "tool", **replied, "content": to_reply(value, changes)}


def read_part(part: object, changes: Counter) -> list[tuple[str, object]] | None:
    """Return what a part of a message says, as (text | thought | call | reply | step, value); None if it is unknown."""
    if is_text_part(part):
        return [("text", part["text"])]
    if not isinstance(part, dict):
        return None
    part = {key: value for key, value in part.items() if value is not None}
    if isinstance(call := first_of(part, ("functionCall", "function_call", "toolUse")), dict):  # Gemini, Bedrock
        return [("call", call)]
    if isinstance(reply := first_of(part, ("functionResponse", "function_response", "toolResult")), dict):
        replied = {"call_id": first_of(reply, ("id", "toolUseId"))}
        return [("reply", to_reply_message(replied, first_of(reply, ("response", "content")), changes))]
    kind = part.get("type", "tool-invocation" if "state" in part else None)
    if isinstance(part.get("toolInvocation"), dict):
        part = part["toolInvocation"]
    if isinstance(kind, str) and (kind == "dynamic-tool" or (kind not in PARTS and kind.startswith("tool-"))):
        kind, part = "tool-invocation", {"toolName": kind.removeprefix("tool-"), **part}
    if part.get("thought") is True and isinstance(part.get("text"), str):
        return [("thought", part["text"])]
    what, *keys = PARTS.get(kind) or (None,) if isinstance(kind, str) else (None,)
    value = first_of(part, keys)
    if what in ("text", "thought"):
        value = join_thought(next(filter(None, map(part.get, keys)), "")) if what == "thought" else value
        is_whole = what == "thought" or part.keys() <= {"type", *keys}
        return [(what, value)] if isinstance(value, str) and is_whole else None
    if what == "reply":
        return [("reply", to_reply_message(part, value, changes))]
    if what in ("call", "both"):
        call_id = first_of(part, ("call_id", "toolCallId", "id"))
        call = {"id": call_id, "name": first_of(part, NAME_KEYS), "arguments": value}
        found = first_of(part, ("result", "output", "errorText"))
        replies = [("reply", to_reply_message(part, found, changes))] if what == "both" and found is not None else []
        return [("call", call), *replies]
    return None if what is None else [(what, None)]


def join_thought(value: object) -> object:
    """Return the text of a thought that may be a list of parts, as of the Responses API."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "\n\n".join(part["text"] for part in value)
    return value


def split_thought(message: dict, content: object) -> tuple[str, object]:
    """Return (thought, content) of an assistant message: the thought from its own key or from a leading think block."""
    if THOUGHT_SET.isdisjoint(message) and not (isinstance(content, str) and "<think>" in content):
        return "", content
    thoughts = [join_text(message[key]) for key in THOUGHT_KEYS if message.get(key)]
    if wrong := [thought for thought in thoughts if not isinstance(thought, str)]:
        raise ValueError(f"reasoning must be text, got {shorten(wrong[0])}")
    if isinstance(content, str) and content.lstrip().startswith("<think>") and "</think>" in content:
        inside, _, content = content.lstrip().removeprefix("<think>").partition("</think>")
        thoughts.append(inside.strip())
        content = content.lstrip()
    thoughts = [thought for thought in thoughts if thought.strip()]
    if len({*map(str.strip, thoughts)}) > 1:
        raise ValueError("a message has two different thoughts, in its reasoning or in its <think> block; expected one")
    return thoughts[0] if thoughts else "", content


def find_calls(message: dict) -> list | str:
    """Return the calls under the one of CALL_KEYS that a message has, [] if none; as text if they are no JSON."""
    given = (
        ()
        if CALL_SET.isdisjoint(message)
        else [key for key in CALL_KEYS if message.get(key) and message[key] not in NO_CALL]
    )
    if not given:
        return []
    if len(given) > 1:
        raise ValueError(f"a message holds {given[0]} and {given[1]}; expected one of them")
    calls = unpack(message[given[0]], f"{given[0]} is")
    calls = [calls] if given == ["function_call"] and isinstance(calls, dict) else calls
    if not isinstance(calls, list | str):
        raise ValueError(f"{given[0]} must be a list, got {shorten(calls)}")
    return calls


def read_weight(turn: dict, role: object, changes: Counter) -> dict:
    """Return {"weight": 0} for an assistant's turn that is not to be trained, else {}; ValueError if unclear."""
    if FLAG_KEYS.isdisjoint(turn):
        return {}
    wanted = {}
    for key in sorted(turn.keys() & FLAG_KEYS):
        value = turn[key]
        if value is None:
            continue
        if key in UNCLEAR_KEYS:
            raise ValueError(f'"{key}" of a turn may mean that it is trained or that it is not; rename it to "weight"')
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"{key} must be 0 or 1, got {shorten(value)}")
        wanted[key] = bool(value) is (key in LOSS_KEYS)
    if len({*wanted.values()}) > 1:
        raise ValueError(f"{' and '.join(wanted)} of a turn do not agree; expected one of them")
    if role not in ("assistant", "calls", "item"):
        if True in wanted.values():
            changes[f"{role} turn marked as trained -> not trained"] += 1
        return {}
    return {"weight": 0} if False in wanted.values() else {}


def unwrap(turn: dict) -> tuple[object, dict]:
    """Return (role, turn) of a turn in LangChain's shapes, {"type": "ai", "data": {...}}, or any other; "item" is the
    role of an item of the Responses API that is part of an assistant's turn. Loss flags stand around it."""
    kind, flags = turn.get("type"), {key: turn[key] for key in FLAG_KEYS & turn.keys()}
    if isinstance(turn.get("kwargs"), dict) and isinstance(turn.get("id"), list) and turn["id"]:
        kind, turn = str(turn["id"][-1]).removesuffix("Chunk").removesuffix("Message"), turn["kwargs"]
    elif isinstance(turn.get("data"), dict):
        turn = turn["data"]
    role = turn.get("from", turn.get("role"))
    if role is None and isinstance(kind, str) and kind in PARTS:
        return "tool" if PARTS[kind][0] == "reply" else "item", {"content": [turn], **flags}
    role = to_role(kind if role is None else role)
    return ("item" if role == "assistant" and kind == "message" else role), {**turn, **flags} if flags else turn


def read_turn(turn: dict, changes: Counter) -> list[dict]:
    """Return the messages of a turn, with only what a chat template reads, their ids, and weight 0 if not trained.

    One turn may hold calls and their replies. A message of the role "calls" or "item" is part of an assistant's turn;
    text in it that is yet to be read as calls stands in `content` of "calls".
    """
    role, turn = unwrap(turn)
    content = turn.get("value", turn.get("content"))
    parts = next((found for found in (content, turn.get("parts")) if isinstance(found, list) and found), [])
    made_calls = turn.get("toolInvocations")
    if isinstance(made_calls, list) and made_calls and not turn.get("parts"):
        said = parts or ([{"type": "text", "text": content}] if content else [])
        answered = any(isinstance(call, dict) and "result" in call for call in made_calls)
        parts = [*made_calls, *said] if answered else [*said, *made_calls]  # the text is about the results
    if not parts or all(map(is_text_part, parts)):
        return [make_message(role, turn, join_text(parts or content), [], changes)]
    read = [read_part(part, changes) for part in parts]
    if None in read:
        value = to_reply(parts, changes) if role == "tool" else parts
        return [make_message(role, turn, value, [], changes)]
    made, texts, thoughts, calls, replies = [], [], [], [], []

    def close() -> None:
        said = {**turn, **({"reasoning": "\n\n".join(thoughts)} if thoughts else {})}
        if texts or thoughts or calls or not (made or replies):
            made.append(make_message(role, said, "".join(texts), calls[:], changes))
        made.extend(replies)
        for kept in (texts, thoughts, calls, replies):
            kept.clear()

    for what, value in (pair for pairs in read for pair in pairs):
        if what in ("text", "thought", "step") and replies:
            close()
        if what == "text" and calls and value.strip():
            changes[LATE_TEXT] += 1
        if what in ("text", "thought", "call", "reply"):
            {"text": texts, "thought": thoughts, "call": calls, "reply": replies}[what].append(value)
    close()
    return made


def make_message(role: object, turn: dict, content: object, calls: list, changes: Counter) -> dict:
    """Return one message of a turn, whose content and calls in its parts have been read."""
    if role == "tool":
        return to_reply_message(turn, content, changes)
    weight = read_weight(turn, role, changes)
    if role not in ("assistant", "calls", "item"):
        return {"role": role, "content": content}
    (thought, content), given = split_thought(turn, content), find_calls(turn)
    more = turn.get("additional_kwargs")
    if isinstance(more, dict):
        given, thought = given or find_calls(more), thought or split_thought(more, "")[0]
    if isinstance(given, str):  # calls that are no JSON
        if content:
            raise ValueError("a message holds text and calls as text; expected the calls in the text")
        role, content, given = "calls", given, []
    if calls or given:
        calls, given = ([to_tool_call(call, changes, not weight) for call in found] for found in (calls, given))
    if calls and given and [call["function"] for call in calls] != [call["function"] for call in given]:
        raise ValueError("a message holds calls in its content and in another key; expected one of them")
    if role == "calls" and given and content:
        raise ValueError("a turn of calls holds calls in content and in another key; expected one of them")
    if role == "calls" and not isinstance(content, str):
        calls, content = [to_tool_call(call, changes, not weight) for call in as_list(content)], ""
    message = {"role": role, "content": content, **({"reasoning_content": thought} if thought else {})}
    if given or calls:
        message["tool_calls"] = given or calls
    return {**message, **weight}


def set_calls(message: dict, content: str, calls: list) -> dict:
    """Return an assistant's message with another text and other calls, its weight last as make_message has it."""
    made = {key: value for key, value in message.items() if key not in ("tool_calls", "weight")} | {"content": content}
    made |= {"tool_calls": calls} if calls else {}
    return made | ({"weight": 0} if "weight" in message else {})


def spread_flags(row: dict, turns: list[dict]) -> list[dict]:
    """Return the turns with the row's own loss flags: one for all, one for each turn, or one for each answer."""
    for key in () if ROW_FLAGS.keys().isdisjoint(row) else sorted(row.keys() & ROW_FLAGS.keys()):
        value = row[key]
        if key in UNCLEAR_KEYS and to_role(value) == "assistant":
            raise ValueError(f'"{key}" names the assistant: no turn would be trained')  # NeMo names who is left out
        if value is None or isinstance(value, str | dict):
            continue
        answers = [index for index, turn in enumerate(turns) if unwrap(turn)[0] in ("assistant", "calls", "item")]
        values = value if isinstance(value, list) else [value] * len(answers)
        own = range(any(map(row.get, SYSTEM_KEYS)) and len(values) == len(turns) - 1, len(turns))
        places = own if len(values) == len(own) else answers
        if len(values) != len(places):
            counts = f"{len(turns)} messages or {len(answers)} answers"
            raise ValueError(f'"{key}" has {len(values)} entries; expected one for each of {counts}')
        turns = [*turns]
        for index, flag in zip(places, values):
            name = ROW_FLAGS[key]
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
    output = row.get("output") if "output" in keys else None
    places += [("output", output, TURN_KEYS)] if isinstance(output, dict) else []
    talks = [row[key] for key in TALK_KEYS if key in keys and key in row]
    places += [("turn", turn, TURN_KEYS) for talk in talks if isinstance(talk, list) for turn in talk]
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
    said = to_role(first.get("role", first.get("from"))) == "system"
    said = said and join_text(first.get("content", first.get("value"))) == join_text(system)
    return [{"role": "system", "content": system}, *turns] if system and not said else turns
