"""Attention over rows with a common prefix."""

from types import SimpleNamespace

import torch

from tool_calling.engines.attention import attend_in_blocks, attend_with_prefix, to_attention_mask, to_key_blocks


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


def test_a_block_of_queries_computes_only_keys_that_some_of_them_see():
    ends = torch.full((600,), 600)  # 100 tokens that all share, then rows of 50
    ends[100:] = torch.arange(150, 601, 50).repeat_interleave(50)
    mask = to_attention_mask(ends)
    blocks = to_key_blocks(mask)
    # Queries 256 to 511 see keys 0 to 99 and 250 to 511, the others of their rows; 32 keys are seen or not together.
    assert [keys for keys, _ in blocks] == [
        [slice(0, 256)],
        [slice(0, 128), slice(224, 512)],
        [slice(0, 128), slice(480, 608)],
    ]
    assert [part.shape[2:] for _, part in blocks] == [(256, 256), (256, 416), (88, 248)]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 600, 8, generator=generator) for heads in (4, 2, 2))
    got, _ = attend_in_blocks(None, query, key, value, mask, key_blocks=blocks, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, expected.transpose(1, 2))


def test_attention_whose_gradients_are_not_always_finite_is_off():
    assert not torch.backends.cuda.cudnn_sdp_enabled()
