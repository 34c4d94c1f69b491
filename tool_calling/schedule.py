"""Which rows are in which stream of which step of which epoch, and how long streams are."""

import argparse
import hashlib
import math
import random
from typing import NamedTuple

import numpy as np

from tool_calling.processes import count_devices
from tool_calling.prompts import Sample
from tool_calling.run_folder import to_step
from tool_calling.streams import build_padded, build_stream, count_tokens, fill_up, split_rows, to_tree
from tool_calling.terminal import plural, say

READ_BACK_ROWS = 64  # held-out rows on which the losses of merged model and adapter are compared
READ_BACK_BATCH = 4  # of them at once: their logits are held, with Qwen3's vocabulary 60 MB for an answer of 40 tokens
MEASURED_EPOCHS = 50  # so many epochs of a run are measured to plan its streams


class Plan(NamedTuple):
    """How an optimizer step is computed: on each of `devices` in `accumulation` streams of `rows` rows.

    Streams are filled up to one of `lengths`, and hold at most `limit` tokens before, unless one row has more; `groups`
    are the training rows that can share (see group_rows).
    """

    rows: int
    accumulation: int
    groups: list[list[list[int]]]
    lengths: tuple[int, ...] = ()
    share_prefix: bool = True
    devices: int = 1
    limit: float = math.inf

    @property
    def rows_per_step(self) -> int:
        """The effective batch: rows per optimizer step on all devices."""
        return self.rows * self.accumulation * self.devices


def build_batch(rows: list[Sample], plan: Plan) -> dict:
    """Return the tensors of one micro-batch as the plan says."""
    return build_stream(rows, plan.lengths) if plan.share_prefix else build_padded(rows)


def group_rows(samples: list[Sample]) -> list[list[list[int]]]:
    """Return indices of samples: groups (the same tools) of conversations (the same row of the file) of turns.

    Rows whose prompts share at least half of their tokens are of one group.
    """
    index_of = {id(sample): i for i, sample in enumerate(samples)}
    groups: list[dict[str, list[int]]] = []
    for sample, shared in to_tree(samples):
        if not groups or shared < sample.prompt_length / 2:
            groups.append({})
        groups[-1].setdefault(sample.source, []).append(index_of[id(sample)])
    return [list(group.values()) for group in groups]


def order_rows(plan: Plan, seed: int, epoch: int) -> list[int]:
    """Return the order of the training rows in one epoch: random, yet with rows of the same tools in small runs.

    With one list of tools this is a plain shuffle. With many, rows that can share their prefix meet in a step: half of
    it is of one list, so that it mixes several. The same seed and epoch give the same order for the same rows per step,
    however these are cut into streams, so a resumed run goes on as planned, also on another number of devices.
    """
    generator, piece = random.Random(f"{seed} {epoch}"), max(1, plan.rows_per_step // 2)
    pieces = []
    for group in plan.groups:
        conversations = generator.sample(group, len(group))
        rows = [row for conversation in conversations for row in conversation]
        pieces += [rows[i : i + piece] for i in range(0, len(rows), piece)]
    generator.shuffle(pieces)
    return [row for rows in pieces for row in rows]


def cut_streams(plan: Plan, args: argparse.Namespace, epoch: int) -> list[list[int]]:
    """Return the rows of each stream of one epoch, step by step; within a step the devices take turns.

    What is left for the last step is spread evenly. With fewer rows than devices, some of its streams have no row.
    """
    order, streams, size = order_rows(plan, args.seed, epoch), [], plan.rows_per_step
    for rows in (order[i : i + size] for i in range(0, len(order), size)):
        count = plan.devices * math.ceil(len(rows) / (plan.rows * plan.devices))
        streams += [rows[len(rows) * i // count : len(rows) * (i + 1) // count] for i in range(count)]
    return streams


class StreamSampler:
    """The rows of one stream after the other, as a batch sampler of PyTorch's DataLoader.

    A stream without a row is given as the index after the last row, which stands for one that trains nothing.
    """

    def __init__(self, plan: Plan, args: argparse.Namespace, rows: int, find_epoch):
        self.plan, self.args, self.rows, self.find_epoch = plan, args, rows, find_epoch

    def __len__(self):
        return len(cut_streams(self.plan, self.args, epoch=0))

    def __iter__(self):
        return iter([stream or [self.rows] for stream in cut_streams(self.plan, self.args, self.find_epoch())])


def measure_batches(samples: list[Sample], plan: Plan, batches: list[list[int]]) -> list[int]:
    """Return how many tokens are computed for each batch, given as the indices of its rows; empty ones are left out."""
    batches = [[samples[i] for i in batch] for batch in batches if batch]
    if not plan.share_prefix:
        return [len(batch) * max(len(row.input_ids) for row in batch) for batch in batches]
    return [fill_up(count_tokens(batch), plan.lengths) for batch in batches]


def count_measured_epochs(args: argparse.Namespace, samples: list[Sample]) -> int:
    """Return of how many epochs a run is measured: of all that it begins, but not of hundreds."""
    steps, per_epoch = count_steps(args, samples)
    return min(MEASURED_EPOCHS, math.ceil(steps / per_epoch))


def measure_run(samples: list[Sample], plan: Plan, args: argparse.Namespace) -> list[int]:
    """Return how many tokens are computed for each stream of the epochs that are measured."""
    rows = [row._replace(input_ids=np.asarray(row.input_ids, dtype=">u4")) for row in samples]  # once for all epochs
    return [
        size
        for epoch in range(count_measured_epochs(args, samples))
        for size in measure_batches(rows, plan, cut_streams(plan, args, epoch))
    ]


def to_padded(plan: Plan, args: argparse.Namespace) -> Plan:
    """Return the plan of the same steps in ordinary batches of --batch_size."""
    return plan._replace(rows=args.batch_size, accumulation=args.gradient_accumulation_steps, share_prefix=False)


def plan_streams(samples: list[Sample], args: argparse.Namespace, engine: str) -> Plan:
    """Fuse accumulation steps into one stream as far as the flags' memory allows, for every stream of the run.

    A stream may hold batch_size x max_seq_length tokens: what the flags allow a padded batch to hold.
    """
    batch_size, steps = args.batch_size, args.gradient_accumulation_steps
    plan = Plan(batch_size, steps, group_rows(samples), share_prefix=args.share_prefix, devices=count_devices())
    if not args.share_prefix:
        return plan
    for fused in range(steps, 0, -1):
        if steps % fused == 0:
            plan = plan._replace(
                rows=batch_size * fused, accumulation=steps // fused, limit=batch_size * args.max_seq_length
            )
            sizes = measure_run(samples, plan, args)
            if fused == 1 or max(sizes) <= plan.limit:
                return plan._replace(lengths=choose_lengths(sizes)) if engine == "unsloth" else plan


def choose_lengths(sizes: list[int]) -> tuple[int, ...]:
    """Return the few lengths that streams are filled up to, because attention is compiled anew for each length.

    Quartiles, rounded up to the kernel's 128; a length less than a quarter below the next is not worth compiling.
    """
    sizes = sorted(sizes)
    quartiles = {-(-sizes[(len(sizes) - 1) * quarter // 4] // 128) * 128 for quarter in (1, 2, 3, 4)}
    lengths: list[int] = []
    for length in sorted(quartiles, reverse=True):
        if not lengths or length <= 0.75 * lengths[-1]:
            lengths.append(length)
    return tuple(reversed(lengths))


def divide_plan(plan: Plan, size: int, samples: list[Sample], args: argparse.Namespace) -> Plan:
    """Return the plan by which each of its streams is computed in parts of at most `size` rows.

    The parts have lengths of their own: filled up to those of whole streams they would need as much memory.
    """
    if not plan.lengths:
        return plan._replace(rows=size)
    sizes = [
        count_tokens(part)
        for epoch in range(count_measured_epochs(args, samples))
        for stream in cut_streams(plan, args, epoch)
        if stream
        for part in split_rows([samples[i] for i in stream], size)
    ]
    return plan._replace(rows=size, lengths=choose_lengths(sizes))


def to_batches(samples: list[Sample], plan: Plan) -> list[dict]:
    """Return the batches of samples for scoring, where order does not matter."""
    return [build_batch(part, plan) for part in split_rows(samples, plan.rows, plan.limit)]


def to_small_batches(samples: list[Sample], plan: Plan) -> list[dict]:
    """Return the batches on which losses of saved models are compared: small, as less memory may be left by then."""
    small = plan._replace(rows=min(plan.rows, READ_BACK_BATCH), lengths=())
    return to_batches(samples[:READ_BACK_ROWS], small)


def count_rows_per_step(args: argparse.Namespace) -> int:
    """Return how many rows an optimizer step has: the effective batch."""
    return args.batch_size * args.gradient_accumulation_steps * count_devices()


def count_steps(args: argparse.Namespace, train: list[Sample]) -> tuple[int, int]:
    """Return (optimizer steps of the whole run, of one epoch)."""
    per_epoch = math.ceil(len(train) / count_rows_per_step(args))
    return args.max_steps or args.num_epochs * per_epoch, per_epoch


def list_saves(args: argparse.Namespace, train: list[Sample]) -> list[int]:
    """Return the steps after which a run writes a checkpoint."""
    steps, per_epoch = count_steps(args, train)
    every = args.save_steps or per_epoch
    return [*range(every, steps, every), steps]


def count_checkpoints(args: argparse.Namespace, train: list[Sample], checkpoint: str | None = None) -> int:
    """Return how many checkpoints this run will have on the disk at once, at most, beside those that are there."""
    start = to_step(checkpoint) if checkpoint else 0
    written = sum(step > start for step in list_saves(args, train))
    # A new one is written before the oldest is removed, and the best is kept beside the newest.
    kept = args.save_total_limit + 1 + bool(args.metric_for_best) if args.save_total_limit else written
    return min(written, kept)


def show_plan(train: list[Sample], args: argparse.Namespace, plan: Plan) -> None:
    """Print how many tokens the first step computes, beside what padded batches would."""
    ways = plan, to_padded(plan, args)
    firsts = [cut_streams(way, args, epoch=0)[: way.accumulation * way.devices] for way in ways]
    rows = sum(map(len, firsts[0]))
    streams, batches = (measure_batches(train, way, first) for way, first in zip(ways, firsts))
    computed, padded = sum(streams), sum(batches)
    devices = f" on {plan.devices} devices" * (plan.devices > 1)
    if not plan.share_prefix:
        say(
            "plan",
            f"{plural(rows, 'row')} per step{devices} in {plural(len(batches), 'padded batch')} of about "
            f"{padded // len(batches):,} tokens",
        )
        return
    say(
        "plan",
        f"{plural(rows, 'row')} per step{devices} in {plural(len(streams), 'stream')} of about "
        f"{computed // len(streams):,} tokens instead of {plural(len(batches), 'batch')} of "
        f"{padded // len(batches):,} ({padded / computed:.1f} times fewer)",
    )


def count_trained(step: int, rows: int, rows_per_step: int) -> int:
    """Return how many rows are trained on up to a step; the last step of an epoch has what is left of the `rows`."""
    epochs, more = divmod(step, math.ceil(rows / rows_per_step))
    return epochs * rows + more * rows_per_step


def count_padded(args: argparse.Namespace, train: list[Sample], plan: Plan, steps: range) -> int:
    """Return how many tokens padded batches of --batch_size would have computed in these steps of the run."""
    padded, total, per_epoch = to_padded(plan, args), 0, count_steps(args, train)[1]
    for epoch in range(steps.start // per_epoch, -(-steps.stop // per_epoch)):
        made = (
            padded.accumulation * padded.devices * max(0, step - epoch * per_epoch)  # the last step may have fewer
            for step in (steps.start, min(steps.stop, (epoch + 1) * per_epoch))
        )
        total += sum(measure_batches(train, padded, cut_streams(padded, args, epoch)[slice(*made)]))
    return total


def hash_rows(samples: list[Sample]) -> str:
    """Return a SHA-256 over tokens and prompt lengths of the samples, in order."""
    found = hashlib.sha256()
    for row in samples:
        found.update(np.array([row.prompt_length, len(row.input_ids), *row.input_ids], dtype="<i8").tobytes())
    return found.hexdigest()
