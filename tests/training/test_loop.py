"""The training's end: what its losses say about the number of epochs and the rate."""

import pytest

from tool_calling.training.loop import find_overfitting, find_unfinished


def history(*epochs: tuple) -> list[dict]:
    """What a trainer of two steps an epoch logs: (training loss, held-out loss) of each epoch."""
    logs = []
    for epoch, (loss, held) in enumerate(epochs, start=1):
        logs += [{"loss": loss + 0.1, "step": 2 * epoch - 1}, {"loss": loss - 0.1, "step": 2 * epoch}]
        logs += [{"eval_loss": held, "step": 2 * epoch, "epoch": float(epoch)}] if held is not None else []
    return logs + [{"train_loss": 1.0, "step": 2 * len(epochs), "epoch": float(len(epochs))}]


def test_a_held_out_loss_that_rose_while_the_training_loss_fell_is_pointed_out():
    assert find_overfitting(history((0.5, 0.3), (0.2, 0.021), (0.1, 0.05))) == (
        "held-out loss rose from 0.021 (epoch 2) to 0.050 (epoch 3) while the training loss fell: fewer epochs, or "
        "--metric_for_best loss keeps the best checkpoint"
    )


@pytest.mark.parametrize(
    "epochs",
    [
        [(0.5, 0.3), (0.2, 0.02), (0.1, 0.01)],  # still falling
        [(0.5, 0.3), (0.2, 0.02), (0.1, 0.035)],  # rose by less than 0.02
        [(0.5, 2.0), (0.2, 1.0), (0.1, 1.09)],  # rose by less than a tenth
        [(0.5, 0.3), (0.1, 0.02), (0.2, 0.5)],  # the training loss rose too
        [(0.5, 0.3)],
        [(0.5, None), (0.2, None)],
        [],
    ],
)
def test_nothing_is_pointed_out_where_nothing_is(epochs):
    assert find_overfitting(history(*epochs)) is None


def test_without_training_losses_in_between_nothing_is_pointed_out():
    assert find_overfitting([log for log in history((0.5, 0.3), (0.2, 0.6)) if "loss" not in log]) is None


@pytest.mark.parametrize(
    "matches, found",
    [
        ([0.445, 0.51, 0.615], "from 51.0% (epoch 2) to 61.5% (epoch 3)"),
        ([0.0, 0.05], "from 0.0% (epoch 1) to 5.0% (epoch 2)"),
        ([0.2, 0.95, 0.96], None),
        ([0.2, 0.9, 0.8], None),
        ([0.6], None),
        ([], None),
    ],
)
def test_an_exact_match_that_is_still_rising_is_pointed_out(matches, found):
    logs = [{"eval_exact_match": match, "epoch": float(epoch)} for epoch, match in enumerate(matches, start=1)]
    advice = "a higher --learning_rate or more epochs may teach more"
    line = found and f"held-out exact match was still rising, {found}: {advice}"
    assert find_unfinished([{"loss": 1.0}, *logs]) == line
