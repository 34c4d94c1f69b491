"""--hard_rows: rows that the start answers right are found, and only a share of them stays, the same when resumed."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import patch
from small import TRAIN, make_trainer

from tool_calling.engines.answers import generate_tokens
from tool_calling.engines.losses import score_batch
from tool_calling.streams import build_padded
from tool_calling.terminal import UserError
from tool_calling.training.hard_rows import find_right, leave_out

FLAGS = ("--method", "grpo", "--num_generations", "2", "--batch_size", "4", "--max_new_tokens", "3")


@pytest.fixture
def trainer(tmp_path, tokenizer, monkeypatch):
    """A trainer of 24 rows, of which its model reproduces every third; of those it counts as sure."""
    patch(monkeypatch, "SURE", 1e-9)
    trainer = make_trainer(tmp_path, tokenizer, *FLAGS, held_out=TRAIN[:2])
    prompts = [sample.input_ids[:6] for sample in TRAIN]
    with torch.no_grad():
        answers = generate_tokens(trainer.model.eval(), prompts, [], 3)
    wrong = [[(token + 1) % 61 for token in answer] for answer in answers]
    chosen = [answers[i] if i % 3 == 0 else wrong[i] for i in range(24)]
    samples = [
        sample._replace(input_ids=prompt + tokens, request=f"request {i}", completion=tokenizer.decode(tokens))
        for i, (sample, prompt, tokens) in enumerate(zip(TRAIN, prompts, chosen))
    ]
    samples[1] = samples[1]._replace(completion=tokenizer.decode(answers[1]))  # right, although not token for token
    trainer.take(replace(trainer.schedule, samples=samples, groups=None))
    return trainer


@pytest.mark.parametrize("share_prefix", [True, False])
def test_rows_that_are_answered_right_are_found(trainer, share_prefix):
    trainer.layout = replace(trainer.layout, share_prefix=share_prefix)
    assert find_right(trainer) == {*range(0, 24, 3), 1}
    assert trainer.model.training


def test_rows_are_right_if_the_model_is_sure_of_them(trainer, monkeypatch):
    hits = [*range(0, 24, 3)]
    losses, reproduced = score_batch(trainer.model, build_padded([trainer.schedule.samples[row] for row in hits]), "")
    sure = sorted(losses.tolist())
    assert all(reproduced) and sure[3] < sure[4]
    patch(monkeypatch, "SURE", math.exp(-(sure[3] + sure[4]) / 2))
    assert find_right(trainer) == {row for row, loss in zip(hits, losses.tolist()) if loss <= sure[3]} | {1}


def test_a_share_of_them_stays_and_all_that_are_hard(trainer, capsys):
    before = trainer.schedule.samples
    chosen = leave_out(trainer, 0.4, None)
    kept = [before.index(sample) for sample in trainer.schedule.samples]
    assert {*range(24)} - {*range(0, 24, 3), 1} < {*kept} and kept == sorted(kept) and 15 < len(kept) < 24
    assert chosen == {"rows": 24, "right": 9, "trained": len(kept), "left_out": chosen["left_out"]}
    assert int(chosen["left_out"], 16) == sum(1 << i for i in range(24) if i not in kept)
    found = f"9 of 24 rows are surely right already: {24 - len(kept)} of them are left out, and {len(kept)} rows are"
    assert found in capsys.readouterr().out
    assert len(trainer.arrays) == len(kept) + 1 and trainer.schedule.steps_per_epoch == -(-len(kept) // 16)
    assert sorted(row for stream in trainer.schedule.streams(0) for row in stream) == [*range(len(kept))]


def test_a_run_that_goes_on_takes_the_same_rows_without_a_look(trainer, monkeypatch):
    before = trainer.schedule
    chosen = leave_out(trainer, 0.4, None)
    kept = trainer.schedule.samples
    trainer.take(before)
    patch(monkeypatch, "find_right", lambda trainer: pytest.fail("looked again"))
    assert leave_out(trainer, 0.4, chosen) == chosen and trainer.schedule.samples == kept


def test_all_or_none_stay(trainer, monkeypatch):
    before = trainer.schedule
    assert leave_out(trainer, 1.0, None)["trained"] == 24
    assert leave_out(trainer, 0.0, None)["trained"] == 15
    trainer.take(before)
    patch(monkeypatch, "find_right", lambda trainer: {*range(24)})
    with pytest.raises(UserError) as error:
        leave_out(trainer, 0.0, None)
    assert str(error.value) == "--hard_rows 0: the model is sure of all 24 training rows"


def test_a_row_is_left_out_of_all_editions_if_it_is_right_in_all(trainer):
    """The second edition of row 3 asks for something else than the model answers."""
    plain = trainer.schedule.samples
    second = [sample._replace(edition=1) for sample in plain]
    second[3] = second[3]._replace(input_ids=[*second[3].input_ids[:6], 60, 60, 60], completion="another")
    trainer.take(replace(trainer.schedule, samples=[*plain, *second], groups=None))
    chosen = leave_out(trainer, 0.0, None)
    left = {*range(0, 24, 3), 1} - {3}
    assert (chosen["rows"], chosen["right"], chosen["trained"]) == (24, len(left), 24 - len(left))
    rows = [(sample.edition, sample.row) for sample in trainer.schedule.samples]
    assert rows == [(edition, row) for edition in (0, 1) for row in range(24) if row not in left]
    assert trainer.schedule.rows == 24 - len(left)
