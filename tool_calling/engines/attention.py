"""Attention of Transformers' models over streams, and over batches with a common prefix."""

import math

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCKS = "blocks"  # the name of attend_in_blocks as an attention of Transformers
HELD_SCORES = 2**28  # attention scores held at once while answers are generated: 1 GiB in fp32


def to_attention_mask(subtree_end):
    """Return which keys a query sees, bool [1, 1, queries, keys], from subtree_end [tokens] (see build_stream)."""
    index = torch.arange(len(subtree_end), device=subtree_end.device)
    return ((index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :]))[None, None]


def to_key_blocks(attention_mask) -> list[tuple[list[slice], torch.Tensor]]:
    """Return for each block of queries the keys of which it sees any, and their mask, from [1, 1, tokens, tokens]."""
    queries, step = block_sizes(attention_mask)
    length, parts = attention_mask.shape[-1], attention_mask.split(queries, dim=2)
    seen = torch.stack([part.any(dim=2).flatten() for part in parts])
    seen = pad(seen, (0, -length % step)).view(len(parts), -1, step).any(dim=2).tolist()
    blocks = []
    for part, row in zip(parts, seen):
        edges = [step * i for i, (last, this) in enumerate(zip([False, *row], [*row, False])) if last != this]
        keys = [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2])]
        blocks.append((keys, torch.cat([part[..., run] for run in keys], dim=3)))
    return blocks


def block_sizes(tensor) -> tuple[int, int]:
    """Return how many queries and keys make a block: few on CPU, to skip much; many on a GPU, to launch little."""
    return (256, 32) if tensor.device.type == "cpu" else (1024, 128)


def attend_in_blocks(module, query, key, value, attention_mask, **options):
    """Return the attention [rows, tokens, heads, head_dim] as Transformers calls it, without what sees nothing.

    With the option `key_blocks` (see to_key_blocks), keys of a stream that no query of a block sees are left out: most
    of them. With `prefix_cache`, the rows have a prefix in common, whose keys and values are there. With neither, this
    is Transformers' own "sdpa".
    """
    key_blocks, prefix_cache = options.pop("key_blocks", None), options.pop("prefix_cache", None)
    scaling = options.get("scaling")
    if unknown := [name for name in ("softcap", "s_aux") if options.get(name) is not None]:  # see takes_sdpa
        raise RuntimeError(f"attention with {unknown[0]} cannot be computed in blocks; expected plain attention")
    if prefix_cache is not None:
        layer = prefix_cache.layers[module.layer_idx]
        scores = query[0, :, :, 0].numel() * (layer.keys.shape[2] + key.shape[2])  # of one row
        parts = [tensor.split(max(1, HELD_SCORES // scores)) for tensor in (query, key, value, attention_mask)]
        return torch.cat([attend_with_prefix(*part, scaling, layer) for part in zip(*parts)]), None
    if key_blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # One key for each query head: on a GPU, only cuDNN's kernel takes fewer with a mask, and it is off.
    key, value = (repeat_kv(tensor, query.shape[1] // key.shape[1]) for tensor in (key, value))
    outputs = []
    for queries, (keys, mask) in zip(query.split([mask.shape[2] for _, mask in key_blocks], dim=2), key_blocks):
        seen = [torch.cat([tensor[:, :, run] for run in keys], dim=2) for tensor in (key, value)]
        outputs.append(scaled_dot_product_attention(queries, *seen, mask, scale=scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def attend_with_prefix(query, key, value, attention_mask, scaling: float, prefix):
    """Return the attention [rows, tokens, heads, head_dim] of rows whose common prefix is held once, not row by row.

    Args:
        query: [rows, heads, tokens, head_dim]; key and value: [rows, key heads, keys, head_dim].
        attention_mask: bool [rows, 1, tokens, keys]. Every token sees the whole prefix.
        prefix: a layer of a cache, with keys and values [1, key heads, prefix, head_dim].
    """
    rows, heads, tokens, size = query.shape
    groups, length = key.shape[1], prefix.keys.shape[2]
    # Query heads that use the same keys are one matrix: [rows, key heads, heads of each x tokens, head_dim].
    query = query.reshape(rows, groups, -1, size)
    flat = query.transpose(0, 1).reshape(groups, -1, size)  # with all rows, for the keys that all have
    shared = multiply(flat, prefix.keys[0].mT).reshape(groups, rows, -1, length).transpose(0, 1)
    seen = attention_mask.expand(-1, heads // groups, -1, -1).flatten(1, 2)[:, None]
    own = multiply(query, key.mT).masked_fill(~seen, -math.inf)
    weights = (torch.cat([shared, own], dim=-1) * scaling).softmax(dim=-1).to(value.dtype)
    shared, own = weights.split([length, key.shape[2]], dim=-1)
    output = multiply(shared.transpose(0, 1).reshape(groups, -1, length), prefix.values[0])
    output = output.reshape(groups, rows, -1, value.shape[-1]).transpose(0, 1) + multiply(own, value)
    return output.to(value.dtype).reshape(rows, heads, tokens, -1).transpose(1, 2)


def multiply(left, right):
    """Return the products of matrices [..., m, k] and [..., k, n] in fp32, in which they are computed on any device."""
    if torch.float32 in (left.dtype, right.dtype):
        return left.float() @ right.float()
    products = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=torch.float32)
    return products.view(*left.shape[:-1], right.shape[-1])


# On H100 and H200, the backward pass of cuDNN's attention with a mask writes NaN at some lengths where all scores are
# low, as in Qwen2.5 (pytorch/pytorch issue 196678). It is off in all processes, so that they compute the same.
torch.backends.cuda.enable_cudnn_sdp(False)
AttentionInterface.register(BLOCKS, attend_in_blocks)
AttentionMaskInterface.register(BLOCKS, sdpa_mask)
