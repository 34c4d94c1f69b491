"""Every format: a row as people have it in, the exact example out; its malformed twins; arbitrary JSON."""

import json
import re
import time

import pytest
from conftest import ROOT, WEATHER, native, run_script, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_qwen3_tool_calling as script
from tool_calling.data.examples import Checked, Example, Reading, read_examples, to_examples, to_row
from tool_calling.data.formats import FORMATS, split_tags
from tool_calling.data.messages import to_message
from tool_calling.data.rows import read_rows
from tool_calling.data.schemas import parse_type
from tool_calling.data.tools import check_call, check_tools, to_tools
from tool_calling.prompts import render_examples
from tool_calling.terminal import UserError, shorten

PARAMETERS = WEATHER["function"]["parameters"]
BARE = WEATHER["function"]
TOOLS = json.dumps([WEATHER])
USER = {"role": "user", "content": "rain in Rome?"}
REPLY = {"role": "tool", "content": '{"rain": true}'}
YES = {"role": "assistant", "content": "Yes."}
CALL = '{"name": "get_weather", "arguments": {"city": "Rome"}}'


def calls(*cities: str, **more) -> dict:
    """The assistant's message of an Example that asks for the weather of these cities."""
    return {
        "role": "assistant",
        "content": "",
        **more,
        "tool_calls": [
            {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}} for city in cities
        ],
    }


def read(row, name: str = "auto", tools_path: str = "no/such/tools.json"):
    """Return (the example or None, problems, changes) of one row."""
    checked = to_examples([("x:1", row)], tools_path, name)
    assert checked.total == 1 and bool(checked.examples) != bool(checked.problems)
    assert all(source == "x:1" for source, _ in checked.problems)
    return (checked.examples or [None])[0], [problem for _, problem in checked.problems], dict(checked.changes)


CALL_AS_TEXT = (
    "message 2 (assistant): content is a call as text, {}; expected it in a form that is read as a call, such "
    'as "tool_calls"'
)


def sharegpt(*turns: tuple[str, str], **more) -> dict:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


def tool(properties: dict, required: list | None = None, name: str = "f") -> dict:
    """A tool in the OpenAI shape with these parameters."""
    parameters = {"type": "object", "properties": properties, **({} if required is None else {"required": required})}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


HERMES_SYSTEM = (
    "You are a function calling AI model. You are provided with function signatures within <tools> </tools> XML tags. "
    "You may call one or more functions. Don't make assumptions.\n<tools>\n%s\n</tools>\n"
    "For each function call return a JSON object:\n{'title': 'FunctionCall', 'type': 'object'}\nEach call should be "
    "enclosed within <tool_call> </tool_call> XML tags.\n<tool_call>\n{'name': <name>}\n</tool_call>"
)
TOOLACE_SYSTEM = (
    "You are an expert in composing functions. Here is a list of functions in JSON format that you can invoke:\n%s\n"
    "Put it in the format of [func1(params_name=params_value, params_name2=params_value2...), func2(params)]"
)
TRENDS = {
    "name": "Market Trends API/v2.1",
    "description": "d",
    "required": None,
    "parameters": {
        "type": "dict",
        "required": ["trend_type"],
        "properties": {
            "trend_type": {"type": "string"},
            "n": {"type": "int"},
            "share": {"type": "float"},
            "all": {"type": "boolean"},
            "tags": {"type": "list", "items": {"type": "str"}},
            "more": {"type": "dict"},
        },
    },
}
TRENDS_TOOL = tool(
    {
        "trend_type": {"type": "string"},
        "n": {"type": "integer"},
        "share": {"type": "number"},
        "all": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "more": {"type": "object"},
    },
    ["trend_type"],
    TRENDS["name"],
)
TRENDS_TOOL["function"]["parameters"] = {
    key: TRENDS_TOOL["function"]["parameters"][key] for key in ("type", "required", "properties")
}
GLAIVE_CHAT = (
    'USER: rain in Rome?\n\n\nASSISTANT: <functioncall> {"name": "get_weather", "arguments": '
    '\'{"city": "L\'Aquila"}\'} <|endoftext|>\n\n\nFUNCTION RESPONSE: {"rain": true}\n\n\n'
    "ASSISTANT: Yes. <|endoftext|>\n\n\nUSER: thanks\n\n\nASSISTANT: You're welcome. <|endoftext|>"
)
MOBILE_TOOL = {
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "OBJECT",
            "required": ["city"],
            "properties": {
                "city": {"type": "STRING"},
                "days": {"type": "INTEGER", "minimum": 1, "maximum": 7},
                "units": {"type": "STRING", "enum": ["celsius", "fahrenheit"]},
            },
        },
    }
}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


CASES = {  # name: (row, format, messages, tools)
    "native": (
        {**native("rain in Rome?", ("get_weather", {"city": "Rome"})), "system": "Be brief.", "tools": [WEATHER]},
        "native",
        [{"role": "system", "content": "Be brief."}, USER, calls("Rome")],
        [WEATHER],
    ),
    "native with content and thought": (
        {
            "input": "rain in Rome?",
            "tools": TOOLS,
            "output": {
                "content": "<think>\nRome it is.\n</think>\n\nI look.",
                "function_calls": [json.loads(CALL)] * 2,
            },
        },
        "native",
        [USER, calls("Rome", "Rome", content="I look.", reasoning_content="Rome it is.")],
        [WEATHER],
    ),
    "openai": (
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "weight": 0,
                    "thinking": "Rome?",
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
                        }
                    ],
                },
                {**REPLY, "tool_call_id": "c1", "name": "get_weather"},
                {"role": "assistant", "content": "<think></think>Yes.", "weight": 1, "reasoning_content": ""},
            ],
            "tools": [WEATHER],
            "parallel_tool_calls": False,
        },
        "openai",
        [
            {"role": "system", "content": "Be brief."},
            USER,
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "Rome?",
                "weight": 0,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
                ],
            },
            {**REPLY, "tool_call_id": "c1"},
            YES,
        ],
        [WEATHER],
    ),
    "openai of 2023": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
                },
                {"role": "function", "name": "get_weather", "content": '{"rain": true}'},
                YES,
            ],
            "functions": [BARE],
        },
        "openai",
        [USER, calls("Rome"), REPLY, YES],
        [WEATHER],
    ),
    "openai as JSON text": (
        {"messages": json.dumps([USER, {"role": "assistant", "tool_calls": f"[{CALL}]"}]), "tools": [json.dumps(BARE)]},
        "openai",
        [USER, calls("Rome")],
        [WEATHER],
    ),
    "hermes with a list of calls": (
        {
            "messages": [USER, {"role": "assistant", "content": f"I look.\n<TOOLCALL>[{CALL}, {CALL}]</TOOLCALL>"}],
            "tools": [json.dumps(BARE)],
        },
        "hermes",
        [USER, calls("Rome", "Rome", content="I look.")],
        [WEATHER],
    ),
    "hermes in prompt and completion": (
        {
            "prompt": [{"role": "system", "content": f"Be brief. <tools>[{json.dumps(BARE)}]</tools>"}, USER],
            "completion": [{"role": "assistant", "content": f"<TOOLCALL>[{CALL}]</TOOLCALL>"}],
            "functions": [],
        },
        "prompt-completion",
        [{"role": "system", "content": "Be brief."}, USER, calls("Rome")],
        [WEATHER],
    ),
    "openai that speaks of tags": (
        {
            "messages": [{"role": "system", "content": "Use what stands in <tools>. Be brief."}, USER, calls("Rome")],
            "tools": [WEATHER],
        },
        "openai",
        [{"role": "system", "content": "Use what stands in <tools>. Be brief."}, USER, calls("Rome")],
        [WEATHER],
    ),
    "hermes in messages that name their tools": (
        {"messages": [{"role": "system", "content": f"Be brief.\n<tools>{json.dumps(BARE)}</tools>"}, USER, YES]},
        "hermes",
        [{"role": "system", "content": "Be brief."}, USER, YES],
        [WEATHER],
    ),
    "alpaca with functions": (
        {"instruction": "rain in Rome?", "output": "Yes.", "functions": [BARE], "tools": None},
        "alpaca",
        [USER, YES],
        [WEATHER],
    ),
    "prompt-completion": (
        {
            "prompt": [USER, {"role": "assistant", "tool_calls": [json.loads(CALL)]}, REPLY],
            "completion": [YES],
            "tools": [WEATHER],
        },
        "prompt-completion",
        [USER, {**calls("Rome"), "weight": 0}, REPLY, YES],
        [WEATHER],
    ),
    "sharegpt-tools": (
        sharegpt(
            ("human", "rain in Rome?"),
            ("function_call", f"[{CALL}, {CALL}]"),
            ("observation", '{"rain": true}'),
            ("gpt", "Yes."),
            system="",
            tools=TOOLS,
        ),
        "sharegpt-tools",
        [USER, calls("Rome", "Rome"), REPLY, YES],
        [WEATHER],
    ),
    "sharegpt-tools with functions, none of them called": (
        {**sharegpt(("human", "rain in Rome?"), ("gpt", "Yes.")), "functions": [BARE]},
        "sharegpt-tools",
        [USER, YES],
        [WEATHER],
    ),
    "sharegpt-tools without tools": (
        sharegpt(("human", "rain in Rome?"), ("gpt", "Yes."), system="Be brief.", tools=""),
        "sharegpt-tools",
        [{"role": "system", "content": "Be brief."}, USER, YES],
        [],
    ),
    "hermes": (
        sharegpt(
            ("system", HERMES_SYSTEM % "[{'type': 'function'}]"),
            ("human", "rain in Rome?"),
            (
                "gpt",
                "I look.\n<tool_call>\n{'name': 'get_weather', 'arguments': {'city': \"L'Aquila\"}}\n"
                f"</tool_call>\n<tool_call>\n{CALL}\n</tool_call>",
            ),
            ("tool", '<tool_response>\n{"rain": true}\n</tool_response>\n<tool_response>no</tool_response>'),
            ("gpt", "Yes."),
            tools=TOOLS,
            category="weather",
        ),
        "hermes",
        [
            {"role": "system", "content": "You are a function calling AI model."},
            USER,
            calls("L'Aquila", "Rome", content="I look."),
            REPLY,
            {"role": "tool", "content": "no"},
            YES,
        ],
        [WEATHER],
    ),
    "hermes with its tools in the system text": (
        sharegpt(
            ("system", HERMES_SYSTEM % repr([WEATHER]) + "\nBe brief."),
            ("human", "rain in Rome?"),
            ("gpt", f"<tool_call>\n{CALL}\n</tool_call>"),
        ),
        "hermes",
        [{"role": "system", "content": "You are a function calling AI model.\nBe brief."}, USER, calls("Rome")],
        [WEATHER],
    ),
    "hermes with texts as lists of parts": (
        {
            "messages": [
                {"role": "system", "content": parts(HERMES_SYSTEM % repr([WEATHER]))},
                {**USER, "content": parts(USER["content"])},
                {"role": "assistant", "content": parts(f"<tool_call>\n{CALL}\n", "</tool_call>")},
            ]
        },
        "hermes",
        [{"role": "system", "content": "You are a function calling AI model."}, USER, calls("Rome")],
        [WEATHER],
    ),
    "toolace in messages": (
        {
            "messages": [
                {"role": "system", "content": TOOLACE_SYSTEM % json.dumps([BARE])},
                USER,
                {"role": "assistant", "content": "[get_weather(city='Rome')]"},
            ]
        },
        "toolace",
        [USER, calls("Rome")],
        [WEATHER],
    ),
    "prompt and completion as JSON texts": (
        {"prompt": json.dumps([USER]), "completion": json.dumps([YES]), "tools": TOOLS},
        "prompt-completion",
        [USER, YES],
        [WEATHER],
    ),
    "prompt and completion as texts in brackets": (
        {"prompt": "[rain in Rome?]", "completion": "[1]"},
        "alpaca",
        [{"role": "user", "content": "[rain in Rome?]"}, {"role": "assistant", "content": "[1]"}],
        [],
    ),
    "xlam": (
        {
            "id": 0,
            "query": "rain in Rome?",
            "answers": f"[{CALL}]",
            "tools": json.dumps(
                [
                    {
                        "name": "get_weather",
                        "description": "d",
                        "parameters": {
                            "city": {"description": "c", "type": "str"},
                            "type": {"type": "str, optional", "default": ""},
                            "properties": {"type": "List[int]", "default": [1]},
                            "at": {"type": "Tuple[float, float], optional"},
                        },
                    }
                ]
            ),
        },
        "xlam",
        [USER, calls("Rome")],
        [
            tool(
                {
                    "city": {"description": "c", "type": "string"},
                    "type": {"type": "string", "default": ""},
                    "properties": {"type": "array", "items": {"type": "integer"}, "default": [1]},
                    "at": {
                        "type": "array",
                        "prefixItems": [{"type": "number"}, {"type": "number"}],
                        "minItems": 2,
                        "maxItems": 2,
                    },
                },
                ["city"],
                "get_weather",
            )
        ],
    ),
    "glaive": (
        {
            "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required "
            f"-\n{json.dumps(BARE, indent=4)}\n" + json.dumps({"name": "g", "parameters": {}}),
            "chat": GLAIVE_CHAT,
        },
        "glaive",
        [
            USER,
            calls("L'Aquila"),
            REPLY,
            YES,
            {"role": "user", "content": "thanks"},
            {"role": "assistant", "content": "You're welcome."},
        ],
        [WEATHER, {"type": "function", "function": {"name": "g", "parameters": {}}}],
    ),
    "glaive without functions": (
        {
            "system": "SYSTEM: You are a helpful assistant, with no access to external functions.",
            "chat": "USER: rain in Rome?\n\n\nASSISTANT: Yes. <|endoftext|>",
        },
        "glaive",
        [
            {"role": "system", "content": "You are a helpful assistant, with no access to external functions."},
            USER,
            YES,
        ],
        [],
    ),
    "toolace": (
        sharegpt(
            ("user", "rain in Rome?"),
            (
                "assistant",
                '[Market Trends API/v2.1(trend_type="A, (B]", n=3, share=0.5, all=true, '
                'tags=[\'x\', "y"], more={"k": null, \'l\': [true, "true"]}), '
                "Market Trends API/v2.1(trend_type='it\\'s')]",
            ),
            ("tool", '{"rain": true}'),
            ("assistant", "Yes."),
            system=TOOLACE_SYSTEM % json.dumps([TRENDS]),
        ),
        "toolace",
        [
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": TRENDS["name"], "arguments": arguments}}
                    for arguments in (
                        {
                            "trend_type": "A, (B]",
                            "n": 3,
                            "share": 0.5,
                            "all": True,
                            "tags": ["x", "y"],
                            "more": {"k": None, "l": [True, "true"]},
                        },
                        {"trend_type": "it's"},
                    )
                ],
            },
            REPLY,
            YES,
        ],
        [TRENDS_TOOL],
    ),
    "swift": (
        {
            "tools": TOOLS,
            "messages": [
                {"role": "system", "content": "Be brief."},
                USER,
                {"role": "assistant", "content": "I look."},
                {"role": "tool_call", "content": CALL},
                {"role": "tool_call", "content": CALL},
                {"role": "tool_response", "content": '{"rain": true}'},
                {"role": "tool", "content": "no"},
                YES,
            ],
        },
        "swift",
        [
            {"role": "system", "content": "Be brief."},
            USER,
            calls("Rome", "Rome", content="I look."),
            REPLY,
            {"role": "tool", "content": "no"},
            YES,
        ],
        [WEATHER],
    ),
    "mobile-actions": (
        {
            "metadata": "train",
            "tools": [MOBILE_TOOL],
            "messages": [
                {"role": "developer", "content": "Today is Monday."},
                USER,
                {"role": "assistant", "tool_calls": [{"function": json.loads(CALL)}]},
            ],
        },
        "mobile-actions",
        [{"role": "system", "content": "Today is Monday."}, USER, calls("Rome")],
        [
            {
                "type": "function",
                "function": {
                    **BARE,
                    "parameters": {key: PARAMETERS[key] for key in ("type", "required", "properties")},
                },
            }
        ],
    ),
    "alpaca": (
        {
            "instruction": "Is there rain",
            "input": "in Rome?",
            "output": "Yes.",
            "system": "Be brief.",
            "history": [["rain in Rome?", "Yes."]],
        },
        "alpaca",
        [
            {"role": "system", "content": "Be brief."},
            USER,
            YES,
            {"role": "user", "content": "Is there rain\nin Rome?"},
            YES,
        ],
        [],
    ),
    "input and output as text": ({"input": "rain in Rome?", "output": "Yes."}, "alpaca", [USER, YES], []),
    "question, context and answer": (
        {"question": "rain in Rome?", "context": "It is May.", "answer": "Yes."},
        "alpaca",
        [{"role": "user", "content": "rain in Rome?\nIt is May."}, YES],
        [],
    ),
    "native with an instruction": (
        {"instruction": "Answer me:", "input": "rain in Rome?", "output": {"content": "Yes."}, "tools": TOOLS},
        "native",
        [{"role": "user", "content": "Answer me:\nrain in Rome?"}, YES],
        [WEATHER],
    ),
    "native with a history and a thought": (
        {
            "input": "rain in Rome?",
            "history": [["hi", "Yes."]],
            "tools": TOOLS,
            "output": {"reasoning": "Look.", "function_call": json.loads(CALL)},
        },
        "native",
        [{"role": "user", "content": "hi"}, YES, USER, calls("Rome", reasoning_content="Look.")],
        [WEATHER],
    ),
    "hermes with empty tools beside it": (
        sharegpt(
            ("system", f"Call these. <tools>[{json.dumps(WEATHER)}]</tools>"),
            ("human", "rain in Rome?"),
            ("gpt", "Yes."),
            tools="[]",
        ),
        "hermes",
        [{"role": "system", "content": "Call these."}, USER, YES],
        [WEATHER],
    ),
    "sharegpt with its system text twice": (
        sharegpt(("system", "Be brief."), ("human", "rain in Rome?"), ("gpt", "Yes."), system="Be brief."),
        "sharegpt",
        [{"role": "system", "content": "Be brief."}, USER, YES],
        [],
    ),
    "question and answer": ({"question": "rain in Rome?", "answer": "Yes."}, "alpaca", [USER, YES], []),
    "prompt and completion": (
        {"prompt": "rain in Rome?", "completion": "<think>so</think>Yes."},
        "alpaca",
        [USER, {**YES, "reasoning_content": "so"}],
        [],
    ),
    "sharegpt": (sharegpt(("human", "rain in Rome?"), ("gpt", "Yes.")), "sharegpt", [USER, YES], []),
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_becomes_its_exact_example(name, tools_path):
    row, found, messages, tools = CASES[name]
    example, problems, _ = read(row, tools_path=tools_path)
    assert problems == []
    expected = json.loads(open(tools_path).read()) if tools is None else tools
    assert example == Example("x:1", messages, expected, found)
    assert json.dumps(example.tools) == json.dumps(expected)  # the order of keys too: the model sees it
    by_name, problems, _ = read(row, found, tools_path)
    assert (by_name, problems) == (example, [])


def test_the_formats_of_the_flag_are_those_of_the_table():
    assert {found for _, found, _, _ in CASES.values()} == set(FORMATS)


def test_rows_of_every_format_may_be_mixed_and_converting_twice_changes_nothing(tools_path):
    rows = [(f"x:{i}", row) for i, (row, *_) in enumerate(CASES.values(), start=1)]
    checked = to_examples(rows, tools_path)
    assert checked.problems == [] and len(checked.examples) == checked.total == len(CASES)
    lines = [(example.source, json.loads(json.dumps(to_row(example)))) for example in checked.examples]
    again = to_examples(lines, "no/such/tools.json")
    assert again == Checked([example._replace(format="openai") for example in checked.examples], total=len(CASES))


def test_a_converted_row_has_its_arguments_as_text():
    example, _, _ = read(CASES["openai"][0])
    assert to_row(example)["messages"][2]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    ]


@pytest.mark.parametrize(
    "name, row, expected",
    [
        ("openai", {}, '"messages" is missing; expected a list of objects'),
        ("sharegpt", {"messages": 1}, '"messages" must be a list of objects, got 1'),
        ("glaive", {"system": "x"}, '"chat" is missing; expected text'),
        ("xlam", {"query": "x"}, '"answers" is missing; expected a list of calls'),
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
            "a turn of calls joins one that has another thought or weight; expected the same",
        ),
        (
            "auto",
            {"tools": TOOLS, "messages": [USER, YES, {"role": "tool_call", "content": CALL, "weight": 0}]},
            "a turn of calls joins one that has another thought or weight; expected the same",
        ),
        (
            "openai",
            {"tools": TOOLS, "messages": [USER, {**YES, "content": f"<tool_call>{CALL}</tool_call>"}]},
            "message 2 (assistant): holds the control token <tool_call>, which would forge a turn; remove it, or read it as a "
            "call with --format hermes",
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
            '"instruction" and "question" both have a place in the row; expected one of them',
        ),
        (
            "auto",
            {"question": "rain?", "answer": "Yes.", "response": "No."},
            '"answer" and "response" both have a place in the row; expected one of them',
        ),
        (
            "auto",
            {"input": "rain?", "output": f'{{"function_call": {CALL}}}'},
            CALL_AS_TEXT.format(shorten(f'{{"function_call": {CALL}}}', 40)),
        ),
        (
            "auto",
            {"query": "rain?", "answer": f"[{CALL}]", "tools": TOOLS},
            CALL_AS_TEXT.format(shorten(f"[{CALL}]", 40)),
        ),
        (
            "auto",
            {"messages": [USER, {**YES, "content": CALL}], "tools": TOOLS},
            CALL_AS_TEXT.format(shorten(CALL, 40)),
        ),
        (
            "auto",
            {"messages": [USER, {**YES, "content": f"```json\n{CALL}\n```"}], "tools": TOOLS},
            CALL_AS_TEXT.format(shorten(f"```json\n{CALL}\n```", 40)),
        ),
        ("auto", sharegpt(("human", "rain?"), ("gpt", CALL), tools=TOOLS), CALL_AS_TEXT.format(shorten(CALL, 40))),
        (
            "auto",
            {"input": "rain?", "output": {"content": CALL}, "tools": TOOLS},
            CALL_AS_TEXT.format(shorten(CALL, 40)),
        ),
        (
            "auto",
            {"messages": [USER, {**YES, "content": f"<functioncall> {CALL}"}], "tools": TOOLS},
            CALL_AS_TEXT.format(shorten(f"<functioncall> {CALL}", 40)),
        ),
        (
            "auto",
            {"messages": [USER, {**YES, "content": f"[TOOL_CALLS] [{CALL}]"}], "tools": TOOLS},
            CALL_AS_TEXT.format(shorten(f"[TOOL_CALLS] [{CALL}]", 40)),
        ),
        (
            "auto",
            {"messages": [USER, YES], "conversations": [{"from": "human", "value": "x"}]},
            '"messages" and "conversations" both have a place in the row; expected one of them',
        ),
        (
            "auto",
            {"messages": [USER, YES], "tools": [{"name": "f", "parameters": {"city": "the city"}}]},
            'tool 1 "f": parameters.city is no word of JSON Schema; expected {"type": "object", "properties": {...}}',
        ),
        (
            "auto",
            {"messages": "[" * 100_000 + "]" * 100_000},
            "is nested too deeply; expected at most some hundred levels",
        ),
        (
            "auto",
            {"messages": [USER, {**YES, "content": "a\ud800"}]},
            "message 2 (assistant): holds \\ud800, one half of a character; remove it or write the other half too",
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
        ("auto", {"query": "x", "answers": "none", "tools": TOOLS}, '"answers" must be a list of calls, got "none"'),
        ("auto", {"query": "x", "answers": "{}", "tools": TOOLS}, '"answers" must be a list of calls, got {}'),
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
        (
            "auto",
            sharegpt(("user", "a"), ("assistant", "[f(a='b)]")),
            'a quote or bracket has no partner in "f(a=\'b)"',
        ),
        (
            "auto",
            sharegpt(("user", "a"), ("assistant", "[f(a=1), g(b=2]])]")),
            'a quote or bracket has no partner in "f(a=1), g(b=2]])"',
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
            "tool 1 \"f\": parameters.properties.a.type is not valid JSON Schema: 'file' is not valid under any of the given "
            "schemas",
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
            '"output" holds function_call and tool_calls; expected one of them',
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
                    {"from": "gpt", "value": f"<tool_call>{CALL}</tool_call>", "tool_calls": [json.loads(CALL)]},
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
            'a tool beside others is not JSON: "{\\"name\\": \\"g\\", \\"parameters\\": {,}}"',
        ),
        (
            "auto",
            sharegpt(
                ("user", "a"),
                ("assistant", "b"),
                system=f'Use [{json.dumps(BARE)}, {{"name": "g", "parameters": True}}]',
            ),
            'a tool beside others is not JSON: "{\\"name\\": \\"g\\", \\"parameters\\": True}]"',
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


def test_rows_without_tools_need_the_tools_file():
    with pytest.raises(UserError) as error:
        read({"messages": [USER, YES]})
    assert str(error.value) == "x:1: has no tools of its own, and --tools_path no/such/tools.json is not there"


def replied(call_ids: list, reply_ids: list) -> dict:
    """A row with these ids at its calls and replies (None: no id)."""
    made = [{**({"id": name} if name else {}), "function": json.loads(CALL)} for name in call_ids]
    replies = [{**REPLY, **({"tool_call_id": name} if name else {})} for name in reply_ids]
    return {"tools": TOOLS, "messages": [USER, {"role": "assistant", "tool_calls": made}, *replies, YES]}


@pytest.mark.parametrize(
    "call_ids, reply_ids, expected",
    [
        (["a", "b"], ["b", "a"], []),
        (["a", "b"], ["a", "c"], ['message 4 answers call "c", which is not open']),
        (["a", "b"], ["a", "a"], ['message 4 answers call "a", which is not open']),
        (
            ["a", "b"],
            ["a"],
            ['message 4 has the role "assistant"; expected tool; 1 of its calls still wait for their reply'],
        ),
        ([None, None], [None], []),
        ([None, None], [None, None], []),
        (["a", "b"], [None], []),
        ([None, None], [], ['message 3 has the role "assistant"; expected tool']),
        ([None], [None, None], ['message 4 has the role "tool"; expected assistant']),
    ],
)
def test_replies_answer_the_open_calls(call_ids, reply_ids, expected):
    assert read(replied(call_ids, reply_ids))[1] == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Union[list, tuple]", {"type": ["array"]}),
        ("Optional[Optional[int]]", {"type": ["integer", "null"]}),
        ("str", {"type": "string"}),
        ("STRING", {"type": "string"}),
        ("Int", {"type": "integer"}),
        ("dict", {"type": "object"}),
        ("tuple", {"type": "array"}),
        ("any", {}),
        ("None", {"type": "null"}),
        ("set", {"type": "array", "uniqueItems": True}),
        ("Set[str]", {"type": "array", "items": {"type": "string"}, "uniqueItems": True}),
        ("List[List[int]]", {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
        ("Dict[str, int]", {"type": "object", "additionalProperties": {"type": "integer"}}),
        ("typing.Optional[str]", {"type": ["string", "null"]}),
        ("int | None", {"type": ["integer", "null"]}),
        ("Union[int, List[str]]", {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]}),
        ("Tuple[float, ...]", {"type": "array", "items": {"type": "number"}}),
        ("str, optional", {"type": "string"}),
        ("List[int], optional", {"type": "array", "items": {"type": "integer"}}),
        ("Optional[Union[int, str]]", {"type": ["integer", "string", "null"]}),
        ("Tuple[()]", None),
        (
            "int | List[str] | None",
            {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
        ),
        ("Callable[[float], float]", None),
        ("__import__('os').getcwd()", None),
        ("a\0b", None),
        ("(" * 999, None),
        ("List[", None),
        ("", None),
        ("Dict[int, str]", None),
        ("file", None),
    ],
)
def test_a_type_is_read_only_where_it_is_clear(text, expected):
    assert parse_type(text) == expected


def test_types_are_replaced_only_where_a_schema_stands_and_every_change_is_counted():
    """A parameter may be called type, items or properties, and values may look like types."""
    given = {
        "name": "f",
        "description": "d",
        "parameters": {
            "type": "dict",
            "properties": {
                "type": {"type": "str", "enum": ["dict", "str"], "required": True},
                "properties": {"type": "DICT", "properties": {"type": {"type": "float", "default": None}}},
                "items": {"type": "list", "items": {"type": ["STRING", "null"]}, "enum": None, "required": False},
            },
        },
    }
    tools, changes = to_tools([given])
    assert tools == [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "d",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "type": {"type": "string", "enum": ["dict", "str"]},
                        "properties": {"type": "object", "properties": {"type": {"type": "number", "default": None}}},
                        "items": {"type": "array", "items": {"type": ["string", "null"]}},
                    },
                    "required": ["type"],
                },
            },
        }
    ]
    assert changes == {
        "bare function -> tool": 1,
        "type dict -> object": 1,
        "type str -> string": 1,
        "type DICT -> object": 1,
        "type float -> number": 1,
        "type list -> array": 1,
        "type STRING or null -> string or null": 1,
        "enum null -> removed": 1,
        "required true or false in a property -> list": 2,
    }
    assert to_tools(tools) == (tools, {})  # and once is enough
    assert to_tools([WEATHER]) == ([WEATHER], {})


@pytest.mark.parametrize(
    "given, expected, change",
    [
        ({"type": "STRING", "nullable": True}, {"type": ["string", "null"]}, "nullable -> type null"),
        ({"type": ["integer", "null"], "nullable": True}, {"type": ["integer", "null"]}, "nullable -> type null"),
        ({"type": "string", "nullable": False}, {"type": "string"}, "nullable false -> removed"),
        ({"enum": [1], "nullable": True}, {"enum": [1], "nullable": True}, None),  # without a type it says nothing
        ({"minimum": 0, "exclusiveMinimum": True}, {"exclusiveMinimum": 0}, "exclusiveMinimum true -> number"),
        ({"maximum": 9, "exclusiveMaximum": False}, {"maximum": 9}, "exclusiveMaximum without effect -> removed"),
        ({"exclusiveMinimum": True}, {}, "exclusiveMinimum without effect -> removed"),
        ({"exclusiveMaximum": 9}, {"exclusiveMaximum": 9}, None),
        (
            {"type": "Union[int, List[str]]", "nullable": True},
            {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
            "nullable -> type null",
        ),
        (
            {"anyOf": [{"type": "string"}], "nullable": True},
            {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "nullable -> type null",
        ),
        (
            {"type": "object", "properties": {"a": {"type": "string"}, "b": None}},
            {"type": "object", "properties": {"a": {"type": "string"}}},
            "property null -> removed",
        ),
        ({"type": "array", "items": []}, {"type": "array"}, "items of a tuple -> prefixItems"),
        (
            {"items": [{"type": "number"}, {"type": "number", "nullable": True}], "additionalItems": False},
            {"prefixItems": [{"type": "number"}, {"type": ["number", "null"]}], "items": False},
            "items of a tuple -> prefixItems",
        ),
    ],
)
def test_schemas_of_openapi_and_earlier_drafts_are_read_as_they_are_meant(given, expected, change):
    tools, changes = to_tools([tool({"nullable": given})])  # which is a parameter's name here
    assert tools == [tool({"nullable": expected})] and (changes[change] == 1 if change else not changes)
    assert to_tools(tools) == (tools, {})
    assert check_tools(tools)[1] == []


def test_flat_parameters_beside_a_list_of_those_required_are_a_schema():
    given = {"name": "f", "parameters": {"city": {"type": "str"}, "day": {"type": "int"}, "required": ["city"]}}
    tools, changes = to_tools([given])
    assert tools == [
        {
            "type": "function",
            "function": {
                "name": "f",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}, "day": {"type": "integer"}},
                    "required": ["city"],
                },
            },
        }
    ]
    assert changes["flat parameters -> schema"] == 1 and to_tools(tools) == (tools, {})
    validators, problems = check_tools(tools)
    assert problems == [] and check_call("f", {"city": 5, "zz": 1}, validators) == [
        "arguments.zz is not an argument of this tool",
        "arguments.city must be a string, got 5",
    ]


def test_unknown_arguments_inside_a_tuple_are_refused_too():
    pair = {"type": "array", "items": [{"type": "number"}, {"type": "object", "properties": {"a": {"type": "string"}}}]}
    validators, _ = check_tools(to_tools([tool({"pair": pair})])[0])
    assert check_call("f", {"pair": [1, {"a": "x"}]}, validators) == []
    assert check_call("f", {"pair": [1, {"b": "x"}]}, validators) == [
        "arguments.pair[1].b is not an argument of this tool"
    ]


def test_reasoning_that_holds_nothing_is_none():
    message = {"role": "assistant", "content": "Yes.", "reasoning_content": [], "thinking": None, "reasoning": {}}
    assert to_message(message) == YES
    parts_of_it = {**message, "reasoning_content": parts("It ", "rains.")}
    assert to_message(parts_of_it) == {**YES, "reasoning_content": "It rains."}


def test_a_tools_file_that_cannot_be_read_is_named_itself(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text('["{broken"]')
    with pytest.raises(UserError) as error:
        read(native("rain in Rome?", content="Yes."), tools_path=str(path))
    assert str(error.value) == (
        f'{path}: tool 1 is not valid JSON: Expecting property name enclosed in double quotes: "{{broken"'
    )


def test_changes_are_counted_once_per_list_of_tools_and_shown(tmp_path, capsys):
    rows = [CASES["mobile-actions"][0]] * 3
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert len(read_examples([path], Reading(str(ROOT / script.TOOLS_PATH)))[0]) == 3
    assert capsys.readouterr().out.splitlines()[0] == (
        "read     tools normalised: type STRING → string 2, type function added 1, type OBJECT → object 1, "
        "type INTEGER → integer 1"
    )


def test_keys_that_no_format_has_are_named(tmp_path, capsys):
    turn = {"role": "assistant", "content": "I look.", "tool_call": [json.loads(CALL)], "audio": None, "refusal": ""}
    rows = [{"messages": [USER, turn, USER, turn], "id": number, "available_tools": [BARE]} for number in range(2)]
    rows += [
        {"prompt": [USER], "completion": [turn], "id": 2},
        {"messages": json.dumps([USER, turn]), "id": 3},
        {"input": "rain in Rome?", "output": {"content": "Yes.", "function_cals": [json.loads(CALL)]}, "id": 4},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, sharegpt(("human", "rain in Rome?"), ("gpt", "Yes."), id=0)])
    assert len(read_examples([path], Reading(str(ROOT / script.TOOLS_PATH)))[0]) == 6
    assert capsys.readouterr().out.splitlines()[0] == (
        'read     not read, as the format has no such key: "tool_call" of 6 turns, "function_cals" of 1 output, "id" of 6 '
        'rows, "available_tools" of 2 rows'
    )


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "John", "arguments": ["pro", "con"]}',
        '{"name": "x", "function_call": null}',
        '{"city": "Rome"}',
        '[{"role": "assistant", "tool_calls": []}]',
        "```json\n{}\n``` is empty",
        "a" + " " * 1_000_000 + "b",
        "`{" + " " * 1_000_000,
    ],
)
def test_answers_that_look_like_calls_and_are_none_are_text(content):
    example, problems, _ = read(
        {"messages": [{**USER, "content": "What is [TOOL_CALLS]?"}, {**YES, "content": content}]},
        tools_path=str(ROOT / "data" / "tools.json"),
    )
    assert problems == [] and example.messages[1]["content"] == content


def test_a_named_format_says_which_of_two_conversations_is_read():
    row = {
        "messages": [USER, YES],
        "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
        "tools": [],
    }
    checked = to_examples([("x:1", row)], "no/such/tools.json", "openai")
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
    checked = to_examples([("x:1", {**row, "tools": []})], "no/such/tools.json")
    assert sorted(checked.unread) == unread


def test_what_the_formats_read_is_known():
    rows = [("x:1", row) for row, *_ in CASES.values()]
    checked = to_examples(rows, str(ROOT / "data" / "tools.json"))
    assert set(checked.unread) == {("row", key) for key in ("id", "category", "metadata", "parallel_tool_calls")}


def test_a_tools_file_is_normalised_too(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([MOBILE_TOOL]))
    example, problems, changes = read(native("rain in Rome?", ("get_weather", {"city": "Rome"})), tools_path=str(path))
    assert problems == [] and example.tools == [WEATHER] and changes["type STRING -> string"] == 2


def test_turns_of_weight_0_are_not_trained(tokenizer):
    messages = [USER, {**YES, "weight": 0}, {"role": "user", "content": "sure?"}, {**YES, "content": "I am."}]
    example, problems, _ = read({"messages": messages, "tools": []})
    assert problems == []
    ((sample,),), problems = render_examples(tokenizer, [example], 4096)
    assert problems == [] and sample.completion == "I am."
    assert "Yes." in tokenizer.decode(sample.input_ids[: sample.prompt_length])


def test_convert_to_writes_a_new_file_and_trains_nothing(tmp_path, tools_path):
    rows = [row for row, *_ in CASES.values()]
    path, target = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "new" / "openai.jsonl"
    flags = ["--dataset_path", path, "--tools_path", tools_path, "--convert_to", target]
    result = run_script(*flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"write    {len(rows):,} rows: {target}"
    before = to_examples(read_rows([path]), tools_path).examples
    after = to_examples(read_rows([str(target)]), "no/such/tools.json").examples
    assert [example[1:3] for example in after] == [example[1:3] for example in before]
    assert [file.name for file in target.parent.iterdir()] == ["openai.jsonl"]
    result = run_script(*flags)
    assert result.returncode == 1
    assert result.stderr == f"error: --convert_to {target}: is there already; expected the name of a new file\n"


# Arbitrary JSON ---------------------------------------------------------------------------------------------------
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


@settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(rows=st.lists(JSON | ROW, min_size=1, max_size=4), name=st.sampled_from(["auto", "auto", *FORMATS]))
def test_arbitrary_json_is_an_example_or_a_located_problem(tools_path, rows, name):
    rows = [(f"x:{line}", row) for line, row in enumerate(rows, start=1)]
    checked = to_examples(rows, tools_path, name)
    valid, broken = {example.source for example in checked.examples}, {source for source, _ in checked.problems}
    assert checked.total == len(rows) and not valid & broken and valid | broken == {source for source, _ in rows}
    assert all(problem and "\n" not in problem and len(problem) < 800 for _, problem in checked.problems)
    again = to_examples([(example.source, to_row(example)) for example in checked.examples], tools_path)
    assert again.problems == []
    assert json.dumps(again.examples) == json.dumps([e._replace(format="openai") for e in checked.examples])


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


def test_parameters_with_a_null_are_flat_as_those_without():
    """Or the row, converted and read again, would not be what it was."""
    shown = {"input": "x", "output": {"function_call": {"name": "f", "arguments": {}}}}
    for parameters in ({"a": {"type": "string"}}, {"a": {"type": "string"}, "b": None}):
        assert read({**shown, "tools": [{"name": "f", "parameters": parameters}]})[1] == [
            'call 1 "f": arguments.a is missing'
        ]
    assert (
        read({**shown, "tools": [{"name": "f", "parameters": {"b": None}}]})[0].tools[0]["function"]["parameters"] == {}
    )
