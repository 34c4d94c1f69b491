"""Every format: a row as people have it in, the exact example out; its malformed twins; arbitrary JSON."""

import json
import re
import time

import pytest
from conftest import ROOT
from format_cases import BARE, CALL, CASES, TOOLS, USER, YES, calls, read, sharegpt, tool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tool_calling.data.examples import Checked, Example, Reading, to_examples, to_row
from tool_calling.data.formats import FORMATS
from tool_calling.data.literals import split_tags


@pytest.mark.parametrize("name", CASES)
def test_a_row_becomes_its_exact_example(name, tools_path):
    row, found, messages, tools = CASES[name]
    example, problems, _ = read(row, tools_path=tools_path)
    assert problems == []
    expected = json.loads(open(tools_path).read()) if tools is None else tools
    assert example._replace(syntax="", filled=False) == Example("x:1", messages, expected, found)
    assert json.dumps(example.tools) == json.dumps(expected)  # the order of keys too: the model sees it
    by_name, problems, _ = read(row, found, tools_path)
    assert (by_name, problems) == (example, [])


def test_the_formats_of_the_flag_are_those_of_the_table():
    assert {found for _, found, _, _ in CASES.values()} == set(FORMATS) - {"responses", "gemini"}


def test_rows_of_every_format_may_be_mixed_and_converting_twice_changes_nothing(tools_path):
    rows = [(f"x:{i}", row) for i, (row, *_) in enumerate(CASES.values(), start=1)]
    checked = to_examples(rows, Reading(tools_path))
    assert checked.problems == [] and len(checked.examples) == checked.total == len(CASES)
    lines = [(example.source, json.loads(json.dumps(to_row(example)))) for example in checked.examples]
    again = to_examples(lines, Reading("no/such/tools.json"))
    assert again == Checked(
        [example._replace(format="openai", syntax="", filled=False) for example in checked.examples], total=len(CASES)
    )


@pytest.mark.parametrize(
    "name, row, expected",
    [
        ("openai", {}, '"messages" is missing; expected a list of objects'),
        ("sharegpt", {"messages": 1}, '"messages" must be a list of objects, got 1'),
        ("glaive", {"system": "x"}, '"chat" is missing; expected text'),
        ("xlam", {"query": "x"}, '"answers" is missing; expected a list of objects'),
        ("native", {"input": "x", "output": "y"}, '"output" must be an object, got "y"'),
        (
            "alpaca",
            {"question": "x"},
            "expected one of instruction, question, prompt, query, input and one of output, "
            'answer, response, completion, got {"question": "x"}',
        ),
        ("auto", [], "a row must be an object, got []"),
        (
            "auto",
            {"messages": [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "a=1"}}]},
            'call "f": arguments must be an object, got "a=1"',
        ),
        ("auto", {"messages": [USER, {**YES, "weight": 0}]}, "no turn is trained; every weight is 0"),
        (
            "auto",
            {
                "tools": TOOLS,
                "messages": [USER, *({"role": "tool_call", "content": CALL, "thinking": x} for x in "ab")],
            },
            "a turn of calls follows one with another thought or weight; expected the same",
        ),
        (
            "auto",
            {"tools": TOOLS, "messages": [USER, YES, {"role": "tool_call", "content": CALL, "weight": 0}]},
            "a turn of calls follows one with another thought or weight; expected the same",
        ),
        ("auto", {"messages": [USER, {**YES, "weight": 0.5}]}, "weight must be 0 or 1, got 0.5"),
        (
            "auto",
            {"messages": [USER, {"role": "assistant", "content": "<think>a</think>b", "thinking": "c"}]},
            "a message has two different thoughts, in its reasoning or in its <think> block; expected one",
        ),
        (
            "auto",
            {"messages": [USER, {**YES, "content": [{"type": "image_url", "image_url": "x"}]}]},
            'message 2 (assistant): content must be text, got [{"type": "image_url", "image_url": "x"}]',
        ),
        (
            "auto",
            {"messages": [USER, {**YES, "content": [{"text": "Rome", "url": "u"}]}]},
            'message 2 (assistant): content must be text, got [{"text": "Rome", "url": "u"}]',
        ),
        ("auto", {"messages": [{**USER, "content": []}, YES]}, "message 1 (user): content must be text, got []"),
        (
            "auto",
            {"messages": [USER, {**YES, "reasoning_content": [{"type": "image_url"}]}]},
            'reasoning must be text, got [{"type": "image_url"}]',
        ),
        (
            "auto",
            {"messages": [USER, {**YES, "reasoning_content": "a", "thinking": "b"}]},
            "a message has two different thoughts, in its reasoning or in its <think> block; expected one",
        ),
        (
            "auto",
            {"instruction": "Answer as a pirate.", "question": "rain?", "answer": "Yes."},
            'the row holds "instruction" and "question"; expected one of them',
        ),
        (
            "auto",
            {"question": "rain?", "answer": "Yes.", "response": "No."},
            'the row holds "answer" and "response"; expected one of them',
        ),
        (
            "auto",
            {"messages": [USER, YES], "conversations": [{"from": "human", "value": "x"}]},
            'the row holds "messages" and "conversations"; expected one of them',
        ),
        (
            "auto",
            {"messages": [USER, YES], "tools": [{"name": "f", "parameters": {"city": "the city"}}]},
            'tool 1 "f": parameters.city is not a keyword of JSON Schema; expected '
            '{"type": "object", "properties": {...}}',
        ),
        (
            "auto",
            {"messages": "[" * 100_000 + "]" * 100_000},
            "is nested too deeply; expected a few hundred levels at most",
        ),
        (
            "auto",
            {"messages": [USER, {**YES, "content": "a\ud800"}]},
            "message 2 (assistant): holds \\ud800, half a character; remove it or add the other half",
        ),
        (
            "auto",
            {"messages": [USER, YES], "tools": "[{"},
            'tools are not valid JSON: Expecting property name enclosed in double quotes: "[{"',
        ),
        (
            "auto",
            sharegpt(("human", "hi"), ("function_call", "f(1)"), tools=TOOLS),
            'a turn of calls is neither JSON nor a Python literal: "f(1)"',
        ),
        (
            "auto",
            sharegpt(("human", "hi"), ("function_call", "[1]"), tools=TOOLS),
            'a call must be {"name": "...", "arguments": {...}}, got 1',
        ),
        (
            "auto",
            sharegpt(("human", "hi"), ("robot", "x"), tools=TOOLS),
            'message 2 has the role "robot"; expected assistant',
        ),
        (
            "auto",
            sharegpt(("human", "hi"), ("gpt", "<tool_call>\n{'name': open('x')}\n</tool_call>"), tools=TOOLS),
            "the text inside <tool_call> is neither JSON nor a Python literal: \"\\n{'name': open('x')}\\n\"",
        ),
        (
            "auto",
            sharegpt(("human", "hi"), ("gpt", f"<tool_call>\n{CALL}"), tools=TOOLS),
            "a turn has <tool_call> without </tool_call>; expected both",
        ),
        (
            "auto",
            {"messages": [USER, {**YES, "content": f"<TOOLCALL>[{CALL}]"}], "tools": TOOLS},
            "a turn has <TOOLCALL> without </TOOLCALL>; expected both",
        ),
        (
            "auto",
            sharegpt(("system", "Use <tools>f, g</tools>"), ("human", "hi"), ("gpt", "x")),
            'the text inside <tools> is neither JSON nor a Python literal: "f, g"',
        ),
        ("auto", {"query": "x", "answers": "none", "tools": TOOLS}, '"answers" must be a list of objects, got "none"'),
        ("auto", {"query": "x", "answers": "{}", "tools": TOOLS}, '"answers" must be a list of objects, got {}'),
        ("auto", {"query": "x", "answers": [], "tools": TOOLS}, "message 2 (assistant): content is empty"),
        ("auto", {"chat": "hello"}, '"chat" must start with "USER:", got "hello"'),
        (
            "auto",
            {"chat": "USER: a\n\n\nASSISTANT: <functioncall> get it"},
            'the text after <functioncall> is neither JSON nor a Python literal: " get it"',
        ),
        (
            "auto",
            {"chat": 'USER: a\n\nASSISTANT: <functioncall> {"name": "f", "arguments": \'{a}\'} <|endoftext|>'},
            'call "f": arguments are not valid JSON: Expecting property name enclosed in double quotes: "{a}"',
        ),
        (
            "auto",
            sharegpt(("user", "a"), ("assistant", "[f(1)]"), tools=TOOLS),
            'call "f": expected arguments like key=value, each key once, got "1"',
        ),
        (
            "auto",
            sharegpt(("user", "a"), ("assistant", "[f(a=1, a=2)]"), tools=""),
            'call "f": expected arguments like key=value, each key once, got "a=2"',
        ),
        (
            "auto",
            sharegpt(("user", "a"), ("assistant", "[f(a=b)]")),
            'call "f": a is neither JSON nor a Python literal: "b"',
        ),
        ("auto", sharegpt(("user", "a"), ("assistant", "[f(a='b)]")), 'unpaired quote or bracket in "f(a=\'b)"'),
        (
            "auto",
            sharegpt(("user", "a"), ("assistant", "[f(a=1), g(b=2]])]")),
            'unpaired quote or bracket in "f(a=1), g(b=2]])"',
        ),
        ("auto", {"instruction": "a", "input": 5, "output": "b"}, '"input" must be text, got 5'),
        (
            "auto",
            {"instruction": "a", "output": "b", "history": [["u"]]},
            '"history" must be a list of [request, answer], got [["u"]]',
        ),
        (
            "auto",
            {"messages": [USER, YES], "tools": [tool({"a": {"type": "file"}})]},
            "tool 1 \"f\": parameters.properties.a.type is not valid JSON Schema: 'file' is not valid under any of the "
            "given schemas",
        ),
        (
            "auto",
            {"messages": [USER, YES], "tools": [tool({"a": {"pattern": "("}})]},
            "tool 1 \"f\": parameters.properties.a.pattern is not valid JSON Schema: '(' is not a 'regex'",
        ),
        (
            "auto",
            {"messages": [USER, YES], "tools": [{"name": "f", "parameters": [1]}]},
            'tool 1 "f": parameters must be an object, got [1]',
        ),
        (
            "auto",
            {
                "input": "x",
                "tools": TOOLS,
                "output": {"function_call": {"name": "get_weather", "arguments": {"city": "Rome", "days": 1e999}}},
            },
            "holds NaN or Infinity; expected a number that JSON has",
        ),
        (
            "auto",
            {"input": "x", "tools": TOOLS, "output": {"function_call": json.loads(CALL), "tool_calls": [1]}},
            "a message holds tool_calls and function_call; expected one of them",
        ),
        (
            "auto",
            {"messages": [USER, {**calls("Rome"), "function_call": json.loads(CALL)}], "tools": TOOLS},
            "a message holds tool_calls and function_call; expected one of them",
        ),
        (
            "auto",
            {
                "tools": TOOLS,
                "conversations": [
                    {"from": "human", "value": "x"},
                    {
                        "from": "gpt",
                        "value": f"<tool_call>{CALL}</tool_call>",
                        "tool_calls": calls("Oslo")["tool_calls"],
                    },
                ],
            },
            "a turn holds tool_calls and <tool_call>; expected one of them",
        ),
        (
            "auto",
            sharegpt(
                ("human", "x"), ("function_call", '{"name": "f", "arguments": {"hour": 7, "hour": 8}}'), tools=TOOLS
            ),
            "a turn of calls is neither JSON nor a Python literal: "
            '"{\\"name\\": \\"f\\", \\"arguments\\": {\\"hour\\": 7, \\"hour\\": 8}}"',
        ),
        (
            "auto",
            {
                "chat": "USER: a\n\nASSISTANT: b",
                "system": f'SYSTEM: {json.dumps(BARE)} {{"name": "g", "parameters": {{,}}}}',
            },
            'one of the tools is not JSON: "{\\"name\\": \\"g\\", \\"parameters\\": {,}}"',
        ),
        (
            "auto",
            sharegpt(
                ("user", "a"),
                ("assistant", "b"),
                system=f'Use [{json.dumps(BARE)}, {{"name": "g", "parameters": True}}]',
            ),
            'one of the tools is not JSON: "{\\"name\\": \\"g\\", \\"parameters\\": True}]"',
        ),
    ],
)
def test_a_malformed_twin_is_one_exact_line(tools_path, name, row, expected):
    assert read(row, name, tools_path)[:2] == (None, [expected])


def test_what_stands_beside_a_conversation_is_not_lost(tools_path):
    system = {"role": "system", "content": "Be brief."}
    for row in (
        {"system": "Be brief.", "messages": [USER, YES], "tools": []},
        {"system": "Be brief.", "messages": [system, USER, YES], "tools": []},
        {"system": "Be brief.", "query": "rain in Rome?", "answers": [json.loads(CALL)], "tools": TOOLS},
        {"input": "rain in Rome?", "output": {"content": "Yes."}, "system": "Be brief."},
    ):
        assert read(row, tools_path=tools_path)[0].messages[0] == system
    staff = 'Staff: [{"name": "Ann", "role": "cook"}]. Be kind.'
    example, _, _ = read(sharegpt(("human", "hi"), ("gpt", "hello"), system=staff))
    assert example.format == "sharegpt" and example.tools == [] and example.messages[0]["content"] == staff
    example, _, _ = read(sharegpt(("human", "hi"), ("gpt", "hello"), tools=None), tools_path=tools_path)
    assert example.format == "sharegpt" and example.tools == []
    row = {
        "input": "rain in Rome?",
        "tools": TOOLS,
        "output": {
            "content": "I look.",
            "tool_calls": [json.loads(CALL)],
            "function_call": None,
            "function_calls": None,
        },
    }
    assert read(row)[0].messages[1] == {**calls("Rome"), "content": "I look."}


def test_tools_that_are_no_json_are_read_as_python(tools_path):
    other = {"name": "g", "parameters": {"type": "object", "properties": {"x": {"type": "boolean", "default": True}}}}
    listed = f"<tools>[{json.dumps(BARE)}, {other!r}]</tools>"
    example, problems, _ = read(sharegpt(("system", listed), ("human", "hi"), ("gpt", "hello")))
    assert problems == [] and [tool["function"]["name"] for tool in example.tools] == ["get_weather", "g"]


def test_a_named_format_says_which_of_two_conversations_is_read():
    row = {
        "messages": [USER, YES],
        "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
        "tools": [],
    }
    checked = to_examples([("x:1", row)], Reading("no/such/tools.json", "openai"))
    assert checked.examples[0].messages == [USER, YES] and set(checked.unread) == {("row", "conversations")}
    assert "expected one of them" in read(row, "hermes")[1][0]


@pytest.mark.parametrize(
    "row, unread",
    [
        ({"query": "and tomorrow?", "answers": "[]", "history": [["rain today?", "No."]]}, [("row", "history")]),
        ({"messages": [USER, YES], "context": "in Rome", "prompt": "p"}, [("row", "context"), ("row", "prompt")]),
        ({"input": "a", "output": {"content": "b"}, "messages": [USER, YES]}, [("row", "messages")]),
        ({"prompt": "a", "completion": '{"city": "Rome"}'}, []),  # text, not a turn
    ],
)
def test_keys_of_another_format_are_named_too(row, unread):
    checked = to_examples([("x:1", {**row, "tools": []})], Reading("no/such/tools.json"))
    assert sorted(checked.unread) == unread


def test_what_the_formats_read_is_known():
    rows = [("x:1", row) for row, *_ in CASES.values()]
    checked = to_examples(rows, Reading(str(ROOT / "data" / "tools.json")))
    assert set(checked.unread) == {("row", key) for key in ("id", "category", "metadata", "parallel_tool_calls")}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "<t>",
        "</t>",
        "<t>1</t>",
        "a<t>1</t>b<t></t>",
        "</t><t>1</t>c</t>d",
        "<t>1<t>2</t>3</t>",
        "<t>1</t><t>2",
        "a\n<t>\n1\n</t>\nb",
        "<t>" * 3 + "</t>" * 2,
    ],
)
def test_texts_are_cut_at_tags_as_by_one_expression(text):
    assert split_tags(text, "t") == re.split("<t>(.*?)</t>", text, flags=re.DOTALL)


@pytest.mark.parametrize("tag", ["tool_call", "tool_response", "tools"])
def test_tags_that_are_never_closed_take_no_time(tag):
    """20,000 of them took 17 s; a row would, if a look for the end began at each."""
    start = time.process_time()
    assert split_tags(f"<{tag}>" * 200_000, tag) == [f"<{tag}>" * 200_000]
    assert time.process_time() - start < 5


def test_a_key_that_stands_twice_once_it_is_json_is_a_problem():
    row = sharegpt(
        ("human", "rain?"),
        ("gpt", "<tool_call>{'name': 'get_weather', 'arguments': {1: 'a', '1': 'b'}}</tool_call>"),
        tools=TOOLS,
    )
    assert read(row)[1][0].startswith("the text inside <tool_call> is neither JSON nor a Python literal: ")


def test_calls_in_two_places_of_one_turn_are_a_problem():
    row = {
        "conversations": [
            {"from": "human", "value": "rain?"},
            {
                "from": "function_call",
                "value": CALL,
                "tool_calls": [{"name": "get_weather", "arguments": {"city": "Oslo"}}],
            },
        ],
        "tools": TOOLS,
    }
    assert read(row)[1] == ["a turn of calls holds calls in content and in another key; expected one of them"]


WORDS = [
    "user",
    "assistant",
    "system",
    "tool",
    "tool_call",
    "human",
    "gpt",
    "function_call",
    "observation",
    "f",
    "object",
    "string",
    "str",
    "List[int]",
    "Optional[",
    "array",
    "function",
    "(",
    "#",
    "#/x",
    "http://[",
    "a{9999999999}",
    CALL,
    TOOLS,
    f"<tool_call>{CALL}</tool_call>",
    f"<tools>{TOOLS}</tools>",
    "<think>a</think>b",
    "[f(a=1)]",
    "[f(a={1: 2})]",
    "[f(a={(1,2): {3}})]",
    "USER: a\nASSISTANT: b",
    f"USER: a\nASSISTANT: <functioncall> {CALL}",
    f"<TOOLCALL>[{CALL}]</TOOLCALL>",
    "Use <tools>. Be brief.",
    "\ud800",
    "a\nb",
]
KEYS = [
    "messages",
    "conversations",
    "role",
    "content",
    "from",
    "value",
    "tools",
    "functions",
    "tool_calls",
    "function_call",
    "function_calls",
    "id",
    "tool_call_id",
    "name",
    "arguments",
    "function",
    "parameters",
    "properties",
    "type",
    "required",
    "items",
    "enum",
    "pattern",
    "$ref",
    "$id",
    "$schema",
    "$defs",
    "multipleOf",
    "minimum",
    "default",
    "anyOf",
    "prefixItems",
    "weight",
    "thinking",
    "reasoning_content",
    "input",
    "output",
    "query",
    "answers",
    "system",
    "chat",
    "instruction",
    "history",
    "question",
    "answer",
    "text",
    "additionalProperties",
    "patternProperties",
]
TEXTS = st.sampled_from(WORDS) | st.text(max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | TEXTS
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=5)
    ),
    max_leaves=25,
)
SCHEMA = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("type", "properties", "required", "items", "enum", "pattern", "$ref", "$id", "$schema", "multipleOf", "anyOf"),
        JSON,
    ),
)
TOOL = st.fixed_dictionaries({"name": TEXTS, "parameters": SCHEMA | JSON})
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": TEXTS,
        "from": TEXTS,
        "content": JSON | TEXTS,
        "value": TEXTS | JSON,
        "weight": SCALARS,
        "tool_calls": JSON | st.lists(st.fixed_dictionaries({"name": TEXTS, "arguments": JSON}), max_size=2),
        "function_call": JSON,
        "tool_call_id": SCALARS,
        "thinking": JSON,
    },
)
TALK = st.lists(TURN, max_size=4) | JSON
CALLING = st.fixed_dictionaries(
    {
        "input": TEXTS,
        "tools": st.lists(TOOL, max_size=2),
        "output": st.fixed_dictionaries({"function_call": st.fixed_dictionaries({"name": TEXTS, "arguments": JSON})}),
    }
)
ROW = CALLING | st.fixed_dictionaries(
    {},
    optional={
        "messages": TALK,
        "conversations": TALK,
        "prompt": TALK,
        "completion": TALK,
        "tools": st.lists(TOOL, max_size=2) | JSON,
        "functions": JSON,
        "system": TEXTS | JSON,
        "input": JSON,
        "output": JSON,
        "query": TEXTS | JSON,
        "answers": JSON,
        "chat": TEXTS | JSON,
        "instruction": TEXTS | JSON,
        "history": JSON,
        "answer": TEXTS | JSON,
    },
)


@pytest.mark.slow
@settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(rows=st.lists(JSON | ROW, min_size=1, max_size=4), name=st.sampled_from(["auto", "auto", *FORMATS]))
def test_arbitrary_json_is_an_example_or_a_located_problem(tools_path, rows, name):
    rows = [(f"x:{line}", row) for line, row in enumerate(rows, start=1)]
    checked = to_examples(rows, Reading(tools_path, name))
    valid, broken = {example.source for example in checked.examples}, {source for source, _ in checked.problems}
    assert checked.total == len(rows) and not valid & broken and valid | broken == {source for source, _ in rows}
    assert all(problem and "\n" not in problem and len(problem) < 800 for _, problem in checked.problems)
    again = to_examples([(example.source, to_row(example)) for example in checked.examples], Reading(tools_path))
    assert again.problems == []
    assert json.dumps(again.examples) == json.dumps(
        [e._replace(format="openai", syntax="", filled=False) for e in checked.examples]
    )


@pytest.mark.parametrize("text", ["[" * 900 + "]" * 900, '{"items": ' * 300 + "{}" + "}" * 300])
def test_deep_nesting_is_a_problem_and_not_a_crash(tools_path, text):
    deep = json.loads(text)
    for row in (
        {"messages": [USER, YES], "tools": [tool({"a": {"default": 1, "items": deep, "anyOf": [deep]}})]},
        {"messages": deep},
        {"input": "x", "output": {"function_call": {"name": "f", "arguments": text}}},
    ):
        _, problems, _ = read(row, tools_path=tools_path)
        assert len(problems) == 1 and "\n" not in problems[0]
