"""Models loaded with their adapters."""

import pytest
import torch
from conftest import TINY
from peft import LoraConfig, get_peft_model

from tool_calling.engines.loading import load_adapter, load_base


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
        assert torch.equal(model(ids).logits, expected)
