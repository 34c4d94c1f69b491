"""Samples as tensors: one flat stream in which every common prefix stands once, or ordinary padded rows."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tool_calling.samples import Sample

IGNORED = -100  # the label of a token that is not supervised, as PyTorch's losses have it


@dataclass(frozen=True)
class Layout:
    """How samples become tensors: at most `rows` of them in one stream, or in one padded batch without sharing.

    Streams are filled up to one of `lengths`, and hold at most `limit` tokens before that unless one row has more.
    """

    rows: int
    share_prefix: bool = True
    lengths: tuple[int, ...] = ()
    limit: float = math.inf

    def build(self, samples: list[Sample]) -> dict:
        """Return the tensors of one micro-batch."""
        return build_stream(samples, self.lengths) if self.share_prefix else build_padded(samples)

    def batch(self, samples: list[Sample]) -> list[dict]:
        """Return the micro-batches of samples for scoring, where order does not matter."""
        return [self.build(part) for part in self.split(samples)]

    def split(self, samples: list[Sample]) -> list[list[Sample]]:
        """Return the samples of each of these micro-batches, in their order there."""
        return split_rows(samples, self.rows, self.limit)


def to_tree(samples: list[Sample]) -> list[tuple[Sample, int]]:
    """Sort samples so that each shares with the one before it all it shares with any: [(sample, shared tokens), ...].

    The last prompt token always belongs to its own sample, because it predicts the first token of the completion.
    """
    keys = [np.asarray(sample.input_ids[: sample.prompt_length - 1], dtype=">u4") for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: keys[i].tobytes())  # big-endian bytes sort as the tokens do
    tree, last = [], keys[0][:0]
    for i in order:
        length = min(len(keys[i]), len(last))
        differences = np.flatnonzero(keys[i][:length] != last[:length])
        tree.append((samples[i], int(differences[0]) if len(differences) else length))
        last = keys[i]
    return tree


def count_tokens(samples: list[Sample]) -> int:
    """Return how many tokens the stream of these samples has."""
    return sum(len(sample.input_ids) - shared for sample, shared in to_tree(samples))


def fill_up(size: int, lengths: tuple[int, ...]) -> int:
    """Return the first of the lengths that holds a stream of `size` tokens.

    A stream longer than all of them goes up to the next quarter of the longest, in the kernel's steps of 128, because
    attention is compiled anew for each length. Without lengths nothing is filled.
    """
    step = -(-lengths[-1] // 512) * 128 if lengths else 1
    return next((length for length in lengths if length >= size), -(-size // step) * step)


def build_stream(samples: list[Sample], lengths: tuple[int, ...] = ()) -> dict:
    """Lay samples out as one sequence in which a prefix that several of them share stands once.

    The samples form a tree of tokens, written in depth-first order: the descendants of a token are the tokens after it
    up to its `subtree_end`. A token attends to its ancestors, which are all tokens k with k <= q < subtree_end[k]. So
    it sees its own sample from the start and nothing of any other: loss and gradient are those of the samples alone.

    Returns: int64 tensors of shape [1, tokens]: input_ids, position_ids, labels (IGNORED: not supervised), subtree_end;
    and what add_places adds. The tokens that fill the stream up to one of `lengths` see only themselves.
    """
    tree = to_tree(samples)
    length = fill_up(sum(len(sample.input_ids) - shared for sample, shared in tree), lengths)
    input_ids, position_ids, labels = (np.full(length, value) for value in (0, 0, IGNORED))
    subtree_end, weights = np.arange(1, length + 1), np.ones(length, dtype=np.float32)
    path, size = np.zeros(0, dtype=np.int64), 0  # path: where the tokens of the sample before stand in the stream
    for sample, shared in tree:
        subtree_end[path[shared:]] = size
        tokens, positions = np.asarray(sample.input_ids, dtype=np.int64), np.arange(len(sample.input_ids))
        own = slice(size, size + len(tokens) - shared)
        input_ids[own], position_ids[own] = tokens[shared:], positions[shared:]
        labels[own] = np.where(positions < sample.prompt_length, IGNORED, tokens)[shared:]
        weights[own] = sample.weight
        path = np.concatenate([path[:shared], np.arange(own.start, own.stop)])
        size = own.stop
    subtree_end[path] = size
    stream = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "subtree_end": subtree_end}
    return add_places({name: torch.from_numpy(values)[None] for name, values in stream.items()}, weights[None])


def build_padded(samples: list[Sample]) -> dict:
    """Return the samples as an ordinary batch, padded on the right: int64 tensors of shape [samples, longest].

    And what add_places adds.
    """
    tokens = [torch.as_tensor(sample.input_ids, dtype=torch.int64) for sample in samples]
    labels = [
        ids.masked_fill(torch.arange(len(ids)) < sample.prompt_length, IGNORED) for ids, sample in zip(tokens, samples)
    ]
    ones, pad = [*map(torch.ones_like, tokens)], partial(pad_sequence, batch_first=True)
    batch = {"input_ids": pad(tokens), "labels": pad(labels, padding_value=IGNORED), "attention_mask": pad(ones)}
    weights = np.repeat(np.float32([[sample.weight] for sample in samples]), batch["labels"].shape[1], axis=1)
    return add_places(batch, weights)


def add_places(batch: dict, weights: np.ndarray) -> dict:
    """Return a batch with `places` [supervised]: of all its tokens, row by row, those whose next one is supervised.

    Found on the GPU, their number would make the CPU wait in every step. `weights` [supervised], fp32, are those of the
    supervised tokens in the loss, taken from those of all tokens.
    """
    supervised = batch["labels"].roll(-1, dims=1) != IGNORED
    supervised[:, -1] = False
    places = supervised.flatten().nonzero()[:, 0]
    return {**batch, "places": places, "weights": torch.from_numpy(weights).flatten()[places + 1]}


def split_rows(samples: list[Sample], size: int, limit: float = math.inf) -> list[list[Sample]]:
    """Return samples in parts of at most `size`, and of `limit` tokens if they share; neighbours share the most."""
    ordered = [sample for sample, _ in to_tree(samples)]
    parts = []
    for part in (ordered[i : i + size] for i in range(0, len(ordered), size)):
        fits = limit == math.inf or len(part) == 1 or count_tokens(part) <= limit
        parts += [part] if fits else split_rows(part, -(-len(part) // 2), limit)
    return parts
