"""Schemas: foreign types and dialects become JSON Schema, and unknown arguments are found wherever they stand."""

import pytest
from conftest import WEATHER
from format_cases import read, tool

from tool_calling.data.schemas import parse_type, to_strict
from tool_calling.data.tools import check_call, check_tools, to_tools


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
                "description": None,
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}, "day": {"type": "integer"}},
                    "required": ["city"],
                },
            },
        }
    ]
    assert changes["flat parameters -> schema"] == changes["description missing -> null"] == 1 and to_tools(tools) == (tools, {})
    validators, problems = check_tools(tools)
    assert problems == [] and check_call("f", {"city": 5, "zz": 1}, validators) == [
        "arguments.zz is not an argument of this tool",
        "arguments.city must be a string, got 5",
    ]


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


def test_unknown_arguments_inside_a_tuple_are_refused_too():
    pair = {"type": "array", "items": [{"type": "number"}, {"type": "object", "properties": {"a": {"type": "string"}}}]}
    validators, _ = check_tools(to_tools([tool({"pair": pair})])[0])
    assert check_call("f", {"pair": [1, {"a": "x"}]}, validators) == []
    assert check_call("f", {"pair": [1, {"b": "x"}]}, validators) == [
        "arguments.pair[1].b is not an argument of this tool"
    ]


def test_open_schemas_stay_open():
    free = {"type": "object", "properties": {"a": {}}, "additionalProperties": True}
    assert to_strict(free) == {**free, "properties": {"a": {"additionalProperties": True}}}
    nested = {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}}
    assert to_strict(nested)["items"]["additionalProperties"] is False
    assert "additionalProperties" not in nested["items"]


PLACE = {"type": "object", "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}}, "required": ["lat"]}
COMBINED = {
    "type": "object",
    "$defs": {
        "Place": PLACE,
        "Free": {"type": "object"},
        "Any": True,
        "Noted": {"examples": [1]},
        "Few": {"minProperties": 1},
        "Listed": {"enum": [{"a": 1}]},
        "Numbers": {"type": "object", "additionalProperties": {"type": "number"}},
        "Patterns": {"type": "object", "properties": {"a": {}}, "patternProperties": {"^x": {}}},
    },
    "properties": {
        **{
            name.lower(): {"$ref": f"#/$defs/{name}"}
            for name in ("Any", "Noted", "Few", "Listed", "Numbers", "Patterns")
        },
        "anything": {"anyOf": [{"$ref": "#/$defs/Place"}, True]},
        "numbered": {"anyOf": [{"$ref": "#/$defs/Place"}, {"$ref": "#/$defs/Numbers"}]},
        "elsewhere": {"$ref": "#/properties/open"},
        "open": {"type": "object"},
        "ref": {"$ref": "#/$defs/Place"},
        "maybe": {"anyOf": [{"$ref": "#/$defs/Place"}, {"type": "null"}], "default": None},
        "inline": {"anyOf": [PLACE, {"type": "null"}]},
        "many": {"type": "array", "items": {"$ref": "#/$defs/Place"}},
        "named": {"type": "object", "additionalProperties": {"$ref": "#/$defs/Place"}},
        "inherits": {"allOf": [{"$ref": "#/$defs/Place"}, {"properties": {"name": {"type": "string"}}}]},
        "free": {"anyOf": [{"$ref": "#/$defs/Free"}, {"type": "null"}]},
        "loose": {"anyOf": [{"type": "object"}, {"type": "string"}]},
        "kind": {
            "oneOf": [
                {"properties": {"circle": {"type": "number"}}, "required": ["circle"]},
                {"properties": {"square": {"type": "number"}}, "required": ["square"]},
            ]
        },
        "wide": {
            "type": "object",
            "properties": {"a": {}, "b": {}},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        "flag": {
            "type": "object",
            "properties": {"deep": {"type": "boolean"}},
            "if": {"required": ["deep"]},
            "then": {"properties": {"depth": {"type": "integer"}}},
        },
        "one": {"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
    },
}


@pytest.mark.parametrize(
    "arguments, expected",
    [
        *(
            ({name: value}, None)
            for name, value in [
                ("ref", {"lat": 1}),
                ("maybe", {"lat": 1, "lon": 2}),
                ("maybe", None),
                ("inline", {"lat": 1}),
                ("many", [{"lat": 1}]),
                ("named", {"home": {"lat": 1}}),
                ("inherits", {"lat": 1, "name": "x"}),
                ("free", {"x": {"y": 1}}),
                ("loose", {"x": 1}),
                ("loose", "x"),
                *(
                    (name, {"a": 1})
                    for name in ("any", "noted", "few", "listed", "numbers", "anything", "numbered", "elsewhere")
                ),
                ("patterns", {"b": 1, "xb": 2}),
                ("kind", {"circle": 1}),
                ("kind", {"square": 1}),
                ("wide", {"a": 1}),
                ("wide", {"a": 1, "b": 2}),
                ("flag", {"deep": True, "depth": 2}),
                ("flag", {}),
                ("one", {"a": 1, "c": 2}),
            ]
        ),
        ({"ref": {"lat": 1, "lonn": 2}}, "arguments.ref.lonn is not an argument of this tool"),
        ({"maybe": {"lat": 1, "lonn": 2}}, "arguments.maybe.lonn is not an argument of this tool"),
        ({"inline": {"lat": 1, "lonn": 2}}, "arguments.inline.lonn is not an argument of this tool"),
        ({"many": [{"lat": 1, "x": 2}]}, "arguments.many[0].x is not an argument of this tool"),
        ({"named": {"home": {"lat": 1, "x": 2}}}, "arguments.named.home.x is not an argument of this tool"),
        ({"inherits": {"lat": 1, "x": "y"}}, "arguments.inherits.x is not an argument of this tool"),
        ({"kind": {"circle": 1, "x": 1}}, "arguments.kind.x is not an argument of this tool"),
        ({"wide": {"a": 1, "c": 2}}, "arguments.wide.c is not an argument of this tool"),
        ({"flag": {"depth": 2}}, "arguments.flag.depth is not an argument of this tool"),
        ({"maybe": {"lat": "1"}}, 'arguments.maybe.lat must be a number, got "1"'),
        ({"inline": {"lon": 1}}, "arguments.inline.lat is missing"),
        ({"ref": {"lat": 1, "lon": None}}, "arguments.ref.lon must be a number, got null"),
        ({"inherits": {"lat": "1", "name": "x"}}, 'arguments.inherits.lat must be a number, got "1"'),
        ({"other": 1}, "arguments.other is not an argument of this tool"),
    ],
)
def test_unknown_arguments_are_found_wherever_schemas_are_combined(arguments, expected):
    tool = {"type": "function", "function": {"name": "f", "parameters": COMBINED}}
    validators, problems = check_tools([tool])
    assert problems == []
    assert check_call("f", arguments, validators) == [expected] * (expected is not None)


@pytest.mark.parametrize("value, expected", [(None, []), ("x", ['arguments.a must be a number or null, got "x"'])])
def test_several_types_are_all_named(value, expected):
    validators, problems = check_tools([tool({"a": {"type": ["number", "null"]}})])
    assert problems == [] and check_call("f", {"a": value}, validators) == expected


def test_an_alternative_that_lets_nothing_pass_is_no_crash():
    validators, problems = check_tools([tool({"a": {"anyOf": [False, {"type": "null"}]}})])
    assert problems == []
    assert check_call("f", {"a": None}, validators) == []
    assert check_call("f", {"a": 1}, validators) == ["arguments.a: 1 is not valid under any of the given schemas"]


def test_null_properties_are_dropped_and_counted():
    tools, changes = to_tools([tool({"a": {"type": "string", "title": None}, "b": None, "c": None})])
    assert tools == [tool({"a": {"type": "string"}})]
    assert changes == {"title null -> removed": 1, "property null -> removed": 2}
