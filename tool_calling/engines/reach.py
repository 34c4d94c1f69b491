"""How far the layers of a model look back, by which its rows can share a prefix or not."""

import math

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.cache_utils import get_layer_types_and_kwargs

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # layers that a mask over tokens describes


def takes_sdpa(kind, config) -> bool:
    """Return whether PyTorch's attention computes this class of model: not if it has sinks, or caps its scores."""
    return getattr(kind, "_supports_sdpa", True) and not getattr(config, "attn_logit_softcapping", None)


def find_reach(config) -> tuple[float, str]:
    """Return (how many tokens a sample may have so that each sees all before it, what limits that or "").

    In such a sample attention is a mask over tokens, so rows may share a prefix in streams and while answering. The
    reach is infinite for full attention in all layers, that of the shortest window, or 0.
    """
    config = config.get_text_config(decoder=True)
    kinds, more = get_layer_types_and_kwargs(config)
    if others := sorted({*kinds} - ATTENTION):
        return 0, f"layers of {', '.join(others)}"
    if not takes_sdpa(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), config):
        return 0, "attention with sinks or capped scores"
    if len(kinds) < config.num_hidden_layers:
        return 0, "layers that share their keys and values"
    if getattr(config, "attn_temperature_tuning", False):
        return 0, "attention that is scaled by the place in a batch"
    window = more.get("sliding_window")
    return (window, f"windows of {window:,} tokens") if window else (math.inf, "")
