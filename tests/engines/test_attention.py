"""Attention over rows with a common prefix."""

from types import SimpleNamespace

import torch

from tool_calling.engines.attention import attend_with_prefix


def test_grouped_query_attention_with_a_prefix_is_attention():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 5, 8, generator=generator) for heads in (6, 2, 2))
    prefix_key, prefix_value = (torch.randn(1, 2, 7, 8, generator=generator) for _ in range(2))
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool).tril()
    got = attend_with_prefix(query, key, value, mask, 0.3, SimpleNamespace(keys=prefix_key, values=prefix_value))
    keys, values = (
        torch.cat([prefix.expand(3, -1, -1, -1), own], dim=2)
        for prefix, own in ((prefix_key, key), (prefix_value, value))
    )
    whole = torch.cat([torch.ones(3, 1, 5, 7, dtype=torch.bool), mask], dim=3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, whole, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, expected.transpose(1, 2))
