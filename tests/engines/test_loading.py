"""Models loaded with their adapters, on the devices that hold them."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from peft import LoraConfig, get_peft_model
from small import make_adapted, row

from tool_calling.engines.loading import copy_trained, find_place, load_adapter, load_base, set_trained
from tool_calling.terminal import UserError


def test_an_adapter_leaves_the_parts_of_its_base_where_they_are(tmp_path, monkeypatch):
    """By what is free with the base already there, PEFT would find no room for it."""
    trained = get_peft_model(
        load_base(str(TINY), False),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    trained.save_pretrained(tmp_path)
    ids = torch.arange(50)[None]
    expected = trained.eval()(ids).logits
    monkeypatch.setattr("peft.peft_model.infer_auto_device_map", lambda *_, **__: pytest.fail("spread anew"))
    for place in (
        None,
        {"": "cpu"},
        {
            "model.embed_tokens": "cpu",
            "model.layers": "cpu",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
        },
    ):
        model = load_adapter(load_base(str(TINY), False, place=place), str(tmp_path)).eval()
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_what_is_trained_can_be_set_back():
    model = make_adapted()
    start, tokens = copy_trained(model), torch.tensor([row([1, 2, 3], [4]).input_ids])
    expected = model(tokens).logits
    assert start and all("lora_" in name for name in start)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(1)
    assert not torch.allclose(model(tokens).logits, expected)
    set_trained(model, start)
    assert torch.equal(model(tokens).logits, expected)
    assert all(weight.requires_grad for name, weight in model.named_parameters() if name in start)


def test_weights_out_of_reach_are_one_line():
    with pytest.raises(UserError, match="^me/none: its weights cannot be loaded: .+$"):  # as on a cut-off machine
        load_base("me/none", False)


def test_a_quantised_model_is_not_spread(monkeypatch):
    places = []

    def load(model_id, device_map, **options):
        places.append((device_map, "max_memory" in options))
        raise OSError("enough")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    for quantised in ({"quant_method": "bitsandbytes"}, None):
        config = SimpleNamespace(quantization_config=quantised)
        monkeypatch.setattr("tool_calling.engines.loading.load_config", lambda *_, config=config, **__: config)
        with pytest.raises(UserError, match="enough"):
            load_base("some/model", False, place="auto")
    assert places == [("cpu", False), ("auto", True)]


def test_a_model_in_4_bits_is_on_one_gpu_unless_fsdp_trained_it_on_several(monkeypatch):
    assert {find_place(*choice) for choice in ((False, False), (True, False), (True, True))} == {"cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (find_place(), find_place(True), find_place(True, True)) == ("auto", "cuda", "auto")
