"""Rows of every format with the examples that they become, and what else several test files of the data share."""

import json
from pathlib import Path

from conftest import ROOT, WEATHER, native

from tool_calling.data.examples import Reading, to_examples

PARAMETERS = WEATHER["function"]["parameters"]
BARE = WEATHER["function"]
TOOLS = json.dumps([WEATHER])
USER = {"role": "user", "content": "rain in Rome?"}
REPLY = {"role": "tool", "content": '{"rain": true}'}
YES = {"role": "assistant", "content": "Yes."}
CALL = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
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
    checked = to_examples([("x:1", row)], Reading(tools_path, name))
    assert checked.total == 1 and bool(checked.examples) != bool(checked.problems)
    assert all(source == "x:1" for source, _ in checked.problems)
    return (checked.examples or [None])[0], [problem for _, problem in checked.problems], dict(checked.changes)


def sharegpt(*turns: tuple[str, str], **more) -> dict:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


def tool(properties: dict, required: list | None = None, name: str = "f") -> dict:
    """A tool in the OpenAI shape with these parameters."""
    parameters = {"type": "object", "properties": properties, **({} if required is None else {"required": required})}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


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
                {
                    "role": "developer",
                    "content": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Ask."}],
                },
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
            {"role": "system", "content": "Be brief.\nAsk."},
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
            "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required"
            f" -\n{json.dumps(BARE, indent=4)}\n" + json.dumps({"name": "g", "parameters": {}}),
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
        [WEATHER, {"type": "function", "function": {"name": "g", "description": None, "parameters": {}}}],
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


def write_many(path: Path, count: int) -> str:
    """Write `count` rows like the bundled ones, each with a request of its own."""
    rows = json.loads((ROOT / "data" / "synthetic_finetune_dataset.json").read_text(encoding="utf-8"))
    with open(path, "w", encoding="utf-8") as file:
        for index in range(count):
            row = rows[index % len(rows)]
            file.write(json.dumps({**row, "input": f"{row['input']} ({index})"}) + "\n")
    return str(path)
