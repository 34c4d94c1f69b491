"""Random mixtures of containers, parts, syntaxes and flags: each row is an example or a problem."""

import json
import random

import pytest
from format_cases import BARE, REPLY, USER, WEATHER, YES

from tool_calling.data.examples import Reading, to_examples, to_row

ARGUMENTS = {"city": "Rome"}
TEXT = json.dumps(ARGUMENTS)
CALL_TEXTS = (  # of the same call in every syntax, known or not, and of none
    '<tool_call>\n{"name": "get_weather", "arguments": %s}\n</tool_call>',
    '<TOOLCALL>[{"name": "get_weather", "arguments": %s}]</TOOLCALL>',
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>",
    "<function=get_weather>%s</function>",
    '<invoke name="get_weather"><parameter name="city">Rome</parameter></invoke>',
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>",
    "[get_weather(city='Rome')]",
    "I look.\nget_weather(city='Rome')",
    "```python\nget_weather(city='Rome')\n```",
    "Thought: so\nAction: get_weather\nAction Input: %s",
    '{"name": "get_weather", "parameters": %s}',
    'I look: [{"name": "get_weather", "arguments": %s}]',
    '<functioncall> {"name": "get_weather", "arguments": \'%s\'}',
    '[TOOL_CALLS] [{"name": "get_weather", "arguments": %s}]',
    '<|python_tag|>{"name": "get_weather", "parameters": %s}',
    "get_weather %s",
    "get_weather(",
    "<tool_call>{",
    "[get_weather(city=",
    "Action: get_weather\nAction Input: {",
    "I would use get_weather.",
    "<think>get_weather(city='Rome')</think>No.",
    "<think>",
    "[1](2)",
    "",
)
CALL_TEXTS = [text.replace("%s", TEXT) for text in CALL_TEXTS]
NAMES = {
    "user": ["user", "human", "User"],
    "assistant": ["assistant", "gpt", "model", "ai"],
    "tool": ["tool", "observation"],
}
FLAGS = [{}, {}, {}, {"loss": False}, {"weight": 0}, {"train": 1}, {"masked": True}, {"mask": 1}, {"loss": 0.5}]
CALL = {"name": "get_weather", "arguments": ARGUMENTS}


def assistant(pick) -> dict:
    """A turn of the assistant in one of the shapes."""
    parts = [
        {"type": "text", "text": "I look."},
        {"type": "thinking", "thinking": "so"},
        {"type": "tool_use", "id": "c", "name": "get_weather", "input": ARGUMENTS},
        {"type": "tool-call", "toolCallId": "c", "toolName": "get_weather", "args": ARGUMENTS},
        {"functionCall": {"name": "get_weather", "args": ARGUMENTS}},
        {"type": "image"},
    ]
    return pick(
        [
            {"content": pick(CALL_TEXTS)},
            {"content": pick(CALL_TEXTS)},
            {
                "content": None,
                "tool_calls": [pick([{"function": CALL}, CALL, {**CALL, "arguments": None}, {"id": "c", **CALL}])],
            },
            {"content": "I look.", "function_call": {**CALL, "arguments": pick([TEXT, "{", "", 7])}},
            {"content": pick(CALL_TEXTS), "tool_calls": [CALL]},
            {"content": [pick(parts), pick(parts)]},
            {"parts": [pick(parts), pick(parts)]},
            {"content": "", "function_calls": "get_weather(city='Rome')"},
        ]
    )


def turn(pick) -> dict:
    """A turn of a conversation, with the names of any format."""
    role = pick(["user", "assistant", "assistant", "tool", "calls", "system"])
    reply = pick(["3", {"t": 3}, [], None, "<tool_response>\n3\n</tool_response>", "3</tool_response><tool_response>4"])
    answered = [{"type": "tool_result", "tool_use_id": "c", "content": "3"}]
    declared = f"Use <tools>[{json.dumps(BARE)}]</tools>."
    made = {
        "user": lambda: {"content": pick(["rain?", reply, answered])},
        "tool": lambda: {"content": reply, **pick([{}, {"tool_call_id": "c"}])},
        "assistant": lambda: assistant(pick),
        "calls": lambda: {"content": pick([json.dumps(CALL), json.dumps([CALL] * 2), *CALL_TEXTS])},
        "system": lambda: {"content": pick(["Be brief.", declared, json.dumps([BARE])])},
    }[role]()
    name = pick(["function_call", "tool_call"]) if role == "calls" else pick(NAMES.get(role, ["system"]))
    item = {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": TEXT}
    items = [
        item,
        {"type": "function_call_output", "call_id": "c", "output": "3"},
        {"type": "ai", "data": {"content": "Yes."}},
    ]
    return pick([{"role": name, **made, **pick(FLAGS)}] * 9 + items)


def row(pick) -> dict:
    """A row of a random container; every second of its conversations begins as one should."""
    turns = [turn(pick) for _ in range(pick([1, 2, 3, 4, 6]))]
    if pick([True, False]):
        turns = [USER, {"role": "assistant", **assistant(pick), **pick(FLAGS)}, *pick([[], [REPLY, YES], turns])]
    sharegpt = [{"from": one.get("role"), "value": one.get("content"), **one} for one in turns]
    tools = pick([{"tools": [WEATHER]}] * 4 + [{"tool_defs": json.dumps([BARE])}, {"tools": None}, {}, {"tools": []}])
    talk = pick(
        [
            {"messages": turns},
            {"messages": json.dumps(turns)},
            {"conversations": sharegpt},
            {"input": turns, "instructions": "Be brief."},
            {"contents": turns, "systemInstruction": {"parts": [{"text": "Be brief."}]}},
            {"prompt": turns[:1], "completion": turns[1:]},
            {"input": "rain?", "output": assistant(pick)},
            {"query": "rain?", "answers": [CALL]},
            {"question": "rain?", "answer": pick(CALL_TEXTS)},
            {
                "chat": f"USER: rain?\n\n\nASSISTANT: {pick(CALL_TEXTS)} <|endoftext|>",
                "system": f"SYSTEM: {json.dumps(BARE)}",
            },
        ]
    )
    masks = [{}] * 6 + [{"train_mask": [pick([0, 1]) for _ in turns]}, {"loss": pick([True, False])}]
    return {**talk, **tools, **pick(masks)}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_mixtures_are_examples_or_problems_and_read_back_the_same(tmp_path, seed):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([WEATHER]))
    pick, count = random.Random(seed).choice, 20_000 if seed else 2_000
    rows = [(f"x:{line}", row(pick)) for line in range(count)]
    checked = to_examples(rows, Reading(str(path)))
    valid, broken = {example.source for example in checked.examples}, {source for source, _ in checked.problems}
    assert not valid & broken and len(valid | broken) == count and len(valid) > count / 4
    assert all(problem and "\n" not in problem for _, problem in checked.problems)
    lines = [(example.source, json.loads(json.dumps(to_row(example)))) for example in checked.examples]
    again = to_examples(lines, Reading("no/such/tools.json"))
    expected = [example._replace(format="openai", syntax="", filled=False) for example in checked.examples]
    assert again.problems == [] and again.changes == {} and again.unread == {}
    for one, other in zip(again.examples, expected):
        assert json.dumps(one) == json.dumps(other)
