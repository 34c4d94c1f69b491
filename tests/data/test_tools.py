"""Tools: read from a file or a row, and each call checked against its own tool, in bounded time."""

import json
import random
import time
from collections import Counter

import pytest
from conftest import WEATHER, native
from format_cases import MOBILE_TOOL, read

from tool_calling.data.examples import Reading, to_examples
from tool_calling.data.tools import check_call, check_tools, limit_time, read_tools, settle_arguments
from tool_calling.data.validators import Validator, fits
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
    checked = to_examples([(f"x:{i}", row) for i, row in enumerate(rows, 1)], Reading("no/tools.json"))
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


LEFT_OUT, DROPPED, KEPT = (
    "null of an optional argument left out",
    "null of no argument dropped",
    "null of a required argument kept",
)
TEXT, YEAR = {"type": "string"}, {"type": "integer"}
REMIND = {"type": "object", "properties": {"text": TEXT, "year": YEAR, "place": TEXT}, "required": ["text", "year"]}
PLACE = {"type": "object", "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}}, "required": ["lat"]}


def one(schema: dict, *required: str, **more) -> dict:
    """A schema with one property, x."""
    return {"type": "object", "properties": {"x": schema}, "required": list(required), **more}


@pytest.mark.parametrize(
    "schema, arguments, settled, counts",
    [
        (REMIND, {"text": "a", "year": None, "place": None}, {"text": "a", "year": None}, {LEFT_OUT: 1, KEPT: 1}),
        (REMIND, {"text": "a", "year": 2027, "place": None}, {"text": "a", "year": 2027}, {LEFT_OUT: 1}),
        (REMIND, {"text": "a", "year": "2028"}, {"text": "a", "year": "2028"}, {}),
        (REMIND, {"text": None, "year": None}, {"text": None, "year": None}, {KEPT: 2}),
        (REMIND, {"text": "a", "year": 1, "zone": None, "unit": None}, {"text": "a", "year": 1}, {DROPPED: 2}),
        (one({"type": ["string", "null"]}), {"x": None}, {"x": None}, {}),  # what the schema allows stays
        (one({"type": "string", "nullable": True}), {"x": None}, {"x": None}, {}),
        (one({"type": "string", "default": None}), {"x": None}, {"x": None}, {}),
        (one({"anyOf": [TEXT, {"type": "null"}]}), {"x": None}, {"x": None}, {}),
        (one({}), {"x": None}, {"x": None}, {}),
        (one({"enum": ["c", "f"]}), {"x": None}, {}, {LEFT_OUT: 1}),
        (one({"enum": ["c", "f"]}, "x"), {"x": None}, {"x": None}, {KEPT: 1}),
        (one({"anyOf": [TEXT, YEAR]}), {"x": None}, {}, {LEFT_OUT: 1}),
        (one(PLACE), {"x": {"lat": 1, "lon": None, "z": None}}, {"x": {"lat": 1}}, {LEFT_OUT: 1, DROPPED: 1}),
        (one(PLACE), {"x": {"lat": None, "lon": 1}}, {"x": {"lat": None, "lon": 1}}, {KEPT: 1}),
        (one({"anyOf": [PLACE, {"type": "null"}]}), {"x": {"lat": 1, "lon": None}}, {"x": {"lat": 1}}, {LEFT_OUT: 1}),
        (
            one({"$ref": "#/$defs/P"}, **{"$defs": {"P": PLACE}}),
            {"x": {"lat": 1, "z": None}},
            {"x": {"lat": 1}},
            {DROPPED: 1},
        ),
        (
            one({"allOf": [PLACE, {"properties": {"name": {"type": ["string", "null"]}}}]}),
            {"x": {"lat": 1, "lon": None, "name": None, "z": None}},
            {"x": {"lat": 1, "name": None}},
            {LEFT_OUT: 1, DROPPED: 1},
        ),
        (
            one({"type": "array", "items": PLACE}),
            {"x": [{"lat": 1, "lon": None}, {"lat": 2, "lon": 3}, {"lat": 4, "q": None}]},
            {"x": [{"lat": 1}, {"lat": 2, "lon": 3}, {"lat": 4}]},
            {LEFT_OUT: 1, DROPPED: 1},
        ),
        (one({"type": "array", "items": TEXT}), {"x": ["a", None]}, {"x": ["a", None]}, {}),  # an item is no argument
        (one({"type": "object"}), {"x": {"a": None}}, {"x": {"a": None}}, {}),  # a free object
        (
            one({"type": "object", "additionalProperties": TEXT}),
            {"x": {"a": None, "b": "c"}},
            {"x": {"b": "c"}},
            {LEFT_OUT: 1},
        ),
        ({"type": "object", "properties": {}}, {"a": None}, {}, {DROPPED: 1}),
        (None, {"a": None, "b": 1}, {"b": 1}, {DROPPED: 1}),
        ({"type": "file"}, {"a": None}, {"a": None}, {}),  # a schema that cannot be used is named by check_tools
        (one({"$ref": "https://example.invalid/x"}), {"x": 1, "y": None}, {"x": 1, "y": None}, {}),
    ],
)
def test_nulls_that_stand_for_nothing_go_and_required_ones_stay(schema, arguments, settled, counts):
    changes, before = Counter(), json.dumps(arguments)
    assert settle_arguments(arguments, schema, changes) == settled and changes == counts
    assert json.dumps(arguments) == before and settle_arguments(settled, schema, Counter()) == settled


def test_a_required_null_is_no_problem_and_other_wrong_types_are():
    validators, problems = check_tools([tool(REMIND), tool(one({"anyOf": [PLACE, TEXT]}), "g")])
    assert problems == []
    assert check_call("f", {"text": None, "year": None}, validators) == []
    assert check_call("g", {"x": {"lat": None}}, validators) == []
    assert check_call("f", {"text": "a", "year": "2028"}, validators) == [
        'arguments.year must be an integer, got "2028"'
    ]
    assert check_call("f", {"text": "a", "year": 1, "place": None}, validators) == [
        "arguments.place must be a string, got null"
    ]
    assert check_call("f", {"text": "a"}, validators) == ["arguments.year is missing"]


def test_settling_a_null_beside_a_pattern_that_takes_years_is_quick():
    start = time.monotonic()
    schema = {"type": "object", "properties": {**SLOW["function"]["parameters"]["properties"], "y": TEXT}}
    assert settle_arguments({**EVIL, "y": None}, schema, Counter()) == EVIL
    assert time.monotonic() - start < 1


def draw_schema(choose: random.Random, depth: int) -> dict:
    """Any schema of a few properties, combined in any way."""
    leaves = [
        TEXT,
        {"type": ["string", "null"]},
        {"type": "string", "default": None},
        {"enum": ["a", 1]},
        {"$ref": "#/$defs/P"},
    ]
    if depth == 0 or choose.random() < 0.4:
        return choose.choice(leaves)
    parts = [draw_schema(choose, depth - 1) for _ in range(3)]
    names = choose.sample("abc", choose.randint(0, 3))
    whole = {"type": "object", "properties": dict(zip(names, parts)), "required": names[:1]}
    return choose.choice(
        [whole, whole, {"type": "array", "items": parts[0]}, {choose.choice(["anyOf", "allOf", "oneOf"]): parts}]
    )


def draw_arguments(choose: random.Random, depth: int) -> object:
    if depth == 0 or choose.random() < 0.5:
        return choose.choice([None, None, "a", 1])
    if choose.random() < 0.2:
        return [draw_arguments(choose, depth - 1)]
    return {name: draw_arguments(choose, depth - 1) for name in choose.sample("abcd", 3)}


def test_settling_any_arguments_by_any_schema_makes_no_problem_and_settles_them():
    settled_rows = 0
    for seed in range(200):
        choose = random.Random(seed)
        defs = {"P": draw_schema(choose, 1) | {"title": "P"}} if choose.random() < 0.5 else {"P": TEXT}
        names = choose.sample("abc", 2)
        schema = {"type": "object", "properties": {name: draw_schema(choose, 3) for name in names}, "$defs": defs}
        schema["required"] = names[:1]
        validators, problems = check_tools([tool(schema)])
        assert problems == []
        arguments = {name: draw_arguments(choose, 3) for name in "abcd"}
        settled, again = settle_arguments(arguments, schema, Counter()), Counter()
        assert settle_arguments(settled, schema, again) == settled and LEFT_OUT not in again and DROPPED not in again
        assert check_call("f", arguments, validators) or not check_call("f", settled, validators), (schema, arguments)
        settled_rows += settled != arguments
        for given in (arguments, settled):
            assert not fits(given, validators["f"].schema) or validators["f"].is_valid(given)
    assert settled_rows > 100


@pytest.mark.parametrize(
    "value, schema, expected",
    [
        ("a", {"type": "string", "description": "d", "default": 1}, True),
        ("a", {"type": "string", "enum": ["a", "b"]}, True),
        (1, {"type": "integer", "minimum": 1, "maximum": 1}, True),
        (1, {"type": "number"}, True),
        (None, {"type": "null"}, True),
        ({"x": ["a"]}, one({"type": "array", "items": TEXT}, "x", additionalProperties=False), True),
        ({"y": 1}, {"additionalProperties": True}, True),
        ({"a": {"b": 1}}, {}, True),
        ("c", {"type": "string", "enum": ["a", "b"]}, False),
        (True, {"type": "integer"}, False),
        (0, {"type": "boolean"}, False),
        (0, {"minimum": 1}, False),
        (2.5, {"maximum": 2}, False),
        (5.5, {"type": "integer"}, False),
        (None, {"type": "string"}, False),
        ({"x": "a", "y": 1}, one(TEXT, additionalProperties=False), False),
        ({}, one(TEXT, "x"), False),
        ({"x": [1]}, one({"type": "array", "items": TEXT}), False),
        ([{"x": 1}], {"items": one(TEXT)}, False),
        (1, False, False),
    ],
)
def test_what_is_valid_at_a_glance_is_valid(value, schema, expected):
    assert fits(value, schema) is Validator(schema).is_valid(value) is expected


@pytest.mark.parametrize(
    "value, schema",
    [("a", {"pattern": "^a"}), (5.0, {"type": "integer"}), (1, {"enum": [1]}), ("a", {"anyOf": [TEXT]})],
)
def test_what_needs_a_closer_look_is_left_to_the_validator(value, schema):
    assert Validator(schema).is_valid(value) and not fits(value, schema)
    assert check_call("f", {"x": value}, check_tools([tool(one(schema))])[0]) == []
