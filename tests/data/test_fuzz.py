"""Random conversations in every container of turns and every syntax of calls are read as what they are, and read the
same again when they are converted; rows with random mistakes are read or refused, and never crash."""

import copy
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tool_calling.data.examples import Reading, to_examples, to_row

ROWS = 50  # of one example: 400 examples are 20,000 rows
READING = Reading("no/such/tools.json")
TEXTS = ["Oslo", "São Paulo", "it's 5 o'clock", 'a "quoted" word', "one, two; three", "a(b) [c] {d}", "x = y", "7"]
TEXTS += ["back\\slash", "雪 ❄"]
WORDS = "please check the weather then tell me what you found about snow and set nothing else today".split()


def tool(name: str, properties: dict, required: list[str]) -> dict:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


STRING, NUMBER = {"type": "string"}, {"type": "number"}
TOOLS = [
    tool("get_weather", {"city": STRING, "days": {"type": "integer"}, "metric": {"type": "boolean"}}, ["city"]),
    tool("set_alarm", {"time": STRING, "days": {"type": "array", "items": STRING}}, ["time"]),
    tool("send", {"to": STRING, "options": {"type": "object", "properties": {"urgent": {"type": "boolean"}}}}, ["to"]),
    tool("measure", {"ratio": NUMBER, "unit": {"type": "string", "enum": ["c", "f"]}}, []),
    tool("ping", {}, []),
]


# ----------------------------------------------------------------------------------------------------------------------
# A conversation as it should be read
# ----------------------------------------------------------------------------------------------------------------------
def say(rng: random.Random) -> str:
    """Return a text that calls nothing, though it may speak of a tool."""
    words = rng.choices(WORDS, k=rng.randint(1, 9)) + rng.choices(["", "with get_weather", "(maybe ping)"], [8, 1, 1])
    return " ".join(filter(None, words)).capitalize() + rng.choice([".", "!", "?", ".\nAnd more."])


def fill(schema: dict, rng: random.Random) -> object:
    """Return a value that fits a schema."""
    match schema:
        case {"enum": choices}:
            return rng.choice(choices)
        case {"type": "string"}:
            return rng.choice(TEXTS)
        case {"type": "integer"}:
            return rng.randint(-9, 10**6)
        case {"type": "number"}:
            return rng.choice([0.5, -2, 1e-3])
        case {"type": "boolean"}:
            return rng.random() < 0.5
        case {"type": "array", "items": items}:
            return [fill(items, rng) for _ in range(rng.randint(0, 3))]
        case {"properties": properties}:
            required = schema.get("required", [])
            wanted = {name: part for name, part in properties.items() if name in required or rng.random() < 0.5}
            return {name: fill(part, rng) for name, part in wanted.items()}


def make_calls(tools: list[dict], rng: random.Random, most: int) -> list[dict]:
    chosen = rng.choices([tool["function"] for tool in tools], k=rng.randint(1, most))
    return [{"name": function["name"], "arguments": fill(function["parameters"], rng)} for function in chosen]


def make_talk(rng: random.Random, most: int = 3) -> tuple[list[dict], list[dict]]:
    """Return (tools, messages); a message has `calls`, {"name", "arguments"} each, in place of tool_calls."""
    tools, messages = rng.sample(TOOLS, rng.randint(1, 4)), []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": say(rng)})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": say(rng)})
        while rng.random() < 0.6:
            calls = make_calls(tools, rng, most)
            messages.append({"role": "assistant", "content": say(rng) if rng.random() < 0.3 else "", "calls": calls})
            messages += [{"role": "tool", "content": json.dumps({"found": rng.randint(0, 99)})} for _ in calls]
        messages.append({"role": "assistant", "content": say(rng)})
    return tools, messages


def to_openai(message: dict) -> dict:
    """Return a message as it should be read, without ids."""
    rest = {key: value for key, value in message.items() if key != "calls"}
    calls = [{"type": "function", "function": call} for call in message.get("calls", [])]
    return {**rest, "tool_calls": calls} if calls else rest


# ----------------------------------------------------------------------------------------------------------------------
# Containers with calls of their own: messages -> row
# ----------------------------------------------------------------------------------------------------------------------
def number(messages: list[dict]) -> list[dict]:
    """Return the messages with an `id` in each call and in its reply."""
    numbered, waiting = [], []
    for index, message in enumerate(copy.deepcopy(messages)):
        for place, call in enumerate(message.get("calls", [])):
            call["id"] = f"call_{index}_{place}"
            waiting.append(call)
        if message["role"] == "tool":
            call = waiting.pop(0)
            message |= {"id": call["id"], "called": call["name"]}
        numbered.append(message)
    return numbered


def write_openai(messages, rng):
    ids, packed = rng.random() < 0.5, rng.random() < 0.5
    turns = []
    for message in number(messages):
        turn = {"role": message["role"], "content": message["content"]}
        if calls := message.get("calls"):
            turn["content"] = turn["content"] or rng.choice(["", None])
            turn["tool_calls"] = [
                {
                    **({"id": call["id"]} if ids else {}),
                    "type": "function",
                    "function": {
                        "name": call["name"],
                        "arguments": json.dumps(call["arguments"]) if packed else call["arguments"],
                    },
                }
                for call in calls
            ]
        if ids and message["role"] == "tool":
            turn["tool_call_id"] = message["id"]
        turns.append(turn)
    return {"messages": json.dumps(turns) if rng.random() < 0.2 else turns}


SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def write_sharegpt(messages, rng):
    turns = []
    for message in messages:
        if message["content"] or "calls" not in message:
            turns.append({"from": SHAREGPT[message["role"]], "value": message["content"]})
        if calls := message.get("calls"):
            turns.append({"from": "function_call", "value": json.dumps(calls if len(calls) > 1 else calls[0])})
    return {"conversations": turns}


def write_swift(messages, rng):
    turns = []
    for message in messages:
        role = "tool_response" if message["role"] == "tool" else message["role"]
        if message["content"] or "calls" not in message:
            turns.append({"role": role, "content": message["content"]})
        turns += [{"role": "tool_call", "content": json.dumps(call)} for call in message.get("calls", [])]
    return {"messages": turns}


def write_anthropic(messages, rng):
    row, turns = {}, []
    for message in number(messages):
        role, content = message["role"], message["content"]
        if role == "system":
            row["system"] = content
        elif role == "tool":
            block = {"type": "tool_result", "tool_use_id": message["id"]}
            block["content"] = [{"type": "text", "text": content}]
            if turns[-1]["role"] == "user":
                turns[-1]["content"].append(block)
            else:
                turns.append({"role": "user", "content": [block]})
        else:
            blocks = [{"type": "text", "text": content}] if content else []
            blocks += [
                {"type": "tool_use", "id": call["id"], "name": call["name"], "input": call["arguments"]}
                for call in message.get("calls", [])
            ]
            turns.append({"role": role, "content": blocks})
    return {**row, "messages": turns}


def write_responses(messages, rng):
    row, items = {}, []
    for message in number(messages):
        role, content = message["role"], message["content"]
        if role == "system":
            row["instructions"] = content
        elif role == "tool":
            items.append({"type": "function_call_output", "call_id": message["id"], "output": content})
        elif role == "user":
            items.append({"role": "user", "content": content})
        else:
            part = {"type": "output_text", "text": content, "annotations": []}
            items += [{"type": "message", "role": "assistant", "content": [part]}] if content else []
            for call in message.get("calls", []):
                item = {"type": "function_call", "call_id": call["id"], "name": call["name"]}
                items.append({**item, "arguments": json.dumps(call["arguments"])})
    return {**row, "input": items}


def write_gemini(messages, rng):
    row, contents = {}, []
    for message in number(messages):
        role, content = message["role"], message["content"]
        if role == "system":
            row["systemInstruction"] = {"parts": [{"text": content}]}
        elif role == "tool":
            reply = {"functionResponse": {"name": message["called"], "response": json.loads(content)}}
            if contents[-1]["role"] == "user":
                contents[-1]["parts"].append(reply)
            else:
                contents.append({"role": "user", "parts": [reply]})
        else:
            parts = [{"text": content}] if content else []
            parts += [{"functionCall": {"name": c["name"], "args": c["arguments"]}} for c in message.get("calls", [])]
            contents.append({"role": "model" if role == "assistant" else role, "parts": parts})
    return {**row, "contents": contents}


def write_vercel(messages, rng):
    turns = []
    for message in number(messages):
        role, content = message["role"], message["content"]
        if role == "tool":
            part = {"type": "tool-result", "toolCallId": message["id"], "toolName": message["called"]}
            part["output"] = {"type": "json", "value": json.loads(content)}
            if turns[-1]["role"] == "tool":
                turns[-1]["content"].append(part)
            else:
                turns.append({"role": "tool", "content": [part]})
        elif "calls" in message:
            parts = [{"type": "text", "text": content}] if content else []
            parts += [
                {"type": "tool-call", "toolCallId": call["id"], "toolName": call["name"], "input": call["arguments"]}
                for call in message["calls"]
            ]
            turns.append({"role": "assistant", "content": parts})
        else:
            turns.append({"role": role, "content": content})
    return {"messages": turns}


def write_langchain(messages, rng):
    nested, turns = rng.random() < 0.5, []
    names = {"system": "system", "user": "human", "assistant": "ai", "tool": "tool"}
    for message in number(messages):
        data = {"content": message["content"]}
        if calls := message.get("calls"):
            data["tool_calls"] = [{"name": c["name"], "args": c["arguments"], "id": c["id"]} for c in calls]
        if message["role"] == "tool":
            data["tool_call_id"] = message["id"]
        kind = names[message["role"]]
        turns.append({"type": kind, "data": data} if nested else {"type": kind, **data})
    return {"messages": turns}


def write_prompt_completion(messages, rng):
    turns = write_openai(messages, random.Random(1))["messages"]
    turns = json.loads(turns) if isinstance(turns, str) else turns
    return {"prompt": turns[:-1], "completion": turns[-1:]}


CONTAINERS = {
    function.__name__.removeprefix("write_"): function
    for function in (
        *(write_openai, write_sharegpt, write_swift, write_anthropic, write_responses, write_gemini, write_vercel),
        *(write_langchain, write_prompt_completion),
    )
}


# ----------------------------------------------------------------------------------------------------------------------
# Syntaxes of calls in text: (calls, rng) -> text
# ----------------------------------------------------------------------------------------------------------------------
def write_python(calls: list[dict], quote=repr) -> list[str]:
    return [
        f"{call['name']}({', '.join(f'{key}={quote(value)}' for key, value in call['arguments'].items())})"
        for call in calls
    ]


def write_xml(call: dict, wrapped: bool) -> str:
    values = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in call["arguments"].items()}
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    text = f"<function={call['name']}>\n{inner}</function>"
    return f"<tool_call>\n{text}\n</tool_call>" if wrapped else text


def dump(calls: list[dict], key: str = "arguments") -> list[str]:
    return [json.dumps({"name": call["name"], key: call["arguments"]}, ensure_ascii=False) for call in calls]


# name: (whether a text may stand before it, whether it has several calls, how it is written)
SYNTAXES = {
    "hermes": (True, True, lambda calls, rng: "\n".join(f"<tool_call>\n{c}\n</tool_call>" for c in dump(calls))),
    "hermes list": (True, True, lambda calls, rng: f"<TOOLCALL>[{', '.join(dump(calls))}]</TOOLCALL>"),
    "xml": (True, True, lambda calls, rng: "\n".join(write_xml(call, wrapped=True) for call in calls)),
    "xml alone": (True, True, lambda calls, rng: "\n".join(write_xml(call, wrapped=False) for call in calls)),
    "toolace": (False, True, lambda calls, rng: f"[{', '.join(write_python(calls))}]"),
    "toolace json": (False, True, lambda calls, rng: f"[{', '.join(write_python(calls, json.dumps))}]"),
    "python": (True, True, lambda calls, rng: "\n".join(write_python(calls))),
    "python block": (True, True, lambda calls, rng: "```python\n" + "\n".join(write_python(calls)) + "\n```"),
    "react": (
        True, False,
        lambda calls, rng: f"Action: {calls[0]['name']}\nAction Input: {json.dumps(calls[0]['arguments'])}",
    ),
    "json": (False, True, lambda calls, rng: dump(calls)[0] if len(calls) == 1 else f"[{', '.join(dump(calls))}]"),
    "json parameters": (False, False, lambda calls, rng: dump(calls, "parameters")[0]),
    "json block": (False, True, lambda calls, rng: f"```json\n[{', '.join(dump(calls))}]\n```"),
    "glaive": (True, False, lambda calls, rng: f"<functioncall> {dump(calls)[0]}"),
    "mistral": (True, True, lambda calls, rng: f"[TOOL_CALLS] [{', '.join(dump(calls))}]"),
    "llama": (False, False, lambda calls, rng: f"<|python_tag|>{dump(calls, 'parameters')[0]}"),
}  # fmt: skip


def write_text(messages: list[dict], name: str, rng: random.Random) -> tuple[dict, list[dict]]:
    """Return (a row with its calls in this syntax, the messages as they should be read)."""
    can_have_text, several, write = SYNTAXES[name]
    turns, expected = [], []
    for message in messages:
        if "calls" in message:
            calls = message["calls"] if several else message["calls"][:1]
            content = message["content"] if can_have_text else ""
            turns.append({"role": "assistant", "content": "\n".join(filter(None, (content, write(calls, rng))))})
            expected.append({**message, "content": content, "calls": calls})
            left = len(calls)
        elif message["role"] != "tool" or left:
            turns.append(dict(message))
            expected.append(message)
            left = left - 1 if message["role"] == "tool" else 0
    if rng.random() < 0.5:
        return {"messages": turns}, expected
    return {"conversations": [{"from": SHAREGPT[turn["role"]], "value": turn["content"]} for turn in turns]}, expected


# ----------------------------------------------------------------------------------------------------------------------
# Checks
# ----------------------------------------------------------------------------------------------------------------------
def drop_ids(messages: list[dict]) -> list[dict]:
    calls = [[{k: v for k, v in call.items() if k != "id"} for call in m.get("tool_calls", [])] for m in messages]
    rest = [{k: v for k, v in m.items() if k not in ("tool_calls", "tool_call_id")} for m in messages]
    return [{**message, "tool_calls": own} if own else message for message, own in zip(rest, calls)]


def read(rows: list[dict]):
    checked = to_examples([(str(index), row) for index, row in enumerate(rows)], READING)
    assert checked.total == len(rows)
    assert len(rows) - len(checked.examples) == len({source for source, _ in checked.problems})
    assert all(problem and "\n" not in problem for _, problem in checked.problems)
    return checked


def check_again(checked) -> None:
    """Examples that are converted and read back are the same."""
    rows = [json.loads(json.dumps(to_row(example))) for example in checked.examples]
    again = read(rows)
    assert again.problems == []
    for before, after in zip(checked.examples, again.examples):
        assert (after.messages, after.tools) == (before.messages, before.tools)


def make_row(rng: random.Random) -> tuple[dict, list[dict], list[dict]]:
    """Return (row, messages as they should be read, tools) of a random container or syntax."""
    tools, messages = make_talk(rng)
    kind = rng.choice(["container", "syntax"])
    if kind == "container":
        name = rng.choice([*CONTAINERS])
        row, expected = CONTAINERS[name](messages, rng), [*map(to_openai, messages)]
        if name == "prompt_completion":
            early = [message | ({"weight": 0} if message["role"] == "assistant" else {}) for message in expected[:-1]]
            expected = [*early, expected[-1]]
    else:
        row, expected = write_text(messages, rng.choice([*SYNTAXES]), rng)
        expected = [*map(to_openai, expected)]
    row["tools"] = json.dumps(tools) if rng.random() < 0.3 else tools
    return row, expected, tools


many = settings(max_examples=200, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True)


@pytest.mark.slow
@many
@given(st.integers(0, 2**48))
def test_a_conversation_is_read_as_it_is_in_every_container_and_syntax(seed):
    rng = random.Random(seed)
    made = [make_row(rng) for _ in range(ROWS)]
    checked = read([json.loads(json.dumps(row)) for row, _, _ in made])
    assert checked.problems == [], made[int(checked.problems[0][0])][0]
    for (row, expected, tools), example in zip(made, checked.examples):
        assert drop_ids(example.messages) == expected, row
        assert example.tools == tools, row
    check_again(checked)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes
# ----------------------------------------------------------------------------------------------------------------------
# fmt: off
JUNK = [
    None, "", 0, -1, 1.5, True, False, [], {}, [[]], [None], {"a": None}, "[", "{", "]", "x", "null", "[]", "{}",
    "\u2028", "<tool_call>", "</tool_call>", "<tools>", "[f(", "get_weather(", "get_weather", "Action: ping", "<think>",
    "0" * 300, "user", "assistant", "tool", "system", {"role": "user", "content": "x"}, {"type": "text", "text": "x"},
    10**400, json.dumps({"name": "ping", "arguments": {}}), {"name": "ping"}, {"function": {"name": "ping"}}, ["ping"],
]
KEYS = [
    "role", "content", "from", "value", "tool_calls", "function_call", "arguments", "name", "type", "id", "tools",
    "weight", "loss", "masked", "messages", "conversations", "input", "output", "parts", "thinking", "system",
    "prompt", "completion",
]
# fmt: on


def list_places(value: object) -> list[tuple]:
    """Return (holder, key) of everything inside a JSON value."""
    holders, places = [value], []
    while holders:
        holder = holders.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder))
        places += [(holder, key) for key in keys]
        holders += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    return places


def spoil(row: dict, rng: random.Random) -> dict:
    """Return the row with one to three random mistakes."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        if not (places := list_places(row)):
            break
        holder, key = rng.choice(places)
        match rng.randint(0, 5):
            case 0:
                del holder[key]
            case 1 | 2:
                holder[key] = copy.deepcopy(rng.choice(JUNK))
            case 3 if isinstance(holder, dict):
                holder[rng.choice(KEYS)] = holder.pop(key)
            case 3 | 4 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case _ if isinstance(holder, dict):
                holder[rng.choice(KEYS)] = copy.deepcopy(rng.choice(JUNK))
            case _:
                rng.shuffle(holder)
    return row


@pytest.mark.slow
@many
@given(st.integers(0, 2**48))
def test_a_row_with_mistakes_is_read_or_refused_and_means_the_same_when_it_is_converted(seed):
    rng = random.Random(seed)
    check_again(read([spoil(make_row(rng)[0], rng) for _ in range(ROWS)]))
