"""Rows of the embeddings for tokens that a base was made without."""

import re
from zlib import crc32

import torch

SAMPLED_ROWS = 1000  # of the embeddings, whose length a new row takes


def start_row(token: str, tokenizer, rows: torch.Tensor) -> torch.Tensor:
    """Return the row with which a new token starts: the mean of its words' rows, and a direction of its own.

    The same token has the same row in every process, and `<x>` another than `</x>`.

    Args:
        rows: those of the tokens that the model knows, (tokens, width).
    """
    words = tokenizer(" ".join(re.findall(r"[^\W_]+", token)), add_special_tokens=False)["input_ids"]
    known = rows[[word for word in words if word < len(rows)] or slice(SAMPLED_ROWS)].float().mean(dim=0)
    own = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(crc32(token.encode())))
    length = rows[:SAMPLED_ROWS].float().norm(dim=1).mean()
    return known + own.to(known.device) / own.norm() * length / 2


@torch.no_grad()
def fit_vocabulary(model, tokenizer):
    """Return the model with a row in both embeddings for each token of the tokenizer, the new ones as start_row says.

    Every load of a base ends here, so that an adapter finds the rows with which it was trained.
    """
    known, size = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values()) + 1
    if size <= known:
        return model
    model.resize_token_embeddings(size, mean_resizing=False)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    for weight in {layer.weight for layer in layers if layer is not None}:  # one if they are tied
        for index in range(known, size):
            weight[index] = start_row(tokenizer.convert_ids_to_tokens(index), tokenizer, weight[:known])
    return model
