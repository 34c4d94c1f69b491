"""Rewards: exact values by example; 1 exactly where the scorer says exact; no part that becomes right lowers one."""

import copy
import json

import pytest
from conversations import score_answer
from hypothesis import given, settings
from hypothesis import strategies as st

from tool_calling.rewards import rate, rate_answer
from tool_calling.samples import Sample
from tool_calling.scores import Said, judge

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "abc"]


def write(*calls: tuple[str, dict]) -> str:
    """Return calls as Qwen3 writes them."""
    texts = (json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls)
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


ONE, TWO = write(("a", {"x": 1, "y": "k"})), write(("a", {"x": 1}), ("a", {"x": 2}))


@pytest.mark.parametrize(
    "expected, got, reward",
    [
        (ONE, ONE, 1.0),
        (ONE, write(("a", {"y": "k", "x": 1.0})), 1.0),  # the same JSON values
        (ONE, write(("a", {"x": 1, "y": "l"})), 0.5 * (0.1 + 0.2 + 0.3 + 0.4 * 1 / 2)),
        (ONE, write(("a", {"x": True, "y": "l"})), 0.5 * (0.1 + 0.2 + 0.3)),  # true is not 1
        (ONE, write(("a", {"x": 1})), 0.5 * (0.1 + 0.2 + 0.3 * 1 / 2 + 0.4 * 1 / 2)),
        (ONE, write(("a", {"x": 1, "y": "k", "z": 0})), 0.5 * (0.1 + 0.2 + 0.3 * 2 / 3 + 0.4 * 2 / 3)),
        (ONE, write(("a", {})), 0.5 * (0.1 + 0.2)),
        (ONE, write(("b", {"x": 1, "y": "k"})), 0.5 * 0.1),  # arguments of another tool are worth nothing
        (ONE, write(("a", {"x": 1, "y": "k"}), ("b", {})), 0.5 * (0.1 + 0.9 / 2)),
        (write(("a", {})), write(("a", {"x": 1})), 0.5 * (0.1 + 0.2)),
        (write(("a", {}), ("b", {})), write(("a", {})), 0.5 * (0.1 + 0.9 / 2)),
        (TWO, write(("a", {"x": 2}), ("a", {"x": 1})), 1.0),  # in any order
        (TWO, write(("a", {"x": 2})), 0.5 * (0.1 + 0.9 / 2)),  # paired with the call that it fits best
        (TWO, write(("a", {"x": 2}), ("a", {"x": 2})), 0.5 * (0.1 + (0.9 + 0.5) / 2)),
        (ONE, "I cannot do that.", 0.5 * 0.1),
        (ONE, "", 0.5 * 0.1),
        (ONE, "<tool_call>\n{\n</tool_call>", 0.0),
        ("Which city?", "What do you mean?", 1.0),
        ("Which city?", "", 0.0),
        ("Which city?", ONE, -1.0),
        ("Which city?", "<tool_call>\n{\n</tool_call>", -1.0),  # a call, although no server can run it
    ],
)
def test_the_reward_of_an_answer(expected, got, reward):
    sample = Sample("", [], 0, expected, TOOLS)
    assert rate_answer(got, sample).reward == pytest.approx(reward, abs=1e-12)
    assert (rate_answer(got, sample).reward == 1) == score_answer(got, expected, TOOLS).exact


@pytest.mark.parametrize(
    "expected, got, parts",
    [
        (ONE, ONE, (1, 1, 1, 1, 1)),
        (ONE, write(("a", {"x": 1, "y": "l"})), (1, 1, 1, 1 / 2, 0)),
        (ONE, write(("a", {"x": 1, "z": 0})), (1, 1, 1 / 3, 1 / 3, 0)),
        (ONE, write(("b", {"x": 1, "y": "k"})), (1, 0, 0, 0, 0)),
        (TWO, write(("a", {"x": 2})), (1, 1 / 2, 1 / 2, 1 / 2, 0)),
        (TWO, write(("a", {"x": 2}), ("a", {})), (1, 1, 1 / 2, 1 / 2, 0)),
        (ONE, "<tool_call>\n{\n</tool_call>", (0, 0, 0, 0, 0)),
        ("Which city?", "What do you mean?", (1, 1, 1, 1, 1)),
        ("Which city?", "", (1, 1, 1, 1, 0)),
        ("Which city?", ONE, (1, 0, 0, 0, 0)),
        ("Which city?", "<tool_call>\n{\n</tool_call>", (0, 0, 0, 0, 0)),
    ],
)
def test_the_parts_of_a_rating(expected, got, parts):
    rating = rate_answer(got, Sample("", [], 0, expected, TOOLS))
    assert (rating.parses, rating.tools, rating.names, rating.values, rating.exact) == pytest.approx(parts)


def test_without_tools_the_text_counts():
    assert [rate_answer(text, Sample("", [], 0, "yes")).reward for text in ("yes", "yes ", "no")] == [1.0, 1.0, 0.0]


values = st.sampled_from([0, 1, 1.0, True, "k", None, [1], {"x": 1}])
calls = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from("abc"), "arguments": st.dictionaries(st.sampled_from("xyz"), values, max_size=3)}
    ),
    max_size=4,
)
said = st.builds(Said, st.sampled_from(["", "text"]), st.one_of(st.none(), calls))


def to_said(calls: list[dict] | None, text: str = "text") -> Said:
    """Return what an answer says: one with calls is never an empty text."""
    return Said(text if not calls else "text", calls)


@settings(max_examples=500, deadline=None)
@given(said, calls, st.booleans())
def test_it_is_1_exactly_where_the_scorer_says_exact(got, expected, tools):
    got, expected, tools = to_said(got.calls, got.text), to_said(expected), TOOLS if tools else []
    reward = rate(got, expected, tools).reward
    assert (reward == 1) == judge(got, expected, tools).exact and -1 <= reward <= 1
    assert reward == 1 or reward <= 0.5


@settings(max_examples=1000, deadline=None)
@given(st.data(), st.one_of(st.none(), calls), calls)
def test_a_part_that_becomes_right_never_lowers_it(data, got, expected):
    better = copy.deepcopy(got)
    if better is None:  # it parses now, and calls what nobody wants, or nothing
        better = data.draw(calls)
    elif not expected:
        better = better[:-1]  # a call less that nobody wants
    elif not better:
        better = [data.draw(st.sampled_from(expected))]
    else:
        place = data.draw(st.integers(0, len(better) - 1))
        call, wanted = better[place], data.draw(st.sampled_from(expected))
        repair = data.draw(st.sampled_from(["name", "missing", "excess", "value", "whole", "call", "drop"]))
        names = [call["name"] for call in expected]
        if repair == "name" and call["name"] not in names:
            missing = [name for name in names if [c["name"] for c in better].count(name) < names.count(name)]
            call["name"] = missing[0] if missing else call["name"]
        elif repair == "missing" and len(expected) == len(better) == 1 and call["name"] == wanted["name"]:
            call["arguments"] = dict.fromkeys(wanted["arguments"], "wrong") | call["arguments"]
        elif repair == "excess" and len(expected) == 1:
            call["arguments"] = {k: v for k, v in call["arguments"].items() if k in wanted["arguments"]}
        elif repair == "value" and len(expected) == 1:
            call["arguments"] |= {k: v for k, v in wanted["arguments"].items() if k in call["arguments"]}
        elif repair == "whole" and len(expected) == 1:
            better[place] = copy.deepcopy(wanted)
        elif repair == "call" and len(better) < len(expected):
            better.append(copy.deepcopy(wanted))
        elif repair == "drop" and len(better) > len(expected) and call["name"] not in names:
            better.pop(place)
    before, after = (rate(to_said(calls), to_said(expected), TOOLS).reward for calls in (got, better))
    assert after >= before - 1e-12
