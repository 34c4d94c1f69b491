"""Where a row keeps its turns; CONTAINERS is the one place to add a shape of rows."""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

from tool_calling.data.calls import CALL_KEYS
from tool_calling.data.literals import as_list, try_unpack, unpack
from tool_calling.data.turns import FLAG_KEYS, ROW_FLAGS, SHAREGPT_KEYS, TALK_KEYS, THOUGHT_KEYS, add_system, take
from tool_calling.terminal import shorten

GLAIVE_TURN = re.compile(r"(?:^|\n)[^\S\n]*(USER|ASSISTANT|FUNCTION RESPONSE):")
GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
FLAG_TEXT = re.compile(r"([01]|true|false)|\[\s*(([01]|true|false|null)\s*(,\s*|(?=\])))+\]", re.IGNORECASE)
QUESTION_KEYS = ("instruction", "question", "prompt", "query", "input")
ANSWER_KEYS = ("output", "answer", "response", "completion")


def read_talk(row: dict, *keys: str) -> list[dict]:
    """{"messages": [{"role": "...", "content": "..."}]}, {"conversations": [{"from": "...", "value": "..."}]}"""
    return add_system(row, take(row, next((key for key in keys if key in row), keys[0]), list))


def read_request(row: dict, question: str) -> list[dict]:
    """Return the turns before a row's answer: its `history`, and its question with the text that this is about."""
    history = unpack(row.get("history") or [], '"history" is')
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f'"history" must be a list of [request, answer], got {shorten(history)}')
    turns = [{"role": role, "content": text} for pair in history for role, text in zip(("user", "assistant"), pair)]
    about = [key for key in ("input", "context") if key != question and row.get(key)]
    return [*turns, {"role": "user", "content": "\n".join(take(row, key, str) for key in (question, *about))}]


def read_native(row: dict) -> list[dict]:
    """{"input": "...", "output": {"function_call": {...} | "function_calls": [...], "content": "..."}}"""
    output, question = take(row, "output", dict), "instruction" if row.get("instruction") else "input"
    if output.keys().isdisjoint((*CALL_KEYS, "content")):
        raise ValueError(f'"output" must hold function_call, function_calls or content, got {shorten(output)}')
    return add_system(row, [*read_request(row, question), {**output, "role": "assistant"}])


def read_prompt_completion(row: dict) -> list[dict]:
    """{"prompt": [{"role": "user", "content": "..."}], "completion": [{"role": "assistant", ...}], "tools": [...]}; of
    these turns only the completion is trained."""
    prompt = [{key: turn[key] for key in turn if key not in FLAG_KEYS} for turn in take(row, "prompt", list)]
    return add_system(row, [*({**turn, "weight": 0} for turn in prompt), *take(row, "completion", list)])


def read_xlam(row: dict) -> list[dict]:
    """{"query": "...", "answers": "[{\\"name\\": ..., \\"arguments\\": {...}}]", "tools": "[...]"}"""
    calls, question = take(row, "answers", list), take(row, "query", str)
    return add_system(row, [{"role": "user", "content": question}, {"role": "assistant", "tool_calls": calls}])


def read_glaive(row: dict) -> list[dict]:
    """{"system": "SYSTEM: ... -\\n{...}\\n{...}",
    "chat": "USER: ...\\n\\n\\nASSISTANT: <functioncall> {...} <|endoftext|>"}"""
    system = take(row, "system", str) if row.get("system") is not None else ""
    start, *parts = GLAIVE_TURN.split(take(row, "chat", str))
    if start.strip():
        raise ValueError(f'"chat" must start with "USER:", got {shorten(start)}')
    texts = [text.replace("<|endoftext|>", "").strip() for text in parts[1::2]]
    turns = [{"role": GLAIVE_ROLES[speaker], "content": text} for speaker, text in zip(parts[::2], texts)]
    return add_system({"system": system.strip().removeprefix("SYSTEM:").strip()}, turns)


def read_alpaca(row: dict) -> list[dict]:
    """{"instruction": "...", "input": "", "output": "...", "system": "...", "history": [["u", "a"]]}, or a question, a
    "context" and an answer by other names."""
    question, answer = (next((key for key in keys if key in row), None) for keys in (QUESTION_KEYS, ANSWER_KEYS))
    if not question or not answer:
        questions, answers = ", ".join(QUESTION_KEYS), ", ".join(ANSWER_KEYS)
        raise ValueError(f"expected one of {questions} and one of {answers}, got {shorten(row)}")
    for key, others in ((question, QUESTION_KEYS), (answer, ANSWER_KEYS)):
        if more := [other for other in others if row.get(other) and other not in (key, "input")]:
            raise ValueError(f'the row holds "{key}" and "{more[0]}"; expected one of them')
    turns = [*read_request(row, question), {"role": "assistant", "content": take(row, answer, str)}]
    return add_system(row, turns)


def read_responses(row: dict) -> list[dict]:
    """{"instructions": "...", "input": [{"role": "user", ...}, {"type": "function_call", ...}], "tools": [...]}, with
    `output` if the row is a request and its answer: items, or a text"""
    request, answer = row.get("input", ""), row.get("output") or []
    is_text = isinstance(request, str) and not request.lstrip().startswith("[")  # not JSON
    turns = [{"role": "user", "content": request}] if is_text else take(row, "input", list)
    items = try_unpack(answer)
    if isinstance(answer, str):
        answer = items if has_items(items) else [{"role": "assistant", "content": answer}]
    system = row.get("instructions") or row.get("system")
    return add_system({"system": system}, [*turns, *take({"output": answer}, "output", list)])


def read_gemini(row: dict) -> list[dict]:
    """{"systemInstruction": {...}, "contents": [{"role": "user" | "model", "parts": [{"text": "..."}]}], ...}"""
    keys = ("systemInstruction", "system_instruction", "system")
    system = next((row[key] for key in keys if row.get(key)), None)
    if isinstance(system, dict):
        system = to_parts(system.get("parts", system.get("content")))
    turns = [{"role": "user", **turn, "parts": to_parts(turn.get("parts"))} for turn in take(row, "contents", list)]
    return add_system({"system": system}, turns)


def to_parts(parts: object) -> object:
    """Return the parts of a turn of Gemini as a list, which may be one alone, or texts."""
    return [{"text": part} if isinstance(part, str) else part for part in as_list(parts)] if parts else parts


class Container(NamedTuple):
    """How rows of a shape are recognised, how their turns are read, and which keys that takes."""

    fits: Callable[[dict], bool]
    read: Callable[[dict], list[dict]]
    keys: set[str]  # beside tools and system


def has_items(value: object) -> bool:
    """Return whether a value is a list of turns or of items of the Responses API."""
    is_list = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    return is_list and any("role" in item or "type" in item for item in value)


# fmt: off
CONTAINERS = {  # the first that fits a row
    "native": Container(
        lambda row: "input" in row and isinstance(row.get("output"), dict),
        read_native, {"input", "output", "instruction", "history", "context"}),
    "messages": Container(
        lambda row: "messages" in row, lambda row: read_talk(row, "messages"), {"messages"}),
    "conversations": Container(
        lambda row: "conversations" in row or any(isinstance(row.get(key), list) for key in SHAREGPT_KEYS),
        lambda row: read_talk(row, *SHAREGPT_KEYS), {*SHAREGPT_KEYS}),
    "xlam": Container(lambda row: "query" in row and "answers" in row, read_xlam, {"query", "answers"}),
    "glaive": Container(lambda row: "chat" in row, read_glaive, {"chat"}),
    "prompt-completion": Container(
        lambda row: isinstance(row.get("prompt"), list) and "completion" in row,
        read_prompt_completion, {"prompt", "completion"}),
    "responses": Container(
        lambda row: has_items(row.get("input")) or (isinstance(row.get("input"), str) and has_items(row.get("output"))),
        read_responses, {"input", "output", "instructions"}),
    "gemini": Container(
        lambda row: "contents" in row, read_gemini, {"contents", "systemInstruction", "system_instruction"}),
    "alpaca": Container(
        lambda row: not row.keys().isdisjoint(QUESTION_KEYS) and not row.keys().isdisjoint(ANSWER_KEYS),
        read_alpaca, {*QUESTION_KEYS, *ANSWER_KEYS, "history", "context"}),
}
# fmt: on


def unpack_turns(row: dict) -> dict:
    """Return the row with its conversations and loss flags out of JSON text, as tables keep them."""
    flags = {key: row[key].strip().lower() for key in row if key in ROW_FLAGS and isinstance(row[key], str)}
    unpacked = {key: json.loads(text) for key, text in flags.items() if FLAG_TEXT.fullmatch(text)}
    packed = [key for key in (*TALK_KEYS, "contents") if isinstance(row.get(key), str)]
    unpacked |= {key: unpack(row[key], f'"{key}" is') for key in packed}
    if "input" in row and isinstance(row.get("output"), str):
        output = try_unpack(row["output"])
        if isinstance(output, dict) and set() < output.keys() <= {*CALL_KEYS, *THOUGHT_KEYS, "content"}:  # native
            unpacked["output"] = output
    if "prompt" in row and "completion" in row:  # which may as well be plain text that begins with a bracket
        turns = {key: try_unpack(row[key]) for key in ("prompt", "completion")}
        if all(isinstance(turn, dict) and "role" in turn for part in turns.values() for turn in as_list(part)):
            unpacked |= turns
    return {**row, **unpacked} if unpacked else row
