"""Rows of the embeddings: those of tokens that a base was made without, and those that no text has ever trained.

Two tokens with the same row cannot be told apart, whatever an adapter on the projections learns: a model cannot write
`<tool_call>` if its row equals those of all tokens that its training never met.
"""

import re
from functools import partial
from zlib import crc32

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper

from tool_calling.samples import Sample
from tool_calling.terminal import UserError, list_first, say, warn

SAMPLED_ROWS = 1000  # of the embeddings, whose length a new row takes
# As a share of the usual length of a row. Ordinary tokens of Qwen2.5, SmolLM2 and models/tiny-qwen3 are 0.4 and more
# from any other row; rows that no text has trained are within 0.08 of each other.
NEAR = 0.1
NO_ROWS = 'vLLM loads no adapter with trained rows of tokens ("unsupported LoRA weight"): serve the merged model'
COMPARED_ROWS = 2**14  # at once: they are held in fp32


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


def list_tables(model) -> dict[str, torch.nn.Module]:
    """Return the embedding and, unless it is the same weight, the head of a model, by their names in it."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    if tables[1] is None or tables[1].weight is tables[0].weight:
        tables = tables[:1]
    return {name: module for name, module in model.named_modules() if any(module is table for table in tables)}


@torch.no_grad()
def start_rows(model, tokenizer, ids, known: int) -> None:
    """Give the tokens `ids` the rows of start_row in both embeddings, of which the first `known` are the base's."""
    for table in list_tables(model).values():
        for index in ids:
            table.weight[index] = start_row(tokenizer.convert_ids_to_tokens(index), tokenizer, table.weight[:known])


def count_rows(tokenizer) -> int:
    """Return how many rows an embedding needs for all tokens; a tokenizer may leave some numbers out."""
    return max(tokenizer.get_vocab().values()) + 1


def fit_config(config, tokenizer):
    """Return the config of a base as fit_vocabulary will leave it."""
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, count_rows(tokenizer))
    return config


def fit_vocabulary(model, tokenizer):
    """Return the model with a row in both embeddings for each token of the tokenizer, the new ones as start_row says.

    Every load of a base ends here, so that an adapter finds the rows with which it was trained.
    """
    known, size = model.get_input_embeddings().weight.shape[0], count_rows(tokenizer)
    if size > known:
        model.resize_token_embeddings(size, mean_resizing=False)
        start_rows(model, tokenizer, range(known, size), known)
    return model


@torch.no_grad()
def find_untrained(weight, ids: list[int]) -> list[int]:
    """Return those of `ids` whose rows in `weight` [tokens, width] are near zero, or nearly equal to another row."""
    index, own = torch.tensor(ids, device=weight.device), weight[ids].float()
    nearest, start = own.norm(dim=1), 0  # from zero, then from any other row
    for rows in weight.split(COMPARED_ROWS):
        distances = torch.cdist(own, rows.float())
        itself = index[:, None] == torch.arange(start, start + len(rows), device=weight.device)
        nearest = torch.minimum(nearest, distances.masked_fill(itself, torch.inf).min(dim=1).values)
        start += len(rows)
    usual = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).median()
    return index[nearest < NEAR * usual].tolist()


def to_ids(tokenizer, tokens: list[str]) -> list[int]:
    """Return the ids of tokens; UserError for a text that is not one token."""
    vocabulary = tokenizer.get_vocab()
    if unknown := [token for token in tokens if token not in vocabulary]:
        raise UserError(f"--train_tokens {' '.join(unknown)}: not a token of the model; expected auto, off or tokens")
    return [vocabulary[token] for token in tokens]


def prepare_tokens(model, tokenizer, samples: list[Sample], wanted: list[str], kept=(), alone: bool = False) -> dict:
    """Fit the vocabulary; return the setting of PEFT's LoraConfig that trains rows of tokens, {} if there are none.

    Rows that were never trained start as start_row says, and are printed.

    Args:
        samples: of which the supervised tokens are looked at.
        wanted: ["auto"], ["off"], or the tokens whose rows are to be trained.
        kept: ids of tokens whose rows an adapter has trained, which is to be trained on: they are trained on, too.
        alone: whether the adapter is kept without a merged model.
    """
    known, automatic = model.get_input_embeddings().weight.shape[0], wanted == ["auto"]
    fit_vocabulary(model, tokenizer)
    named = [] if automatic or wanted == ["off"] else to_ids(tokenizer, wanted)
    ids = sorted({*named, *(token for sample in samples for token in sample.input_ids[sample.prompt_length :])})
    tables, untrained = list_tables(model), {token for token in ids if token >= known}
    for table in tables.values():
        untrained |= {*find_untrained(table.weight, [token for token in ids if token < known])}
    untrained -= {*kept}
    if untrained:
        shown = list_first(tokenizer.convert_ids_to_tokens(sorted(untrained)), 8)
        what = f"{len(untrained)} in answers have embedding rows that were never trained: {shown}"
        if missed := untrained - {*named} if not automatic else ():
            names = " ".join(tokenizer.convert_ids_to_tokens(sorted(missed)))
            warn(f"{what}; without --train_tokens {names} these may not be learned")
        else:
            say("tokens", f"{what}; they start apart from each other and are trained")
    start_rows(model, tokenizer, [token for token in untrained if token < known], known)
    # With its new rows, also those of tokens in prompts alone, an adapter is whole on a base of as many rows.
    trained = sorted({*kept, *({*untrained, *range(known, count_rows(tokenizer))} if automatic else named)})
    if trained and alone:
        warn(f"{NO_ROWS}, of --save_method merged_16bit")
    return {"trainable_token_indices": dict.fromkeys(tables, trained)} if trained else {}


def compute_rows_alone(model) -> None:
    """Make the layers of trained rows compute nothing but these rows, with gradients of their size.

    PEFT copies the whole table in each forward pass and computes a gradient of its size. Nothing here waits for the
    GPU, so that a CUDA graph can record it.
    """
    for layer in model.modules():
        if isinstance(layer, TrainableTokensWrapper):
            layer.bias = getattr(layer.original_module, "bias", None)  # hidden by PEFT, and TRL's fused head asks
        if isinstance(layer, TrainableTokensLayer):
            base, adapter = layer.get_base_layer(), layer.active_adapters[0]
            ids = torch.tensor(layer.token_indices[adapter], device=base.weight.device)
            layer.trainable_tokens_delta[adapter].requires_grad_(True)  # Unsloth freezes all but the weights of LoRA
            read = isinstance(base, torch.nn.Embedding)
            layer.forward = partial(read_rows if read else multiply_rows, layer, adapter, ids)
            # Unsloth asks for an embedding's weight in a CUDA graph, only to see whether it is trained whole.
            layer.get_merged_weights = partial(look_at_base if read else put_rows, layer, adapter, ids)


def look_at_base(layer: TrainableTokensLayer, adapter: str, ids, active):
    """Return the table [tokens, width] of the base alone."""
    return layer.base_layer.weight


def put_rows(layer: TrainableTokensLayer, adapter: str, ids, active):
    """Return the table [tokens, width] with the trained rows in it, for a head that is computed from its weight."""
    weight = layer.base_layer.weight
    return weight.index_copy(0, ids, layer.trainable_tokens_delta[adapter].to(weight.dtype))


def read_rows(layer: TrainableTokensLayer, adapter: str, ids, tokens):
    """Return the embeddings [..., width] of tokens [...]: of `ids` the trained rows, of others those of the base."""
    base, trained = layer.base_layer(tokens), layer.trainable_tokens_delta[adapter]
    hits, scale = tokens[..., None] == ids, layer._get_embed_scale()
    rows = hits.to(trained.dtype) @ trained * (1 if scale is None else scale)
    return torch.where(hits.any(dim=-1, keepdim=True), rows.to(base.dtype), base)


def multiply_rows(layer: TrainableTokensLayer, adapter: str, ids, hidden):
    """Return the logits [..., vocabulary] of hidden states [..., width]: those of `ids` by the trained rows."""
    logits = layer.base_layer(hidden)
    own = torch.nn.functional.linear(hidden, layer.trainable_tokens_delta[adapter].to(hidden.dtype))
    return logits.index_copy(-1, ids, own.to(logits.dtype))
