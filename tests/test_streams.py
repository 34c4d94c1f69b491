"""Streams: literal tensors, and every token sees its own row and nothing else."""

import torch
from hypothesis import given, settings
from small import ROWS_OF_TOKENS, row

from tool_calling.schedule import Schedule
from tool_calling.streams import Layout, build_padded, build_stream, fill_up


def values(stream: dict) -> dict:
    places, weights = stream.pop("places").tolist(), stream.pop("weights")
    assert {tensor.dtype for tensor in stream.values()} == {torch.int64}
    assert weights.dtype == torch.float32 and weights.tolist() == [1.0] * len(places)
    assert places == [i for i, label in enumerate(stream["labels"][0, 1:]) if label != -100]
    assert len({tuple(tensor.shape) for tensor in stream.values()}) == 1
    return {name: tensor[0].tolist() for name, tensor in stream.items()}


def test_one_row_is_itself():
    assert values(build_stream([row([5, 6, 7], [8, 9])])) == {
        "input_ids": [5, 6, 7, 8, 9],
        "position_ids": [0, 1, 2, 3, 4],
        "labels": [-100, -100, -100, 8, 9],
        "subtree_end": [5, 5, 5, 5, 5],
    }


def test_a_common_prefix_stands_once():
    rows = [row([5, 6, 7, 2], [8, 9]), row([5, 6, 7, 1], [4])]
    assert values(build_stream(rows)) == {
        #             shared   first    second
        "input_ids": [5, 6, 7, 2, 8, 9, 1, 4],
        "position_ids": [0, 1, 2, 3, 4, 5, 3, 4],
        "labels": [-100, -100, -100, -100, 8, 9, -100, 4],
        "subtree_end": [8, 8, 8, 6, 6, 6, 8, 8],
    }


def test_equal_prompts_keep_their_last_token_apart():
    rows = [row([5, 6], [8, 9]), row([5, 6], [7])]  # token 6 predicts 8 in one row and 7 in the other
    assert values(build_stream(rows)) == {
        "input_ids": [5, 6, 8, 9, 6, 7],
        "position_ids": [0, 1, 2, 3, 1, 2],
        "labels": [-100, -100, 8, 9, -100, 7],
        "subtree_end": [6, 4, 4, 4, 6, 6],
    }


def test_a_tree_with_three_levels_and_a_stranger():
    rows = [row([1, 2, 3, 9], [4]), row([1, 2, 5, 9], [4]), row([1, 7], [4]), row([8, 2], [4])]
    assert values(build_stream(rows)) == {
        "input_ids": [1, 7, 4, 2, 3, 9, 4, 5, 9, 4, 8, 2, 4],
        "position_ids": [0, 1, 2, 1, 2, 3, 4, 2, 3, 4, 0, 1, 2],
        "labels": [-100, -100, 4, -100, -100, -100, 4, -100, -100, 4, -100, -100, 4],
        "subtree_end": [10, 3, 3, 10, 7, 7, 7, 10, 10, 10, 13, 13, 13],
    }


def test_the_places_of_a_padded_batch_are_counted_over_all_rows():
    batch = build_padded([row([5, 6], [7, 8]), row([5], [9])])
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 9, -100, -100]]
    assert batch["places"].tolist() == [1, 2, 4]
    assert build_padded([row([5, 6], [])])["places"].tolist() == []


def test_each_token_has_the_weight_of_its_row():
    rows = [row([5, 6, 7, 2], [8, 9])._replace(weight=0.5), row([5, 6, 7, 1], [4])._replace(weight=-2.0)]
    assert build_stream(rows)["weights"].tolist() == [0.5, 0.5, -2.0]
    assert build_padded(rows)["weights"].tolist() == [0.5, 0.5, -2.0]
    assert build_stream(rows[::-1], lengths=(16,))["weights"].tolist() == [-2.0, 0.5, 0.5]


def test_filling_tokens_see_only_themselves():
    stream = values(build_stream([row([5, 6], [7])], lengths=(2, 4, 8)))
    assert stream == {
        "input_ids": [5, 6, 7, 0],
        "position_ids": [0, 1, 2, 0],
        "labels": [-100, -100, 7, -100],
        "subtree_end": [3, 3, 3, 4],
    }


def test_streams_longer_than_planned_have_few_lengths_too():
    assert [fill_up(size, (1024, 2816)) for size in (1, 1024, 1025, 2816)] == [1024, 1024, 2816, 2816]
    assert {fill_up(size, (1024, 2816)) for size in range(2817, 5633)} == {3072, 3840, 4608, 5376, 6144}
    assert fill_up(7, ()) == 7
    long = [row([1, 2, 3], [4]), row([5] * 700, [6])]
    assert build_stream(long, (512,))["input_ids"].shape == (1, 768)
    assert Schedule(long, 2, 1, Layout(2, lengths=(512,))).measure([[0, 1]]) == [768]


@settings(max_examples=300, deadline=None)
@given(ROWS_OF_TOKENS)
def test_every_token_sees_its_own_row_and_nothing_else(rows):
    stream = values(build_stream(rows))
    ids, labels, end = stream["input_ids"], stream["labels"], stream["subtree_end"]
    seen = [[k for k in range(q + 1) if q < end[k]] for q in range(len(ids))]
    assert all(len(visible) == stream["position_ids"][q] + 1 for q, visible in enumerate(seen))
    leaves = [q for q in range(len(ids)) if labels[q] != -100 and (q + 1 == len(ids) or labels[q + 1] == -100)]
    got = sorted(([ids[k] for k in seen[q]], sum(labels[k] != -100 for k in seen[q])) for q in leaves)
    assert got == sorted((r.input_ids, len(r.input_ids) - r.prompt_length) for r in rows)
