"""Optimizers and trackers are known before a model is loaded."""

import pytest

from tool_calling.engines.choices import check_optim, check_report_to, find_optim
from tool_calling.terminal import UserError


def test_the_default_optimizer_is_the_one_that_fits():
    assert find_optim(None, 16, fsdp=False, cuda=True) == "adamw_torch_fused"
    assert find_optim(None, 0, fsdp=False, cuda=True) == "adamw_8bit"  # the moments of all weights
    assert find_optim(None, 0, fsdp=True, cuda=True) == "adamw_torch_fused"  # which are split
    assert {find_optim(None, rank, fsdp=False, cuda=False) for rank in (0, 16)} == {"adamw_torch"}
    assert {find_optim("sgd", rank, False, cuda) for rank in (0, 16) for cuda in (True, False)} == {"sgd"}


def test_the_default_optimizer_is_that_of_this_machine(monkeypatch):
    for cuda, expected in ((True, "adamw_torch_fused"), (False, "adamw_torch")):
        monkeypatch.setattr("torch.cuda.is_available", lambda cuda=cuda: cuda)
        assert find_optim(None, 16, fsdp=False) == expected


def test_an_optimizer_that_is_not_there_is_refused():
    for cuda in (True, False):
        for rank in (0, 16):
            check_optim(find_optim(None, rank, False, cuda))
    with pytest.raises(UserError, match="^--optim adamw8bit: unknown to Transformers; did you mean adamw_8bit\\?$"):
        check_optim("adamw8bit")


def test_a_tracker_that_is_not_there_is_refused():
    check_report_to("none")
    check_report_to("all")
    with pytest.raises(
        UserError, match="^--report_to mine: not installed, or unknown to Transformers; here: none, all"
    ):
        check_report_to("mine")
