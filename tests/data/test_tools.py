"""Tools: read from a file or a row, and each call checked against its own tool, in bounded time."""

import json
import time

import pytest
from conftest import WEATHER, native
from format_cases import MOBILE_TOOL, read

from tool_calling.data.examples import to_examples
from tool_calling.data.tools import limit_time, read_tools
from tool_calling.terminal import UserError


def test_a_tools_file_that_cannot_be_read_is_named_itself(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text('["{broken"]')
    with pytest.raises(UserError) as error:
        read(native("rain in Rome?", content="Yes."), tools_path=str(path))
    assert str(error.value) == (
        f'{path}: tool 1 is not valid JSON: Expecting property name enclosed in double quotes: "{{broken"'
    )


def test_a_tools_file_is_normalised_too(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([MOBILE_TOOL]))
    example, problems, changes = read(native("rain in Rome?", ("get_weather", {"city": "Rome"})), tools_path=str(path))
    assert problems == [] and example.tools == [WEATHER] and changes["type STRING -> string"] == 2


def test_a_bad_tools_file_names_the_line(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text('[\n{"type": "function",\n "function": {"name": "f"}},\n{"title": "g"}\n]')
    with pytest.raises(UserError) as error:
        read_tools(str(path))
    assert str(error.value).splitlines() == [
        f'{path}:4: tool 2: expected {{"type": "function", "function": {{"name": ...}}}}, got {{"title": "g"}}',
        "1 problem in 1 of 2 tools",
    ]


def tool(schema: dict, name: str = "f") -> dict:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def row(arguments: object, *tools: dict, name: str = "f", request: str = "go") -> dict:
    """A row that calls one of its own tools."""
    return {**native(request, (name, arguments)), "tools": list(tools)}


def problems_of(*rows: dict) -> list[str]:
    checked = to_examples([(f"x:{i}", row) for i, row in enumerate(rows, 1)], "no/tools.json")
    assert checked.total == len(rows) == len(checked.examples) + len({source for source, _ in checked.problems})
    return [f"{source}: {problem}" for source, problem in checked.problems]


def text_schema(**more) -> dict:
    return {"type": "object", "properties": {"x": {"type": "string", **more}}}


SLOW = tool(text_schema(pattern="^(a+)+$"))
EVIL = {"x": "a" * 60 + "!"}


def test_a_pattern_that_would_take_years_is_a_problem_and_is_tried_once():
    start = time.monotonic()
    message = 'call 1 "f": its tool\'s schema takes over 2 s to apply; simplify its patterns or alternatives'
    assert problems_of(*[row(EVIL, SLOW)] * 50) == [f"x:{i}: {message}" for i in range(1, 51)]
    assert time.monotonic() - start < 50  # 2 s, and not 50 times 2 s
    assert problems_of(row({"x": "aaa"}, SLOW)) == []
    assert problems_of(row({"x": "b"}, SLOW)) == ["x:1: call 1 \"f\": arguments.x: 'b' does not match '^(a+)+$'"]


@pytest.mark.parametrize(
    "schema, found",
    [
        (
            text_schema(**{"$ref": "https://example.invalid/schema.json"}),
            'call 1 "f": its tool\'s schema refers to https://example.invalid/schema.json, which is '
            "not inside that schema",
        ),
        (
            text_schema(**{"$ref": "file:///etc/passwd"}),
            'call 1 "f": its tool\'s schema refers to file:///etc/passwd, which is not inside that schema',
        ),
        (
            text_schema(pattern="("),
            "tool 1 \"f\": parameters.properties.x.pattern is not valid JSON Schema: '(' is not a 'regex'",
        ),
    ],
)
def test_schemas_that_reach_out_or_break_are_problems(schema, found):
    assert problems_of(row({"x": "a"}, tool(schema))) == [f"x:1: {found}"]


def test_a_schema_in_a_file_is_not_read(tmp_path):
    """Read, it would refuse the text for its type."""
    address = (tmp_path / "schema.json").as_uri()
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    assert problems_of(row({"x": "a"}, tool(text_schema(**{"$ref": address})))) == [
        f'x:1: call 1 "f": its tool\'s schema refers to {address}, which is not inside that schema'
    ]


def test_a_schema_that_refers_to_itself_is_bounded():
    schema = {"type": "object", "properties": {"x": {"$ref": "#/properties/x"}}}
    (problem,) = problems_of(row({"x": 1}, tool(schema)))
    assert problem.startswith("x:1: ") and len(problem) < 400


@pytest.mark.parametrize("key", ["__proto__", "constructor", "__class__", "__init__", "toString", "prototype"])
def test_prototype_like_names_are_names_like_others(key):
    schema = {"type": "object", "properties": {key: {"type": "string"}}, "required": [key]}
    assert problems_of(row({key: "a"}, tool(schema, key), name=key)) == []
    assert problems_of(row({}, tool(schema, key), name=key)) == [f'x:1: call 1 "{key}": arguments.{key} is missing']
    assert problems_of(row({key: "a"}, tool(text_schema()))) == [
        f'x:1: call 1 "f": arguments.{key} is not an argument of this tool'
    ]


@pytest.mark.slow
def test_ten_thousand_tools():
    tools = [tool(text_schema(), f"tool_{i}") for i in range(10_000)]
    assert problems_of(row({"x": "a"}, *tools, name="tool_9999"), row({"x": "b"}, *tools, name="tool_1")) == []
    (problem,) = problems_of(row({"x": "a"}, *tools, name="zzz"))
    assert problem.startswith('x:1: call 1 "zzz": the row has no such tool; tools: tool_0, ') and len(problem) < 400


def test_only_computing_counts_as_time():
    """On a busy machine a check may wait for longer than it may compute."""
    with limit_time(0.1):
        time.sleep(0.3)
    with pytest.raises(TimeoutError), limit_time(0.1):
        while True:
            pass
