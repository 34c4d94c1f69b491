"""Losses: streams and batches have the loss and gradients of rows computed one at a time."""

import pytest
import torch
from hypothesis import given, settings
from small import CASES, ROWS_OF_TOKENS, TRAIN, make_adapted, make_qwen3, row

import train_qwen3_tool_calling as script
from tool_calling.arguments import pick
from tool_calling.engines.losses import compute_gradient, compute_token_losses, score_batches, to_metrics
from tool_calling.samples import Sample
from tool_calling.schedule import Batching, plan_schedule
from tool_calling.streams import Layout, build_padded, build_stream


@pytest.fixture(scope="module")
def model():
    """A small random Qwen3 with LoRA whose two factors are both alive."""
    return make_adapted()


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


@settings(max_examples=60, deadline=None)
@given(ROWS_OF_TOKENS)
def test_any_tree_of_rows_gives_the_same_gradients(model, rows):
    assert_same(loss_and_gradients(model, [rows]), plain_loss_and_gradients(model, rows))


def test_held_out_rows_that_share_nothing_make_no_larger_streams_than_training(model):
    train = [row([*range(1, 31), i % 8], [9]) for i in range(16)]
    strangers = [row([i, *range(1, 31)], [9]) for i in range(16)]
    flags = ["--batch_size", "2", "--gradient_accumulation_steps", "8", "--max_seq_length", "64"]
    layout = plan_schedule(train, pick(Batching, script.parse_args(flags)), engine="transformers").layout
    assert layout.rows == 16 and layout.limit == 128
    batches = layout.batch(strangers)
    assert [batch["input_ids"].numel() for batch in batches] == [128] * 4
    assert len(layout.batch(train)) == 1
    sums = [
        to_metrics(score_batches(model, given, "transformers"))["loss"]
        for given in (batches, [build_padded(strangers)])
    ]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_held_out_loss_is_a_mean_over_tokens(model):
    rows = CASES["one tool set"] + CASES["single rows"]
    model.train()
    expected = plain_loss_and_gradients(model, rows)[0]
    for size in (1, 2, 6):
        sums = score_batches(model, Layout(size).batch(rows), "transformers")
        assert to_metrics(sums)["loss"] == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_of_a_large_gradient_every_nth_number_is_compared(monkeypatch):
    model, batch = make_qwen3(tied=True), [build_padded(TRAIN[:2])]
    loss, whole = compute_gradient(model, batch, "transformers")
    sizes = [parameter.numel() for parameter in model.parameters()]
    monkeypatch.setattr("tool_calling.engines.losses.COMPARED_NUMBERS", sum(sizes) // 2)  # of an odd sum, every third
    again, part = compute_gradient(model, batch, "transformers")
    step = 3 if sum(sizes) % 2 else 2
    assert torch.equal(again, loss) and torch.equal(part, torch.cat([piece[::step] for piece in whole.split(sizes)]))
