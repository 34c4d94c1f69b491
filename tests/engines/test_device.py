"""The device of a run."""

import os

import pytest
import torch

from tool_calling.engines.device import autocast, leave_group, to_dtype


def test_bf16_is_for_gpus_that_compute_it(monkeypatch):
    for computes, dtype in ((True, torch.bfloat16), (False, torch.float16)):  # older ones emulate it
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, computes=computes: including_emulation or computes,
        )
        assert to_dtype("cuda") == dtype


def test_on_cpu_nothing_is_rounded_to_16_bits():
    model = torch.nn.Linear(3, 2)
    model.device = torch.device("cpu")
    assert to_dtype("cpu") == torch.float32
    with autocast(model):
        assert not torch.is_autocast_enabled("cpu") and model(torch.zeros(1, 3)).dtype == torch.float32


@pytest.mark.parametrize("rank, main", [("0", True), ("1", False)])
def test_only_the_first_process_goes_on_and_alone(monkeypatch, rank, main):
    monkeypatch.setattr(os, "environ", {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "here", "HOME": "/root"})
    assert leave_group() is main
    assert set(os.environ) == ({"HOME"} if main else {"RANK", "WORLD_SIZE", "MASTER_ADDR", "HOME"})
