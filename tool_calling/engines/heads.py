"""The head of a model on CUDA, fused with the loss: logits are held for some of the supervised tokens at a time."""

from functools import wraps

import torch
from peft.utils.other import TrainableTokensWrapper
from trl.trainer import utils

from tool_calling.engines.compat import read_head_scale

ALL_COLUMNS = 32768  # of the vocabulary at a time in TRL's kernel, its own default; Unsloth's takes them all


def fuse_head(model) -> None:
    """Let a model that SFTTrainer has prepared compute `model(..., places, targets)`, without waiting for the GPU.

    That returns (log-probability of each of `targets` [places], whether it is the most likely token), where `places`
    are the tokens before them, counted over all rows. SFTTrainer's own head also computes entropy, and waits twice
    until the GPU has counted the supervised tokens. Where the head is not a plain table, the model stays as it is.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(base.get_output_embeddings()) not in (torch.nn.Linear, TrainableTokensWrapper):
        return  # an adapter of its own would be left out
    forward, (softcap, scale) = base.forward, read_head_scale(base.forward)

    @wraps(forward)
    def fused(*args, places=None, targets=None, temperature=1.0, labels=None, **kwargs):
        if places is None:
            return forward(*args, labels=labels, **kwargs)
        hidden = base.base_model(*args, **kwargs, use_cache=False).last_hidden_state.flatten(0, 1)
        head, outputs = base.get_output_embeddings(), ("log_probs", "is_top1")
        given = (hidden.index_select(0, places), head.weight, head.bias, targets, temperature)
        given += (ALL_COLUMNS, softcap, scale)
        found = utils._ChunkedLogProbFunction.apply(*given, outputs)  # looked up here: Unsloth puts in its own
        return found[0], found[-1]

    base.forward, base.fused_head = fused, True


def has_fused_head(model) -> bool:
    """Return whether fuse_head has changed a model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "fused_head", False)
