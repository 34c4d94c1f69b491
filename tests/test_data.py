"""The bundled data is what its generator writes, and every row is right by the tools' own schemas."""

import json
import re
import subprocess
import sys
from collections import Counter
from importlib import util
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

DATA = Path(__file__).resolve().parents[1] / "data"
DATASET = DATA / "synthetic_finetune_dataset.json"
GENERATOR = DATA / "make_dataset.py"
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|</?(tool_call|tool_response|tools|think)>")
TIME = re.compile(r"([01]\d|2[0-3]):[0-5]\d")


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def load_generator():
    spec = util.spec_from_file_location("make_dataset", GENERATOR)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def closed(schema):
    """The schema with every object refusing arguments that it does not name."""
    schema = dict(schema)
    if "properties" in schema:
        schema["properties"] = {name: closed(part) for name, part in schema["properties"].items()}
        schema["additionalProperties"] = False
    return schema


def calls_of(row):
    output = row["output"]
    return output.get("function_calls") or ([output["function_call"]] if "function_call" in output else [])


def leaves(schema, value, name=""):
    """Every scalar of the arguments as (argument name, its schema, its value)."""
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in leaves(schema["properties"][key], part, key)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in leaves(schema["items"], part, name)]
    return [(name, schema, value)]


ROWS = read_json(DATASET)
TOOLS = {tool["function"]["name"]: tool["function"] for tool in read_json(DATA / "tools.json")}
CALLS = [(row, call) for row in ROWS for call in calls_of(row)]


def test_generator_reproduces_the_committed_file(tmp_path):
    output = tmp_path / "again.json"
    subprocess.run([sys.executable, GENERATOR, "--output", output], cwd=tmp_path, check=True)
    assert output.read_bytes() == DATASET.read_bytes()


def test_another_seed_and_size_give_other_rows(tmp_path):
    output = tmp_path / "other.json"
    subprocess.run([sys.executable, GENERATOR, "--output", output, "--seed", "1", "--rows", "200"], check=True)
    rows = read_json(output)
    assert len(rows) == 200
    assert rows != ROWS[:200]


def test_one_row_per_line():
    lines = DATASET.read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("[", "]")
    assert [json.loads(line.removesuffix(",")) for line in lines[1:-1]] == ROWS


def test_rows_have_exactly_one_kind_of_output():
    assert len(ROWS) >= 1500
    for row in ROWS:
        assert set(row) == {"input", "output"}
        assert list(row["output"]) in (["function_call"], ["function_calls"], ["content"]), row
        assert row["input"].strip() == row["input"] != "", row
        assert "content" not in row["output"] or row["output"]["content"].strip(), row
        assert "function_calls" not in row["output"] or 2 <= len(row["output"]["function_calls"]) <= 3, row


@pytest.mark.parametrize("kind", ["content", "function_calls"])
def test_share_of_no_call_and_parallel_rows(kind):
    assert 0.07 <= sum(kind in row["output"] for row in ROWS) / len(ROWS) <= 0.095


def test_no_request_occurs_twice():
    folded = Counter(" ".join(row["input"].casefold().split()) for row in ROWS)
    assert [text for text, count in folded.items() if count > 1] == []


def test_requests_are_short():
    for row in ROWS:
        longest = 45 if "function_calls" in row["output"] else 30
        shortest = 1 if "content" in row["output"] else 4
        assert shortest <= len(row["input"].split()) <= longest, row


@pytest.mark.parametrize("name", TOOLS)
def test_tool_is_well_formed(name):
    assert list(TOOLS[name]) == ["name", "description", "parameters"]
    assert list(TOOLS[name]["parameters"])[:3] == ["type", "properties", "required"]
    Draft202012Validator.check_schema(TOOLS[name]["parameters"])
    assert set(TOOLS[name]["parameters"]["required"]) <= set(TOOLS[name]["parameters"]["properties"])


def test_tools_show_every_kind_of_argument():
    schemas = [part for tool in TOOLS.values() for part in tool["parameters"]["properties"].values()]
    assert {"string", "integer", "number", "boolean", "array", "object"} == {schema["type"] for schema in schemas}
    assert any("enum" in schema for schema in schemas)
    assert 8 <= len(TOOLS) <= 12


@pytest.mark.parametrize("name", TOOLS)
def test_every_call_is_valid_and_every_argument_is_used(name):
    validator = Draft202012Validator(closed(TOOLS[name]["parameters"]))
    calls = [(row, call["arguments"]) for row, call in CALLS if call["name"] == name]
    assert len(calls) >= 60
    for row, arguments in calls:
        assert [error.message for error in validator.iter_errors(arguments)] == [], row
    assert {key for _, arguments in calls for key in arguments} == set(TOOLS[name]["parameters"]["properties"])


def test_calls_name_known_tools_and_nothing_else():
    for row, call in CALLS:
        assert list(call) == ["name", "arguments"], row
        assert call["name"] in TOOLS, row


def test_strings_are_copied_from_the_request():
    for row, call in CALLS:
        for name, schema, value in leaves(TOOLS[call["name"]]["parameters"], call["arguments"]):
            if schema["type"] != "string" or "enum" in schema:
                continue
            if name == "time":
                assert TIME.fullmatch(value), row
            else:
                assert value in row["input"], (value, row)


def test_most_enums_are_said_as_they_are():
    for row, call in CALLS:
        for name in {"room", "color", "app", "units", "from_currency", "to_currency"} & set(call["arguments"]):
            assert call["arguments"][name] in row["input"], row


def test_numbers_are_said_in_digits_or_in_words():
    spoken = {**load_generator().NUMBER_WORDS, "half an hour": 30, "an hour": 60, "two hours": 120}
    for row, call in CALLS:
        for _, schema, value in leaves(TOOLS[call["name"]]["parameters"], call["arguments"]):
            if schema["type"] in ("integer", "number"):
                digits = re.search(rf"(?<![\d.]){re.escape(str(value))}(?!\.?\d)", row["input"])
                words = any(re.search(rf"\b{word}\b", row["input"].lower()) for word in spoken if spoken[word] == value)
                assert digits or words, (value, row)


def test_generator_has_thirty_phrasings_a_tool():
    phrases = load_generator().PHRASES
    assert set(phrases) == set(TOOLS)
    for name, templates in phrases.items():
        assert len({" ".join(template.casefold().split()) for template in templates}) >= 30, name


def test_answers_in_words_are_few_enough_to_learn():
    answers = Counter(row["output"]["content"] for row in ROWS if "content" in row["output"])
    assert 12 <= len(answers) <= 25
    assert min(answers.values()) >= 3


def test_no_special_token():
    for path in (DATASET, DATA / "tools.json"):
        assert not SPECIAL_TOKEN.search(path.read_text(encoding="utf-8")), path
