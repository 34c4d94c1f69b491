"""Samples to one flat stream in which every common prefix stands once."""

import math
from functools import partial

import numpy as np
import torch

from tool_calling.prompts import Sample


def to_tree(rows: list) -> list[tuple]:
    """Sort rows so that each shares with the one before it all it shares with any: [(row, shared tokens), ...].

    The last prompt token always belongs to its row alone, because its prediction (the answer's first token) does.
    """
    keys = [np.asarray(row.input_ids[: row.prompt_length - 1], dtype=">u4") for row in rows]
    order = sorted(range(len(rows)), key=lambda i: keys[i].tobytes())  # big-endian bytes sort as the tokens do
    tree, last = [], keys[0][:0]
    for i in order:
        length = min(len(keys[i]), len(last))
        differences = np.flatnonzero(keys[i][:length] != last[:length])
        tree.append((rows[i], int(differences[0]) if len(differences) else length))
        last = keys[i]
    return tree


def count_tokens(rows: list[Sample]) -> int:
    """Return how many tokens the stream of these rows has."""
    return sum(len(row.input_ids) - shared for row, shared in to_tree(rows))


def fill_up(size: int, lengths: tuple[int, ...]) -> int:
    """Return the first of the lengths that holds a stream of `size` tokens.

    One that is longer than all, as of held-out rows unlike those of training, goes up to the next quarter of the
    longest, in the kernel's steps of 128: attention is compiled anew for each length. Without any, nothing is filled.
    """
    step = -(-lengths[-1] // 512) * 128 if lengths else 1
    return next((length for length in lengths if length >= size), -(-size // step) * step)


def build_stream(rows: list[Sample], lengths: tuple[int, ...] = ()) -> dict:
    """Lay rows out as one sequence in which a prefix that several rows share stands once.

    The rows form a tree of tokens, written in depth-first order: a token's descendants are the tokens after it up to
    its `subtree_end`. A token attends to its ancestors, which are all tokens k with k <= q < subtree_end[k]; so it sees
    its own row from the start and nothing of any other, and loss and gradient are those of the rows one by one.

    Args:
        rows: samples in any order.
        lengths: the stream is filled up to one of these (see fill_up), with tokens that see only themselves.
    Returns: int64 tensors of shape [1, tokens]: input_ids, position_ids, labels (-100: not supervised), subtree_end.
    """
    tree = to_tree(rows)
    length = fill_up(sum(len(row.input_ids) - shared for row, shared in tree), lengths)
    stream = {
        "input_ids": np.zeros(length, dtype=np.int64),
        "position_ids": np.zeros(length, dtype=np.int64),
        "labels": np.full(length, -100),
        "subtree_end": np.arange(1, length + 1),
    }  # what fills it up
    path, size = np.zeros(0, dtype=np.int64), 0  # path: where the tokens of the row before stand in the stream
    for row, shared in tree:
        stream["subtree_end"][path[shared:]] = size
        tokens, positions = np.asarray(row.input_ids, dtype=np.int64), np.arange(len(row.input_ids))
        own = slice(size, size + len(tokens) - shared)
        stream["input_ids"][own], stream["position_ids"][own] = tokens[shared:], positions[shared:]
        stream["labels"][own] = np.where(positions < row.prompt_length, -100, tokens)[shared:]
        path = np.concatenate([path[:shared], np.arange(own.start, own.stop)])
        size = own.stop
    stream["subtree_end"][path] = size
    return {name: torch.from_numpy(values)[None] for name, values in stream.items()}


def build_padded(rows: list[Sample]) -> dict:
    """Return the rows as an ordinary batch, padded on the right: int64 [rows, longest]; for --no-share_prefix."""
    tokens = [torch.as_tensor(row.input_ids, dtype=torch.int64) for row in rows]
    labels = [ids.masked_fill(torch.arange(len(ids)) < row.prompt_length, -100) for ids, row in zip(tokens, rows)]
    ones, pad = [*map(torch.ones_like, tokens)], partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {"input_ids": pad(tokens), "labels": pad(labels, padding_value=-100), "attention_mask": pad(ones)}


def split_rows(rows: list[Sample], size: int, limit: float = math.inf) -> list[list[Sample]]:
    """Return rows in parts of at most `size`, and of `limit` tokens if they share; neighbours share the most."""
    ordered = [row for row, _ in to_tree(rows)]
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [
        half
        for part in parts
        for half in (
            [part]
            if limit == math.inf or len(part) == 1 or count_tokens(part) <= limit
            else split_rows(part, -(-len(part) // 2), limit)
        )
    ]
