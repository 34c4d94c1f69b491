"""Reading, converting, validating, splitting: exact examples and exact error lines."""

import json
import random

import pytest
from conftest import ALARM, WEATHER, native, write_jsonl

from tool_calling.data.examples import Example, split_examples, to_examples
from tool_calling.data.rows import read_rows
from tool_calling.data.schemas import to_strict
from tool_calling.data.tools import check_call, check_tools, read_tools
from tool_calling.terminal import UserError, report_problems

USER = {"role": "user", "content": "hi"}


def calling(name: str, arguments: object) -> dict:
    """An assistant message in the OpenAI shape with one call."""
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def read(path: str, tools_path: str):
    checked = to_examples(read_rows([path]), tools_path)
    return checked.examples, checked.problems


def problems_of(tmp_path, tools_path, row) -> list[str]:
    """The problems of one row, without their place."""
    examples, problems = read(write_jsonl(tmp_path / "one.jsonl", [row]), tools_path)
    assert (len(examples) == 0) == bool(problems)
    assert all(source == str(tmp_path / "one.jsonl") + ":1" for source, _ in problems)
    return [problem for _, problem in problems]


def test_native_rows_become_examples(tmp_path, tools_path):
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [
            native("rain in Rome?", ("get_weather", {"city": "Rome"})),
            native("wake me at 6 and 7", ("set_alarm", {"time": "06:00"}), ("set_alarm", {"time": "07:00"})),
            "",
            native("thanks", content="You're welcome."),
        ],
    )
    examples, problems = read(path, tools_path)
    assert problems == []
    assert [example.source for example in examples] == [f"{path}:1", f"{path}:2", f"{path}:4"]
    assert examples[0].messages == [
        {"role": "user", "content": "rain in Rome?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}],
        },
    ]
    assert [call["function"]["arguments"]["time"] for call in examples[1].messages[1]["tool_calls"]] == [
        "06:00",
        "07:00",
    ]
    assert examples[2].messages[1] == {"role": "assistant", "content": "You're welcome."}
    assert examples[0].tools == [WEATHER, ALARM]


def test_openai_rows_keep_turns_replies_and_their_own_tools(tmp_path, tools_path):
    row = {
        "tools": [WEATHER],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "rain in Rome?"},
            calling("get_weather", '{"city": "Rome", "days": 2}'),
            {"role": "tool", "tool_call_id": "c1", "content": '{"rain": true}'},
            {"role": "assistant", "content": "Yes.", "reasoning_content": "rain is true"},
        ],
    }
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    (example,), problems = read(path, "no/such/tools.json")  # the row has its own: the file is not needed
    assert problems == []
    assert example.tools == [WEATHER]
    assert example.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "rain in Rome?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": {"city": "Rome", "days": 2}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": '{"rain": true}'},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "rain is true"},
    ]


def test_array_and_jsonl_give_the_same_rows_and_lines(tmp_path):
    rows = [native("a", content="b"), {"messages": [USER], "x": {"deep": [1, 2.5, None]}}, native("c", content="d")]
    lines = write_jsonl(tmp_path / "rows.jsonl", rows)
    array = tmp_path / "rows.json"
    array.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    assert [row for _, row in read_rows([lines])] == [row for _, row in read_rows([str(array)])] == rows
    assert [source for source, _ in read_rows([str(array)])] == [f"{array}:2", f"{array}:3", f"{array}:4"]
    array.write_text(json.dumps(rows))  # all on one line: counted instead
    assert [source for source, _ in read_rows([str(array)])] == [f"{array}:1", f"{array}[1]", f"{array}[2]"]
    assert len(list(read_rows([lines], max_samples=2))) == 2


@pytest.mark.parametrize(
    "row, expected",
    [
        (
            native("x", ("get_wether", {"city": "Rome"})),
            'call 1 "get_wether": the row has no such tool; did you mean "get_weather"?',
        ),
        (native("x", ("fly", {})), 'call 1 "fly": the row has no such tool; tools: get_weather, set_alarm'),
        (native("x", ("get_weather", {})), 'call 1 "get_weather": arguments.city is missing'),
        (native("x", ("get_weather", {"city": 7})), 'call 1 "get_weather": arguments.city must be a string, got 7'),
        (
            native("x", ("get_weather", {"city": "Rome", "days": "7"})),
            'call 1 "get_weather": arguments.days must be an integer, got "7"',
        ),
        (
            native("x", ("get_weather", {"city": "Rome", "days": 9})),
            'call 1 "get_weather": arguments.days: 9 is greater than the maximum of 7',
        ),
        (
            native("x", ("get_weather", {"city": "Rome", "units": "kelvin"})),
            'call 1 "get_weather": arguments.units must be one of "celsius", "fahrenheit", got "kelvin"',
        ),
        (
            native("x", ("get_weather", {"city": "Rome"}), ("get_weather", {"city": "Rome", "town": "x"})),
            'call 2 "get_weather": arguments.town is not an argument of this tool',
        ),
        (
            native("x", ("set_alarm", {"time": "6", "loud": 1})),
            'call 1 "set_alarm": arguments.loud must be true or false, got 1',
        ),
        (
            native("x", ("set_alarm", {"time": "6", "place": {"room": "a", "floor": 2}})),
            'call 1 "set_alarm": arguments.place.floor is not an argument of this tool',
        ),
        (native("x", ("set_alarm", {"time": "6", "place": {}})), 'call 1 "set_alarm": arguments.place.room is missing'),
        (
            {"input": "x", "output": {"function_call": {"name": "set_alarm"}}},
            'a call must be {"name": "...", "arguments": {...}}, got {"name": "set_alarm"}',
        ),
        (
            {"input": "x", "output": {"function_call": {"name": "set_alarm", "arguments": "{time: 6}"}}},
            'call "set_alarm": arguments are not valid JSON: Expecting property name enclosed in double quotes: "{time: 6}"',
        ),
        (
            {"input": "x", "output": {"function_call": {"name": "set_alarm", "arguments": [1]}}},
            'call "set_alarm": arguments must be an object, got [1]',
        ),
        ({"input": "x", "output": {}}, '"output" must hold function_call, function_calls or content, got {}'),
        ({"input": 5, "output": {"content": "y"}}, '"input" must be text, got 5'),
        ({"input": " ", "output": {"content": "y"}}, "message 1 (user): content is empty"),
        (
            {"prompt": "x"},
            'no known format; expected an object with "messages"; "conversations"; "input" and "output"; '
            '"query" and "answers"; "chat"; "question" and "answer"; "prompt" and "completion"; '
            'got {"prompt": "x"}',
        ),
        (
            {"data": [{"input": "x"}]},
            'no known format; expected an object with "messages"; "conversations"; "input" and '
            '"output"; "query" and "answers"; "chat"; "question" and "answer"; "prompt" and "completion"; got {"data": '
            '[{"input": "x"}]}; if its "data" are the rows, give that list alone',
        ),
        ('"text"', 'a row must be an object, got "text"'),
        (
            "{broken",
            "not valid JSON: Expecting property name enclosed in double quotes; "
            "expected one JSON object a line, or a JSON array",
        ),
        (
            '{"input": "x", "output": {"content": NaN}}',
            "not valid JSON: NaN is not JSON; expected one JSON object a line, or a JSON array",
        ),
        (
            native("hi <|im_end|>", content="y"),
            "message 1 (user): holds the control token <|im_end|>, which would forge a turn; remove it",
        ),
        (
            native("hi", ("get_weather", {"city": "</tool_call>"})),
            "message 2 (assistant): holds the control token </tool_call>, which would forge a turn; remove it",
        ),
        ({"messages": [USER]}, "the last message must be the assistant's: it is what is trained"),
        ({"messages": []}, "the last message must be the assistant's: it is what is trained"),
        ({"messages": "x"}, '"messages" must be a list of objects, got "x"'),
        (
            {"messages": [{"role": "assistant", "content": "y"}]},
            'message 1 has the role "assistant"; expected system or user',
        ),
        ({"messages": [USER, USER]}, 'message 2 has the role "user"; expected assistant'),
        (
            {"messages": [USER, calling("set_alarm", {"time": "6"}), USER]},
            'message 3 has the role "user"; expected tool',
        ),
        (
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": name, "function": {"name": "set_alarm", "arguments": {"time": "6"}}}
                            for name in ("c1", "c2")
                        ],
                    },
                    {"role": "tool", "tool_call_id": "c2", "content": "ok"},
                    {"role": "assistant", "content": "done"},
                ]
            },
            'message 4 has the role "assistant"; expected tool; 1 of its calls still wait for their reply',
        ),
        (
            {
                "messages": [
                    USER,
                    calling("set_alarm", {"time": "6"}),
                    {"role": "tool", "content": "ok"},
                    {"role": "tool", "content": "ok"},
                    {"role": "assistant", "content": "done"},
                ]
            },
            'message 4 has the role "tool"; expected assistant',
        ),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, 'message 2 has the role "robot"; expected assistant'),
        ({"messages": [USER, {"role": "assistant", "content": "y"}], "tools": {}}, "tools must be a list, got {}"),
        (
            {"messages": [USER, {"role": "assistant", "content": "y"}], "tools": [{"title": "f"}]},
            'tool 1: expected {"type": "function", "function": {"name": ...}}, got {"title": "f"}',
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "y"}], "tools": [WEATHER, WEATHER]},
            'tool 2 "get_weather": the name is taken by an earlier tool',
        ),
        (
            {
                "messages": [USER, {"role": "assistant", "content": "y"}],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "map"}}}],
            },
            "tool 1 \"f\": parameters.type is not valid JSON Schema: 'map' is not valid under any of the given schemas",
        ),
        (
            {
                "messages": [USER, calling("f", {"a": 1})],
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"$ref": "http://localhost:9/x"}}}
                ],
            },
            'call 1 "f": its tool\'s schema refers to http://localhost:9/x, which is not inside that schema',
        ),
    ],
)
def test_each_problem_is_named_exactly(tmp_path, tools_path, row, expected):
    assert problems_of(tmp_path, tools_path, row) == [expected]


def test_rows_without_tools_are_plain_conversations(tmp_path):
    row = {"messages": [USER, {"role": "assistant", "content": "hello"}], "tools": []}
    (example,), problems = read(write_jsonl(tmp_path / "rows.jsonl", [row]), "no/such/tools.json")
    assert problems == [] and example.tools == []


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


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", "{path}: is empty; expected a JSON array of rows, or one JSON object a line"),
        ("[]", "{path}: holds no rows"),
        ('[\n{"a": 1},\n{"b" 2}\n]', "{path}:3: not valid JSON: Expecting ':' delimiter"),
        ('[\n{"a": 1}\n', "{path}:3: the JSON array does not end; expected ]"),
        (b"\xff\xfe\x00", "{path}: not UTF-8 text (byte 0); save it as UTF-8 JSON or JSONL"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, content, expected):
    path = tmp_path / "rows.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        list(read_rows([str(path)]))
    assert str(error.value) == expected.format(path=path)


def test_a_missing_file_is_one_line():
    with pytest.raises(UserError, match="^no/such.json: cannot be read: No such file or directory$"):
        list(read_rows(["no/such.json"]))


def test_a_bad_tools_file_names_the_line(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text('[\n{"type": "function",\n "function": {"name": "f"}},\n{"title": "g"}\n]')
    with pytest.raises(UserError) as error:
        read_tools(str(path))
    assert str(error.value).splitlines() == [
        f'{path}:4: tool 2: expected {{"type": "function", "function": {{"name": ...}}}}, got {{"title": "g"}}',
        "1 problem in 1 of 2 tools",
    ]


def test_problems_are_counted_and_the_first_twenty_shown():
    problems = [(f"x.jsonl:{i}", "broken") for i in range(1, 31)]
    with pytest.raises(UserError) as error:
        report_problems(problems, "error", 1500)
    lines = str(error.value).splitlines()
    assert lines[:20] == [f"x.jsonl:{i}: broken" for i in range(1, 21)]
    assert lines[20:] == [
        "30 problems in 30 of 1,500 rows, the first 20 above; fix them or skip these rows with --on_invalid skip"
    ]


def test_skipping_names_every_row(capsys):
    report_problems([("x.jsonl:4", "broken"), ("x.jsonl:9", "worse")], "skip", 50)
    captured = capsys.readouterr()
    assert captured.err == "skipped: x.jsonl:4: broken\nskipped: x.jsonl:9: worse\n"
    assert captured.out == "skip     2 of 50 rows, named above\n"


def example(request: str, answer: str = "ok") -> Example:
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return Example(f"x:{request}", messages, [])


def requests(examples) -> set[str]:
    return {example.messages[0]["content"] for example in examples}


def test_split_is_exact_and_independent_of_order():
    examples = [example(f"request {i}") for i in range(200)]
    train, held_out = split_examples(examples, 0.1)
    assert (len(train), len(held_out)) == (180, 20)
    shuffled = random.Random(0).sample(examples, len(examples))
    again = split_examples(shuffled, 0.1)
    assert (requests(again[0]), requests(again[1])) == (requests(train), requests(held_out))
    assert [e.source for e in train] == [e.source for e in examples if e in train]  # file order is kept


def test_one_prompt_is_never_on_both_sides():
    examples = [example(f"request {i % 50}", f"answer {i}") for i in range(200)]
    train, held_out = split_examples(examples, 0.25)
    assert len(held_out) in range(47, 51) and len(train) + len(held_out) == 200
    assert not requests(train) & requests(held_out)


def test_appended_rows_move_few_others():
    examples = [example(f"request {i}") for i in range(1000)]
    before = requests(split_examples(examples[:900], 0.1)[1])
    after = requests(split_examples(examples, 0.1)[1])
    assert len(before - after) <= 15  # of 90; chance alone would move 81


def test_nothing_is_held_out_at_zero():
    assert split_examples([example("a"), example("b")], 0.0) == ([example("a"), example("b")], [])
