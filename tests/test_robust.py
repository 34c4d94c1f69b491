"""What must not cost a run, or harm: memory that runs out, numbers that are none, a network, foreign code, secrets."""

import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ALARM, TINY, WEATHER, patch, run_here, run_script, write_jsonl
from test_command_line import ROWS, arguments, errors, names
from transformers import Qwen3Config, Qwen3ForCausalLM

import train_qwen3_tool_calling as script
from tool_calling.audit import write_audit
from tool_calling.engines.graphs import empty_weights, make_room
from tool_calling.engines.hub import check_model
from tool_calling.engines.loading import load_base
from tool_calling.engines.losses import compute_token_losses
from tool_calling.prompts import Sample
from tool_calling.report import write_report
from tool_calling.run_folder import write_run
from tool_calling.schedule import Plan, group_rows, order_rows
from tool_calling.terminal import UserError, report_problems, say, warn
from tool_calling.training.selfcheck import check_sharing, compare_sharing
from tool_calling.training.trainer import build_trainer, explain_numbers, find_overfitting, train_model

COMPUTE = compute_token_losses
ANSWERS = [[5, 6], [7], [8, 9, 10], [11], [12, 13], [14]]
TRAIN = [
    Sample(f"rows.jsonl:{i + 1}", [1, 2, 3, 4, 30 + i, 20, *answer], 6) for i, answer in enumerate(ANSWERS * 4)
]  # 24 rows that share four tokens


def make_trainer(folder, tokenizer, *flags, held_out=(), lengths=()):
    """A trainer of one epoch over TRAIN with a small random Qwen3, the same each time, in float32."""
    from peft import LoraConfig, get_peft_model

    args = script.parse_args(
        ["--num_epochs", "1", "--warmup_steps", "0", "--learning_rate", "0.01", "--output_dir", str(folder), *flags]
    )
    plan = Plan(args.batch_size, args.gradient_accumulation_steps, group_rows(TRAIN), lengths, args.share_prefix)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    model = get_peft_model(model, LoraConfig(r=4, target_modules=script.TARGET_MODULES, task_type="CAUSAL_LM"))
    return build_trainer(
        args,
        script.to_sft_config(args, plan, bool(held_out)),
        "transformers",
        model,
        tokenizer,
        TRAIN,
        list(held_out),
        plan,
    )


def weights(trainer) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in trainer.model.parameters() if value.requires_grad])


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()


class FailsBackward(Identity):
    """The identity, whose gradient does not fit into memory."""

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("simulated")


def limit_memory(monkeypatch, tokens: int, backward: bool = False) -> list[int]:
    """Let every batch of more tokens fail, before or in its backward pass; return the list of those that fit."""
    sizes = []

    def compute(model, batch, engine):
        size = batch["input_ids"].numel()
        if size <= tokens:
            sizes.append(size)
            return COMPUTE(model, batch, engine)
        if not backward:
            raise torch.OutOfMemoryError("simulated")
        found, hits = COMPUTE(model, batch, engine)
        # Half of the loss reaches the weights before the other half fails.
        return torch.cat([FailsBackward.apply(found[:1]), found[1:]]), hits

    patch(monkeypatch, "compute_token_losses", compute)
    return sizes


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
                "with a stream of 14 tokens: from here on each step is computed in 6 streams of at most 2 rows",
                "with a stream of 11 tokens: from here on each step is computed in 10 streams of at most 1 row",
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
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-6)
    change = (weights(expected) - start).norm()
    assert change > 0.1 and (weights(trainer) - weights(expected)).norm() < 1e-4 * change


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


def test_the_self_check_takes_fewer_rows_when_memory_is_short(tmp_path, tokenizer, monkeypatch, capsys):
    trainer = make_trainer(tmp_path, tokenizer, "--batch_size", "8", "--gradient_accumulation_steps", "1")
    args = script.parse_args([])
    plan = Plan(8, 1, group_rows(TRAIN))
    limit_memory(monkeypatch, 20)
    assert check_sharing(args, trainer.model, TRAIN, plan, "transformers") is True
    assert capsys.readouterr().out.startswith("check    sharing changes the loss of 4 rows by ")
    limit_memory(monkeypatch, 5)
    with pytest.raises(torch.OutOfMemoryError):
        check_sharing(args, trainer.model, TRAIN, plan, "transformers")


def test_a_kernel_that_cannot_be_compiled_switches_sharing_off(tmp_path, tokenizer, monkeypatch, capsys):
    trainer = make_trainer(tmp_path, tokenizer)
    plan = Plan(8, 1, group_rows(TRAIN))

    def fail(*_):
        raise RuntimeError("No valid triton configs.\nout of resource: shared memory")

    patch(monkeypatch, "compare_sharing", fail)
    assert check_sharing(script.parse_args([]), trainer.model, TRAIN, plan, "unsloth") is False
    assert capsys.readouterr().err == (
        "warning: attention with a shared prefix cannot be computed here (No valid "
        "triton configs.): sharing is switched off\n"
    )
    for engine, devices in (("unsloth", 2), ("transformers", 1)):  # one device does not decide for all; and a bug
        with pytest.raises(RuntimeError):
            check_sharing(script.parse_args([]), trainer.model, TRAIN, plan._replace(devices=devices), engine)


@pytest.mark.parametrize("error, kind", [(MemoryError(), "memory"), (torch.OutOfMemoryError("x"), "GPU memory")])
def test_memory_that_runs_out_elsewhere_is_one_line(monkeypatch, capsys, error, kind):
    def run_out(argv):
        raise error

    patch(monkeypatch, "main", run_out)
    monkeypatch.setattr(sys, "argv", ["train"])
    assert script.run_command_line() == 1
    assert capsys.readouterr().err == (
        f"error: out of {kind}; lower --batch_size or --max_seq_length (while answers are written, --eval_batch_size), "
        "or choose a smaller --model_id\n"
    )


def test_recorded_graphs_are_dropped_when_memory_runs_out():
    decoder = torch.nn.Linear(1, 1)
    decoder.graphs = {128: "a graph"}
    weight = decoder.weight
    weight.grad = torch.ones(1, 1)
    model = types.SimpleNamespace(
        get_base_model=lambda: types.SimpleNamespace(model=decoder), zero_grad=decoder.zero_grad
    )
    make_room(model)
    assert decoder.graphs is None and weight.grad is None


def test_memory_that_runs_out_on_several_gpus_ends_the_run(tmp_path, tokenizer):
    """The others wait for one gradient, not for two halves."""
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.accelerator = types.SimpleNamespace(num_processes=2)
    with pytest.raises(UserError, match="out of GPU memory at step 1 with a stream of 36 tokens; lower --batch_size"):
        trainer.divide_streams(TRAIN[:8], 36)
    assert trainer.streams is trainer.plan


def test_held_out_rows_are_shared_out_over_the_gpus(tmp_path, tokenizer, monkeypatch):
    """Each computes as many batches as the others, the last one perhaps of nothing."""
    trainer = make_trainer(tmp_path, tokenizer, "--batch_size", "2", held_out=TRAIN[:6])
    assert len(trainer.held_out_batches) == 3
    shares = []
    patch(monkeypatch, "score_batches", lambda model, batches, engine: shares.append(batches) or torch.ones(4))
    for index in range(2):
        trainer.accelerator = types.SimpleNamespace(num_processes=2, process_index=index, reduce=lambda sums, how: sums)
        trainer.evaluation_loop(None)
    first, second = shares
    assert [id(batch) for batch in (first[0], second[0], first[1])] == [id(batch) for batch in trainer.held_out_batches]
    assert len(first) == len(second) == 2 and not (second[1]["labels"] != -100).any()


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
        "--batch_size",
        "5",
        "--gradient_accumulation_steps",
        "2",
        "--lr_scheduler_type",
        "constant",
        "--logging_steps",
        logging_steps,
        "--save_steps",
        "1",
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
        train_model(trainer, None, complete=False)
    assert bar.finished is False and not bar.live.is_started  # or the message would be drawn through it
    plan = Plan(5, 2, group_rows(TRAIN))
    rows = [TRAIN[index].source for index in order_rows(plan, script.SEED, 0)[10:20]]
    assert str(error.value) == (
        f"step 2: {wrong}; expected a finite number. Nothing of it is saved, and a checkpoint written "
        "before is good. Lower --learning_rate, or look at the rows of this step: "
        + ", ".join(rows[:8])
        + ", and 2 more"
    )
    assert [name for name in names(tmp_path / "out") if name.startswith("checkpoint")] == ["checkpoint-1"]
    file = Path("checkpoint-1", "adapter_model.safetensors")
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


def test_rows_that_are_named_are_those_of_the_step():
    """A device that has none computes the first row, of which nothing is trained."""
    nothing = TRAIN[0]._replace(prompt_length=len(TRAIN[0].input_ids))
    assert explain_numbers(3, math.nan, 1.0, [nothing, TRAIN[4]]).endswith("the rows of this step: rows.jsonl:5")


def test_a_loss_of_nothing_can_be_compared(monkeypatch):
    patch(monkeypatch, "compute_gradient", lambda *_: (0.0, torch.zeros(3)))
    assert compare_sharing(torch.nn.Linear(1, 1), TRAIN[:2], (), "transformers") == (0.0, 0.0)


def test_a_run_that_diverges_is_one_line(tmp_path, tools_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    result = run_here(
        *arguments(tmp_path), "--learning_rate", "1e30", "--warmup_steps", 0, "--save_steps", 1, "--no-load_in_4bit"
    )
    assert result.returncode == 1
    lines = errors(result)
    assert len(lines) == 1 and "the loss is nan; expected a finite number. Nothing of it" in lines[0]
    step = int(lines[0].removeprefix("error: step ").split(":")[0])
    checkpoints = sorted(name for name in names(tmp_path / "out") if name.startswith("checkpoint"))
    assert checkpoints == [f"checkpoint-{number}" for number in range(1, step)]
    assert not (tmp_path / "final").exists()


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


WATCH = """
import os, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        if not isinstance(arguments[-1], (str, bytes)) or "name" in event:  # not a Unix socket's path
            open(os.environ["ATTEMPTS"], "a").write(f"{event} {arguments}\\n")
            raise OSError(f"no network in this test: {event} {arguments}")

sys.addaudithook(watch)
"""


def test_a_run_from_local_files_asks_nothing_of_the_network_even_when_it_may(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCH)
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER, ALARM]))
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    watched = {"ATTEMPTS": str(tmp_path / "attempts"), "PYTHONPATH": str(tmp_path / "site"), "CI": ""}
    result = run_script(
        *arguments(tmp_path),
        "--max_steps",
        2,
        "--warmup_steps",
        0,
        "--eval_samples",
        2,
        "--max_new_tokens",
        9,
        HF_HUB_OFFLINE="0",
        **watched,
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "attempts").exists(), (tmp_path / "attempts").read_text()
    # The watch itself works.
    connect = "import socket; socket.create_connection(('192.0.2.1', 80))"
    assert subprocess.run(
        [sys.executable, "-c", connect], env={**os.environ, **watched}, capture_output=True
    ).returncode
    assert "192.0.2.1" in (tmp_path / "attempts").read_text()


def test_emptied_weights_hold_no_memory_also_if_something_holds_them():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    kept, view = [*model.parameters(), *model.buffers()], model[0].weight.detach()
    empty_weights(model)
    assert [tensor.untyped_storage().nbytes() for tensor in [*kept, view]] == [0] * 8


CODE = """
from pathlib import Path
from transformers import Qwen3Config
Path({marker!r}).touch()

class OwnConfig(Qwen3Config):
    model_type = "own_qwen3"
"""


def test_code_that_comes_with_a_model_is_run_only_if_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = tmp_path / "model", tmp_path / "it ran"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_qwen3", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    with pytest.raises(UserError) as error:
        check_model(str(folder))
    assert str(error.value) == (
        f"--model_id {folder}: brings Python code of its own, which is not run; if you know "
        "who wrote it, add --trust_remote_code"
    )
    assert not marker.exists()
    assert check_model(str(folder), trust=True).model_type == "own_qwen3"
    assert marker.exists()
    assert script.parse_args([]).trust_remote_code is False
    assert script.parse_args(["--trust_remote_code"]).trust_remote_code is True


def test_weights_are_read_from_safetensors_alone(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match="the folder holds no .*safetensors"):
        check_model(str(tmp_path / "model"))
    with pytest.raises(UserError, match="its weights cannot be loaded: .*safetensors"):
        load_base(str(tmp_path / "model"), load_in_4bit=False)


def test_secrets_are_written_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    args = script.parse_args(
        [
            "--model_id",
            "https://me:hf_other@hub.example/x",
            "--run_name",
            "hf_abcdefghij, short",
            "--output_dir",
            str(tmp_path),
        ]
    )
    write_run(args, tmp_path)
    write_report(str(tmp_path), {"args": vars(args), "command": "python x.py --run_name hf_abcdefghij"})
    say("read", "from https://me:hf_other@hub.example/x")
    warn("hf_abcdefghij in https://me:hf_other@hub.example/x")
    report_problems([("x:1", "holds hf_abcdefghij")], "skip", 1)
    assert "hf_abcdefghij" not in write_audit(args, {"problems": ["holds hf_abcdefghij"]}).read_text()
    assert capsys.readouterr() == (
        "read     from https://hub.example/x\nskip     1 of 1 row, named above\n",
        "warning: $HF_TOKEN in https://hub.example/x\nskipped: x:1: holds $HF_TOKEN\n",
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["args"]["model_id"] == "https://hub.example/x" and report["args"]["run_name"] == "$HF_TOKEN, short"
    for name in ("run.yaml", "report.json", "report.html"):
        text = (tmp_path / name).read_text()
        assert "hf_abcdefghij" not in text and "hf_other" not in text and "$HF_TOKEN" in text
