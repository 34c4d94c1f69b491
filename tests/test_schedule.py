"""Schedules: what is computed together, in which order, in how many streams of how many lengths."""

import math
from dataclasses import replace

import pytest
from small import row

import train_qwen3_tool_calling as script
from tool_calling.arguments import pick
from tool_calling.samples import Sample
from tool_calling.schedule import Batching, Schedule, build_small_batches, choose_lengths, group_samples, plan_schedule
from tool_calling.streams import Layout


def plan(samples: list[Sample], batch_size: int, steps: int, max_seq_length: int, *flags: str, engine="transformers"):
    """Return the schedule of a run of two epochs with these flags."""
    flags = [
        *("--batch_size", str(batch_size)),
        *("--gradient_accumulation_steps", str(steps)),
        *("--max_seq_length", str(max_seq_length)),
        *("--num_epochs", "2"),
        *("--seed", "1"),
        *flags,
    ]
    return plan_schedule(samples, pick(Batching, script.parse_args(flags)), engine=engine)


def fused(lengths: list[int], shared: int, *flags: int, engine="transformers") -> tuple[Layout, int]:
    """Return (layout, streams per step) for rows of these lengths that have `shared` tokens in common."""
    samples = [row(list(range(shared)) + [100 + i] * (length - shared - 1), [7], i) for i, length in enumerate(lengths)]
    schedule = plan(samples, *flags, engine=engine)
    assert sorted(row for group in schedule.groups for rows in group for row in rows) == list(range(len(samples)))
    assert schedule.devices == 1
    return schedule.layout, schedule.streams_per_step


def test_accumulation_is_fused_as_far_as_the_flags_allow():
    assert fused([120] * 20, 100, 2, 4, 130) == (Layout(8, limit=260), 1)  # 100 + 8 x 20 tokens, 2 x 130 are allowed
    assert fused([120] * 20, 100, 2, 4, 129) == (Layout(4, limit=258), 2)
    assert fused([120] * 20, 0, 2, 4, 130) == (Layout(2, limit=260), 4)  # nothing shared, nothing fused
    assert fused([120] * 3, 100, 2, 4, 130) == (Layout(8, limit=260), 1)  # fewer rows than a step
    assert fused([120] * 20, 100, 1, 3, 160) == (Layout(3, limit=160), 1)
    assert fused([130] * 20, 0, 2, 4, 100) == (Layout(2, limit=200), 4)  # too long for the bound: as the flags say


def test_streams_for_compiled_attention_have_few_lengths():
    layout, _ = fused([120] * 20, 100, 2, 4, 130, engine="unsloth")
    assert layout.lengths == (256, 384)  # 260 tokens; the last, 4 rows, 180
    assert choose_lengths([100]) == (128,)
    assert choose_lengths([1900, 1950, 2000, 2040]) == (2048,)  # all within a quarter of the longest
    assert choose_lengths([100, 500, 1000, 2000]) == (128, 512, 1024, 2048)
    assert choose_lengths([128] * 99 + [129]) == (128, 256)


def test_no_sharing_is_the_batches_of_the_flags():
    rows = [row([1, 2, 3], [4]), row([1, 2], [5, 6])]
    schedule = plan(rows, 2, 4, 130, "--no-share_prefix", engine="unsloth")
    assert schedule.layout == Layout(2, share_prefix=False, lengths=(), limit=math.inf)
    assert (schedule.streams_per_step, schedule.groups, schedule.devices) == (4, [[[1]], [[0]]], 1)
    batch = schedule.layout.build(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, 4], [1, 2, 5, 6]],
        "labels": [[-100, -100, -100, 4], [-100, -100, 5, 6]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 1]],
        "places": [2, 5, 6],
        "weights": [1.0, 1.0, 1.0],
    }


def many_tools() -> list[Sample]:
    """Three tool sets with 20, 9 and 1 rows; the first set's rows are turns of conversations, two a row of the file."""
    prefixes = [list(range(100, 120)), list(range(200, 220)), list(range(300, 320))]
    rows = [row(prefixes[0] + [i], [1], i // 2) for i in range(20)]
    return [*rows, *(row(prefixes[1] + [i], [1], 10 + i) for i in range(9)), row(prefixes[2], [1], 19)]


def test_rows_of_the_same_tools_are_grouped():
    groups = group_samples(many_tools())
    assert sorted(sum(len(turns) for turns in group) for group in groups) == [1, 9, 20]
    assert sorted(map(sorted, groups[0])) == [[i, i + 1] for i in range(0, 20, 2)]  # turns stay together


def test_the_order_is_random_repeatable_and_lets_rows_meet():
    schedule = Schedule(many_tools(), 8, 1, Layout(8), seed=1)
    order = schedule.order(epoch=0)
    assert sorted(order) == list(range(30))
    assert order == schedule.order(epoch=0)
    assert order != schedule.order(epoch=1) != replace(schedule, seed=2).order(epoch=1)
    tool_set = [0 if i < 20 else 1 if i < 29 else 2 for i in order]
    changes = sum(a != b for a, b in zip(tool_set, tool_set[1:]))
    assert changes <= 7  # eight pieces of four rows and more, or one; a plain shuffle changes about 14 times
    one_group = Schedule(many_tools()[20:29], 8, 1, Layout(8), seed=1)
    assert len({tuple(one_group.order(epoch)) for epoch in range(50)}) > 45


def test_a_step_mixes_three_lists_of_tools_at_most():
    """A fourth can make its stream too long for all, and then no step is recorded as a CUDA graph."""
    sizes = [4, 5, 7, 9, 13, 22]
    samples = [
        row([*range(100 * i, 100 * i + 20), k], [1], 100 * i + k) for i, n in enumerate(sizes, 1) for k in range(n)
    ]
    schedule = Schedule(samples, 8, 1, Layout(8))
    assert len(schedule.groups) == len(sizes)
    lists = [{samples[i].input_ids[0] for i in step} for epoch in range(100) for step in schedule.streams(epoch)]
    assert max(map(len, lists)) == 3


def test_a_run_by_steps_is_planned_for_the_epochs_that_it_begins():
    rows = [row([1, 2, 3], [4]) for _ in range(20)]
    assert len(Schedule(rows, 8, 1, Layout(8), epochs=3).measure_run()) == 3 * 3  # three steps of one stream an epoch
    for steps, epochs in ((1, 1), (3, 1), (4, 2), (30, 10)):
        assert len(Schedule(rows, 8, 1, Layout(8), epochs=3, max_steps=steps).measure_run()) == 3 * epochs


def test_losses_of_saved_models_are_compared_on_few_rows_at_once():
    rows = [row([*range(1, 31), 40 + i], [9]) for i in range(70)]
    for size, expected in ((16, 4), (3, 3)):
        batches = build_small_batches(rows, Layout(size, lengths=(512,)), vocabulary=151_936)
        supervised = [int((batch["labels"] != -100).sum()) for batch in batches]
        assert sum(supervised) == 64 and max(supervised) == expected
        assert all(batch["input_ids"].numel() < 512 for batch in batches)  # not filled up to training's length
    assert len(build_small_batches(rows, Layout(32), vocabulary=4096)) == 2  # whose logits take less


@pytest.mark.parametrize(
    "rows, devices, streams",
    [(16, 1, [8, 8]), (16, 2, [8, 8]), (12, 1, [8, 4]), (12, 2, [6, 6]), (17, 2, [8, 8, 0, 1]), (5, 4, [1, 1, 1, 2])],
)
def test_a_step_has_the_same_rows_on_any_number_of_devices(rows, devices, streams):
    samples = [row([1, 2, 3, i], [4], i) for i in range(rows)]
    schedule = Schedule(samples, 8, 1, Layout(8), seed=script.SEED, devices=devices)
    assert schedule.groups == [[[i] for i in range(rows)]]
    cut = schedule.streams(epoch=1)
    assert sorted(map(len, cut)) == sorted(streams) and len(cut) % devices == 0
    whole = Schedule(samples, 8 * devices, 1, Layout(8 * devices), seed=script.SEED)
    assert sum(cut, []) == whole.order(epoch=1)
    for step in range(0, len(cut), devices):
        assert sum(cut[step : step + devices], []) == whole.streams(epoch=1)[step // devices]


def test_rows_are_counted_as_the_epochs_have_them():
    samples = [row([1, 2], [3], i) for i in range(20)]  # 8 in a step: epochs of 8, 8 and 4
    count = Schedule(samples, 8, 1, Layout(8)).count_samples
    assert [count(step) for step in range(8)] == [0, 8, 16, 20, 28, 36, 40, 48]


def test_rows_are_the_same_only_in_the_same_order_with_the_same_prompts():
    first, second = Sample("row:1", [1, 2, 3], 2), Sample("row:2", [4, 5, 6], 1)

    def digest(*samples: Sample) -> str:
        return Schedule([*samples], 8, 1, Layout(8)).digest()

    digests = {
        digest(*samples)
        for samples in (
            [first, second],
            [second, first],
            [first],
            [first, second._replace(prompt_length=2)],
            [first, second._replace(input_ids=[4, 5, 7])],
            [Sample("", [1, 2, 3, 4, 5, 6], 2)],
        )
    }
    assert len(digests) == 6
    assert digest(first._replace(source="elsewhere"), second) == digest(first, second)
