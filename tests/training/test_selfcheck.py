"""The self-check: it passes by rounding alone, draws no dropout, and switches off what cannot be computed."""

import math
import re

import pytest
import torch
from conftest import patch
from small import CASES, TRAIN, limit_memory, make_adapted, make_schedule, make_trainer

from tool_calling.engines.attention import to_attention_mask
from tool_calling.streams import build_stream
from tool_calling.terminal import UserError
from tool_calling.training import selfcheck
from tool_calling.training.selfcheck import Difference, check_sharing, compare_sharing


@pytest.fixture(scope="module")
def model():
    """A small random Qwen3 with LoRA whose two factors are both alive."""
    return make_adapted()


def test_the_self_check_draws_no_dropout(model):
    dropout = torch.nn.Dropout(0.5)
    handle = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: dropout(output))
    model.dropout_of_this_test = dropout
    try:
        change, _ = compare_sharing(model, CASES["one tool set"], (), "transformers")
    finally:
        handle.remove()
        del model.dropout_of_this_test
    assert change.loss < 1e-4 and change.token < 1e-4 and change.gradient < 1e-4


def test_the_self_check_passes_and_a_broken_mask_fails_it(model, monkeypatch, capsys):
    train = CASES["one tool set"] + CASES["one tool set"]
    schedule = make_schedule(train, 4, seed=1)
    assert check_sharing(model, schedule, "transformers") is True
    assert capsys.readouterr().out.startswith("check    sharing changes the loss of 4 rows by ")

    def everything_before(subtree_end):
        return torch.ones(1, 1, len(subtree_end), len(subtree_end), dtype=torch.bool).tril()

    patch(monkeypatch, "to_attention_mask", everything_before)
    assert check_sharing(model, schedule, "transformers") is False
    assert "more than rounding (1e-04): sharing is switched off" in capsys.readouterr().err


def test_the_self_check_takes_fewer_rows_when_memory_is_short(tmp_path, tokenizer, monkeypatch, capsys):
    trainer = make_trainer(tmp_path, tokenizer, "--batch_size", "8", "--gradient_accumulation_steps", "1")
    schedule = make_schedule(TRAIN, 8)
    limit_memory(monkeypatch, 17)
    assert check_sharing(trainer.model, schedule, "transformers") is True
    assert capsys.readouterr().out.startswith("check    sharing changes the loss of 1 row by ")
    limit_memory(monkeypatch, 5)
    with pytest.raises(torch.OutOfMemoryError):
        check_sharing(trainer.model, schedule, "transformers")


def test_a_kernel_that_cannot_be_compiled_switches_sharing_off(tmp_path, tokenizer, monkeypatch, capsys):
    trainer = make_trainer(tmp_path, tokenizer)

    def fail(*_):
        raise RuntimeError("No valid triton configs.\nout of resource: shared memory")

    monkeypatch.setattr(selfcheck, "compare_sharing", fail)
    assert check_sharing(trainer.model, make_schedule(TRAIN, 8), "unsloth") is False
    assert capsys.readouterr().err == (
        "warning: attention with a shared prefix cannot be computed here (No valid "
        "triton configs.): sharing is switched off\n"
    )
    for engine, devices in (("unsloth", 2), ("transformers", 1)):  # one device does not decide for all; and a bug
        with pytest.raises(RuntimeError):
            check_sharing(trainer.model, make_schedule(TRAIN, 8, devices=devices), engine)


@pytest.mark.parametrize("error", [RuntimeError("no kernel\nhere"), TypeError("no kernel"), AssertionError()])
def test_kernels_that_were_asked_for_and_cannot_be_used_end_the_run(tmp_path, tokenizer, monkeypatch, error):
    trainer, schedule = make_trainer(tmp_path, tokenizer), make_schedule(TRAIN, 8, devices=2)

    def fail(*_):
        raise error

    monkeypatch.setattr(selfcheck, "compare_sharing", fail)
    reason = f"{error}".split("\n")[0] or "AssertionError"
    message = f"--flash_attention: attention with a shared prefix cannot be computed here ({reason}); leave it out"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_sharing(trainer.model, schedule, "unsloth", flash=True)
    if not isinstance(error, RuntimeError):  # a bug
        with pytest.raises(type(error)):
            check_sharing(trainer.model, make_schedule(TRAIN, 8), "unsloth")


def test_kernels_that_were_asked_for_and_compute_something_else_end_the_run(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer)
    wrong = Difference(0.5, 0.5, 0.5), Difference(math.inf, 0.1, 0.1)
    monkeypatch.setattr(selfcheck, "compare_sharing", lambda *_: wrong)
    with pytest.raises(UserError, match=r"^--flash_attention: sharing the prefix changes .* \(1e-01\); leave it out$"):
        check_sharing(trainer.model, make_schedule(TRAIN, 8), "unsloth", flash=True)


def test_a_loss_of_nothing_can_be_compared(monkeypatch):
    monkeypatch.setattr(selfcheck, "compute_gradient", lambda *_: (torch.zeros(2), torch.zeros(3)))
    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    assert compare_sharing(model, TRAIN[:2], (), "transformers") == ((0, 0, 0), (math.inf, 1e-4, 1e-4))


def test_a_token_that_sees_another_row_switches_sharing_off(model, monkeypatch, capsys):
    """Its loss does, also where the gradient's error would be a usual one."""
    schedule = make_schedule(CASES["one tool set"], 4, seed=1)
    query = int(build_stream(CASES["one tool set"])["places"][-1])

    def leak(subtree_end):
        found = to_attention_mask(subtree_end)
        found[0, 0, query : query + 1, :query] = True  # where there are so many tokens, also those of other rows
        return found

    patch(monkeypatch, "to_attention_mask", leak)
    change, limit = compare_sharing(model, CASES["one tool set"], (), "transformers")
    assert change.token > limit.token and change.gradient > limit.gradient
    monkeypatch.setattr(selfcheck, "compare", lambda *_: change._replace(gradient=0.0))
    assert check_sharing(model, schedule, "transformers") is False
    assert f"(that of one token by {change.token:.1e} nats)" in capsys.readouterr().err


def test_in_16_bits_the_limit_is_measured_between_rows_alone_and_padded(model, monkeypatch):
    """Here fp32 stands for both, and one loss and the gradient of rows alone are off."""
    rows, compute, kinds = CASES["one tool set"], selfcheck.compute_gradient, []

    def off(model, batches, engine):
        losses, gradient = compute(model, batches, engine)
        kinds.append([batch["input_ids"].shape[0] for batch in batches])
        if len(batches) == 3:  # the rows alone
            losses[1] += 0.5
            gradient = 1.1 * gradient
        return losses, gradient

    monkeypatch.setattr(selfcheck, "compute_gradient", off)
    monkeypatch.setattr(selfcheck, "to_dtype", lambda device: torch.bfloat16)
    change, limit = compare_sharing(model, rows, (), "transformers")
    assert kinds == [[1], [2, 1], [1, 1, 1]] and change.token < 1e-4
    assert limit[1:] == (pytest.approx(1.5, abs=1e-3), pytest.approx(0.3, abs=1e-3))
    monkeypatch.setattr(selfcheck, "compute_gradient", compute)
    assert compare_sharing(model, rows, (), "transformers")[1][1:] == (0.1, 0.1)


def test_a_fault_of_the_gpu_is_no_problem_of_the_compiler(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer)

    def fault(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(selfcheck, "compare_sharing", fault)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        check_sharing(trainer.model, make_schedule(TRAIN, 8), "unsloth")
