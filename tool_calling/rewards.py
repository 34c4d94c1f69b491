"""Rewards: how good an answer is beside its reference, from 1 for an exact one to -1 for a call that nobody wants."""

from typing import NamedTuple

import networkx

from tool_calling.samples import Sample
from tool_calling.scores import Said, is_same, judge, read_answer, read_reference

# An answer that is not exact gets PARTIAL of the sum of its parts, of which all together are 1.
PARTIAL, PARSES, TOOLS, NAMES, VALUES = 0.5, 0.1, 0.2, 0.3, 0.4


class Rating(NamedTuple):
    """The reward of an answer and its parts, each the share that is right."""

    reward: float
    parses: float
    tools: float  # of calls, written or expected
    names: float  # of their arguments
    values: float
    exact: float


EXACT = Rating(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def rate_answer(text: str, sample: Sample) -> Rating:
    """Return the rating of an answer to a sample."""
    return rate(read_answer(text, sample), read_reference(sample), sample.tools)


def rate(got: Said, expected: Said, tools: list[dict]) -> Rating:
    """Return the rating of what an answer says; its reward is in [-1, 1], and 1 if and only if judge finds it exact.

    Where no call is expected, any call is -1, also one that no server could run, and an empty answer is 0. Elsewhere an
    answer that does not parse is 0. Of others count the right tools, argument names and argument values, as shares of
    all calls, written or expected: calls of one tool are paired one to one, as they fit best.
    """
    if judge(got, expected, tools).exact:
        return EXACT
    parses = float(got.calls is not None)
    if not expected.calls:
        right = float(got.calls == [])  # an empty answer, or without tools another text: not one call is wrong
        return Rating(right - 1, parses, right, right, right, 0.0)
    pairs = pair_calls(got.calls or [], expected.calls)
    calls = max(len(got.calls or []), len(expected.calls))
    found, names, values = (sum(part) / calls for part in zip((0, 0, 0), *((1, *rate_pair(*pair)) for pair in pairs)))
    reward = PARTIAL * (PARSES + TOOLS * found + NAMES * names + VALUES * values) if parses else 0.0
    return Rating(reward, parses, found, names, values, 0.0)


def pair_calls(got: list[dict], expected: list[dict]) -> list[tuple[dict, dict]]:
    """Return the arguments of calls of the same tools, paired so that the sum of their worth is the highest."""
    graph = networkx.Graph()
    for i, call in enumerate(got):
        for j, other in enumerate(expected):
            if call["name"] == other["name"]:
                names, values = rate_pair(call["arguments"], other["arguments"])
                graph.add_edge(("got", i), ("expected", j), weight=TOOLS + NAMES * names + VALUES * values)
    pairs = (dict(pair) for pair in networkx.max_weight_matching(graph))
    return [(got[pair["got"]]["arguments"], expected[pair["expected"]]["arguments"]) for pair in pairs]


def rate_pair(got: dict, expected: dict) -> tuple[float, float]:
    """Return the shares of right names and of right values among all arguments of a call, written or expected."""
    names = got.keys() | expected.keys()
    common = got.keys() & expected.keys()
    equal = [name for name in common if is_same(got[name], expected[name])]
    return (len(common) / len(names), len(equal) / len(names)) if names else (1.0, 1.0)
