"""Attention over streams and over batches with a common prefix, for Transformers."""

import math

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

HELD_SCORES = 2**28  # attention scores held at once when answers are written: 1 GiB in fp32


def to_attention_mask(subtree_end):
    """Return which keys a query sees, as bool [1, 1, queries, keys], from subtree_end [tokens]."""
    index = torch.arange(len(subtree_end), device=subtree_end.device)
    return ((index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :]))[None, None]


def to_key_blocks(attention_mask) -> list[list[int]]:
    """Return for each block of queries the blocks of keys it sees anything of, from a mask [1, 1, tokens, tokens]."""
    size, length = block_size(attention_mask), attention_mask.shape[-1]
    blocks, fill = -(-length // size), -length % size
    padded = torch.nn.functional.pad(attention_mask[0, 0], (0, fill, 0, fill))
    return [row.nonzero()[:, 0].tolist() for row in padded.view(blocks, size, blocks, size).any(dim=3).any(dim=1).cpu()]


def block_size(tensor) -> int:
    """Return how many tokens a block of attention has: few on CPU, to skip much; many on a GPU, to launch little."""
    return 128 if tensor.device.type == "cpu" else 1024


def attend_with_prefix(query, key, value, attention_mask, scaling: float, prefix_key, prefix_value):
    """Return the attention [rows, tokens, heads, head_dim] of rows whose common prefix is held once, not row by row.

    query is [rows, heads, tokens, head_dim]; key and value are [rows, key heads, keys, head_dim], those of the prefix
    [1, key heads, prefix, head_dim]; attention_mask is bool [rows, 1, tokens, keys]. Every token sees the whole prefix.
    """
    rows, heads, tokens, _ = query.shape
    query = query.view(rows, key.shape[1], -1, tokens, query.shape[-1])  # query heads grouped by their key head
    own = torch.einsum("bgrqd,bgkd->bgrqk", query, key).masked_fill(~attention_mask[:, :, None], -math.inf)
    shared = torch.einsum("bgrqd,gpd->bgrqp", query, prefix_key[0])
    weights = (torch.cat([shared, own], dim=-1) * scaling).softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    shared, own = weights.split([shared.shape[-1], own.shape[-1]], dim=-1)
    output = torch.einsum("bgrqp,gpd->bgrqd", shared, prefix_value[0]) + torch.einsum("bgrqk,bgkd->bgrqd", own, value)
    return output.reshape(rows, heads, tokens, -1).transpose(1, 2)


def attend_in_blocks(
    module, query, key, value, attention_mask, scaling=None, key_blocks=None, prefix_cache=None, **kwargs
):
    """Return PyTorch's attention [rows, tokens, heads, head_dim] without the blocks in which nothing is seen.

    A stream of many rows is mostly such blocks. With `prefix_cache` the rows have a prefix in common whose keys and
    values stand there. With neither, this is the attention of Transformers' "sdpa".
    """
    if prefix_cache is not None:
        layer = prefix_cache.layers[module.layer_idx]
        scores = query[0, :, :, 0].numel() * (layer.keys.shape[2] + key.shape[2])  # of one row
        parts = [tensor.split(max(1, HELD_SCORES // scores)) for tensor in (query, key, value, attention_mask)]
        return torch.cat([attend_with_prefix(*part, scaling, layer.keys, layer.values) for part in zip(*parts)]), None
    if key_blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    size, outputs = block_size(query), []
    keys, values = key.split(size, dim=2), value.split(size, dim=2)
    for queries, mask, blocks in zip(query.split(size, dim=2), attention_mask.split(size, dim=2), key_blocks):
        masks = mask.split(size, dim=3)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                queries,
                torch.cat([keys[block] for block in blocks], dim=2),
                torch.cat([values[block] for block in blocks], dim=2),
                torch.cat([masks[block] for block in blocks], dim=3),
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None
