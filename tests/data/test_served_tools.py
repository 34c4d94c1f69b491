"""Tools are trained as servers render them: vLLM's request classes, rebuilt here, give the same text back."""

import json
import random
from typing import Any, Literal

import pytest
from conftest import ALARM, WEATHER, run_here, write_jsonl
from format_cases import read

from tool_calling.data.tools import check_call, check_tools, find_bare_tools, read_tools, take_tools, to_tools
from tool_calling.terminal import UserError

pydantic = pytest.importorskip("pydantic")  # comes with other requirements; only these tests need it


class Served(pydantic.BaseModel):
    """What vLLM's request classes have in common: unknown members are accepted, and fall away when it is dumped.

    The serialisation is rebuilt from the definitions of ChatCompletionToolsParam and FunctionDefinition (vLLM of autumn
    2026), because vLLM itself needs an environment of its own.
    """

    model_config = pydantic.ConfigDict(extra="allow")

    @pydantic.model_serializer(mode="wrap")
    def dump(self, handler):
        flags = ("strict", "defer_loading")
        known = {key: value for key, value in handler(self).items() if key in type(self).model_fields}
        return {key: value for key, value in known.items() if key not in flags or value is not None}


class ServedFunction(Served):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class ServedTool(Served):
    type: Literal["function"] = "function"
    function: ServedFunction
    defer_loading: bool | None = None

    @pydantic.model_validator(mode="after")
    def defer(self):
        if self.defer_loading is not None and self.function.defer_loading is None:
            self.function.defer_loading = self.defer_loading
        return self


def serve(tools: list[dict]) -> str:
    """The JSON text of the tools that a request with these gives to the chat template."""
    return json.dumps([ServedTool.model_validate(tool).model_dump() for tool in tools], ensure_ascii=False)


TEXTS = ("", "city", "Zoë 🌧", 'a "b" \\n', "type")
VALUES = (None, True, 0, 1.5, -1e-7, "é", [], ["a", {"b": [1]}], {}, {"a": {"b": "c"}})
TYPES = ("string", "integer", "number", "boolean", "object", "array", ["string", "null"])
EXTRAS = ("annotations", "title", "outputSchema", "_meta", "execution", "icons", "returns", "cache_control")


def pick(choose: random.Random, members: dict) -> dict:
    """Some of the members, in any order."""
    return {key: members[key] for key in choose.sample([*members], choose.randint(0, len(members)))}


def make_parameters(choose: random.Random) -> dict:
    properties = {}
    for name in choose.sample(TEXTS, choose.randint(0, 4)):
        more = {"description": choose.choice(TEXTS), "default": choose.choice(VALUES), "enum": [*VALUES]}
        properties[name] = {"type": choose.choice(TYPES), **pick(choose, more)}
    schema = {"type": "object", "properties": properties, "required": [*properties][:2], "additionalProperties": False}
    return {key: schema[key] for key in choose.sample([*schema], choose.randint(3, 4))} | {"type": "object"}


def make_tool(choose: random.Random) -> dict:
    """A tool as a client may send it: any order, members missing or null, and members that only MCP and others have."""
    known = {
        "description": choose.choice((None, *TEXTS)),
        "parameters": choose.choice((None, {}, make_parameters(choose), make_parameters(choose))),
        "strict": choose.choice((None, True, False)),
        "defer_loading": choose.choice((None, True, False)),
    }
    extras = {key: choose.choice(VALUES) for key in EXTRAS}
    function = {"name": choose.choice(TEXTS), **pick(choose, known), **pick(choose, pick(choose, extras))}
    tool = {"type": "function", "function": {key: function[key] for key in choose.sample([*function], len(function))}}
    tool |= pick(choose, {"defer_loading": choose.choice((None, True, False)), "cache_control": {"type": "ephemeral"}})
    return {key: tool[key] for key in choose.sample([*tool], len(tool))}


def test_the_tools_are_those_of_vllms_request_objects():
    for seed in range(1000):
        choose = random.Random(seed)
        given = [make_tool(choose) for _ in range(choose.randint(1, 4))]
        tools, _ = to_tools(given)
        assert json.dumps(tools, ensure_ascii=False) == serve(given), given
        assert serve(tools) == serve(given) and to_tools(tools) == (tools, {})


def test_the_prompt_is_that_of_the_request(real_tokenizer):
    given_tools = [dict(reversed(WEATHER.items())), {"type": "function", "function": {"name": "ping", "icons": []}}]

    def render(tools):
        return real_tokenizer.apply_chat_template([{"role": "user", "content": "é?"}], tools=tools, tokenize=False)

    prompt = render(to_tools(given_tools)[0])
    assert prompt == render(json.loads(serve(given_tools))) and prompt != render(given_tools)
    assert (
        '{"type": "function", "function": {"name": "ping", "description": null, "parameters": null}}\n</tools>'
        in prompt
    )


PARAMETERS = {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]}
ZONE = {"type": "function", "function": {"name": "get_time", "description": "Time.", "parameters": PARAMETERS}}


@pytest.mark.parametrize(
    "tool, expected, changes",
    [
        (ZONE, ZONE, {}),
        (
            {"function": dict(reversed(ZONE["function"].items())), "type": "function"},
            ZONE,
            {"keys of a tool -> order of servers": 2},
        ),
        (
            {"type": "function", "function": {"name": "ping", "description": "Ping."}},
            {"type": "function", "function": {"name": "ping", "description": "Ping.", "parameters": None}},
            {"parameters missing -> null": 1},
        ),
        (
            {"type": "function", "function": {"name": "get_time", "parameters": PARAMETERS}},
            {"type": "function", "function": {"name": "get_time", "description": None, "parameters": PARAMETERS}},
            {"description missing -> null": 1},
        ),
        (
            {"type": "function", "function": {"strict": True, **ZONE["function"]}},
            {"type": "function", "function": {**ZONE["function"], "strict": True}},
            {"keys of a tool -> order of servers": 1},
        ),
        (
            {**ZONE, "function": {**ZONE["function"], "strict": None, "title": "T", "annotations": {"x": 1}}},
            ZONE,
            {"strict of a tool -> dropped": 1, "title of a tool -> dropped": 1, "annotations of a tool -> dropped": 1},
        ),
        (
            {**ZONE, "defer_loading": True, "cache_control": {"type": "ephemeral"}},
            {**ZONE, "function": {**ZONE["function"], "defer_loading": True}, "defer_loading": True},
            {"cache_control of a tool -> dropped": 1},
        ),
    ],
)
def test_a_tool_has_the_keys_of_servers_in_their_order(tool, expected, changes):
    found, counted = to_tools([tool])
    assert json.dumps(found) == json.dumps([expected]) and counted == changes
    assert check_tools(found)[1] == []


def test_tools_that_say_nothing_of_themselves_are_found():
    bare = [{"name": "ping", "description": "Ping."}, {"name": "get_time", "parameters": PARAMETERS}, {"name": "x"}]
    empty = {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert find_bare_tools(to_tools([WEATHER, *bare, empty, ALARM])[0]) == ["ping", "get_time", "x", "now"]
    assert find_bare_tools([]) == []


def test_a_description_is_text():
    row = {"input": "x", "output": {"content": "y"}, "tools": [{"name": "f", "description": ["a"], "parameters": {}}]}
    assert read(row)[1] == ['tool 1 "f": description must be text, got ["a"]']


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ABOUT = {"name": "f", "description": "d"}
F = {"type": "function", "function": {**ABOUT, "parameters": CITY}}
G = {"type": "function", "function": {"name": "g", "description": None, "parameters": None}}
DECLARED = {**ABOUT, "parameters": {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}, "required": ["city"]}}


@pytest.mark.parametrize(
    "tools, expected",
    [
        ([{"type": "function", **ABOUT, "parameters": CITY, "strict": None}], [F]),  # OpenAI Responses
        ([{"type": "function", **ABOUT, "parameters": CITY, "strict": True}, {"type": "function", "name": "g"}], None),
        ([{**ABOUT, "input_schema": CITY}], [F]),  # Anthropic
        ([{"type": "custom", **ABOUT, "input_schema": CITY, "cache_control": {"type": "ephemeral"}}], [F]),
        ([{**ABOUT, "inputSchema": CITY, "title": "F", "annotations": {"readOnlyHint": True}}], [F]),  # MCP
        ({"tools": [{"outputSchema": CITY, "inputSchema": CITY, **ABOUT}], "nextCursor": "x"}, [F]),
        ([{"functionDeclarations": [DECLARED, {"name": "g"}]}], [F, G]),  # Gemini
        ({"function_declarations": [DECLARED]}, [F]),
        ([{"functionDeclarations": [{**ABOUT, "parametersJsonSchema": CITY, "response": CITY}]}], [F]),
        ({"f": {"description": "d", "inputSchema": {"jsonSchema": CITY}}, "g": {}}, [F, G]),  # Vercel
        ({"f": {"description": "d", "parameters": CITY}}, [F]),
        ([{"type": "function", **ABOUT, "inputSchema": CITY, "providerOptions": {}}], [F]),
        ([{"toolSpec": {**ABOUT, "inputSchema": {"json": CITY}}}], [F]),  # Bedrock
        ([{"function": {**ABOUT, "arguments": {"city": {"type": "str"}}}, "type": "function"}], [F]),  # ToolMind
        (
            [{**ABOUT, "arguments": {"type": "dict", "properties": {"city": {"type": "str"}}, "required": ["city"]}}],
            [F],
        ),
        ([{**ABOUT, "parameters": [{"name": "city", "type": "string", "required": True}]}], [F]),
        ([{**ABOUT, "parameters": json.dumps(CITY)}], [F]),
        (F, [F]),  # one alone
        (json.dumps([json.dumps(F)]), [F]),
    ],
)
def test_tools_of_every_shape_are_the_same_tool(tools, expected):
    expected = expected or [{**F, "function": {**F["function"], "strict": True}}, G]
    assert json.dumps(to_tools(tools)[0]) == json.dumps(expected)
    assert to_tools(expected) == (expected, {}) and check_tools(expected)[1] == []


RADIUS = {"type": "dict", "properties": {"radius": {"type": "float"}}}


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "f", "parameters": RADIUS, "required": ["radius"]}},
        {"type": "function", "function": {"name": "f", "parameters": RADIUS}, "required": ["radius"]},
        {"name": "f", "parameters": {"radius": {"type": "float"}, "unit": {"type": "str"}}, "required": ["radius"]},
        {"name": "f", "parameters": {**RADIUS, "required": ["radius"]}, "required": ["radius"]},
        {"name": "f", "parameters": {**RADIUS, "required": None}, "required": ["radius"]},
    ],
)
def test_required_beside_the_parameters_is_moved_inside(tool):
    tools, changes = to_tools([tool])
    assert tools[0]["function"]["parameters"]["required"] == ["radius"] and "required" not in tools[0]
    assert changes["required beside parameters -> inside"] == 1 and to_tools(tools) == (tools, {})
    validators, problems = check_tools(tools)
    assert problems == [] and check_call("f", {"radius": 3}, validators) == []
    assert check_call("f", {}, validators) == ["arguments.radius is missing"]


def test_a_required_null_beside_the_parameters_says_nothing():
    tools, changes = to_tools([{"name": "f", "parameters": RADIUS, "required": None}])
    assert tools[0]["function"]["parameters"] == {"type": "object", "properties": {"radius": {"type": "number"}}}
    assert changes["required of a tool -> dropped"] == 1


@pytest.mark.parametrize(
    "name, text, rest",
    [
        ("Kimi", "<|im_system|>tool_declare<|im_middle|>%s<|im_end|>", ""),
        ("Kimi, spaced", "<|im_system|> tool_declare <|im_middle|>\n%s\n<|im_end|>Be brief.", "Be brief."),
        (
            "other tokens stay",
            "<|im_system|>system<|im_middle|>%s<|im_end|>",
            "<|im_system|>system<|im_middle|><|im_end|>",
        ),
        ("text", "Use these: %s\nNothing else.", "Use these: \nNothing else."),
    ],
)
def test_tools_are_taken_out_of_a_text(name, text, rest):
    for tools in (
        [F],
        [{**ABOUT, "inputSchema": CITY}, {"name": "g", "input_schema": {}}],
        [{"functionDeclarations": []}],
    ):
        assert take_tools(text % json.dumps(tools)) == (tools, rest)


def test_nulls_of_a_table_say_nothing_in_a_tool():
    """An export of Arrow gives every object the keys of all: `enum`, and the arguments of other tools, are null."""
    city = {"type": "string", "enum": None, "items": None, "properties": None}
    given = {"type": "object", "properties": {"city": city, "zone": None, "place": {**city, "type": "object"}}}
    given["properties"]["place"]["properties"] = {"lat": {"type": "number", "enum": None}, "zone": None}
    tools, changes = to_tools([{"type": "function", "function": {**ABOUT, "strict": None, "parameters": given}}])
    place = {"type": "object", "properties": {"lat": {"type": "number"}}}
    assert tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"city": {"type": "string"}, "place": place},
    }
    assert changes == {
        "strict of a tool -> dropped": 1,
        "property null -> removed": 2,
        "enum null -> removed": 3,
        "items null -> removed": 2,
        "properties null -> removed": 1,
    }


@pytest.mark.parametrize(
    "text, expected",
    [
        (json.dumps({"f": F["function"]}), [F]),
        (json.dumps(F), [F]),
        (json.dumps(F) + "\n" + json.dumps(G), [F, G]),
        (" [ ] ", []),
    ],
)
def test_a_tools_file_may_have_any_shape(tmp_path, text, expected):
    path = tmp_path / "tools.json"
    path.write_text(text)
    assert read_tools(str(path))[0] == expected


def test_a_problem_of_a_declared_tool_names_the_file(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([{"functionDeclarations": [DECLARED, {"name": "g", "parameters": 5}]}]))
    with pytest.raises(UserError) as error:
        read_tools(str(path))
    assert str(error.value).splitlines()[0] == f'{path}: tool 2 "g": parameters must be an object, got 5'


def dry_run(tmp_path, *rows: dict) -> str:
    """What is said on stderr of rows that are read."""
    path = write_jsonl(tmp_path / "rows.jsonl", list(rows))
    return run_here("--convert_to", tmp_path / "out.jsonl", "--dataset_path", path).stderr.replace(str(tmp_path), "")


def test_what_tools_and_nulls_leave_open_is_warned_of_once(tmp_path):
    ping = {"type": "function", "function": {"name": "ping", "description": "Ping."}}
    row = {"input": "go", "output": {"content": "Yes."}, "tools": [WEATHER]}
    call = {
        "input": "go",
        "output": {"function_call": {"name": "get_weather", "arguments": {"city": None, "days": None}}},
    }
    said = dry_run(
        tmp_path,
        row,
        {**row, "tools": [WEATHER, ping]},
        {**call, "tools": [WEATHER, ping]},
        {**call, "tools": [ALARM, WEATHER]},
    )
    assert said.splitlines() == [
        "warning: 2 nulls of required arguments trained as written; the first is in /rows.jsonl:3",
        "warning: 1 tool without a description or without parameters: ping; the first is in /rows.jsonl:2: "
        "a model can only guess what they do",
    ]
    (tmp_path / "out.jsonl").unlink()
    assert dry_run(tmp_path, row) == ""
