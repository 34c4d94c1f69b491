"""Greedy answers of a model of plain Transformers."""

import contextlib
import sys
from functools import partial

import torch
from rich.progress import track
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from tool_calling.data.literals import as_list
from tool_calling.engines.device import autocast
from tool_calling.engines.reach import find_reach
from tool_calling.prompts import find_call_end
from tool_calling.samples import Sample
from tool_calling.streams import split_rows, to_tree


def generate_answers(
    model, tokenizer, samples: list[Sample], batch_size: int, max_new_tokens: int, name: str
) -> list[str]:
    """Return the greedy answer to the prompt of each sample, at most `max_new_tokens` long; `name` is on the bar."""
    stops, answers = find_stop_tokens(model, tokenizer), {}
    model.eval()
    batches = split_rows(samples, batch_size)
    bar = track(batches, f"answers of {name}", transient=True, disable=not sys.stdout.isatty())
    with contextlib.closing(bar):
        for batch in bar:
            prompts = [list(sample.input_ids[: sample.prompt_length]) for sample in batch]
            with torch.inference_mode(), autocast(model):
                tokens = generate_tokens(model, prompts, stops, max_new_tokens)
            answers |= {id(sample): tokenizer.decode(answer) for sample, answer in zip(batch, tokens)}
    return [answers[id(sample)] for sample in samples]


def find_stop_tokens(model, tokenizer) -> list[int]:
    """Return the tokens at which servers end an answer: those of the chat template and of generation_config.json."""
    call_end = tokenizer.convert_tokens_to_ids(find_call_end(tokenizer))
    return sorted({tokenizer.eos_token_id, call_end, *as_list(model.generation_config.eos_token_id)} - {None})


def generate_tokens(model, prompts: list[list[int]], stops: list[int], max_new_tokens: int) -> list[list[int]]:
    """Return the greedy answers to prompts as tokens, each without the one of `stops` that ended it.

    The common prefix of all prompts is computed once and held once, if layers look back that far; the rest of each is
    padded on the left. A row that is done leaves the batch.
    """
    whole = max(map(len, prompts)) + max_new_tokens <= find_reach(model.config)[0]
    shared = count_shared(prompts) if whole else 0
    prefix, cache = DynamicCache(), DynamicCache(config=None if whole else model.config)
    if shared:
        model(torch.tensor([prompts[0][:shared]], device=model.device), past_key_values=prefix, logits_to_keep=1)
    rests = [torch.tensor(prompt[shared:]) for prompt in prompts]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    ids, filled = (pad(rows).to(model.device) for rows in (rests, [*map(torch.ones_like, rests)]))
    positions = (shared + filled.cumsum(dim=1) - 1).clamp(min=0)
    # Padding sees itself, so that no token sees nothing; nothing else sees padding.
    own = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
    mask = (filled[:, None, :].bool() & torch.ones_like(own).tril() | own)[:, None] if whole else filled
    answers, open_rows = [[] for _ in prompts], range(len(prompts))
    options = {"past_key_values": cache, "prefix_cache": prefix if shared else None, "logits_to_keep": 1}
    for _ in range(max_new_tokens):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **options).logits
        tokens = logits[:, -1].argmax(dim=-1)
        going = []  # on the CPU, from where it can index the caches of layers on any GPU
        for index, (row, token) in enumerate(zip(open_rows, tokens.tolist())):
            if token not in stops:
                answers[row].append(token)
                going.append(index)
        if not going:
            break
        if len(going) < len(tokens):
            cache.reorder_cache(torch.tensor(going))
            open_rows, filled = [open_rows[index] for index in going], filled[going]
        ids, positions = tokens[going, None], positions[going, -1:] + 1
        filled = torch.cat([filled, torch.ones_like(ids)], dim=1)
        mask = filled[:, None, None, :].bool() if whole else filled
    return answers


def count_shared(prompts: list[list[int]]) -> int:
    """Return how many tokens all prompts begin with, without the last one of each."""
    tree = to_tree([Sample("", prompt, len(prompt)) for prompt in prompts])
    return min((length for _, length in tree[1:]), default=len(prompts[0]) - 1)
