"""Schemas: foreign types and dialects become JSON Schema, and unknown arguments are found wherever they stand."""

import pytest
from conftest import WEATHER
from format_cases import read, tool

from tool_calling.data.schemas import parse_type
from tool_calling.data.tools import check_call, check_tools, to_tools
from tool_calling.data.validators import Validator, is_plain, to_strict


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
        *((name, {"type": "object"}) for name in ("HashMap", "Hashtable", "Map", "dict (optional)")),
        *((name, {"type": "array"}) for name in ("ArrayList", "Array", "Queue", "Stack", "java.util.List")),
        *((name, {"type": "string"}) for name in ("char", "String", "date", "DATE (YYYY-MM-DD)", "date-time", "url")),
        *((name, {"type": "integer"}) for name in ("long", "byte", "short", "Bigint", "int64")),
        *((name, {"type": "number"}) for name in ("double", "Float", "BigDecimal", "decimal (optional)")),
        ("timestamp", {"type": ["string", "number"]}),
        ("ENUM", {}),
        ("TIME (24-hour HH:MM)", {"type": "string"}),
        ("HashSet", {"type": "array", "uniqueItems": True}),
        ("String[]", {"type": "array", "items": {"type": "string"}}),
        ("int[][]", {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
        ("List<String>", {"type": "array", "items": {"type": "string"}}),
        ("Map<String, Object>", {"type": "object", "additionalProperties": {}}),
        ("Map<String, Integer>", {"type": "object", "additionalProperties": {"type": "integer"}}),
        (
            "HashMap<String, String[]>",
            {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}},
        ),
        ("Record<string, number>", {"type": "object", "additionalProperties": {"type": "number"}}),
        ("java.util.List<java.lang.String>", {"type": "array", "items": {"type": "string"}}),
        ("List<Object>", {"type": "array", "items": {}}),
        ("list of strings", {"type": "array", "items": {"type": "string"}}),
        ("Array of Object", {"type": "array", "items": {}}),
        ("int, required", {"type": "integer"}),
        ("string/number", {"type": ["string", "number"]}),
        ("string | null", {"type": ["string", "null"]}),
        ("int or float", {"type": ["integer", "number"]}),
        ("Literal['a', 'b']", {"enum": ["a", "b"]}),
        ("int" + "[]" * 100_000, None),
        ("a" + " " * 100_000 + "(", None),
    ],
)
def test_a_type_is_read_only_where_it_is_clear(text, expected):
    assert parse_type(text) == expected


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"type": ["STRING", "null"]}, {"type": ["string", "null"]}),
        ({"type": ["str", "string", "int"]}, {"type": ["string", "integer"]}),
        (
            {"type": ["List[str]", "null"]},
            {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
        ),
        ({"type": ["str", "file"]}, {"type": ["str", "file"]}),
        ({"type": []}, {"type": []}),
        ({"type": [1]}, {"type": [1]}),
    ],
)
def test_lists_of_types_are_read_too(given, expected):
    assert to_tools([tool({"a": given})])[0] == [tool({"a": expected})]


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
    "schema, passing, failing",
    [
        ({"type": "string", "nullable": True}, ["a", None], [1]),
        ({"type": ["integer", "null"], "nullable": True}, [1, None], ["a"]),
        ({"type": "string", "nullable": False}, ["a"], [None]),
        ({"enum": [1], "nullable": True}, [1], [None]),  # without a type it says nothing
        ({"type": "string", "enum": ["a"], "nullable": True}, ["a"], [None]),  # null would stand among the values
        ({"minimum": 0, "exclusiveMinimum": True}, [1], [0, -1]),
        ({"minimum": 0, "exclusiveMinimum": False}, [0], [-1]),
        ({"maximum": 9, "exclusiveMaximum": False}, [9], [10]),
        ({"maximum": 9, "exclusiveMaximum": True}, [8], [9]),
        ({"exclusiveMinimum": True}, [-1], []),
        ({"exclusiveMaximum": 9}, [8], [9]),
        ({"anyOf": [{"type": "integer"}, {"type": "array"}], "nullable": True}, [1, [], None], ["a"]),
        ({"type": "array", "items": []}, [[], [1, "a"]], [1]),
        (
            {"items": [{"type": "number"}, {"type": "number", "nullable": True}], "additionalItems": False},
            [[1], [1, None]],
            [[None], [1, 2, 3]],
        ),
        ({"items": [{"type": "number"}], "additionalItems": {"type": "string"}}, [[1, "a"]], [[1, 2], ["a"]]),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 0, "exclusiveMinimum": True}, [1], [0]),
        ({"type": "object", "properties": {"a": {"type": "string", "nullable": True}}}, [{"a": None}], [{"b": 1}]),
    ],
)
def test_schemas_of_openapi_and_earlier_drafts_are_rendered_as_written_and_applied_as_meant(schema, passing, failing):
    given = [tool({"nullable": schema}, ["nullable"])]  # which is a parameter's name here
    tools, changes = to_tools(given)
    assert (tools, changes) == (given, {})
    validators, problems = check_tools(tools)
    assert problems == []
    for value in [*passing, *failing]:
        refused = check_call("f", {"nullable": [value]}, check_tools([tool({"nullable": {"items": schema}})])[0])
        assert bool(refused) == (value in failing), value
        if value is not None:  # which a required argument may always be
            assert bool(check_call("f", {"nullable": value}, validators)) == (value in failing), value


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
    assert changes["flat parameters -> schema"] == changes["description missing -> null"] == 1 and to_tools(tools) == (
        tools,
        {},
    )
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


def test_a_default_is_a_legal_value_of_whatever_type():
    """Of optional and of required arguments, at every depth; `true` is no 1, and another value is as wrong as ever."""
    inner = {"type": "object", "properties": {"n": {"type": "integer", "default": "1"}}}
    one = {"anyOf": [{"type": "number"}, {"type": "boolean"}], "enum": [2], "default": 1}
    properties = {
        "a": {"type": "string", "default": None},
        "b": {"type": "number", "default": "1.0"},
        "c": inner,
        "d": one,
    }
    validators, problems = check_tools([tool(properties, ["b"])])
    assert problems == []
    assert check_call("f", {"a": None, "b": "1.0", "c": {"n": "1"}, "d": 1}, validators) == []
    assert check_call("f", {"a": 1, "b": "2.0", "c": {"n": "2"}, "d": True}, validators) == [
        "arguments.a must be a string, got 1",
        'arguments.b must be a number, got "2.0"',
        'arguments.c.n must be an integer, got "2"',
        "arguments.d must be one of 2, got true",
    ]


def test_an_empty_list_of_properties_is_a_free_object_but_for_the_tool_itself():
    free = {"type": "object", "properties": {}}
    shut = {**free, "additionalProperties": False}
    validators, problems = check_tools([tool({"free": free, "shut": shut, "many": {"type": "array", "items": free}})])
    assert problems == [] and check_call("f", {"free": {"x": {"y": 1}}, "many": [{"z": 1}]}, validators) == []
    assert check_call("f", {"shut": {"x": 1}}, validators) == ["arguments.shut.x is not an argument of this tool"]
    for parameters in (free, {}, None, {"properties": {}}):
        validators, _ = check_tools(to_tools([{"name": "f", "parameters": parameters}])[0])
        assert check_call("f", {}, validators) == []
        assert check_call("f", {"x": 1}, validators) == ["arguments.x is not an argument of this tool"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "file"},
        {"type": ["file"]},
        {"required": ["a", "a"]},
        {"required": [1]},
        {"minimum": True},
        {"maximum": "9"},
        {"enum": {"a": 1}},
        {"description": 5},
        {"items": 5},
        {"properties": {"b": 5}},
        {"additionalProperties": "no"},
        {"pattern": "("},
    ],
)
def test_a_schema_that_is_valid_at_a_glance_is_valid(part):
    fine = {"type": "string", "title": "t", "enum": [], "default": {}, "minimum": 1.5, "examples": [1]}
    whole = {"type": "object", "properties": {"a": fine, "b": {"items": fine}}, "required": ["a"]}
    assert is_plain(whole) and Validator.check_schema(whole) is None
    assert not is_plain({**whole, "properties": {"a": {**fine, **part}}})
    assert check_tools([tool({"a": {**fine, **part}})])[1] != []
