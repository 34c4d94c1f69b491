"""Rows as people have them, whose tools or nulls are of a kind that occurs in many files: what is trained of each."""

import json

import pytest
from format_cases import read


def chat(name: str, arguments: object, *tools: dict, **more) -> dict:
    """A row in which a tool is called."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": turns, "tools": list(tools), **more}


def tool(name: str, properties: dict, required: list | None = None, **more) -> dict:
    parameters = {"type": "object", "properties": properties} | ({} if required is None else {"required": required})
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters, **more}}


TEXT, ENUM = {"type": "string"}, {"type": "string", "enum": ["c", "f"]}
LEFT_OUT, DROPPED = "null of an optional argument left out", "null of no argument dropped"
KEPT, INSIDE = "null of a required argument kept", "required beside parameters -> inside"
REMIND = tool("remind", {"text": TEXT, "year": {"type": "integer"}, "place": TEXT}, ["text", "year"])
AREA = {"type": "object", "properties": {"radius": {"type": "number", "default": "1.0"}}, "required": ["radius"]}
DATE = {"city": {"type": "string", "default": "Rome"}, "zone": {"type": "string", "default": ""}}
WRITTEN = {"city": {"type": "str", "default": "Rome"}, "zone": {"type": "str, optional", "default": ""}}
CASES = {  # name: (row, arguments that are trained, tools that are rendered, some of what is counted)
    "a table in which every object has the keys of all": (
        chat(
            "get_weather",
            {"city": "Oslo", "unit": None, "zone": None},
            tool("get_weather", {"city": {**TEXT, "enum": None}, "unit": ENUM, "zone": None}, ["city"]),
            tool("get_time", {"city": None, "unit": None, "zone": {**TEXT, "enum": None}}, ["zone"]),
        ),
        {"city": "Oslo"},
        [tool("get_weather", {"city": TEXT, "unit": ENUM}, ["city"]), tool("get_time", {"zone": TEXT}, ["zone"])],
        {LEFT_OUT: 1, DROPPED: 1, "property null -> removed": 3, "enum null -> removed": 2},
    ),
    "a table whose calls are text": (
        chat("f", json.dumps({"a": "x", "b": None}), tool("f", {"a": {**TEXT, "items": None}, "b": None})),
        {"a": "x"},
        [tool("f", {"a": TEXT})],
        {DROPPED: 1, "items null -> removed": 1},
    ),
    "a table with a default in its schemas": (
        chat(
            "f",
            {"a": "x", "n": None},
            tool("f", {"a": {**TEXT, "default": None, "enum": None}, "n": {**TEXT, "default": "y", "enum": None}}),
        ),
        {"a": "x"},
        [tool("f", {"a": TEXT, "n": {**TEXT, "default": "y"}})],
        {LEFT_OUT: 1, "default null -> removed": 1, "enum null -> removed": 2},
    ),
    "a table with objects in its calls": (
        chat(
            "f",
            {"at": {"lat": 1, "lon": None, "name": None}, "many": [{"name": None, "lat": 2, "lon": 3}], "name": None},
            tool(
                "f",
                {
                    "at": {
                        "type": "object",
                        "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}, "name": None},
                    },
                    "many": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}},
                        },
                    },
                },
            ),
        ),
        {"at": {"lat": 1}, "many": [{"lat": 2, "lon": 3}]},
        None,
        {LEFT_OUT: 1, DROPPED: 3},
    ),
    "null for what is not given": (
        chat("remind", {"text": "water", "year": None, "place": None}, REMIND),
        {"text": "water", "year": None},
        [REMIND],
        {LEFT_OUT: 1, KEPT: 1},
    ),
    "null for an optional choice": (
        chat("f", {"a": None, "unit": None}, tool("f", {"a": TEXT, "unit": ENUM})),
        {},
        None,
        {LEFT_OUT: 2},
    ),
    "null that the schema allows": (
        chat(
            "f", {"a": None, "b": None}, tool("f", {"a": {"type": ["string", "null"]}, "b": {**TEXT, "default": None}})
        ),
        {"a": None, "b": None},
        None,
        {},
    ),
    "keys in another order, strict before the parameters": (
        chat(
            "book",
            {"id": 1},
            {
                "function": {
                    "strict": True,
                    "parameters": {"type": "object", "properties": {"id": {}}},
                    "name": "book",
                    "description": "d",
                },
                "type": "function",
            },
        ),
        {"id": 1},
        [tool("book", {"id": {}}, strict=True)],
        {"keys of a tool -> order of servers": 2},
    ),
    "a tool without parameters, one without a description": (
        chat(
            "ping",
            {},
            {"type": "function", "function": {"name": "ping", "description": "d"}},
            {"name": "g", "parameters": AREA},
        ),
        {},
        [
            {"type": "function", "function": {"name": "ping", "description": "d", "parameters": None}},
            {"type": "function", "function": {"name": "g", "description": None, "parameters": AREA}},
        ],
        {"parameters missing -> null": 1, "description missing -> null": 1},
    ),
    "a tool of MCP with its notes": (
        chat(
            "f",
            {"a": "x"},
            {
                "name": "f",
                "title": "F",
                "description": "d",
                "inputSchema": {"type": "object", "properties": {"a": TEXT}},
                "outputSchema": {},
                "annotations": {},
                "_meta": {},
                "icons": [],
            },
        ),
        {"a": "x"},
        [tool("f", {"a": TEXT})],
        {f"{key} of a tool -> dropped": 1 for key in ("title", "outputSchema", "annotations", "_meta", "icons")},
    ),
    "required beside the parameters, tools as text": (
        chat("area", '{"radius": 3}')
        | {
            "tools": json.dumps(
                [
                    {
                        "type": "function",
                        "function": {
                            "name": "area",
                            "description": "d",
                            "parameters": {
                                "type": "dict",
                                "properties": {"radius": {"type": "float", "default": "1.0"}},
                            },
                            "required": ["radius"],
                        },
                    }
                ]
            )
        },
        {"radius": 3},
        [{"type": "function", "function": {"name": "area", "description": "d", "parameters": AREA}}],
        {INSIDE: 1, "type dict -> object": 1, "type float -> number": 1},
    ),
    "required beside the function": (
        chat("f", {"a": "x"}, {**tool("f", {"a": TEXT}), "required": ["a"]}),
        {"a": "x"},
        [tool("f", {"a": TEXT}, ["a"])],
        {INSIDE: 1},
    ),
    "the schema under arguments, as flat parameters": (
        chat(
            "date",
            {"city": "Oslo"},
            {"type": "function", "function": {"name": "date", "description": "d", "arguments": WRITTEN}},
        ),
        {"city": "Oslo"},
        [tool("date", DATE, [])],
        {"arguments -> parameters": 1, "flat parameters -> schema": 1},
    ),
    "the schema under arguments, as a schema": (
        chat(
            "date",
            {"city": "Oslo"},
            {"name": "date", "description": "d", "arguments": {"type": "object", "properties": DATE}},
        ),
        {"city": "Oslo"},
        [tool("date", DATE)],
        {"arguments -> parameters": 1},
    ),
    "types of Java": (
        chat(
            "f",
            {"a": {"k": 1}, "b": ["x"], "c": "y", "d": [{"z": 1}]},
            {
                "name": "f",
                "description": "d",
                "parameters": {
                    "type": "HashMap",
                    "properties": {
                        "a": {"type": "HashMap"},
                        "b": {"type": "String[]"},
                        "c": {"type": "char"},
                        "d": {"type": "ArrayList"},
                    },
                },
            },
        ),
        {"a": {"k": 1}, "b": ["x"], "c": "y", "d": [{"z": 1}]},
        [
            tool(
                "f", {"a": {"type": "object"}, "b": {"type": "array", "items": TEXT}, "c": TEXT, "d": {"type": "array"}}
            )
        ],
        {
            "type HashMap -> object": 2,
            "type String[] -> array": 1,
            "type char -> string": 1,
            "type ArrayList -> array": 1,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_trained_is_what_is_meant(name):
    row, arguments, tools, counted = CASES[name]
    example, problems, changes = read(row)
    assert problems == [] and example.messages[-1]["tool_calls"][0]["function"]["arguments"] == arguments
    assert tools is None or json.dumps(example.tools) == json.dumps(tools)
    assert {key: changes.get(key) for key in counted} == counted
    settled = {**chat("", {}), "messages": example.messages, "tools": example.tools}
    again, problems, changes = read(settled)  # what was read is read again as it is
    assert (again.messages, again.tools, problems) == (example.messages, example.tools, [])
    assert set(changes) <= {KEPT}


@pytest.mark.parametrize(
    "row, problem",
    [
        (chat("remind", {"text": "vote", "year": "2028"}, REMIND), 'arguments.year must be an integer, got "2028"'),
        (
            chat("remind", {"text": "vote", "zone": "x", "year": 1}, REMIND),
            "arguments.zone is not an argument of this tool",
        ),
        (
            chat("area", {}, {"name": "area", "parameters": {"radius": {"type": "float"}}, "required": ["radius"]}),
            "arguments.radius is missing",
        ),
        (
            chat("f", {"a": [None]}, tool("f", {"a": {"type": "array", "items": TEXT}})),
            "arguments.a[0] must be a string, got null",
        ),
    ],
)
def test_other_wrong_arguments_stay_problems(row, problem):
    name = row["messages"][1]["tool_calls"][0]["function"]["name"]
    assert read(row)[1] == [f'call 1 "{name}": {problem}']
