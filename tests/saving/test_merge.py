"""The merged and the fully trained model: rounded so that sums are kept, and refused if nothing changed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import ALARM, TINY, WEATHER
from jobs import names
from peft import LoraConfig, PeftModel, get_peft_model
from small import make_trainer
from transformers import AutoModelForCausalLM
from transformers import __version__ as VERSION

import train_qwen3_tool_calling as script
from tool_calling.engines.loading import load_base
from tool_calling.samples import Sample
from tool_calling.saving.merge import (
    Trained,
    collect_tools,
    merge_adapter,
    refuse_unchanged,
    requantise,
    round_at_random,
    round_trained,
    save_adapter,
    save_merged,
    save_whole,
    sum_weights,
)
from tool_calling.terminal import UserError


def trained(folder: Path, dtype=None) -> Trained:
    """Return what is to be made of `folder`/adapter, which was trained on the embedded base, or of all its weights."""
    adapter = str(folder / "adapter") if (folder / "adapter").is_dir() else None
    final, settings = str(folder / "final"), vars(script.parse_args([]))
    return Trained(str(TINY), str(TINY), dtype, "transformers", final, "merged_16bit", settings, adapter)


def test_rounding_at_random_keeps_sums(monkeypatch):
    monkeypatch.setattr("tool_calling.saving.merge.ROUNDED_WEIGHTS", 1000)
    torch.manual_seed(0)
    held = (
        torch.tensor([0.0, -0.0, 1.0, -1.0078125, 3.3895314e38, float("inf"), -float("inf"), 1e-40]).bfloat16().float()
    )
    same = held.clone()
    round_at_random(same)
    assert torch.equal(same, held)  # what bf16 has
    wrong = torch.full((100,), 2**31 - 1, dtype=torch.int32).view(torch.float32)  # CUDA's NaN
    round_at_random(wrong)
    assert wrong.isnan().all()
    weights = torch.full((2**18,), 1 + 2**-10)  # an eighth of the way from 1 to the next
    round_at_random(weights)
    assert {*weights.unique().tolist()} == {1.0, 1.0078125} and torch.equal(weights, weights.bfloat16().float())
    assert (weights > 1).float().mean().item() == pytest.approx(1 / 8, abs=4 * (7 / 64 / 2**18) ** 0.5)
    downwards = torch.full((2**18,), -1 - 2**-10).view(512, 512)
    round_at_random(downwards)
    assert downwards.double().mean().item() == pytest.approx(-1 - 2**-10, abs=4 * 2**-7 * (7 / 64 / 2**18) ** 0.5)


def merge_and_save(folder: Path, tokenizer):
    """Return the merged model of the adapter in a folder, as it is read back."""
    settings = trained(folder).settings | {"load_in_4bit": False}
    return AutoModelForCausalLM.from_pretrained(save_merged(replace(trained(folder), settings=settings), tokenizer, []))


def test_a_merge_keeps_what_is_less_than_a_step_of_bf16(tmp_path, tokenizer, monkeypatch):
    """To the nearest number of bf16, most of this adapter would be lost."""
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    before = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    saved, again = (merge_and_save(tmp_path, tokenizer) for _ in range(2))
    exact = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), tmp_path / "adapter"
    ).merge_and_unload()
    kept = nearest = wanted = 0.0
    for (name, weight), other, whole in zip(saved.named_parameters(), again.parameters(), exact.parameters()):
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, other)  # the seed decides
        delta, old = (whole - before[name].float()).detach(), before[name].float()
        assert delta.any() == name.endswith(("q_proj.weight", "down_proj.weight"))
        assert delta.any() or torch.equal(weight, before[name])
        kept += ((weight.float() - old) * delta).sum().item()
        nearest += ((whole.bfloat16().float() - old) * delta).sum().item()
        wanted += (delta * delta).sum().item()
    assert kept / wanted == pytest.approx(1, abs=0.1) and nearest / wanted < 0.5
    layers = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(saved.config.num_hidden_layers)}
    places = layers | dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    # What "auto" says if the GPUs cannot hold all:
    monkeypatch.setattr("tool_calling.saving.merge.find_place", lambda *_: places)
    assert all(torch.equal(*pair) for pair in zip(saved.parameters(), merge_and_save(tmp_path, tokenizer).parameters()))


def save_adapter_of(base, folder: Path, spread: float) -> None:
    """Save an adapter of numbers of this spread to `folder`/adapter."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=spread)
    model.save_pretrained(folder / "adapter")


def test_requantised_weights_are_those_of_4_bits():
    exact, packed = (load_base(str(TINY), four_bit, dtype=torch.float32) for four_bit in (False, True))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        before, expected = exact(ids).logits, packed(ids).logits
        requantise(exact)
        torch.testing.assert_close(exact(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert (before - expected).abs().max() > 0.1
    assert exact.lm_head.weight is exact.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("losses", "exact", "kept"),
    [
        ((1.5, 1.25), (7, 7), "latter"),
        ((1.25, 1.5), (7, 7), "former"),
        ((1.0, 1.0), (7, 7), "former"),
        ((1.25, 1.5), (7, 8), "latter"),
        ((1.5, 1.25), (8, 7), "former"),
        ((float("nan"), 1.25), (0, 7), "latter"),
    ],
)
def test_of_two_merges_of_a_4_bit_adapter_the_better_is_kept(
    tmp_path, tokenizer, monkeypatch, capsys, losses, exact, kept
):
    save_adapter_of(AutoModelForCausalLM.from_pretrained(TINY), tmp_path, 0.01)
    sums = iter([torch.tensor([20 * loss, 20, rows, 8]) for loss, rows in zip(losses, exact)])
    monkeypatch.setattr("tool_calling.saving.merge.score_batches", lambda *_: next(sums))
    settings = trained(tmp_path).settings | {"load_in_4bit": True}
    of_4_bits = replace(trained(tmp_path), settings=settings)
    saved = AutoModelForCausalLM.from_pretrained(save_merged(of_4_bits, tokenizer, []))
    expected = merge_adapter(of_4_bits, tokenizer, four_bit=kept == "latter")
    assert all(torch.equal(*pair) for pair in zip(saved.parameters(), expected.parameters()))
    other = merge_adapter(of_4_bits, tokenizer, four_bit=kept == "former")
    assert not torch.equal(saved.model.layers[0].mlp.down_proj.weight, other.model.layers[0].mlp.down_proj.weight)
    on_16, on_4 = (f"{rows / 8:.1%} (loss {loss:.4f})" for loss, rows in zip(losses, exact))
    line = f"exact match {on_16} on the 16-bit base, {on_4} on its 4-bit weights in 16 bits: the {kept} is kept"
    assert f"merge    {line}" in capsys.readouterr().out


def test_what_is_put_into_4_bits_again_is_merged_into_the_16_bit_base(tmp_path, tokenizer, monkeypatch):
    """A 4-bit number with a little added is rounded to what it was: all of the adapter would be lost."""
    save_adapter_of(AutoModelForCausalLM.from_pretrained(TINY), tmp_path, 1e-3)
    monkeypatch.setattr("tool_calling.saving.merge.score_batches", lambda *_: pytest.fail("nothing to compare"))
    settings = trained(tmp_path).settings | {"load_in_4bit": True}
    of_4_bits = replace(trained(tmp_path), settings=settings, method="merged_4bit")
    models = [
        AutoModelForCausalLM.from_pretrained(TINY),
        AutoModelForCausalLM.from_pretrained(save_merged(of_4_bits, tokenizer, [])),
        merge_adapter(of_4_bits, tokenizer, four_bit=True),
    ]
    before, kept, lost = (model.model.layers[0].mlp.up_proj.weight.detach() for model in models)
    added = merge_adapter(of_4_bits, tokenizer).model.layers[0].mlp.up_proj.weight.detach() - before
    exact = before.clone()
    for weight in (before, kept, lost):
        weight.copy_(dequantize_4bit(*quantize_4bit(weight, compress_statistics=True, quant_type="nf4")))
    shares = [((weight - before) * added).sum().item() / added.square().sum().item() for weight in (kept, lost)]
    assert not torch.equal(exact, before)
    assert shares == [pytest.approx(1, abs=0.1), pytest.approx(0, abs=0.1)]


def test_an_adapter_on_weights_that_came_in_4_bits_is_merged_into_the_original(tmp_path, tokenizer, monkeypatch):
    save_adapter_of(AutoModelForCausalLM.from_pretrained(TINY), tmp_path, 0.01)
    monkeypatch.setattr("tool_calling.saving.merge.score_batches", lambda *_: pytest.fail("nothing to compare"))
    settings = trained(tmp_path).settings | {"load_in_4bit": True}
    quantised = replace(trained(tmp_path), settings=settings, model_id=str(TINY) + "/", base_id=str(TINY))
    saved = AutoModelForCausalLM.from_pretrained(save_merged(quantised, tokenizer, []))
    expected = merge_adapter(replace(quantised, model_id=str(TINY)), tokenizer)
    assert all(torch.equal(*pair) for pair in zip(saved.parameters(), expected.parameters()))


def test_a_merge_that_changes_nothing_is_refused(tmp_path, tokenizer):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")  # as it begins: its second factor is zero
    with pytest.raises(UserError, match="the trained model equals the base"):
        merge_adapter(trained(tmp_path), tokenizer)
    assert names(tmp_path) == ["adapter"]


def test_training_that_16_bits_do_not_hold_is_warned_of(tmp_path, tokenizer, monkeypatch, capsys):
    model, losses = make_trainer(tmp_path, tokenizer, "--lora_rank", "0").model, iter([1.0, 2.0])  # of ten tokens
    monkeypatch.setattr("tool_calling.engines.losses.score_batches", lambda *_: torch.tensor([next(losses), 10, 0, 1]))
    whole, loss = round_trained(trained(tmp_path, torch.bfloat16), model, [])
    save_whole(replace(trained(tmp_path), tools=(ALARM, WEATHER)), whole, tokenizer)
    assert json.loads((tmp_path / ".final.partial" / "tools.json").read_text()) == [ALARM, WEATHER]
    assert loss == pytest.approx(0.2)
    assert capsys.readouterr().err.startswith(
        "warning: torch.bfloat16 holds less than training changed: held-out loss 0.2000, in 32 bits 0.1000; train "
        "longer or raise --learning_rate\n"
    )
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / ".final.partial")
    assert saved.dtype == torch.bfloat16 and saved.config.use_cache
    with pytest.raises(UserError, match="the trained model equals the base"):
        refuse_unchanged(sum_weights(saved), saved)


BASE_SETTINGS = {
    "bos_token_id": 7,
    "pad_token_id": 4070,
    "eos_token_id": 4071,
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "max_new_tokens": 2048,
    "note": "of the base",
}


def test_what_is_saved_answers_greedily_and_keeps_the_settings_of_the_base(tmp_path, tokenizer):
    """Also when it is trained on: the settings that stay are those of the first base."""
    base, greedy = tmp_path / "base", {"do_sample": True, "top_k": 1, "eos_token_id": [4071, 4072]}
    greedy |= {"bos_token_id": 7, "pad_token_id": 4070, "max_new_tokens": 2048, "transformers_version": VERSION}
    shutil.copytree(TINY, base)
    (base / "generation_config.json").write_text(json.dumps(BASE_SETTINGS))
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model = AutoModelForCausalLM.from_pretrained(base)
        assert model.generation_config.top_k == (20 if folder.name == "once" else 1)
        of_base = replace(trained(folder), model_id=str(base), base_id=str(base))
        base = save_whole(of_base, model, tokenizer)
        assert json.loads((base / "generation_config.json").read_text()) == greedy
        assert json.loads((base / "generation_config.base.json").read_text()) == BASE_SETTINGS
    inputs = tokenizer("wake me at", return_tensors="pt")
    answer = AutoModelForCausalLM.from_pretrained(base).eval().generate(**inputs, max_new_tokens=12, pad_token_id=4070)
    rest = inputs["input_ids"]
    for token in answer[0, rest.shape[1] :]:
        assert model(rest).logits[0, -1].argmax() == token
        rest = torch.cat([rest, token[None, None]], dim=1)


def test_an_adapter_has_settings_for_its_server(tmp_path, tokenizer):
    settings = vars(script.parse_args(["--output_dir", str(tmp_path), "--model_id", str(TINY)]))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), LoraConfig(r=2, target_modules=["q_proj"]))
    folder = Path(save_adapter(model, settings, tokenizer))
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "do_sample": True,
        "top_k": 1,
        "eos_token_id": [4070, 4072],
        "pad_token_id": 4070,
        "transformers_version": VERSION,
    }
    assert not (folder / "generation_config.base.json").exists()


def test_weights_are_summed_in_pieces(monkeypatch):
    model = torch.nn.Linear(7, 5)
    whole = sum_weights(model)
    monkeypatch.setattr("tool_calling.saving.merge.ROUNDED_WEIGHTS", 4)
    assert sum_weights(model) == pytest.approx(whole)
    assert whole["weight"] == pytest.approx(model.weight.double().sum().item())


OTHER_ALARM = {"type": "function", "function": ALARM["function"] | {"description": "Ring."}}


@pytest.mark.parametrize(
    "lists, tools, said",
    [
        ([[WEATHER, ALARM], [WEATHER, ALARM]], (WEATHER, ALARM), ""),
        ([[ALARM], [], [WEATHER, ALARM]], (ALARM, WEATHER), ""),
        ([[WEATHER, ALARM], [ALARM, WEATHER]], (WEATHER, ALARM), ""),
        ([[], []], (), ""),
        (
            [[ALARM], [WEATHER, ALARM], [WEATHER, OTHER_ALARM], [WEATHER, ALARM]],
            (),
            'tools    no tools.json: the rows bring 3 lists, and "set_alarm" is not the same in all of them\n',
        ),
    ],
    ids=["one list", "several lists", "other order", "no tools", "two tools of one name"],
)
def test_the_tools_of_training_are_those_that_a_client_sends(capsys, lists, tools, said):
    assert collect_tools([Sample("x:1", [1, 2], 1, "a", of_row) for of_row in lists]) == tools
    assert capsys.readouterr().out == said
