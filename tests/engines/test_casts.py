"""Casts of an adapter's weights: made together, they change nothing but their number."""

import pytest
import torch
from small import CASES, make_adapted
from torch.utils.checkpoint import checkpoint

from tool_calling.engines import casts
from tool_calling.engines.casts import CastTogether, cast_together
from tool_calling.engines.losses import compute_token_losses
from tool_calling.streams import build_stream


def test_copies_have_the_gradients_of_what_they_copy():
    weights = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    copies = CastTogether.apply(torch.bfloat16, *weights)
    for weight, copy in zip(weights, copies):
        assert torch.equal(copy, weight.to(torch.bfloat16))
    (copies[0].t().float() ** 2).sum().backward()  # of the second nothing is used
    assert torch.equal(weights[0].grad, (2 * copies[0].float()).to(torch.bfloat16).float())
    assert weights[0].grad.is_contiguous() and torch.equal(weights[1].grad, torch.zeros(5))


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_with_copies_have_the_same_gradients(monkeypatch, recompute):
    model, calls = make_adapted(), []
    batch, layers = build_stream(CASES["one tool set"]), model.get_base_model().model.layers

    def compute():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = compute_token_losses(model, batch, "transformers")[0].sum()
        loss.backward()
        return loss.item(), {
            name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
        }

    plain = compute()
    cast_together(model)
    if recompute:
        for layer in layers:
            layer.forward = lambda *given, forward=layer.forward, **more: checkpoint(
                forward, *given, use_reentrant=False, **more
            )
    apply = CastTogether.apply
    monkeypatch.setattr(casts.CastTogether, "apply", lambda *given: calls.append(len(given)) or apply(*given))
    kept = {name: id(weight) for name, weight in model.named_parameters()}
    together = compute()
    assert calls == [1 + 14] * 2 * (1 + recompute)  # the type, and two factors of seven projections
    assert {name: id(weight) for name, weight in model.named_parameters()} == kept
    assert together[0] == plain[0] and together[1].keys() == plain[1].keys() and len(plain[1]) == 28
    for name, gradient in plain[1].items():
        assert torch.equal(together[1][name], gradient), name
    calls.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        compute_token_losses(model, batch, "transformers")
    compute_token_losses(model, batch, "transformers")[0].sum().backward()  # in fp32 there is nothing to cast
    assert not calls
