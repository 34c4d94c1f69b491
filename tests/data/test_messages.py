"""Messages: replies answer calls, reasoning and text are read from every place, weight 0 is not trained."""

import json
import time
from collections import Counter

import pytest
from conftest import ROOT
from format_cases import CALL, REPLY, TOOLS, USER, YES, parts, read
from format_cases import calls as called

from tool_calling.data.known_tools import ARGUMENT_KEYS, NAME_KEYS
from tool_calling.data.turns import join_text, list_unread, read_turn
from tool_calling.samples import render_examples


def to_message(turn: dict) -> dict:
    """The one message of a turn."""
    [message] = read_turn(turn, Counter())
    return message


def replied(call_ids: list, reply_ids: list) -> dict:
    """A row with these ids at its calls and replies (None: no id)."""
    made = [{**({"id": name} if name else {}), "function": json.loads(CALL)} for name in call_ids]
    replies = [{**REPLY, **({"tool_call_id": name} if name else {})} for name in reply_ids]
    return {"tools": TOOLS, "messages": [USER, {"role": "assistant", "tool_calls": made}, *replies, YES]}


@pytest.mark.parametrize(
    "call_ids, reply_ids, expected",
    [
        (["a", "b"], ["b", "a"], []),
        (["a", "b"], ["a", "c"], ['message 4 answers call "c", which is not open']),
        (["a", "b"], ["a", "a"], ['message 4 answers call "a", which is not open']),
        (
            ["a", "b"],
            ["a"],
            ['message 4 has the role "assistant"; expected tool; 1 of its calls still wait for their reply'],
        ),
        ([None, None], [None], []),
        ([None, None], [None, None], []),
        (["a", "b"], [None], []),
        ([None, None], [], ['message 3 has the role "assistant"; expected tool']),
        ([None], [None, None], ['message 4 has the role "tool"; expected assistant']),
    ],
)
def test_replies_answer_the_open_calls(call_ids, reply_ids, expected):
    assert read(replied(call_ids, reply_ids))[1] == expected


def test_reasoning_that_holds_nothing_is_none():
    message = {"role": "assistant", "content": "Yes.", "reasoning_content": [], "thinking": None, "reasoning": {}}
    assert to_message(message) == YES
    parts_of_it = {**message, "reasoning_content": parts("It ", "rains.")}
    assert to_message(parts_of_it) == {**YES, "reasoning_content": "It rains."}


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "John", "arguments": ["pro", "con"]}',
        '{"name": "x", "function_call": null}',
        '{"city": "Rome"}',
        '[{"role": "assistant", "tool_calls": []}]',
        "```json\n{}\n``` is empty",
        "a" + " " * 1_000_000 + "b",
        "`{" + " " * 1_000_000,
    ],
)
def test_answers_that_look_like_calls_and_are_none_are_text(content):
    example, problems, _ = read(
        {"messages": [{**USER, "content": "What is [TOOL_CALLS]?"}, {**YES, "content": content}]},
        tools_path=str(ROOT / "data" / "tools.json"),
    )
    assert problems == [] and example.messages[1]["content"] == content


def test_turns_of_weight_0_are_not_trained(tokenizer):
    messages = [USER, {**YES, "weight": 0}, {"role": "user", "content": "sure?"}, {**YES, "content": "I am."}]
    example, problems, _ = read({"messages": messages, "tools": []})
    assert problems == []
    ((sample,),), problems = render_examples(tokenizer, [example], 4096)
    assert problems == [] and sample.completion == "I am."
    assert "Yes." in tokenizer.decode(sample.input_ids[: sample.prompt_length])


@pytest.mark.parametrize("key", ["tool_calls", "function_calls"])
def test_calls_are_read_under_each_of_their_keys(key):
    for calls in ([json.loads(CALL)], json.dumps([json.loads(CALL)])):
        assert to_message({"role": "assistant", "content": None, key: calls}) == called("Rome")
    assert to_message({"role": "assistant", "content": None, "function_call": CALL}) == called("Rome")
    with pytest.raises(ValueError, match=f"^a message holds {key} and function_call; expected one of them$"):
        to_message({"role": "assistant", key: [json.loads(CALL)], "function_call": json.loads(CALL)})


def test_a_turn_may_have_nulls_under_the_keys_of_another_format():
    nulls = {"from": None, "value": None, "role": None, "content": None}
    turns = [{**nulls, **USER}, {**nulls, "from": "gpt", "value": "Yes."}]
    example, problems, _ = read({"messages": turns, "tools": []})
    assert problems == [] and example.messages == [USER, YES]


def test_a_turn_of_many_parts_takes_no_longer_for_each():
    part = {"type": "tool_use", "name": "get_weather", "input": {"city": "Rome"}}
    start = time.process_time()
    message = to_message({"role": "assistant", "content": [part, *parts("a") * 20_000]})
    assert len(message["content"]) == 20_000 and time.process_time() - start < 2


@pytest.mark.parametrize("name", NAME_KEYS)
@pytest.mark.parametrize("arguments", ARGUMENT_KEYS)
def test_a_call_is_read_with_each_of_its_keys_in_a_text_too(name, arguments):
    call = {name: "get_weather", arguments: {"city": "Rome"}}
    for answer in ({"role": "assistant", "tool_calls": [call]}, {"role": "assistant", "content": json.dumps(call)}):
        example, problems, _ = read({"messages": [USER, answer], "tools": TOOLS})
        assert problems == [] and example.messages[1] == called("Rome")


@pytest.mark.parametrize(
    "content, text",
    [
        (None, ""),
        ("a", "a"),
        (parts("a", "b"), "a\nb"),
        ([], []),
        ([{"type": "image_url"}], [{"type": "image_url"}]),
        ([{"type": "text", "text": "a", "image": "b"}], [{"type": "text", "text": "a", "image": "b"}]),
        (7, 7),
    ],
)
def test_content_is_joined_where_all_of_it_is_text(content, text):
    assert join_text(content) == text


def test_parts_of_an_answer_follow_each_other():
    """One that cites has several within a sentence."""
    assert join_text(parts("It rains", " in Rome."), "assistant") == "It rains in Rome."


def test_a_row_says_what_is_not_read_of_it():
    row = {"messages": [{**USER, "mood": "good"}, "text"], "id": 3, "notes": [], "output": {"x": 1}}
    assert list_unread(row, {"messages"}) == [("row", "id"), ("row", "output"), ("turn", "mood")]
    assert list_unread(row, {"output"}) == [("row", "messages"), ("row", "id"), ("output", "x")]
