"""Hostile data: each is a located problem or an ordinary example, in bounded time, and nothing of it is ever run."""

import copy
import json

from conftest import TINY, WEATHER, native, run_here, write_jsonl

from tool_calling.data.examples import Reading, to_examples
from tool_calling.page import render_report


def test_a_row_of_a_million_characters_is_too_long_and_says_so(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [
            *[native("rain in Rome?", ("get_weather", {"city": "Rome"}))] * 3,
            native("word " * 200_000, ("get_weather", {"city": "Rome"})),
        ],
    )
    result = run_here(
        "--dry_run",
        "--dataset_path",
        path,
        "--tools_path",
        tmp_path / "tools.json",
        "--output_dir",
        tmp_path / "out",
        "--model_id",
        TINY,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert (
        f"error: {path}:4: " in result.stderr and "--max_seq_length is 2,048 and no answer is ever cut" in result.stderr
    )


def test_nothing_from_the_data_is_run(tmp_path):
    marker = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    weather = copy.deepcopy(WEATHER)
    rows = [
        {
            "conversations": [
                {"from": "user", "value": "x"},
                {"from": "assistant", "value": f"[get_weather(city={code})]"},
            ],
            "tools": [weather],
        },
        {
            "conversations": [
                {"from": "human", "value": "x"},
                {"from": "gpt", "value": f"<tool_call>{{'name': 'get_weather', 'arguments': {code}}}</tool_call>"},
            ],
            "tools": [weather],
        },
        {
            "conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": code}],
            "tools": [weather],
        },
        native(
            "x", ("get_weather", {"city": "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"})
        ),
    ]
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    checked = to_examples([(f"x:{i}", row) for i, row in enumerate(rows, 1)], Reading(str(tmp_path / "tools.json")))
    assert [source for source, _ in checked.problems] == ["x:1", "x:2", "x:3"] and len(
        checked.examples
    ) == 1  # the last is a text
    report = {
        "failures": [{"where": "x:4", "request": "{{ 7 * 7 }}", "expected": rows[3]["input"], "got": "{{ 7 * 7 }}"}]
    }
    assert "{{ 7 * 7 }}" in render_report(report) and not marker.exists()
