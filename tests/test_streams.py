"""Streams: literal tensors, and the same loss and gradients as rows computed one at a time."""

import argparse
import math

import pytest
import torch
from conftest import patch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

import train_qwen3_tool_calling as script
from tool_calling.engines.graphs import find_recorded
from tool_calling.engines.losses import compute_token_losses, score_batches, to_metrics
from tool_calling.prompts import Sample
from tool_calling.schedule import (
    Plan,
    build_batch,
    choose_lengths,
    count_measured_epochs,
    group_rows,
    measure_batches,
    order_rows,
    plan_streams,
    to_batches,
    to_small_batches,
)
from tool_calling.streams import build_padded, build_stream, fill_up
from tool_calling.training.selfcheck import check_sharing, compare_sharing, compute_lengths

VOCABULARY = 61


def row(prompt: list[int], answer: list[int], where: str = "x:1") -> Sample:
    return Sample(where, prompt + answer, len(prompt))


def values(stream: dict) -> dict:
    assert {tensor.dtype for tensor in stream.values()} == {torch.int64}
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
    assert measure_batches(long, Plan(2, 1, [], (512,)), [[0, 1]]) == [768]


@pytest.fixture(scope="module")
def model():
    """A small random Qwen3 with LoRA whose two factors are both alive, in float32."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=script.TARGET_MODULES, task_type="CAUSAL_LM")
    model = get_peft_model(Qwen3ForCausalLM(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def loss_and_gradients(model, batches: list[list[Sample]]) -> tuple[float, dict]:
    """The mean loss over all supervised tokens of the batches, and the gradient of every adapter weight."""
    model.zero_grad()
    tokens = sum(len(row.input_ids) - row.prompt_length for batch in batches for row in batch)
    total = 0.0
    for batch in batches:
        loss = compute_token_losses(model, build_stream(batch), "transformers")[0].sum() / tokens
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def plain_loss_and_gradients(model, rows: list[Sample]) -> tuple[float, dict]:
    """The same by the model's own causal attention and loss, one row at a time, with nothing of this project."""
    model.zero_grad()
    tokens = sum(len(row.input_ids) - row.prompt_length for row in rows)
    total = 0.0
    for r in rows:
        ids = torch.tensor([r.input_ids])
        labels = ids.clone()
        labels[0, : r.prompt_length] = -100
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=tokens).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(shared, separate):
    assert shared[0] == pytest.approx(separate[0], rel=1e-5)
    assert shared[1].keys() == separate[1].keys()
    largest = max(torch.linalg.norm(gradient) for gradient in separate[1].values())
    for name, gradient in separate[1].items():  # a gradient that is zero by symmetry is rounding noise in both
        assert torch.linalg.norm(shared[1][name] - gradient) <= 1e-5 * torch.linalg.norm(gradient) + 1e-6 * largest, (
            name
        )


TOOLS_A, TOOLS_B = list(range(1, 21)), list(range(30, 45))
CASES = {
    "one tool set": [
        row(TOOLS_A + [22, 23], [24, 25]),
        row(TOOLS_A + [22, 26], [27]),
        row(TOOLS_A + [28], [29, 24, 1]),
    ],
    "several tool sets": [
        row(TOOLS_A + [22], [24]),
        row(TOOLS_B + [22], [24, 25]),
        row(TOOLS_A + [23], [24]),
        row(TOOLS_B + [50, 51], [52]),
    ],
    "a row that is a prefix of another": [row(TOOLS_A[:10], [11]), row(TOOLS_A, [21, 22]), row(TOOLS_A[:9], [10, 11])],
    "single rows": [row(TOOLS_A, [21]), row(TOOLS_B, [21]), row([59, 58, 57], [56, 55])],
    "turns of one conversation": [
        row(TOOLS_A, [21, 22]),
        row(TOOLS_A + [21, 22, 30, 31], [32]),
        row(TOOLS_A + [21, 22, 30, 31, 32, 33], [34, 35]),
    ],
    "the same row twice": [row(TOOLS_A, [21, 22])] * 2,
    "prompts of one token": [row([7], [8]), row([7], [9])],
}


@pytest.mark.parametrize("name", CASES)
def test_sharing_changes_neither_loss_nor_gradients(model, name):
    assert_same(loss_and_gradients(model, [CASES[name]]), plain_loss_and_gradients(model, CASES[name]))


def test_micro_batches_and_fused_accumulation_are_the_same(model):
    rows = CASES["one tool set"] + CASES["several tool sets"] + CASES["single rows"]
    expected = plain_loss_and_gradients(model, rows)
    for size in (1, 3, 4, len(rows)):
        assert_same(loss_and_gradients(model, [rows[i : i + size] for i in range(0, len(rows), size)]), expected)


@pytest.mark.parametrize("build", [lambda rows: build_stream(rows, lengths=(64, 128)), build_padded])
def test_filled_streams_and_padded_batches_change_nothing(model, build):
    rows = CASES["several tool sets"]
    tokens = sum(len(r.input_ids) - r.prompt_length for r in rows)
    model.zero_grad()
    loss = compute_token_losses(model, build(rows), "transformers")[0].sum() / tokens
    loss.backward()
    filled = loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert_same(filled, plain_loss_and_gradients(model, rows))


def test_a_broken_mask_would_be_seen(model):
    stream = build_stream(CASES["one tool set"])
    right = compute_token_losses(model, stream, "transformers")[0].sum().item()
    stream["subtree_end"][:] = stream["input_ids"].shape[1]  # everyone sees their elder siblings
    assert compute_token_losses(model, stream, "transformers")[0].sum().item() != pytest.approx(right, rel=1e-4)


token = st.integers(1, 3)  # few tokens, so that prefixes meet by chance
rows_of_tokens = st.lists(
    st.builds(row, st.lists(token, min_size=1, max_size=8), st.lists(token, min_size=1, max_size=3)),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(rows_of_tokens)
def test_any_tree_of_rows_gives_the_same_gradients(model, rows):
    assert_same(loss_and_gradients(model, [rows]), plain_loss_and_gradients(model, rows))


@settings(max_examples=300, deadline=None)
@given(rows_of_tokens)
def test_every_token_sees_its_own_row_and_nothing_else(rows):
    stream = values(build_stream(rows))
    ids, labels, end = stream["input_ids"], stream["labels"], stream["subtree_end"]
    seen = [[k for k in range(q + 1) if q < end[k]] for q in range(len(ids))]
    assert all(len(visible) == stream["position_ids"][q] + 1 for q, visible in enumerate(seen))
    leaves = [q for q in range(len(ids)) if labels[q] != -100 and (q + 1 == len(ids) or labels[q + 1] == -100)]
    got = sorted(([ids[k] for k in seen[q]], sum(labels[k] != -100 for k in seen[q])) for q in leaves)
    assert got == sorted((r.input_ids, len(r.input_ids) - r.prompt_length) for r in rows)


def settings_of(batch_size: int, steps: int, max_seq_length: int, **more) -> argparse.Namespace:
    return argparse.Namespace(
        batch_size=batch_size,
        gradient_accumulation_steps=steps,
        share_prefix=True,
        num_epochs=2,
        max_steps=None,
        max_seq_length=max_seq_length,
        seed=1,
        **more,
    )


def plan(lengths: list[int], shared: int, batch_size: int, steps: int, max_seq_length: int, engine="transformers"):
    samples = [
        row(list(range(shared)) + [100 + i] * (length - shared - 1), [7], f"x:{i}") for i, length in enumerate(lengths)
    ]
    plan = plan_streams(samples, settings_of(batch_size, steps, max_seq_length), engine)
    assert sorted(row for group in plan.groups for rows in group for row in rows) == list(range(len(samples)))
    return plan._replace(groups=[])


def test_accumulation_is_fused_as_far_as_the_flags_allow():
    assert plan([120] * 20, 100, 2, 4, 130) == (8, 1, [], (), True, 1, 260)  # 100 + 8 x 20 tokens, 2 x 130 are allowed
    assert plan([120] * 20, 100, 2, 4, 129) == (4, 2, [], (), True, 1, 258)
    assert plan([120] * 20, 0, 2, 4, 130) == (2, 4, [], (), True, 1, 260)  # nothing shared, nothing fused
    assert plan([120] * 3, 100, 2, 4, 130) == (8, 1, [], (), True, 1, 260)  # fewer rows than a step
    assert plan([120] * 20, 100, 1, 3, 160) == (3, 1, [], (), True, 1, 160)
    assert plan([130] * 20, 0, 2, 4, 100) == (2, 4, [], (), True, 1, 200)  # too long for the bound: as the flags say


def test_streams_for_compiled_attention_have_few_lengths():
    assert plan([120] * 20, 100, 2, 4, 130, engine="unsloth").lengths == (256, 384)  # 260 tokens; the last, 4 rows, 180
    assert choose_lengths([100]) == (128,)
    assert choose_lengths([1900, 1950, 2000, 2040]) == (2048,)  # all within a quarter of the longest
    assert choose_lengths([100, 500, 1000, 2000]) == (128, 512, 1024, 2048)
    assert choose_lengths([128] * 99 + [129]) == (128, 256)


def test_no_sharing_is_the_batches_of_the_flags():
    args = settings_of(2, 4, 130)
    args.share_prefix = False
    rows = [row([1, 2, 3], [4]), row([1, 2], [5, 6])]
    plan = plan_streams(rows, args, "unsloth")
    assert plan == (2, 4, [[[1]], [[0]]], (), False, 1, math.inf)
    batch = build_batch(rows, plan)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, 4], [1, 2, 5, 6]],
        "labels": [[-100, -100, -100, 4], [-100, -100, 5, 6]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 1]],
    }


def many_tools() -> list[Sample]:
    """Three tool sets with 20, 9 and 1 rows; the first set's rows are turns of conversations, two a row of the file."""
    prefixes = [list(range(100, 120)), list(range(200, 220)), list(range(300, 320))]
    rows = [row(prefixes[0] + [i], [1], f"x:{i // 2}") for i in range(20)]
    return [*rows, *(row(prefixes[1] + [i], [1], f"y:{i}") for i in range(9)), row(prefixes[2], [1], "z:1")]


def test_rows_of_the_same_tools_are_grouped():
    groups = group_rows(many_tools())
    assert sorted(sum(len(turns) for turns in group) for group in groups) == [1, 9, 20]
    assert sorted(map(sorted, groups[0])) == [[i, i + 1] for i in range(0, 20, 2)]  # turns stay together


def test_the_order_is_random_repeatable_and_lets_rows_meet():
    plan = Plan(8, 1, group_rows(many_tools()))
    order = order_rows(plan, seed=1, epoch=0)
    assert sorted(order) == list(range(30))
    assert order == order_rows(plan, seed=1, epoch=0)
    assert order != order_rows(plan, seed=1, epoch=1) != order_rows(plan, seed=2, epoch=1)
    tool_set = [0 if i < 20 else 1 if i < 29 else 2 for i in order]
    changes = sum(a != b for a, b in zip(tool_set, tool_set[1:]))
    assert changes <= 9  # nine pieces of about four rows; a plain shuffle changes about 14 times
    one_group = plan._replace(groups=group_rows(many_tools()[20:29]))
    assert len({tuple(order_rows(one_group, 1, epoch)) for epoch in range(50)}) > 45


def test_the_self_check_draws_no_dropout(model):
    dropout = torch.nn.Dropout(0.5)
    handle = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: dropout(output))
    model.dropout_of_this_test = dropout
    try:
        loss, gradient = compare_sharing(model, CASES["one tool set"], (), "transformers")
    finally:
        handle.remove()
        del model.dropout_of_this_test
    assert loss < 1e-4 and gradient < 1e-4


def test_a_run_by_steps_is_planned_for_the_epochs_that_it_begins():
    rows = [row([1, 2, 3], [4]) for _ in range(20)]
    args = script.parse_args(["--num_epochs", "3"])
    assert count_measured_epochs(args, rows) == 3
    for steps, epochs in ((1, 1), (3, 1), (4, 2), (30, 10)):  # three steps an epoch
        args.max_steps = steps
        assert count_measured_epochs(args, rows) == epochs


def test_the_self_check_passes_and_a_broken_mask_fails_it(model, monkeypatch, capsys):
    train = CASES["one tool set"] + CASES["one tool set"]
    planned = Plan(4, 1, group_rows(train))
    args = settings_of(4, 1, 100)
    assert check_sharing(args, model, train, planned, "transformers") is True
    assert capsys.readouterr().out.startswith("check    sharing changes the loss of 4 rows by ")

    def everything_before(subtree_end):
        return torch.ones(1, 1, len(subtree_end), len(subtree_end), dtype=torch.bool).tril()

    patch(monkeypatch, "to_attention_mask", everything_before)
    assert check_sharing(args, model, train, planned, "transformers") is False
    assert "more than rounding (1e-04): sharing is switched off" in capsys.readouterr().err


def test_on_several_devices_a_stream_of_each_length_is_computed_before_training(model):
    train = [*CASES["one tool set"], row([1, 2], [3], "short:1")]
    computed = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *given: computed.append(given[1][0].shape[1]))
    try:
        for devices in (1, 2):
            planned = Plan(4, 1, group_rows(train), (16, 32, 64), devices=devices)
            assert check_sharing(settings_of(4, 1, 100), model, train, planned, "transformers") is True
            streams = [length for length in computed if length in planned.lengths]
            assert streams == [32] if devices == 1 else [32, 16, 32, 64]  # the rows of the check need 32
            computed.clear()
    finally:
        handle.remove()


KEPT = 4 * 32 + 3 * 16 * 3 + 2 * 64  # inputs of norms and projections of one layer


@pytest.mark.parametrize(
    "flags, token",
    [
        (
            ["--gradient_checkpointing", "on"],
            2 * 2 * 32 + 1.25 * 2 * KEPT,
        ),  # bytes, layers, width; and one layer at work
        (["--gradient_checkpointing", "off"], 2 * 2 * KEPT),
    ],
)
def test_streams_are_recorded_where_half_of_the_free_memory_holds_them(model, monkeypatch, flags, token):
    flags, lengths = [*flags, "--lora_dropout", "0"], (128, 256)
    plan = Plan(8, 1, [], lengths)
    for free, found in ((2 * 384 * token, lengths), (2 * 384 * token - 1, ())):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2**40))
        assert find_recorded(script.parse_args(flags), plan, model.config) == found
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    assert find_recorded(script.parse_args([*flags, "--no-cuda_graphs"]), plan, model.config) == ()
    assert find_recorded(script.parse_args([*flags[:2], "--lora_dropout", "0.1"]), plan, model.config) == ()
    assert find_recorded(script.parse_args(flags), plan._replace(accumulation=2), model.config) == ()


def test_where_recording_runs_out_of_memory_nothing_stays_recorded(model, monkeypatch):
    decoder, computed = model.get_base_model().model, []

    def compute(model, batches, engine):
        computed.append(batches[0]["input_ids"].shape[1])
        if computed[-1] == 64:
            raise torch.OutOfMemoryError

    patch(monkeypatch, "compute_gradient", compute)
    monkeypatch.setattr(decoder, "graphs", {}, raising=False)
    compute_lengths(model, CASES["one tool set"], Plan(4, 1, [], (32, 64, 128)), "unsloth")
    assert computed == [32, 64] and decoder.graphs is None


def test_held_out_rows_that_share_nothing_make_no_larger_streams_than_training(model):
    train = [row([*range(1, 31), i % 8], [9]) for i in range(16)]
    strangers = [row([i, *range(1, 31)], [9]) for i in range(16)]
    plan = plan_streams(train, settings_of(2, 8, 64), "transformers")
    assert plan.rows == 16 and plan.limit == 128
    batches = to_batches(strangers, plan)
    assert [batch["input_ids"].numel() for batch in batches] == [128] * 4
    assert len(to_batches(train, plan)) == 1
    sums = [
        to_metrics(score_batches(model, given, "transformers"))["loss"]
        for given in (batches, [build_padded(strangers)])
    ]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_losses_of_saved_models_are_compared_on_few_rows_at_once():
    rows = [row([*range(1, 31), i % 8], [9]) for i in range(70)]
    for plan, size in ((Plan(16, 1, [], (512,)), 4), (Plan(3, 1, [], (512,)), 3)):
        batches = to_small_batches(rows, plan)
        supervised = [int((batch["labels"] != -100).sum()) for batch in batches]
        assert sum(supervised) == 64 and max(supervised) == size
        assert all(batch["input_ids"].numel() < 512 for batch in batches)  # not filled up to training's length


def test_held_out_loss_is_a_mean_over_tokens(model):
    rows = CASES["one tool set"] + CASES["single rows"]
    model.train()
    expected = plain_loss_and_gradients(model, rows)[0]
    for size in (1, 2, 6):
        sums = score_batches(model, to_batches(rows, Plan(size, 1, [])), "transformers")
        assert to_metrics(sums)["loss"] == pytest.approx(expected, rel=1e-5)
    assert model.training
