"""The trainer: a step that does not fit is computed in parts, and a number that is not finite ends the run unsaved."""

import math
import types
from pathlib import Path

import pytest
import torch
from conftest import patch
from jobs import names
from small import COMPUTE, TRAIN, Identity, limit_memory, losses, make_trainer, weights
from transformers import TrainerCallback
from trl import SFTTrainer

import train_qwen3_tool_calling as script
from tool_calling.files import find_damage
from tool_calling.run_folder import Run
from tool_calling.schedule import Schedule
from tool_calling.streams import Layout
from tool_calling.terminal import UserError
from tool_calling.training import trainer as trainer_module
from tool_calling.training.loop import load_trained, train
from tool_calling.training.trainer import explain_numbers


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "flags, limit, warning",
    [
        # eight rows: 4 tokens that all share, then for each row 2 of its prompt and its answer
        (
            ["--batch_size", "8", "--gradient_accumulation_steps", "1"],
            24,
            ["with a stream of 36 tokens: from here on each step is computed in 2 streams of at most 4 rows"],
        ),
        (
            ["--batch_size", "4", "--gradient_accumulation_steps", "2"],
            14,
            ["with a stream of 18 tokens: from here on each step is computed in 4 streams of at most 2 rows"],
        ),
        (
            ["--batch_size", "5", "--gradient_accumulation_steps", "2"],
            9,
            [
                "with a stream of 22 tokens: from here on each step is computed in 4 streams of at most 3 rows",
                "with a stream of 15 tokens: from here on each step is computed in 6 streams of at most 2 rows",
                "with a stream of 12 tokens: from here on each step is computed in 10 streams of at most 1 row",
            ],
        ),
        (
            ["--batch_size", "4", "--gradient_accumulation_steps", "2", "--no-share_prefix"],
            18,
            ["with a stream of 32 tokens: from here on each step is computed in 4 streams of at most 2 rows"],
        ),
    ],
)
def test_a_step_that_does_not_fit_is_computed_in_smaller_streams(
    tmp_path, tokenizer, monkeypatch, capsys, flags, limit, warning, backward
):
    expected = make_trainer(tmp_path / "whole", tokenizer, *flags)
    start = weights(expected)
    expected.train()
    capsys.readouterr()
    sizes = limit_memory(monkeypatch, limit, backward)
    trainer = make_trainer(tmp_path / "parts", tokenizer, *flags)
    trainer.train()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert lines == [f"warning: out of GPU memory at step 1 {text}; the result is the same" for text in warning]
    assert max(sizes) <= limit and trainer.state.global_step == expected.state.global_step == 3
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-5)  # fp32 sums in other groups
    change = (weights(expected) - start).norm()
    assert change > 0.1 and (weights(trainer) - weights(expected)).norm() < 1e-4 * change


def test_streams_that_are_replayed_add_up_to_the_step(tmp_path, tokenizer, monkeypatch):
    """A replayed stream writes its gradient where the last one's lies, so it must find none."""
    flags = ["--batch_size", "4", "--gradient_accumulation_steps", "3"]
    expected, replayed = (make_trainer(tmp_path / name, tokenizer, *flags) for name in ("launched", "replayed"))
    start, compute = weights(expected), SFTTrainer.training_step
    expected.train()

    def replay(trainer, *arguments):
        assert all(weight.grad is None for weight in trainer.trained)
        return compute(trainer, *arguments)

    monkeypatch.setattr(SFTTrainer, "training_step", replay)
    patch(monkeypatch, "replays", lambda model: True)
    replayed.train()
    assert losses(replayed) == pytest.approx(losses(expected), rel=1e-6) and replayed.aside is None
    change = (weights(expected) - start).norm()
    assert change > 0.1 and (weights(replayed) - weights(expected)).norm() < 1e-4 * change


def test_one_row_that_does_not_fit_ends_the_run_with_its_line(tmp_path, tokenizer, monkeypatch, capsys):
    limit_memory(monkeypatch, 8)
    trainer = make_trainer(tmp_path, tokenizer, "--batch_size", "2", "--gradient_accumulation_steps", "12")
    with pytest.raises(UserError) as error:
        trainer.train()
    where = str(error.value).split(": ")[0]
    assert where in [row.source for row in TRAIN if len(row.input_ids) == 9]
    assert str(error.value) == (
        f"{where}: out of GPU memory at step 1 on this row alone, 9 tokens; lower --max_seq_length, use "
        "--load_in_4bit, --gradient_checkpointing on and --no-cuda_graphs, or choose a smaller --model_id"
    )
    assert "in 24 streams of at most 1 row; the result is the same" in capsys.readouterr().err


def test_smaller_streams_are_filled_to_lengths_of_their_own(tmp_path, tokenizer, monkeypatch, capsys):
    sizes = limit_memory(monkeypatch, 400)
    patch(monkeypatch, "choose_lengths", lambda counts: (max(counts), 300))
    make_trainer(tmp_path, tokenizer, "--batch_size", "8", "--gradient_accumulation_steps", "1", lengths=(512,)).train()
    assert "at step 1 with a stream of 512 tokens: " in capsys.readouterr().err
    assert len(sizes) == 6 and max(sizes) <= 24


def test_an_evaluation_after_it_takes_the_smaller_streams(tmp_path, tokenizer, monkeypatch, capsys):
    flags = ["--batch_size", "8", "--gradient_accumulation_steps", "1"]
    expected = make_trainer(tmp_path / "whole", tokenizer, *flags, held_out=TRAIN)
    expected.train()
    sizes = limit_memory(monkeypatch, 24)
    trainer = make_trainer(tmp_path / "parts", tokenizer, *flags, held_out=TRAIN)
    trainer.train()
    held = [[log for log in each.state.log_history if "eval_loss" in log] for each in (expected, trainer)]
    assert len(held[0]) == len(held[1]) == 1 and max(sizes) <= 24
    assert held[1][0]["eval_loss"] == pytest.approx(held[0][0]["eval_loss"], rel=1e-6)
    assert held[1][0]["eval_exact_match"] == held[0][0]["eval_exact_match"]


def test_memory_that_runs_out_with_a_split_model_ends_the_run(tmp_path, tokenizer, monkeypatch):
    """Each device gathers a layer as often as the others compute it."""
    trainer = make_trainer(tmp_path, tokenizer)
    patch(monkeypatch, "is_split", lambda model: True)
    with pytest.raises(UserError, match="out of GPU memory at step 1 with a stream of 36 tokens; lower --batch_size"):
        trainer.divide_streams(TRAIN[:8], 36)
    assert trainer.layout is trainer.schedule.layout


def test_held_out_rows_are_shared_out_over_the_gpus(tmp_path, tokenizer, monkeypatch):
    """Each computes as many batches as the others, the last one perhaps of nothing."""
    trainer = make_trainer(tmp_path, tokenizer, "--batch_size", "2", held_out=TRAIN[:5])
    monkeypatch.setattr(trainer_module, "gather_object", lambda counts: [1, 2])
    shares = []
    for index in range(2):
        trainer.accelerator = types.SimpleNamespace(num_processes=2, process_index=index)
        shares.append(trainer.batch_held_out())
    supervised = [[len(batch["places"]) for batch in share] for share in shares]
    expected = [[len(row.input_ids) - row.prompt_length for row in TRAIN[first:5:2]] for first in (0, 1)]
    assert [sum(share) for share in supervised] == [sum(share) for share in expected]
    assert len(shares[0]) == len(shares[1]) == 2 and supervised[1][1] == 0


def test_a_held_out_row_that_is_taken_twice_counts_once(tmp_path, tokenizer):
    again = [sample._replace(row=sample.row + 6) for sample in TRAIN[:6]]
    trainer = make_trainer(tmp_path, tokenizer, "--batch_size", "2", held_out=[*TRAIN[:6], *again])
    assert len(trainer.batch_held_out()) == 3


def test_activations_that_are_computed_again_change_nothing(tmp_path, tokenizer):
    results = {}
    for choice in ("on", "off"):
        trainer = make_trainer(tmp_path / choice, tokenizer, "--gradient_checkpointing", choice)
        assert trainer.model.get_base_model().is_gradient_checkpointing == (choice == "on")
        trainer.train()
        results[choice] = (losses(trainer), weights(trainer))
    assert results["on"][0] == pytest.approx(results["off"][0], rel=1e-6)
    torch.testing.assert_close(results["on"][1], results["off"][1], rtol=1e-5, atol=1e-6)


class InfiniteBackward(Identity):
    """The identity with an infinite gradient."""

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


SPOILERS = {
    "the loss is nan": lambda found: found * math.nan,
    "the loss is inf": lambda found: found + math.inf,
    "the norm of the gradient is nan": InfiniteBackward.apply,
}


@pytest.mark.parametrize("wrong", SPOILERS)
@pytest.mark.parametrize("logging_steps", ["1", "3"])
def test_a_number_that_is_not_finite_ends_the_run_before_anything_is_saved(
    tmp_path, tokenizer, monkeypatch, wrong, logging_steps
):
    flags = [
        *("--batch_size", "5", "--gradient_accumulation_steps", "2", "--lr_scheduler_type", "constant"),
        *("--logging_steps", logging_steps, "--save_steps", "1"),
    ]
    one_step = make_trainer(tmp_path / "one", tokenizer, *flags, "--max_steps", "1")
    one_step.train()
    calls = []

    def compute(model, batch, engine):
        calls.append(batch)
        found, hits = COMPUTE(model, batch, engine)
        return (SPOILERS[wrong](found) if len(calls) == 4 else found), hits  # second micro-batch of step 2

    patch(monkeypatch, "compute_token_losses", compute)
    trainer = make_trainer(tmp_path / "out", tokenizer, *flags)
    bar = trainer.progress.bar
    bar.disable = False  # as on a terminal
    with pytest.raises(UserError) as error:
        train(trainer, Run(tmp_path / "out", settings={}))
    assert bar.finished is False and not bar.live.is_started  # or the message would be drawn through it
    schedule = Schedule(TRAIN, 5, 2, Layout(5), seed=script.SEED)
    rows = [TRAIN[index].source for index in schedule.order(epoch=0)[10:20]]
    assert str(error.value) == (
        f"step 2: {wrong}; expected a finite number. Nothing of it is saved, and earlier checkpoints are "
        "good. Lower --learning_rate, or look at the rows of this step: " + ", ".join(rows[:8]) + ", and 2 more"
    )
    assert [name for name in names(tmp_path / "out") if name.startswith("checkpoint")] == ["checkpoint-1"]
    file = Path("checkpoint-1", "adapter_model.safetensors")
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


def test_rows_of_tokens_are_trained_at_a_rate_of_their_own(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, "--weight_decay", "0.1", tokens=[5, 6])
    *others, rows = trainer.create_optimizer().param_groups
    assert (rows["lr"], rows["weight_decay"], [weight.shape for weight in rows["params"]]) == (0.04, 0, [(2, 32)])
    assert {group["lr"] for group in others} == {0.01}
    grouped = [id(weight) for group in (*others, rows) for weight in group["params"]]
    assert sorted(grouped) == sorted(id(weight) for weight in trainer.model.parameters() if weight.requires_grad)


def test_rows_that_are_named_are_those_of_the_step():
    """A device that has none computes the first row, of which nothing is trained."""
    nothing = TRAIN[0]._replace(prompt_length=len(TRAIN[0].input_ids))
    assert explain_numbers(3, math.nan, 1.0, [nothing, TRAIN[4]]).endswith("the rows of this step: rows.jsonl:5")


def make_whole(folder: Path, tokenizer, *flags: str):
    """Return a trainer of all weights, three steps, that saves a checkpoint after each."""
    return make_trainer(folder, tokenizer, "--lora_rank", "0", "--save_steps", "1", *flags)


def test_full_fine_tuning_goes_on_with_the_same_bits(tmp_path, tokenizer):
    whole = make_whole(tmp_path, tokenizer)
    start = weights(whole)
    whole.train()
    ends = weights(whole)
    assert not torch.equal(start, ends) and find_damage(tmp_path / "checkpoint-3") is None
    trainer = make_whole(tmp_path / "again", tokenizer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(weights(trainer), ends)
    trainer = make_whole(tmp_path / "last", tokenizer)
    load_trained(trainer, str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(trainer), ends)


def test_full_fine_tuning_that_does_not_fit_goes_on_in_smaller_streams(tmp_path, tokenizer, monkeypatch, capsys):
    flags = ["--batch_size", "8", "--gradient_accumulation_steps", "1"]
    expected = make_whole(tmp_path / "whole", tokenizer, *flags)
    start = weights(expected)
    expected.train()
    limit_memory(monkeypatch, 24)
    trainer = make_whole(tmp_path / "parts", tokenizer, *flags)
    trainer.train()
    assert "in 2 streams of at most 4 rows; the result is the same" in capsys.readouterr().err
    # Adam moves a weight whose gradient is nearly zero by its sign alone, so single weights may differ.
    assert (weights(trainer) - weights(expected)).norm() < 1e-2 * (weights(expected) - start).norm()


def test_activations_that_were_kept_are_computed_twice_before_streams_are_halved(
    tmp_path, tokenizer, monkeypatch, capsys
):
    trainer, switched = make_trainer(tmp_path, tokenizer), []
    patch(monkeypatch, "set_checkpointing", lambda model, on: switched.append(on))
    trainer.can_recompute = True
    trainer.divide_streams(TRAIN[:1], 36)
    assert switched == [True] and trainer.layout is trainer.schedule.layout and not trainer.can_recompute
    assert "with a stream of 36 tokens: from here on activations are computed twice" in capsys.readouterr().err
    with pytest.raises(UserError, match="on this row alone"):
        trainer.divide_streams(TRAIN[:1], 36)


def test_losses_are_logged_of_their_own_steps_while_the_next_one_computes(tmp_path, tokenizer):
    """Logs hold what the library would log at once: the mean loss since the last log, at its step."""
    trainer = make_trainer(tmp_path / "each", tokenizer, "--batch_size", "4", "--gradient_accumulation_steps", "1")
    noted = []
    trainer.add_callback(
        type(
            "Look",
            (TrainerCallback,),
            {
                "on_log": lambda self, args, state, control, logs=None, **more: noted.append(
                    (state.global_step, trainer.model.training and len(trainer.noted), logs.get("loss"))
                )
            },
        )()
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3, 4, 5, 6]
    assert [log["epoch"] for log in logs] == pytest.approx([step / 6 for step in range(1, 7)])
    assert [(step, left) for step, left, _ in noted[:6]] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 0)]
    assert logs[0]["learning_rate"] == 0.01 and logs[5]["learning_rate"] == pytest.approx(0.01 / 6)
    flags = ("--batch_size", "4", "--gradient_accumulation_steps", "1", "--logging_steps", "2")
    pairs = make_trainer(tmp_path / "pairs", tokenizer, *flags)
    result = pairs.train()
    logs = [log for log in pairs.state.log_history if "loss" in log]
    each = losses(trainer)
    assert [log["step"] for log in logs] == [2, 4, 6]
    assert losses(pairs) == pytest.approx([(each[i] + each[i + 1]) / 2 for i in (0, 2, 4)], rel=1e-5)
    assert result.training_loss == pytest.approx(sum(each) / 6, rel=1e-5)


def test_the_loss_is_not_scaled_again_for_accumulation(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, "--batch_size", "2", "--gradient_accumulation_steps", "4")
    assert trainer.loss_is_scaled_for_ga and not trainer.model_accepts_loss_kwargs and trainer.compute_loss_func
