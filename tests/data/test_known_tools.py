"""Answers that call a tool of their own row in a syntax that is not read, and answers that only speak of it."""

import pytest
from conftest import WEATHER

from tool_calling.data.examples import Reading, to_examples

CALLS = [
    "<start_function_call>call:get_weather{city:<escape>Oslo<escape>}<end_function_call>",
    "I will call get_weather(city='Oslo') now.",
    "`get_weather(city='Oslo')`",
    '{"function": "get_weather", "city": "Oslo"}',
    '```json\n{"tool": "get_weather", "city": "Oslo"}\n```',
    '✿FUNCTION✿: get_weather\n✿ARGS✿: {"city": "Oslo"}',
    'to=functions.get_weather {"city": "Oslo"}',
    'get_weather\n{"city": "Oslo"}',
    "Action: get_weather[Oslo]",
    "<get_weather><city>Oslo</city></get_weather>",
    '[{"get_weather": {"city": "Oslo"}}]',
    "x = get_weather(city='Oslo')\nprint(x)",
]
TALK = [
    "You can use get_weather to see it.",
    "Use get_weather(city) for that.",
    "Ask get_weather() whenever you like.",
    "get_weather (or another tool) would know.",
    'The name of the tool is "get_weather".',
    "[get_weather] is a tool.",
    "my_get_weather(city='Oslo') is another tool's.",
]


def read(text: str):
    messages = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": text}]
    return to_examples([("x:1", {"messages": messages, "tools": [WEATHER]})], Reading("no/such/tools.json"))


@pytest.mark.parametrize("text", CALLS)
def test_a_call_in_a_syntax_that_is_not_read_is_a_problem(text):
    checked = read(text)
    assert checked.examples == [] and len(checked.problems) == 1
    assert checked.problems[0][1].startswith('an answer calls "get_weather" as text, ')
    assert checked.problems[0][1].endswith('; expected it in a syntax that is read, such as "tool_calls"')


@pytest.mark.parametrize("text", TALK)
def test_talk_about_a_tool_is_no_call(text):
    checked = read(text)
    assert checked.problems == [] and checked.examples[0].messages[-1] == {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>\n"
        "<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\nget_weather(city="Rome")',
        '[get_weather(city="Rome")]\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    ],
)
def test_no_call_is_left_in_the_text_beside_others(text):
    checked = read(text)
    assert checked.examples == [] and len(checked.problems) == 1
    assert checked.problems[0][1].startswith("an answer writes calls in two ways, hermes and ")
