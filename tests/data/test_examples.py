"""Examples: rows are read, converted, checked and written back; each problem is named exactly."""

import json
import subprocess
import sys
import time

import pytest
from conftest import ALARM, ROOT, WEATHER, native, run_script, write_jsonl
from format_cases import CALL, CASES, USER, YES, read, sharegpt, write_many

from tool_calling.data.examples import Reading, check_rows, read_examples, to_examples, to_row
from tool_calling.data.rows import read_rows
from tool_calling.terminal import UserError


def calling(name: str, arguments: object) -> dict:
    """An assistant message in the OpenAI shape with one call."""
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def read_path(path: str, tools_path: str):
    checked = to_examples(read_rows([path]), Reading(tools_path))
    return checked.examples, checked.problems


def problems_in(tmp_path, tools_path, row) -> list[str]:
    """The problems of one row, without their place."""
    examples, problems = read_path(write_jsonl(tmp_path / "one.jsonl", [row]), tools_path)
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
    examples, problems = read_path(path, tools_path)
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
    (example,), problems = read_path(path, "no/such/tools.json")  # the row has its own: the file is not needed
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
            'call 1 "set_alarm": arguments.time is missing',
        ),
        (
            {"input": "x", "output": {"function_call": {"name": "set_alarm", "arguments": "{time: 6}"}}},
            'call "set_alarm": arguments are not valid JSON: Expecting property name enclosed in double quotes: '
            '"{time: 6}"',
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
            '"query" and "answers"; "chat"; "contents"; "question" and "answer"; "prompt" and "completion"; '
            'got {"prompt": "x"}',
        ),
        (
            {"data": [{"input": "x"}]},
            'no known format; expected an object with "messages"; "conversations"; "input" and '
            '"output"; "query" and "answers"; "chat"; "contents"; "question" and "answer"; "prompt" and '
            '"completion"; got {"data": '
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
            "message 1 (user): holds the special token <|im_end|>, which would forge a turn; remove it",
        ),
        (
            native("hi", ("get_weather", {"city": "</tool_call>"})),
            "message 2 (assistant): holds the special token </tool_call>, which would forge a turn; remove it",
        ),
        ({"messages": [USER]}, "the last message must be the assistant's: it is what is trained"),
        ({"messages": []}, "the last message must be the assistant's: it is what is trained"),
        ({"messages": "x"}, '"messages" must be a list of objects, got "x"'),
        (
            {"messages": [{"role": "assistant", "content": "y"}]},
            "message 1 answers nothing; expected a message of the system or user before it",
        ),
        ({"messages": [USER, USER]}, 'message 2 has the role "user"; expected assistant'),
        (
            {"messages": [USER, calling("set_alarm", {"time": "6"}), USER], "tools": [ALARM]},
            'message 3 has the role "user"; expected tool',
        ),
        (
            {
                "tools": [ALARM],
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
                ],
            },
            'message 4 has the role "assistant"; expected tool; 1 of its calls still wait for their reply',
        ),
        (
            {
                "tools": [ALARM],
                "messages": [
                    USER,
                    calling("set_alarm", {"time": "6"}),
                    {"role": "tool", "content": "ok"},
                    {"role": "tool", "content": "ok"},
                    {"role": "assistant", "content": "done"},
                ],
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
            'tool 2 "get_weather": an earlier tool has the same name',
        ),
        (
            {
                "messages": [USER, {"role": "assistant", "content": "y"}],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "file"}}}],
            },
            "tool 1 \"f\": parameters.type is not valid JSON Schema: 'file' is not valid under any of the given "
            "schemas",
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
    assert problems_in(tmp_path, tools_path, row) == [expected]


def test_rows_without_tools_are_plain_conversations(tmp_path):
    row = {"messages": [USER, {"role": "assistant", "content": "hello"}], "tools": []}
    (example,), problems = read_path(write_jsonl(tmp_path / "rows.jsonl", [row]), "no/such/tools.json")
    assert problems == [] and example.tools == []


def test_rows_without_tools_need_the_tools_file():
    with pytest.raises(UserError) as error:
        read(native("rain in Rome?", content="Yes."))
    assert str(error.value) == "x:1: has no tools of its own, and --tools_path no/such/tools.json does not exist"


def test_changes_are_counted_once_per_list_of_tools_and_shown(tmp_path, capsys):
    rows = [CASES["mobile-actions"][0]] * 3
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert len(read_examples([path], Reading(str(ROOT / "data" / "tools.json")))[0]) == 3
    assert capsys.readouterr().out.splitlines()[0] == (
        "read     tools normalised: type STRING → string 2, type function added 1, type OBJECT → object 1, "
        "type INTEGER → integer 1"
    )


def test_keys_that_no_format_has_are_named(tmp_path, capsys):
    turn = {"role": "assistant", "content": "I look.", "tool_call": [json.loads(CALL)], "audio": None, "refusal": ""}
    rows = [{"messages": [USER, turn, USER, turn], "id": number, "mood": "good"} for number in range(2)]
    rows += [
        {"prompt": [USER], "completion": [turn], "id": 2},
        {"messages": json.dumps([USER, turn]), "id": 3},
        {"input": "rain in Rome?", "output": {"content": "Yes.", "function_cals": [json.loads(CALL)]}, "id": 4},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, sharegpt(("human", "rain in Rome?"), ("gpt", "Yes."), id=0)])
    assert len(read_examples([path], Reading(str(ROOT / "data" / "tools.json")))[0]) == 6
    assert capsys.readouterr().out.splitlines()[0] == (
        'read     not read, as the format has no such key: "tool_call" of 6 turns, "function_cals" of 1 output, "id" '
        'of 6 rows, "mood" of 2 rows'
    )


def test_a_converted_row_has_its_arguments_as_text():
    example, _, _ = read(CASES["openai"][0])
    assert to_row(example)["messages"][2]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    ]


def test_convert_to_writes_a_new_file_and_trains_nothing(tmp_path, tools_path):
    rows = [row for row, *_ in CASES.values()]
    path, target = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "new" / "openai.jsonl"
    flags = ["--dataset_path", path, "--tools_path", tools_path, "--convert_to", target]
    result = run_script(*flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"write    {len(rows):,} rows: {target}"
    before = to_examples(read_rows([path]), Reading(tools_path, named_tools=True)).examples
    after = to_examples(read_rows([str(target)]), Reading("no/such/tools.json")).examples
    assert [example[1:3] for example in after] == [example[1:3] for example in before]
    assert [file.name for file in target.parent.iterdir()] == ["openai.jsonl"]
    result = run_script(*flags)
    assert result.returncode == 1
    assert result.stderr == f"error: --convert_to {target}: already exists; expected the name of a new file\n"


@pytest.mark.parametrize(
    "thinking, kept, problems",
    [
        ("auto", [1, 2], []),
        ("off", [1, 2], []),
        ("on", [1], [("x:2", "message 2: has no reasoning; with --thinking on every trained answer needs it")]),
    ],
)
def test_thinking_drops_or_requires_reasoning(tmp_path, thinking, kept, problems):
    thought = {**YES, "reasoning_content": "It rains."}
    rows = [{"messages": [USER, thought], "tools": []}, {"messages": [USER, YES], "tools": []}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    checked = check_rows([path], Reading("no/such/tools.json", thinking=thinking))
    expected = [{1: [USER, YES if thinking == "off" else thought], 2: [USER, YES]}[row] for row in kept]
    assert [example.messages for example in checked.examples] == expected
    assert [(source.replace(path, "x"), problem) for source, problem in checked.problems] == problems
    assert checked.total == 2


def test_reading_needs_no_heavy_library():
    """A broken row is named at once: nothing up to the model may import torch."""
    code = (
        "import sys\nfrom tool_calling.data.examples import Reading, read_examples\n"
        "read_examples(['data/synthetic_finetune_dataset.json'], Reading('data/tools.json'))\n"
        "print({'torch', 'transformers', 'tokenizers', 'datasets', 'numpy'} & {*sys.modules})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.mark.slow
def test_a_hundred_thousand_rows_fit_into_a_gibibyte(tmp_path):
    path = write_many(tmp_path / "rows.jsonl", 100_000)
    code = (
        "import re, sys, tool_calling.data.examples as s\nfrom tool_calling.data.rows import read_rows\n"
        "c = s.to_examples(read_rows([sys.argv[1]]), s.Reading('data/tools.json'))\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]\n"
        "print(len(c.examples), len(c.problems), c.total, peak)\n"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, cwd=ROOT)
    *counts, peak = map(int, result.stdout.split())
    print(f"100,000 rows read, converted and checked in {time.perf_counter() - start:.1f} s, {peak / 2**10:.0f} MiB")
    assert counts == [100_000, 0, 100_000]
    assert peak < 2**20  # KiB
