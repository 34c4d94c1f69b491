"""Rows of other people, kind by kind: what public files and traces hold, and exactly what is trained of it."""

import json
import re
import time

import pytest
from conftest import ALARM, WEATHER, native, write_jsonl
from format_cases import BARE, CALL, REPLY, TOOLS, USER, YES, calls, read, sharegpt

from tool_calling.data.examples import Reading, read_examples, to_examples, to_row

PING = {"type": "function", "function": {"name": "ping", "description": "Pong.", "parameters": {"type": "object"}}}
BOTH = [WEATHER, PING]
SYSTEM = {"role": "system", "content": "Be brief."}
WRONG = {"role": "assistant", "content": "A WRONG ANSWER"}
ROME, NO_ARGUMENTS = {"city": "Rome"}, {"name": "ping", "arguments": {}}


def asks(content: str = "", *made: dict, **more) -> dict:
    """The assistant's message of an Example with these calls, {"name", "arguments"} or with an id."""
    listed = [
        {
            **({"id": call["id"]} if "id" in call else {}),
            "type": "function",
            "function": {k: call[k] for k in call if k != "id"},
        }
        for call in made
    ]
    weight = {key: more.pop(key) for key in ("weight",) if key in more}
    return {"role": "assistant", "content": content, **more, **({"tool_calls": listed} if listed else {}), **weight}


def weather(city: str = "Rome", **more) -> dict:
    return {**more, "name": "get_weather", "arguments": {"city": city}}


def messages_of(row: dict) -> list[dict]:
    """The messages of a row that has no problem."""
    example, problems, _ = read(row)
    assert problems == []
    return example.messages


def changes_of(row: dict) -> dict:
    """What was normalised in a row, without what was in its tools."""
    checked = to_examples([("x:1", row)], Reading("no/such/tools.json"))
    assert checked.problems == []
    return {change: count for change, count in checked.changes.items() if change in checked.first}


def answer(text: str, tools=BOTH) -> dict:
    return {"messages": [USER, {"role": "assistant", "content": text}], "tools": tools}


# -- Tools that a row did not bring -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, YES]},
        {"messages": [USER, YES], "tools": None},
        sharegpt(("human", "rain in Rome?"), ("gpt", "Yes.")),
        {"instruction": "rain in Rome?", "output": "Yes."},
        {"prompt": [USER], "completion": [YES], "tools": None},
        {"chat": "USER: rain in Rome?\n\n\nASSISTANT: Yes. <|endoftext|>"},
        {"input": [USER, YES]},
        {
            "contents": [
                {"role": "user", "parts": [{"text": "rain in Rome?"}]},
                {"role": "model", "parts": [{"text": "Yes."}]},
            ]
        },
    ],
)
def test_only_a_named_file_gives_tools_to_a_row_that_brings_none(tools_path, row):
    checked = to_examples([("x:1", row)], Reading(tools_path))
    assert (checked.examples[0].messages, checked.examples[0].tools, checked.filled) == ([USER, YES], [], 0)
    checked = to_examples([("x:1", row), ("x:2", {**row, "tools": []})], Reading(tools_path, named_tools=True))
    assert [example.tools for example in checked.examples] == [[WEATHER, ALARM], []] and checked.filled == 1
    assert [example.filled for example in checked.examples] == [True, False]


def test_the_rows_that_a_named_file_fills_are_counted_on_screen(tmp_path, tools_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [USER, YES]}] * 2 + [native("rain?", content="Yes.")])
    read_examples([path], Reading(tools_path, named_tools=True))
    assert (
        capsys.readouterr().out.splitlines()[0] == f"read     tools of {tools_path} given to 2 rows without their own"
    )
    read_examples([path], Reading(tools_path))
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("key", ["tool_defs", "available_tools", "function_definitions", "my_own_name", "tool_schemas"])
@pytest.mark.parametrize("tools", [[WEATHER], [BARE], json.dumps([BARE]), [json.dumps(WEATHER)]])
def test_a_list_of_tools_is_read_under_any_key(key, tools):
    for row in (
        {key: tools},
        {key: tools, "tools": None},
        {key: tools, "tools": []},
        {"metadata": {key: tools, "n": 1}},
    ):
        example, problems, _ = read({"messages": [USER, calls("Rome")], **row})
        assert (problems, example.tools) == ([], [WEATHER])
    example, problems, _ = read({"messages": [{**SYSTEM, "functions": tools}, USER, calls("Rome")]})
    assert (problems, example.tools, example.messages[0]) == ([], [WEATHER], SYSTEM)
    example, problems, _ = read({"messages": [{"role": "tools", "content": tools}, USER, calls("Rome")]})
    assert (problems, example.tools, example.messages) == ([], [WEATHER], [USER, calls("Rome")])


def test_two_lists_of_tools_are_read_if_they_are_equal():
    talk = {"messages": [USER, calls("Rome")]}
    example, problems, _ = read({**talk, "tools": [WEATHER], "functions": [BARE], "tool_defs": json.dumps([WEATHER])})
    assert (problems, example.tools) == ([], [WEATHER])
    for other in ([ALARM], [WEATHER, ALARM]):
        expected = ['the row has tools in "tools" and others in "tool_defs"; expected one list of tools']
        assert read({**talk, "tools": [WEATHER], "tool_defs": other})[1] == expected
    checked = to_examples([("x:1", {**talk, "tools": [WEATHER], "available_tools": ["a"]})], Reading("no/tools.json"))
    assert checked.problems == [] and set(checked.unread) == {("row", "available_tools")}  # names are no tools
    assert read({**talk, "tool_defs": "[{"})[1][0].startswith("tools are not valid JSON")


@pytest.mark.parametrize(
    "row, name",
    [
        ({"messages": [USER, calls("Rome")]}, "get_weather"),
        ({"messages": [USER, YES, {"role": "tool_call", "content": '{"name": "check", "arguments": {}}'}]}, "check"),
        (sharegpt(("human", "hi"), ("gpt", f"<tool_call>{CALL}</tool_call>")), "get_weather"),
        ({"messages": [USER, {**YES, "content": "[book(day='Monday')]"}]}, "book"),
    ],
)
def test_a_call_in_a_row_without_tools_is_named(tools_path, row, name):
    expected = f'the row calls "{name}" and has no tools; give them with "tools" or --tools_path'
    assert read(row)[1] == read(row, tools_path=tools_path)[1] == [expected]


# -- Loss flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [{"loss": False}, {"train": 0}, {"weight": 0}, {"trainable": False}, {"masked": True}])
def test_a_turn_that_another_trainer_leaves_out_is_context(flag):
    again = {"role": "user", "content": "sure?"}
    expected = [USER, {**WRONG, "weight": 0}, again, YES]
    assert messages_of({"messages": [USER, {**WRONG, **flag}, again, {**YES, "loss": True}]}) == expected
    turns = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": WRONG["content"], **flag}]
    turns += [{"from": "human", "value": "sure?", "loss": None}, {"from": "gpt", "value": "Yes.", "weight": 1.0}]
    assert messages_of({"conversations": turns}) == expected
    parts = [
        {"role": "user", "parts": [{"text": USER["content"]}]},
        {"role": "model", "parts": [{"text": "A WRONG ANSWER"}], **flag},
    ]
    assert messages_of({"contents": [*parts, again, YES]}) == expected
    called = {
        "tools": TOOLS,
        "messages": [USER, {"role": "tool_call", "content": CALL, **flag}, {**REPLY, "role": "tool_response"}, YES],
    }
    assert messages_of(called) == [USER, calls("Rome", weight=0), REPLY, YES]
    for row in ({"input": "a", "output": {"content": "b", **flag}}, {"instruction": "a", "output": "b", **flag}):
        assert read({**row, "tools": []})[1] == ["no turn is trained; every weight is 0"]


@pytest.mark.parametrize(
    "mask",
    [
        {"train_mask": [0, 0, 0, 1]},
        {"loss_mask": [False, True]},
        {"weights": [0, 1]},
        {"masked": [1, 0]},
        {"loss": [None, False, None, True]},
    ],
)
def test_a_mask_beside_the_messages_is_for_each_of_them_or_each_answer(mask):
    row = {"messages": [USER, WRONG, USER, YES], **mask}
    assert messages_of(row) == [USER, {**WRONG, "weight": 0}, USER, YES]
    assert messages_of({**row, "system": "Be brief."})[1:] == [USER, {**WRONG, "weight": 0}, USER, YES]


@pytest.mark.parametrize(
    "row, turn, problem",
    [
        ({}, {"loss": 0.5}, "loss must be 0 or 1, got 0.5"),
        ({}, {"train": "no"}, 'train must be 0 or 1, got "no"'),
        ({}, {"train_detail": [{"begin": 0}]}, 'train_detail must be 0 or 1, got [{"begin": 0}]'),
        ({}, {"mask": 1}, '"mask" of a turn may mean that it is trained or that it is not; rename it to "weight"'),
        ({}, {"loss": True, "weight": 0}, "loss and weight of a turn do not agree; expected one of them"),
        ({"weights": [1, 1, 1]}, {}, '"weights" has 3 entries; expected one for each of 2 messages or 1 answers'),
        (
            {"train_mask": [0, 1]},
            {"train_mask": 0},
            '"train_mask" of the row and "train_mask" of a turn do not agree; expected one of them',
        ),
        ({"mask": [0]}, {}, '"mask" of a turn may mean that it is trained or that it is not; rename it to "weight"'),
        ({"mask": "Assistant"}, {}, '"mask" names the assistant: no turn would be trained'),
        ({"weight": 0.3}, {}, "weight must be 0 or 1, got 0.3"),
        ({"loss": False}, {}, "no turn is trained; every weight is 0"),
    ],
)
def test_a_loss_flag_that_is_not_clear_is_a_problem(row, turn, problem):
    assert read({"messages": [USER, {**YES, **turn}], **row})[1] == [problem]


def test_a_flag_that_is_no_flag_is_named_as_not_read_and_one_on_other_turns_is_counted():
    checked = to_examples([("x:1", {"messages": [USER, YES], "train": "v1", "mask": "User"})], Reading("no/tools.json"))
    assert checked.problems == [] and set(checked.unread) == {("row", "train"), ("row", "mask")}
    assert changes_of({"messages": [USER, YES], "weights": [1, 1]}) == {"user turn marked as trained -> not trained": 1}


@pytest.mark.parametrize("call", [{"name": "nope", "arguments": {}}, {"name": "get_weather", "arguments": {"town": 1}}])
def test_wrong_turns_are_context_whose_calls_need_no_schema(call):
    wrong = {"role": "assistant", "tool_calls": [call], "loss": False}
    row = {"messages": [USER, wrong, {**REPLY, "content": "error"}, calls("Rome")], "tools": TOOLS}
    assert messages_of(row)[1] == asks("", call, weight=0)
    assert read({**row, "messages": [USER, {**wrong, "loss": True}]})[1] != []


def test_wrong_turns_that_cannot_be_read_stay_as_they_are():
    texts = ("get_weather(", "<function=get_weather>", "Action: get_weather", '{"name": "get_weather", "arguments": {')
    for text in texts:
        wrong = {"role": "assistant", "content": text, "weight": 0}
        assert messages_of({"messages": [USER, wrong, USER, YES], "tools": TOOLS}) == [USER, wrong, USER, YES]
        assert read({"messages": [USER, {**wrong, "weight": 1}], "tools": TOOLS})[1] != []
    broken = {"role": "assistant", "weight": 0, "tool_calls": [{"name": "get_weather", "arguments": '{"city": '}]}
    row = {"messages": [USER, broken, {**REPLY, "content": "error"}, YES], "tools": TOOLS}
    assert messages_of(row)[1] == asks("", {"name": "get_weather", "arguments": '{"city": '}, weight=0)
    example, _, _ = read(row)
    assert read(to_row(example))[0] == example
    assert read(answer("[get_weather(city='Rome')]") | {"weights": [0, 0]})[1] == [
        "no turn is trained; every weight is 0"
    ]


# -- Calls written as text --------------------------------------------------------------------------------------------

READ = {  # text of an answer: (syntax, what is left of the text, calls)
    "[get_weather(city='Rome')]": ("toolace", "", [weather()]),
    "[get_weather(city='Rome'), ping()]": ("toolace", "", [weather(), NO_ARGUMENTS]),
    "I look: [get_weather(city='Rome')]": ("python", "I look:", [weather()]),
    "get_weather(city='Rome')": ("python", "", [weather()]),
    "I look.\nget_weather(city='Rome', days=3)": (
        "python", "I look.", [{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}]),
    "get_weather(city='Rome'), ping()": ("python", "", [weather(), NO_ARGUMENTS]),
    "get_weather(city='Rome')\nping()": ("python", "", [weather(), NO_ARGUMENTS]),
    "```python\nget_weather(\n    city='Rome',\n)\n```": ("python", "", [weather()]),
    "```tool_code\nprint(default_api.get_weather(city='Rome'))\n```": ("python", "", [weather()]),
    'Action: get_weather\nAction Input: {"city": "Rome"}': ("react", "", [weather()]),
    'Thought: so.\nAction: get_weather\nAction Input: {"city": "Rome"}\nObservation:': (
        "react", "Thought: so.", [weather()]),
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>": ("hermes", "", [{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}]),
    "I look.\n<function=get_weather>\n<parameter=city>\n3\n</parameter>\n</function>": (
        "qwen3_coder", "I look.", [weather("3")]),
    '<function=get_weather>{"city": "Rome"}</function>': ("qwen3_coder", "", [weather()]),
    '<function_calls>\n<invoke name="get_weather">\n<parameter name="city">Rome</parameter>\n</invoke>\n'
    '</function_calls>': ("qwen3_coder", "", [weather()]),
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>": (
        "hermes", "", [weather()]),
    '{"name": "get_weather", "parameters": {"city": "Rome"}}': ("json", "", [weather()]),
    '{"name": "ping", "parameters": {}}; {"name": "ping", "arguments": null}': ("json", "", [NO_ARGUMENTS] * 2),
    f"[{CALL}, {CALL}]": ("json", "", [weather()] * 2),
    f"```json\n{CALL}\n```": ("json", "", [weather()]),
    f"I look.\n{CALL}": ("json", "I look.", [weather()]),
    f"I look.\n```json\n{CALL}\n```": ("json", "I look.", [weather()]),
    "{'name': 'get_weather', 'arguments': {'city': 'Rome'}}": ("json", "", [weather()]),
    '{"tool": "get_weather", "args": {"city": "Rome"}}': ("json", "", [weather()]),
    '{"action": "get_weather", "action_input": {"city": "Rome"}}': ("json", "", [weather()]),
    f'{{"role": "assistant", "content": "I look.", "tool_calls": [{{"function": {CALL}}}]}}': (
        "json", "I look.", [weather()]),
    f"<functioncall> {CALL} <|endoftext|>": ("glaive", "", [weather()]),
    f"[TOOL_CALLS] [{CALL}]": ("mistral", "", [weather()]),
    '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}': ("mistral", "", [weather()]),
    '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Rome"}}<|eom_id|>': ("llama", "", [weather()]),
    "<|python_tag|>get_weather.call(city='Rome')": ("llama", "", [weather()]),
    f"<think>ping() first?</think>\n<TOOLCALL>[{CALL}]</TOOLCALL>": ("hermes", "", [weather()]),
}  # fmt: skip


@pytest.mark.parametrize("text", READ)
def test_a_call_in_a_text_is_read_in_every_container(text):
    syntax, rest, made = READ[text]
    thought = {"reasoning_content": "ping() first?"} if "<think>" in text else {}
    expected = [USER, asks(rest, *made, **thought)]
    talk = sharegpt(("human", "rain in Rome?"), ("gpt", text))
    for row in (
        answer(text),
        {**talk, "tools": BOTH},
        {"input": "rain in Rome?", "output": {"content": text}, "tools": BOTH},
        {"question": "rain in Rome?", "answer": text, "tools": BOTH},
        {"prompt": [USER], "completion": [{"role": "assistant", "content": text}], "tools": BOTH},
        {"contents": [USER, {"role": "model", "parts": [{"text": text}]}], "tools": BOTH},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": text}]}], "tools": BOTH},
    ):
        example, problems, _ = read(row)
        assert (problems, example.messages, example.syntax) == ([], expected, syntax)


@pytest.mark.parametrize(
    "text",
    [
        "I can use get_weather to look it up.",
        "Use `get_weather(city)` for that.",
        "get_weather(city) returns the weather of a city.",
        "- get_weather(city): weather\n- ping(): pong",
        "You may call get_weather (it needs a city), or ping.",
        'The tool is {"name": "get_weather", "description": "Weather.", "parameters": {"type": "object"}}.',
        "<think>get_weather(city='Rome')</think>\nNo tool is needed.",
        '{"city": "Rome"}',
        "[1] and (2)",
        "[see figure (2)]",
        "f(x) = x",
        "You can use get_weather to see it.",
        "Use get_weather(city) for that.",
        "get_weather (or another tool) would know.",
        "Ask get_weather() whenever you like.",
        'The name of the tool is "get_weather".',
        "[get_weather] is a tool.",
        "my_get_weather(city='Rome') is another tool's.",
    ],
)
def test_talk_about_a_tool_is_no_call(text):
    (_, message) = messages_of(answer(text))
    assert message["content"] == text.removeprefix("<think>get_weather(city='Rome')</think>\n")
    assert "tool_calls" not in message


@pytest.mark.parametrize(
    "text",
    [
        'get_weather {"city": "Rome"}',
        '>>>get_weather\n{"city": "Rome"}',
        "<get_weather><city>Rome</city></get_weather>",
        '<call name="get_weather"/>',
        '{"get_weather": {"city": "Rome"}}',
        'to=functions.get_weather json {"city": "Rome"}',
        'functions.get_weather:0 {"city": "Rome"}',
        '<｜tool▁sep｜>get_weather\n```json\n{"city": "Rome"}\n```',
        "Action: get_weather",
        "result = get_weather(city='Rome')",
        f"I look: {CALL[:-1]}",
        "<start_function_call>call:get_weather{city:<escape>Rome<escape>}<end_function_call>",
        "I will call get_weather(city='Rome') now.",
        "`get_weather(city='Rome')`",
        '{"function": "get_weather", "city": "Rome"}',
        '```json\n{"tool": "get_weather", "city": "Rome"}\n```',
        '✿FUNCTION✿: get_weather\n✿ARGS✿: {"city": "Rome"}',
        "Action: get_weather[Rome]",
        'to=functions.get_weather {"city": "Rome"}',
        'get_weather\n{"city": "Rome"}',
        '[{"get_weather": {"city": "Rome"}}]',
        "x = get_weather(city='Rome')\nprint(x)",
    ],
)
def test_a_call_in_an_unknown_syntax_is_a_problem(text):
    problem = read(answer(text))[1][0]
    assert problem.startswith('an answer calls "get_weather" as text, ')
    assert problem.endswith('; expected it in a syntax that is read, such as "tool_calls"')
    assert messages_of(answer(text, [ALARM]))[1]["content"] == text  # no tool of this row


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>\n"
        "<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>",
        f"<tool_call>\n{CALL}\n</tool_call>\nget_weather(city='Oslo')",
        f"[get_weather(city='Oslo')]\n<tool_call>\n{CALL}\n</tool_call>",
    ],
)
def test_no_call_is_left_in_the_text_beside_others(text):
    example, (problem,), _ = read(answer(text))
    assert example is None and problem.startswith("an answer writes calls in two ways, hermes and ")


@pytest.mark.parametrize(
    "text, problem",
    [
        ("get_weather(city)", 'call "get_weather": expected arguments like key=value, each key once, got "city"'),
        ("get_weather(city='Rome'", "unpaired quote or bracket in \"(city='Rome'\""),
        ("<function=get_weather>", "a turn has <function=get_weather> without </function>; expected both"),
        ("Action: get_weather\nAction Input: {", 'the text after Action Input: is not JSON: "{"'),
        (
            "Action: ping\nAction Input: {}\nObservation: pong",
            'an answer holds the "Observation:" to its own call; expected a turn of its own for it',
        ),
        ("<|python_tag|>run", 'the text after <|python_tag|> is neither JSON nor calls: "run"'),
        ("[get_wether(city='Rome')]", 'call 1 "get_wether": the row has no such tool; did you mean "get_weather"?'),
        ("[get_weather(city=7)]", 'call 1 "get_weather": arguments.city must be a string, got 7'),
    ],
)
def test_a_broken_call_in_a_text_is_one_exact_line(text, problem):
    assert read(answer(text))[1] == [problem]


def test_values_of_xml_calls_are_typed_by_the_schema_of_their_tool():
    properties = {
        "text": {"type": "string"}, "count": {"type": "integer"}, "share": {"type": "number"},
        "on": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}}, "more": {"type": "object"},
        "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "free": {}, "name": {"type": ["string", "null"]},
    }  # fmt: skip
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": properties}}
    given = {"text": "12", "count": "12", "share": "0.5", "on": "True", "tags": '["a"]', "more": "{'a': null}"}
    given |= {"either": "null", "free": "7", "name": "None"}
    text = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in given.items())
    row = answer(f"<function=f>\n{text}</function>", [{"type": "function", "function": function}])
    assert messages_of(row)[1]["tool_calls"][0]["function"]["arguments"] == {
        "text": "12", "count": 12, "share": 0.5, "on": True, "tags": ["a"], "more": {"a": None},
        "either": None, "free": "7", "name": None,
    }  # fmt: skip


# -- System texts -----------------------------------------------------------------------------------------------------

LISTED = f"Here is a list of functions in JSON format that you can invoke:\n{json.dumps([BARE])}\n"
TOOLACE = (
    f"You are an expert in composing functions. Today is Monday.\n{LISTED}Put it in the format of [f(a=b)]. Be kind."
)
HERMES = (
    f"You are Bob. Your tools are <tools>{TOOLS}</tools> today. Be kind. Write <tool_call></tool_call> please. Thanks."
)
QWEN = (
    "Be kind.\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided "
    f"with function signatures within <tools></tools> XML tags:\n<tools>\n{json.dumps(WEATHER)}\n</tools>\n\nFor "
    "each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:"
    '\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
KIMI = f"<|im_system|>tool_declare<|im_middle|>{TOOLS}<|im_end|>"


@pytest.mark.parametrize(
    "system, rest, dropped",
    [(TOOLACE, "Today is Monday.\nBe kind.", 153), (HERMES, "You are Bob. Be kind. Thanks.", 0), (QWEN, "Be kind.", 0)],
)
def test_what_tells_how_to_call_is_cut_to_its_sentence_and_counted(system, rest, dropped):
    texts = ["No.", "[get_weather(city='Rome')]" if dropped else f"<tool_call>{CALL}</tool_call>"]
    for text in texts:
        row = {"messages": [{"role": "system", "content": system}, USER, {"role": "assistant", "content": text}]}
        example, problems, changes = read(row)
        assert problems == [] and example.tools == [WEATHER] and example.format == ("toolace" if dropped else "hermes")
        assert example.messages[0] == {"role": "system", "content": rest}
        size = len(json.dumps([BARE])) if dropped else len(TOOLS) if system == HERMES else len(json.dumps(WEATHER)) + 2
        assert changes["system text on calls cut: characters"] == len(system) - len(rest) - size
        assert to_examples([("x:1", to_row(example))], Reading("no")).examples[0].messages == example.messages


@pytest.mark.parametrize("system", [TOOLACE, f"Use these: {TOOLS} Be kind."])
def test_a_system_text_beside_structured_calls_is_never_rewritten(system):
    message = {"role": "system", "content": system}
    for tools in ({}, {"tools": [WEATHER]}):
        example, problems, changes = read({"messages": [message, USER, calls("Rome")], **tools})
        assert problems == [] and example.messages == [message, USER, calls("Rome")] and example.tools == [WEATHER]
        assert "system text on calls cut: characters" not in changes


@pytest.mark.parametrize("system", [KIMI, f"<tools>{TOOLS}</tools>", f"[AVAILABLE_TOOLS] {TOOLS}[/AVAILABLE_TOOLS]"])
def test_a_message_that_only_declares_tools_is_dropped_and_counted(system):
    row = {"messages": [{"role": "system", "content": system}, SYSTEM, USER, calls("Rome")]}
    assert messages_of(row) == [SYSTEM, USER, calls("Rome")]
    assert changes_of(row) == {"system text that only declares tools dropped": 1}
    assert read({**row, "available_tools": TOOLS})[0].messages == [SYSTEM, USER, calls("Rome")]


# -- Turns: consecutive, first, last, joined --------------------------------------------------------------------------


def test_consecutive_assistant_turns_are_one_answer():
    texts = {"role": "assistant", "content": "I look."}
    legacy = {"role": "assistant", "content": "", "function_call": json.loads(CALL)}
    for turns, joined in (
        ([texts, legacy, legacy], asks("I look.", weather(), weather())),
        ([texts, {"role": "assistant", "content": "Now."}], asks("I look.\n\nNow.")),
        ([{**texts, "reasoning_content": "so"}, legacy], asks("I look.", weather(), reasoning_content="so")),
        ([{"role": "assistant", "content": "<think>so</think>"}, legacy], asks("", weather(), reasoning_content="so")),
        ([{**texts, "weight": 0}, {**legacy, "loss": False}], asks("I look.", weather(), weight=0)),
        ([{"role": "assistant", "content": f"<tool_call>{CALL}</tool_call>"}] * 2, asks("", weather(), weather())),
    ):
        row = {
            "messages": [USER, *turns, *[REPLY] * len(joined.get("tool_calls", [])), YES][
                : None if "tool_calls" in joined else -1
            ],
            "tools": TOOLS,
        }
        assert messages_of(row)[1] == joined
        assert changes_of(row)["consecutive assistant turns joined"] == len(turns) - 1
    thoughts = [{**legacy, "thinking": text} for text in "ab"]
    for turns in (thoughts, [texts, {**legacy, "weight": 0}]):
        expected = "an assistant's turn follows one with another thought or weight; expected the same"
        assert read({"messages": [USER, *turns], "tools": TOOLS})[1] == [expected]
    late = ['message 3 has the role "assistant"; expected tool']  # its replies are missing
    assert read({"messages": [USER, legacy, texts], "tools": TOOLS})[1] == late


def test_the_assistant_may_speak_first():
    hello = {"role": "assistant", "content": "Hi! How can I help?"}
    assert messages_of({"messages": [SYSTEM, hello, USER, YES]}) == [SYSTEM, hello, USER, YES]
    for row in (
        {"messages": [hello, USER, YES]},
        sharegpt(("gpt", hello["content"]), ("human", USER["content"]), ("gpt", "Yes.")),
    ):
        assert messages_of(row) == [{**hello, "weight": 0}, USER, YES]
        assert changes_of(row) == {"greeting before any message -> not trained": 1}


@pytest.mark.parametrize("tail", [[{"role": "user", "content": "###STOP###"}], [USER]])
def test_a_tail_without_an_answer_is_cut_and_counted(tail):
    row = {"messages": [USER, YES, *tail]}
    assert messages_of(row) == [USER, YES] and changes_of(row) == {"tail without an answer cut": 1}
    row = {"messages": [USER, calls("Rome", "Oslo"), REPLY], "tools": TOOLS}
    assert messages_of(row) == [USER, calls("Rome", "Oslo")] and changes_of(row) == {"tail without an answer cut": 1}
    assert messages_of({"messages": [USER, calls("Rome"), REPLY, USER], "tools": TOOLS}) == [USER, calls("Rome")]


@pytest.mark.parametrize(
    "reply",
    [
        "3\n</tool_response>\n<tool_response>\n21",
        "<tool_response>3</tool_response><tool_response>21</tool_response>",
        "<tool_response>\n3\n</tool_response>\n<tool_response>\n21",
    ],
)
def test_joined_replies_are_split_where_so_many_calls_wait(reply):
    row = sharegpt(
        ("human", "rain?"), ("function_call", f"[{CALL}, {CALL}]"), ("observation", reply), ("gpt", "Yes."), tools=TOOLS
    )
    assert [message["content"] for message in messages_of(row)[2:]] == ["3", "21", "Yes."]
    row["conversations"][1]["value"] = f"[{CALL}]"
    assert read(row)[1] != []


@pytest.mark.parametrize(
    "call, reply",
    [
        (f"<tool_call>{CALL}</tool_call>", "<tool_response>\n3\n</tool_response>"),
        ('Action: get_weather\nAction Input: {"city": "Rome"}', "Observation: 3"),
    ],
)
def test_a_reply_in_a_users_turn_is_a_tools(call, reply):
    row = {"messages": [USER, {**YES, "content": call}, {"role": "user", "content": reply}, YES], "tools": TOOLS}
    assert messages_of(row) == [USER, calls("Rome"), {"role": "tool", "content": "3"}, YES]
    assert changes_of(row)["reply of a tool in a user's turn -> tool turn"] == 1


@pytest.mark.parametrize("given", [{"arguments": ""}, {"arguments": None}, {"arguments": "{}"}, {"arguments": {}}, {}])
def test_missing_arguments_are_none_where_the_schema_allows_it(given):
    row = {
        "messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "ping", **given}}]}],
        "tools": BOTH,
    }
    assert messages_of(row) == [USER, asks("", NO_ARGUMENTS)]
    assert changes_of(row) == ({} if given.get("arguments") in ("{}", {}) else {"call without arguments -> {}": 1})
    row["messages"][1]["tool_calls"][0]["function"]["name"] = "get_weather"
    assert read(row)[1] == ['call 1 "get_weather": arguments.city is missing']


# -- Traces of other APIs ---------------------------------------------------------------------------------------------

THREE = {"role": "tool", "tool_call_id": "c", "content": "3"}
TRACED = [SYSTEM, USER, asks("I look.", weather(id="c"), reasoning_content="so"), THREE, YES]
ANTHROPIC = {
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "tools": [{"name": "get_weather", "description": BARE["description"], "input_schema": BARE["parameters"]}],
    "messages": [
        USER,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "so", "signature": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c", "name": "get_weather", "input": ROME},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "3"}]}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ],
}
RESPONSES = {
    "instructions": "Be brief.",
    "tools": [{"type": "function", **BARE}],
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": USER["content"]}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c", "id": "fc_1", "name": "get_weather", "arguments": json.dumps(ROME)},
        {"type": "function_call_output", "call_id": "c", "output": "3"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]},
    ],
}
GEMINI = {
    "systemInstruction": {"parts": [{"text": "Be brief."}]},
    "tools": [{"functionDeclarations": [BARE]}],
    "contents": [
        {"role": "user", "parts": [{"text": USER["content"]}]},
        {
            "role": "model",
            "parts": [
                {"text": "so", "thought": True},
                {"text": "I look."},
                {"functionCall": {"id": "c", "name": "get_weather", "args": ROME}},
            ],
        },
        {"role": "user", "parts": [{"functionResponse": {"id": "c", "name": "get_weather", "response": {"t": 3}}}]},
        {"role": "model", "parts": [{"text": "Yes."}]},
    ],
}
LANGCHAIN = [
    {"type": "system", "content": "Be brief."},
    {"type": "human", "content": USER["content"]},
    {
        "type": "ai",
        "content": "I look.",
        "additional_kwargs": {"reasoning": "so"},
        "reasoning_content": "so",
        "tool_calls": [{"name": "get_weather", "args": ROME, "id": "c", "type": "tool_call"}],
    },
    {"type": "tool", "content": "3", "tool_call_id": "c", "name": "get_weather"},
    {"type": "ai", "content": "Yes."},
]
VERCEL = [
    SYSTEM,
    USER,
    {
        "role": "assistant",
        "content": [
            {"type": "reasoning", "text": "so"},
            {"type": "text", "text": "I look."},
            {"type": "tool-call", "toolCallId": "c", "toolName": "get_weather", "args": ROME},
        ],
    },
    {"role": "tool", "content": [{"type": "tool-result", "toolCallId": "c", "toolName": "get_weather", "result": "3"}]},
    YES,
]
SCREEN = [  # messages of Vercel's user interface
    {"role": "system", "parts": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "parts": [{"type": "text", "text": USER["content"]}]},
    {
        "role": "assistant",
        "content": "",
        "parts": [
            {"type": "step-start"},
            {"type": "reasoning", "reasoning": "so"},
            {"type": "text", "text": "I look."},
            {
                "type": "tool-invocation",
                "toolInvocation": {
                    "state": "result",
                    "toolCallId": "c",
                    "toolName": "get_weather",
                    "args": ROME,
                    "result": "3",
                },
            },
            {"type": "step-start"},
            {"type": "text", "text": "Yes."},
        ],
    },
]


def wrap(message: dict) -> dict:
    """A message as LangChain's dumps writes it."""
    names = {"system": "SystemMessage", "human": "HumanMessage", "ai": "AIMessage", "tool": "ToolMessage"}
    return {"lc": 1, "type": "constructor", "id": ["langchain", "messages", names[message["type"]]], "kwargs": message}


@pytest.mark.parametrize(
    "row",
    [
        ANTHROPIC,
        {**ANTHROPIC, "system": "Be brief."},
        RESPONSES,
        {"messages": [SYSTEM, *RESPONSES["input"]], "tools": TOOLS},
        {**RESPONSES, "input": RESPONSES["input"][:1], "output": RESPONSES["input"][1:]},
        GEMINI,
        json.loads(
            json.dumps(GEMINI)
            .replace("systemInstruction", "system_instruction")
            .replace("functionDeclarations", "function_declarations")
            .replace("functionCall", "function_call")
            .replace("functionResponse", "function_response")
        ),
        {"messages": LANGCHAIN, "tools": TOOLS},
        {"messages": [{"type": message["type"], "data": message} for message in LANGCHAIN], "tools": TOOLS},
        {"messages": [*map(wrap, LANGCHAIN)], "tools": TOOLS},
        {"messages": VERCEL, "tools": TOOLS},
        {"messages": SCREEN, "tools": TOOLS},
    ],
)
def test_a_trace_of_another_api_is_read(row):
    example, problems, _ = read(row)
    expected = [*TRACED]
    if "contents" in row:
        expected[3] = {**THREE, "content": '{"t": 3}'}
    assert (problems, example.messages, example.tools) == ([], expected, [WEATHER])


def test_short_forms_of_gemini_are_read():
    row = {"systemInstruction": {"parts": {"text": "Be brief."}}, "contents": [{"parts": "rain in Rome?"}]}
    for parts in ({"text": "Yes."}, ["Yes."], [{"text": "Ye"}, {"text": "s."}]):
        turns = [*row["contents"], {"role": "model", "parts": parts}]
        assert messages_of({**row, "contents": turns}) == [SYSTEM, USER, YES]
    assert read({"contents": "rain?"})[1] == ['"contents" must be a list of objects, got "rain?"']


def test_parallel_calls_of_traces_and_text_after_results():
    two = [
        {"type": "tool_use", "id": name, "name": "get_weather", "input": {"city": name}} for name in ("Rome", "Oslo")
    ]
    results = [
        {"type": "tool_result", "tool_use_id": name, "content": "3", "is_error": False} for name in ("Rome", "Oslo")
    ]
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": two},
            {"role": "user", "content": [*results, {"type": "text", "text": "and tomorrow?"}]},
            YES,
        ],
        "tools": TOOLS,
    }
    replies = [{"role": "tool", "tool_call_id": name, "content": "3"} for name in ("Rome", "Oslo")]
    made = asks("", *(weather(name, id=name) for name in ("Rome", "Oslo")))
    assert messages_of(row) == [USER, made, *replies, {"role": "user", "content": "and tomorrow?"}, YES]
    image = {"type": "image", "source": {"data": "x"}}
    row["messages"][2]["content"] = [{**results[0], "content": [image]}, results[1]]
    assert read(row)[1][0].startswith("message 3 (tool): content must be text, got ")
    row["messages"][2]["content"] = [image]
    assert read(row)[1][0] == 'message 3 has the role "user"; expected tool'


@pytest.mark.parametrize(
    "content, text", [({"t": 3}, '{"t": 3}'), ([], "[]"), (7, "7"), (None, ""), ([1, "a"], '[1, "a"]')]
)
def test_a_reply_that_is_json_is_trained_as_its_text(content, text):
    row = {"messages": [USER, calls("Rome"), {"role": "tool", "content": content}, YES], "tools": TOOLS}
    assert messages_of(row)[2] == {"role": "tool", "content": text}


def test_rows_of_python_calls_beside_their_messages_are_read():
    """As Dolci writes them."""
    row = {
        "messages": [
            {**SYSTEM, "functions": json.dumps([BARE]), "function_calls": None},
            USER,
            {"role": "assistant", "content": None, "functions": None, "function_calls": "get_weather(city='Rome')"},
            {"role": "environment", "content": "3"},
            YES,
        ]
    }
    assert messages_of(row) == [SYSTEM, USER, calls("Rome"), {"role": "tool", "content": "3"}, YES]


# -- Rows that are kept, and texts that would take long ---------------------------------------------------------------


def test_rows_whose_calls_a_schema_refuses_can_be_kept(tmp_path, tools_path, capsys):
    refused = [
        {},
        {"city": 7},
        {"city": "Rome", "town": 1},
        {"city": "Rome", "units": "kelvin"},
        {"city": "Rome", "days": 9},
    ]
    rows = [native("rain?", ("get_weather", arguments)) for arguments in refused]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    examples, skipped = read_examples([path], Reading(tools_path, on_invalid="keep"))
    assert [
        example.messages[1]["tool_calls"][0]["function"]["arguments"] for example in examples
    ] == refused and not skipped
    assert capsys.readouterr().out.splitlines()[0] == (
        "read     calls kept that their schemas refuse: argument missing 1, argument of another type 1, argument "
        "unknown 1, value not among the choices 1, another rule of the schema 1"
    )
    for row in (
        native("rain?", ("fly", {})),
        native(" ", ("get_weather", {})),
        native("<|im_end|>", ("get_weather", {})),
    ):
        checked = to_examples([("x:1", row)], Reading(tools_path, on_invalid="keep"))
        assert checked.examples == [] and checked.problems and not checked.kept


@pytest.mark.parametrize(
    "unit", ["(", "[{", '{"a":', "<function=", "<function=get_weather><parameter=", "Action: a\n", " ", "`"]
)
def test_no_text_takes_long(unit):
    start, text = time.process_time(), unit * (200_000 // len(unit))
    for turn in ({"role": "assistant", "content": f"get_weather{text}"}, {"role": "tool_call", "content": text}):
        to_examples([("x:1", {"messages": [USER, turn], "tools": TOOLS})], Reading("no/such/tools.json"))
    system = {"role": "system", "content": f'<tools></tools> "name" "parameters" {text}'}
    to_examples([("x:1", {"messages": [system, USER, YES]})], Reading("no/such/tools.json"))
    assert time.process_time() - start < 5


@pytest.mark.parametrize("key", ["arguments", "args", "parameters"])
def test_a_call_with_two_sets_of_arguments_is_a_problem(key):
    block = {"type": "tool_use", "id": "t", "name": "get_weather", "input": {"city": "Rome"}, key: {"city": "Oslo"}}
    messages = [{"role": "user", "content": "rain?"}, {"role": "assistant", "content": [block]}]
    checked = to_examples([("x:1", {"messages": messages, "tools": [WEATHER]})], Reading("no/such/tools.json"))
    expected = r'call "get_weather": has other arguments in "\w+"; expected one object of them'
    assert checked.examples == [] and re.fullmatch(expected, checked.problems[0][1])
    block[key] = block["input"]
    assert to_examples([("x:1", {"messages": messages, "tools": [WEATHER]})], Reading("no/such/tools.json")).examples
