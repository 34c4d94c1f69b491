"""Answers of a model of plain Transformers: the greedy one to each prompt, or several drawn at random."""

import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import Cache, StaticLayer

from tool_calling.data.literals import as_list
from tool_calling.engines.attention import BLOCKS
from tool_calling.engines.compat import attends_by
from tool_calling.engines.device import autocast, free_gpu, is_on_one_gpu
from tool_calling.engines.reach import find_reach
from tool_calling.engines.tokens import compute_rows_alone
from tool_calling.prompts import find_call_end
from tool_calling.samples import Sample
from tool_calling.streams import split_rows, to_tree
from tool_calling.terminal import warn

CPU_ROWS, GPU_ROWS = 64, 256  # answered at once, if that many fit
HELD_SHARE = 0.5  # of the free GPU memory: the keys and values of rows that are answered at once


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: each token at which temperature, from which random numbers."""

    temperature: float
    generator: torch.Generator

    def draw(self, logits):
        """Return a token for each row of logits, [rows, 1].

        Of exponential variates, each divided by its rate, the least is the first with the probability of its share.
        """
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=self.generator)
        return (logits.float() / self.temperature - noise.log()).argmax(dim=-1, keepdim=True)


def generate_answers(
    model, tokenizer, samples: list[Sample], rows: int | None, max_new_tokens: int, name: str | None = None
) -> list[str]:
    """Return the greedy answer to the prompt of each sample, at most `max_new_tokens` long.

    Args:
        rows: answered at once; None: as many as fit. If memory runs out, half as many.
        name: of the model, on the progress bar; None: there is another bar.
    """
    stops, answers = find_stop_tokens(model, tokenizer), {}
    rows = rows or count_rows(model, samples, max_new_tokens)
    with Progress(transient=True, disable=not name or not sys.stdout.isatty()) as bar:
        task = bar.add_task(f"answers of {name}", total=len(samples))
        for batch, found in answer_in_parts(model, samples, rows, stops, max_new_tokens):
            bar.advance(task, len(batch))
            answers |= {id(sample): tokenizer.decode(answer) for sample, answer in zip(batch, found)}
    return [answers[id(sample)] for sample in samples]


def sample_answers(
    model, stops: list[int], samples: list[Sample], count: int, max_new_tokens: int, sampling: Sampling
) -> list[list[list[int]]]:
    """Return `count` drawn answers to each sample as tokens, with the one of `stops` that ended it, if one did."""
    answers = {id(sample): [] for sample in samples}
    rows = count_rows(model, samples, max_new_tokens)
    wanted = [sample for sample in samples for _ in range(count)]
    for batch, found in answer_in_parts(model, wanted, rows, stops, max_new_tokens, sampling):
        for sample, answer in zip(batch, found):
            answers[id(sample)].append(answer)
    return [answers[id(sample)] for sample in samples]


def answer_in_parts(model, samples: list[Sample], rows: int, *arguments) -> Iterator[tuple[list[Sample], list]]:
    """Yield the samples of a batch of at most `rows`, and what generate_tokens returns for them and `arguments`.

    Prompts with the same tools share the most, and those of like length pad the least. If memory runs out, half as many
    are answered at once.
    """
    model.eval()
    if is_on_one_gpu(model):
        compute_rows_alone(model)  # PEFT would need the CPU in every step, which a CUDA graph forbids
    ordered = sorted(samples, key=lambda sample: (str(sample.tools), sample.prompt_length))
    waiting = [ordered[i : i + rows] for i in range(0, len(ordered), rows)]
    while waiting:
        batch, found = waiting.pop(0), None
        prompts = [list(sample.input_ids[: sample.prompt_length]) for sample in batch]
        try:
            with torch.inference_mode(), autocast(model):
                found = generate_tokens(model, prompts, *arguments)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        if found is None:  # not above, where the failed computation is still held
            free_gpu()
            waiting[:0] = split_rows(batch, -(-len(batch) // 2))
        else:
            yield batch, found


def limit_answers(samples: list[Sample]) -> int:
    """Return how many tokens answers to these samples may have: as many as the longest reference, and some more."""
    longest = max(len(sample.input_ids) - sample.prompt_length for sample in samples)
    thinks = any("</think>" in sample.completion for sample in samples)
    return 2 * longest + 256 if thinks else longest + max(64, longest // 2)


def find_stop_tokens(model, tokenizer) -> list[int]:
    """Return the tokens at which servers end an answer: those of the chat template and of generation_config.json."""
    call_end = tokenizer.convert_tokens_to_ids(find_call_end(tokenizer))
    return sorted({tokenizer.eos_token_id, call_end, *as_list(model.generation_config.eos_token_id)} - {None})


def count_rows(model, samples: list[Sample], max_new_tokens: int) -> int:
    """Return how many of these samples can be answered at once: as many as HELD_SHARE allows on a GPU."""
    if not is_on_one_gpu(model):
        return CPU_ROWS
    row = measure_row(model.config, samples, max_new_tokens) * model.dtype.itemsize
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min(GPU_ROWS, max(1, int(HELD_SHARE * free / row)))


def measure_row(config, samples: list[Sample], max_new_tokens: int) -> int:
    """Return how many numbers are held as keys and values of each row while these samples are answered."""
    prompts, config = [list(s.input_ids[: s.prompt_length]) for s in samples], config.get_text_config(decoder=True)
    longest = max(map(len, prompts)) + max_new_tokens
    own = longest - (count_shared(prompts) if longest <= find_reach(config)[0] else 0)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return own * 2 * config.num_hidden_layers * heads * head_dim


def generate_tokens(
    model, prompts: list[list[int]], stops: list[int], max_new_tokens: int, sampling: Sampling | None = None
) -> list[list[int]]:
    """Return the greedy answers to prompts as tokens, each without the one of `stops` that ended it.

    With `sampling`, drawn ones, each with the token that ended it. Prompts that equal the one before are not computed.
    """
    new = [place for place, prompt in enumerate(prompts) if not place or prompt != prompts[place - 1]]
    choose = sampling.draw if sampling else find_likeliest
    batch = Batch(model, [prompts[place] for place in new], max_new_tokens, choose)
    if len(new) < len(prompts):
        batch.keep([bisect_right(new, place) - 1 for place in range(len(prompts))])
    answers = [[] for _ in prompts]
    rows = [*range(len(answers))]  # whose answer stands in each row of the batch
    for _ in range(max_new_tokens):
        going = []
        for place, token in enumerate(batch.step()):
            if rows[place] is None:
                continue
            if token not in stops or sampling:
                answers[rows[place]].append(token)
            if token in stops:
                rows[place] = None
            else:
                going.append(place)
        if not going:
            break
        if len(going) < len(rows) and len(going) <= batch.worth_leaving * len(rows):
            batch.keep(going)
            rows = [rows[place] for place in going]
    return answers


def find_likeliest(logits):
    """Return the likeliest token of each row of logits, [rows, 1]."""
    return logits.argmax(dim=-1, keepdim=True)


def count_shared(prompts: list[list[int]]) -> int:
    """Return how many tokens all prompts begin with, without the last one of each."""
    tree = to_tree([Sample("", prompt, len(prompt)) for prompt in prompts])
    return min((length for _, length in tree[1:]), default=len(prompts[0]) - 1)


class Batch:
    """Rows that are answered together, one token at a time.

    The common prefix of all prompts is computed once and held once, if layers look back that far; the rest of each is
    padded on the left. On a GPU, a small model takes ten times as long to launch the kernels of a token as to compute
    them, so the step to the next token is recorded as a CUDA graph.
    """

    def __init__(self, model, prompts: list[list[int]], room: int, choose=find_likeliest):
        """Compute the prompts, with room for so many more tokens, each of which `choose` takes from its logits."""
        self.model, self.choose = model, choose
        near = max(map(len, prompts)) + room <= find_reach(model.config)[0]
        self.whole = near and attends_by(model.config, BLOCKS)  # another attention would not see the common prefix
        self.recorded = self.whole and is_on_one_gpu(model)
        self.worth_leaving = 0.5 if self.recorded else 1  # of the rows: from then on those that are done are left out
        self.graph, self.steps = None, 0
        shared, prefix = count_shared(prompts) if self.whole else 0, DynamicCache()
        if shared:
            model(torch.tensor([prompts[0][:shared]], device=model.device), past_key_values=prefix, logits_to_keep=1)
        rests = [torch.tensor(prompt[shared:]) for prompt in prompts]
        ids, filled = (
            pad_sequence(rows, batch_first=True, padding_side="left").to(model.device)
            for rows in (rests, [*map(torch.ones_like, rests)])
        )
        layers, length = model.config.get_text_config(decoder=True).num_hidden_layers, ids.shape[1]
        cache = Cache(layers=[Layer(length + room) for _ in range(layers)]) if self.whole else None
        self.options = {
            "past_key_values": cache or DynamicCache(config=model.config),
            "prefix_cache": prefix if shared else None,
            "logits_to_keep": 1,
        }
        self.seen = pad(filled, (0, room)).bool() if self.whole else filled  # by the next token of each row
        self.column = torch.tensor([length], device=model.device)  # of `seen`, the next token's
        positions = (shared + filled.cumsum(dim=1) - 1).clamp(min=0)
        self.positions = positions[:, -1:].clone()
        self.ids = torch.empty_like(self.positions)  # the last token of each row
        self.logits = self.compute(ids, positions, mask_prompts(filled, room) if self.whole else filled)

    def compute(self, ids, positions, mask):
        """Return the logits of the next token of each row, [rows, vocabulary]."""
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, **self.options).logits[:, -1]

    def advance(self) -> None:
        """Compute the logits after the last token of each row."""
        if self.whole:
            self.seen.index_fill_(1, self.column, True)
            self.column += 1
        else:
            self.seen = torch.cat([self.seen, torch.ones_like(self.ids)], dim=1)
        self.positions += 1
        mask = self.seen[:, None, None] if self.whole else self.seen
        self.logits = self.compute(self.ids, self.positions, mask)

    def step(self) -> list[int]:
        """Return the next token of each row."""
        if self.steps == 2 and self.recorded:  # the step before has loaded all kernels, as recording demands
            self.record()
        if self.graph:
            self.graph.replay()
        elif self.steps:
            self.advance()
        self.steps += 1
        self.ids.copy_(self.choose(self.logits))
        return self.ids[:, 0].tolist()

    def record(self) -> None:
        """Record the step as a CUDA graph; a model that has to look at its numbers on the CPU goes on without."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.advance()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).splitlines()[0]
            warn(f"the step to the next token cannot be recorded as a CUDA graph ({reason}): answers take longer")
            self.recorded, self.worth_leaving = False, 1
        else:
            self.graph = graph

    def keep(self, going: list[int]) -> None:
        """Go on with these rows alone; one that is named twice is in two rows from now on."""
        self.options["past_key_values"].reorder_cache(torch.tensor(going))  # on the CPU, for layers on any GPU
        self.ids, self.positions, self.seen = self.ids[going], self.positions[going], self.seen[going]
        self.logits = self.logits[going]
        self.graph, self.steps = None, min(self.steps, 1)


class Layer(StaticLayer):
    """Keys and values of a layer, each of the type in which autocast leaves them."""

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        self.values = self.values.to(value_states.dtype)


def mask_prompts(filled, room: int):
    """Return which keys each token of the prompts sees, bool [rows, 1, tokens, tokens + room], from [rows, tokens].

    Padding sees itself, so that no token sees nothing; nothing else sees padding.
    """
    own = torch.eye(filled.shape[1], dtype=torch.bool, device=filled.device)
    return pad(filled[:, None, :].bool() & torch.ones_like(own).tril() | own, (0, room))[:, None]
