"""Tokens that a base was made without get rows of their own, the same in every process."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY
from jobs import make_blank_base
from peft import LoraConfig, get_peft_model
from small import make_qwen3
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_qwen3_tool_calling as script
from tool_calling.engines.tokens import compute_rows_alone, find_untrained, fit_vocabulary, prepare_tokens, start_row
from tool_calling.samples import Sample
from tool_calling.terminal import UserError


@pytest.fixture
def more_tokens():
    """The embedded base's tokenizer with two tokens more."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["<get_weather>", "</get_weather>"])
    return tokenizer


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_have_rows_and_the_others_keep_theirs(more_tokens, tied):
    size = len(more_tokens)
    models = [make_qwen3(tied) for _ in range(2)]
    for model in models:
        model.resize_token_embeddings(size - 2, mean_resizing=False)
        torch.manual_seed(5)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            torch.nn.init.normal_(layer.weight)
    before = [models[0].get_input_embeddings().weight.clone(), models[0].get_output_embeddings().weight.clone()]
    first, second = (fit_vocabulary(model, more_tokens) for model in models)
    assert first is models[0] and first.config.vocab_size == size
    rows = [first.get_input_embeddings().weight, first.get_output_embeddings().weight]
    assert (rows[0] is rows[1]) == tied
    for row, old in zip(rows, before):
        assert torch.equal(row[:-2], old)
        words = more_tokens("get weather", add_special_tokens=False)["input_ids"]
        for new in row[-2:]:  # near the words it is made of, as long as others, and not the other tag
            away = new - old[words].mean(dim=0)
            assert away.norm().item() == pytest.approx(old[:1000].norm(dim=1).mean().item() / 2, rel=1e-5)
        assert (row[-2] - row[-1]).norm() > old[:1000].norm(dim=1).mean() / 2
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters()))


def test_a_base_with_more_rows_than_tokens_stays_as_it_is(more_tokens):
    model = make_qwen3()
    model.resize_token_embeddings(len(more_tokens) + 3, mean_resizing=False)
    embeddings = model.get_input_embeddings()
    assert fit_vocabulary(model, more_tokens) is model and model.get_input_embeddings() is embeddings


def test_a_token_without_words_starts_at_the_mean(tokenizer):
    rows = torch.arange(12.0).reshape(4, 3)
    row = start_row("<|>", tokenizer, rows)
    assert (row - rows.mean(dim=0)).norm().item() == pytest.approx(rows.norm(dim=1).mean().item() / 2)
    assert torch.equal(row, start_row("<|>", tokenizer, rows))


def test_rows_near_another_or_near_zero_were_never_trained():
    weight = torch.eye(8) * 10  # usual length 10, so 1 is near
    weight[1] = weight[0] + torch.tensor([0.0, 0.9, 0, 0, 0, 0, 0, 0])
    weight[3] = weight[2] + torch.tensor([0.0, 0, 0, 1.1, 0, 0, 0, 0])
    weight[4] = torch.tensor([0.9, 0, 0, 0, 0, 0, 0, 0])
    weight[5] = torch.tensor([0, 0, 0, 0, 0, 1.1, 0, 0])
    assert find_untrained(weight, [*range(8)]) == [0, 1, 4]
    assert find_untrained(weight.to(torch.bfloat16), [7, 3, 1]) == [1]


def test_all_rows_are_compared_whatever_part_they_are_in(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(50, 16)
    weight[49] = weight[7] = weight[8]
    for size in (1, 7, 49, 50, 99):
        monkeypatch.setattr("tool_calling.engines.tokens.COMPARED_ROWS", size)
        assert find_untrained(weight, [0, 7, 20, 49]) == [7, 49]


TAGS = ["<tool_call>", "</tool_call>"]


def load_blank(tokenizer):
    """Return the embedded base with the rows of its call tags as if never trained, and the ids of the tags."""
    model, ids = AutoModelForCausalLM.from_pretrained(TINY), tokenizer.convert_tokens_to_ids(TAGS)
    model.get_input_embeddings().weight.data[ids] = model.get_input_embeddings().weight.data[4090].clone()
    return model, ids


def call(ids: list[int], *others: int) -> list[Sample]:
    """Return a sample whose answer has the tags, and another in whose prompt alone they are."""
    return [Sample("x:1", [5, 6, ids[0], *others, ids[1]], 2), Sample("x:2", [*ids, 1000], 2)]


def test_tokens_of_answers_that_were_never_trained_start_apart(tokenizer, capsys):
    model, ids = load_blank(tokenizer)
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    assert prepare_tokens(model, tokenizer, call(ids, 1000), ["auto"]) == {
        "trainable_token_indices": {"model.embed_tokens": ids}
    }
    line = "2 in answers have embedding rows that were never trained: <tool_call>, </tool_call>"
    assert f"tokens   {line}; they start apart from each other and are trained" in capsys.readouterr().out
    assert (
        find_untrained(weight, ids) == [] and (weight[ids[0]] - weight[ids[1]]).norm() > before.norm(dim=1).mean() / 2
    )
    others = [index for index in range(len(before)) if index not in ids]
    assert torch.equal(weight[others], before[others])


def test_rows_that_text_has_trained_stay_and_nothing_is_said(tokenizer, capsys):
    model, ids = AutoModelForCausalLM.from_pretrained(TINY), tokenizer.convert_tokens_to_ids(TAGS)
    before = model.get_input_embeddings().weight.detach().clone()
    capsys.readouterr()
    assert prepare_tokens(model, tokenizer, call(ids), ["auto"]) == {}
    assert torch.equal(model.get_input_embeddings().weight, before) and capsys.readouterr() == ("", "")


def test_the_user_names_the_tokens(tokenizer, capsys):
    model, ids = load_blank(tokenizer)
    assert prepare_tokens(model, tokenizer, call(ids), ["off"]) == {}
    expected = f"without --train_tokens {' '.join(TAGS)} these may not be learned"
    assert expected in capsys.readouterr().err
    eos = tokenizer.eos_token_id
    named = prepare_tokens(load_blank(tokenizer)[0], tokenizer, call(ids), [TAGS[1], "<|im_end|>"])
    assert named == {"trainable_token_indices": {"model.embed_tokens": sorted([ids[1], eos])}}
    assert "without --train_tokens <tool_call> these may not be learned" in capsys.readouterr().err
    with pytest.raises(UserError, match="^--train_tokens <tool>: not a token of the model; expected auto, off"):
        prepare_tokens(model, tokenizer, call(ids), ["<tool>"])


def test_rows_of_an_adapter_to_go_on_from_are_kept_whatever_else_is_trained(tokenizer, capsys):
    model, ids = load_blank(tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    capsys.readouterr()
    for wanted in (["off"], ["auto"]):
        assert prepare_tokens(model, tokenizer, call(ids), wanted, ids) == {
            "trainable_token_indices": {"model.embed_tokens": ids}
        }
    assert capsys.readouterr() == ("", "") and torch.equal(model.get_input_embeddings().weight, before)
    new = prepare_tokens(model, tokenizer, call(ids), ["auto"], ids[:1])
    assert new == {"trainable_token_indices": {"model.embed_tokens": ids}}
    assert "1 in answers have embedding rows that were never trained: </tool_call>;" in capsys.readouterr().out


def test_all_tokens_that_were_added_are_trained_in_both_embeddings(more_tokens):
    model = make_qwen3(tied=False)
    model.resize_token_embeddings(len(more_tokens) - 2, mean_resizing=False)
    new = [len(more_tokens) - 2, len(more_tokens) - 1]
    found = prepare_tokens(model, more_tokens, [Sample("x:1", [1, 2, new[1]], 2)], ["auto"])
    assert found == {"trainable_token_indices": {"model.embed_tokens": new, "lm_head": new}}
    assert prepare_tokens(model, more_tokens, [], ["auto"]) == {}  # nothing is new to it now


@pytest.mark.parametrize("tied", [True, False])
def test_rows_alone_compute_what_peft_computes(tied):
    """Logits, and the gradients of adapter and rows, are those of whole tables."""
    torch.manual_seed(1)
    model, ids = make_qwen3(tied), [3, 7]
    names = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        trainable_token_indices=dict.fromkeys(names, ids),
    )
    model = get_peft_model(model, lora)
    rows = [weight for name, weight in model.named_parameters() if "trainable_tokens" in name]
    for weight in rows:
        weight.data += 0.5
    tokens, found = torch.tensor([[1, 3, 5, 7], [7, 7, 2, 4]]), []

    def freeze_as_unsloth_does(model):
        for weight in rows:
            weight.requires_grad_(False)
        compute_rows_alone(model)

    for prepare in (lambda model: None, freeze_as_unsloth_does):
        prepare(model)
        model.zero_grad()
        logits = model(input_ids=tokens).logits
        logits[..., 2:8].logsumexp(dim=-1).sum().backward()
        gradients = [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]
        found.append([logits.detach(), *gradients])
    assert len(rows) == len(names) and all(weight.grad.abs().sum() > 0 for weight in rows)
    for expected, got in zip(*found):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_no_server_loads_is_warned_of_before_training(tokenizer, capsys):
    for alone in (False, True):
        model, ids = load_blank(tokenizer)
        assert prepare_tokens(model, tokenizer, call(ids), ["auto"], alone=alone)
        assert ("vLLM loads no adapter" in capsys.readouterr().err) == alone


@pytest.mark.slow
def test_trls_fused_head_computes_with_trained_rows_what_the_stock_head_does():
    pytest.importorskip("triton")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "tests" / "fused_head.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) < 1e-5  # 40 times what the sums of 61 numbers round


def test_all_weights_are_trained_from_rows_that_are_apart(tmp_path, tokenizer):
    base, ids = make_blank_base(tmp_path), tokenizer.convert_tokens_to_ids(TAGS)
    args, schedule = (
        script.parse_args(["--model_id", str(base), "--lora_rank", "0"]),
        SimpleNamespace(samples=call(ids)),
    )
    weight = script.load_model(args, "transformers", schedule, tokenizer).get_input_embeddings().weight
    assert weight.dtype == torch.float32 and (weight[ids[0]] - weight[ids[1]]).norm() > weight.norm(dim=1).mean() / 2
