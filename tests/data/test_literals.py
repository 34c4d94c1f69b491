"""JSON and Python literals give the same values; what is neither is one line that says why."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tool_calling.data.literals import as_list, parse_json, parse_literal, read_value, split_at_commas, to_json, unpack

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_json_and_python_write_the_same_value(value):
    assert parse_json(json.dumps(value), "it is") == value
    assert parse_literal(json.dumps(value), "it is") == value
    assert parse_literal(repr(value), "it is") == value


@pytest.mark.parametrize(
    "text, value",
    [
        ("{'a': true, 'b': [null, False, None]}", {"a": True, "b": [None, False, None]}),
        ("{'a': 'true', \"b\": 'it\\'s null'}", {"a": "true", "b": "it's null"}),
        ("('x', 1)", ["x", 1]),  # a tuple is a list
        ("{1: 2}", {"1": 2}),  # JSON's keys are text
        (r"'\d'", r"\d"),
        (" 'padded' ", "padded"),
    ],
)
def test_python_literals_are_read_as_json_would_give_them(text, value):
    assert parse_literal(text, "it is") == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Rome",
        "f(1)",
        "{'a': 1, 'a': 2}",
        "{1: 'a', '1': 'b'}",
        "{'a': float('nan')}",
        "1e999",
        "{'a'}",
        "b'x'",
        "x" * 200,
    ],
)
def test_what_is_neither_is_named(text):
    with pytest.raises(ValueError) as error:
        parse_literal(text, "the call is")
    shown = json.dumps(text) if len(text) < 78 else '"' + "x" * 78 + "…"
    assert str(error.value) == f"the call is neither JSON nor a Python literal: {shown}"


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"a": 1, "a": 2}', 'duplicate key "a"'),
        ('{"b": 1, "a": 1, "a": 2}', 'duplicate key "a"'),
        ('{"a" 1}', "Expecting ':' delimiter"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ("9" * 5000, "a number has more than 4,300 digits"),
    ],
)
def test_what_is_wrong_with_json_is_said(text, reason):
    with pytest.raises(ValueError) as error:
        parse_json(text, "arguments are")
    assert str(error.value).startswith(f"arguments are not valid JSON: {reason}: ")


def test_a_value_is_read_from_where_it_begins():
    assert read_value('[1, {"a": 2}]', 4) == ({"a": 2}, 12)
    assert read_value('"\\ud83c\\udf27"') == ("🌧", 14)
    with pytest.raises(UnicodeEncodeError):
        read_value('"\\ud83c"')


def test_only_lists_and_objects_are_unpacked():
    assert unpack(' [1, {"a": null}]', "it is") == [1, {"a": None}]
    for value in ("7", '"text"', "null", "", 7, None, [1], {"a": 1}):
        assert unpack(value, "it is") is value


def test_one_value_is_a_list_of_one():
    assert [as_list(value) for value in ([], [1], None, "ab", {"a": 1})] == [[], [1], [None], ["ab"], [{"a": 1}]]


@pytest.mark.parametrize(
    "text, parts",
    [
        ("a", ["a"]),
        ("", [""]),
        ("a, b ,c", ["a", "b", "c"]),
        ("f(a, b), g([1, 2], {'k': (3, 4)})", ["f(a, b)", "g([1, 2], {'k': (3, 4)})"]),
        ('x=\'a, (b\', y="c]\\", d"', ["x='a, (b'", 'y="c]\\", d"']),
        ("a,,b,", ["a", "", "b", ""]),
    ],
)
def test_texts_are_split_at_commas_outside_of_quotes_and_brackets(text, parts):
    assert split_at_commas(text) == parts


@pytest.mark.parametrize("text", ["(", "a)", "[1, 2", "'a", 'x="y', ")(", "f(a]]"])
def test_what_stays_open_is_named(text):
    with pytest.raises(ValueError) as error:
        split_at_commas(text)
    assert str(error.value) == f"unpaired quote or bracket in {json.dumps(text)}"


def test_numbers_that_json_lacks_are_not_written():
    assert to_json({"ä": [1.5, None]}) == '{"ä": [1.5, null]}'
    for number in (float("nan"), float("-inf")):
        with pytest.raises(ValueError, match="^holds NaN or Infinity; expected a number that JSON has$"):
            to_json([number])
