"""Rewards: how good an answer is beside its reference, from 1 for an exact one to -1 for a call that nobody wants."""

import networkx

from tool_calling.samples import Sample
from tool_calling.scores import Said, is_same, judge, read_answer, read_reference

# An answer that is not exact gets PARTIAL of the sum of its parts, of which all together are 1.
PARTIAL, PARSES, TOOLS, NAMES, VALUES = 0.5, 0.1, 0.2, 0.3, 0.4


def reward_answer(text: str, sample: Sample) -> float:
    """Return the reward of an answer to a sample."""
    return compute_reward(read_answer(text, sample), read_reference(sample), sample.tools)


def compute_reward(got: Said, expected: Said, tools: list[dict]) -> float:
    """Return the reward of what an answer says, in [-1, 1]: 1 if and only if judge finds it exact.

    Where no call is expected, any call is -1, also one that no server could run, and an empty answer is 0. Elsewhere an
    answer that does not parse is 0. Of others count the right tools, argument names and argument values, as shares of
    all calls, written or expected: calls of one tool are paired one to one, as they fit best.
    """
    if judge(got, expected, tools).exact:
        return 1.0
    if not expected.calls:
        return 0.0 if got.calls == [] else -1.0
    if got.calls is None:
        return 0.0
    calls = max(len(got.calls), len(expected.calls))
    return PARTIAL * (PARSES + sum_pairs(got.calls, expected.calls) / calls)


def sum_pairs(got: list[dict], expected: list[dict]) -> float:
    """Return the highest sum of rate_pair that a pairing of calls of the same tools can have."""
    graph = networkx.Graph()
    for i, call in enumerate(got):
        for j, other in enumerate(expected):
            if call["name"] == other["name"]:
                weight = rate_pair(call["arguments"], other["arguments"])
                graph.add_edge(("got", i), ("expected", j), weight=weight)
    return sum(graph.edges[pair]["weight"] for pair in networkx.max_weight_matching(graph))


def rate_pair(got: dict, expected: dict) -> float:
    """Return what a call of the right tool is worth, by its arguments and those that are expected."""
    names = got.keys() | expected.keys()
    common = got.keys() & expected.keys()
    equal = [name for name in common if is_same(got[name], expected[name])]
    return TOOLS + (NAMES * len(common) + VALUES * len(equal)) / len(names) if names else TOOLS + NAMES + VALUES
