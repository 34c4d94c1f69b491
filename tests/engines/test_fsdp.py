"""A model split over devices, here over one, and gathered again; tests/test_distributed.py has two."""

import pytest
import torch
import torch.distributed as distributed
from accelerate.state import AcceleratorState
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, get_peft_model
from small import make_qwen3
from torch.distributed.tensor import DTensor

from tool_calling.engines.fsdp import (
    gather_model,
    gather_weights,
    gather_whole,
    held_part,
    is_split,
    split_as,
    split_model,
)
from tool_calling.terminal import UserError


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A group of one process, which a split model needs."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    distributed.destroy_process_group()


def test_a_split_model_computes_the_same_and_is_gathered_whole(group):
    ids, model = torch.arange(12)[None], make_qwen3(tied=True)
    expected, before = model(ids).logits, {name: value.clone() for name, value in model.state_dict().items()}
    split = split_model(model)
    assert is_split(split) and all(isinstance(weight, DTensor) for weight in split.parameters())
    assert torch.allclose(split(ids).logits, expected, atol=1e-6)
    weights = gather_weights(split)
    assert {*before} - {*weights} == {"lm_head.weight"}  # the embedding's, under its second name
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    whole = gather_model(split, torch.bfloat16, trust=False)
    assert not is_split(whole) and {weight.dtype for weight in whole.parameters()} == {torch.bfloat16}
    assert all(torch.equal(value, before[name].bfloat16()) for name, value in whole.state_dict().items())
    assert whole.lm_head.weight is whole.model.embed_tokens.weight


def test_whole_weights_are_split_as_they_are_loaded(group):
    model = split_model(make_qwen3())
    weights = {name: torch.full(weight.shape, 0.5) for name, weight in gather_weights(model).items()}
    model.load_state_dict(weights)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    assert all((held_part(weight) == 0.5).all() for weight in model.parameters())
    weight, moment = next(model.parameters()), torch.ones(next(model.parameters()).shape)
    assert isinstance(split_as(weight, moment), DTensor) and torch.equal(gather_whole(split_as(weight, moment)), moment)
    step = torch.tensor(3.0)
    assert split_as(weight, step) is step and split_as(moment, moment) is moment  # what is no moment of a split weight
    assert held_part(step) is step and gather_whole({"step": step}) == {"step": step}


def test_an_adapter_stays_whole_on_each_device(group):
    model = get_peft_model(make_qwen3(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    split = split_model(model)
    kinds = {weight.requires_grad: isinstance(weight, DTensor) for weight in split.parameters()}
    assert kinds == {True: False, False: True} and is_split(split)


def test_quantised_weights_are_not_split():
    model = make_qwen3()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = Params4bit(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        UserError, match="^--fsdp splits floating-point weights, and those of --model_id are quantised; "
    ):
        split_model(model)
