"""Which training samples are in which stream of which step of which epoch, and how long the streams are."""

import hashlib
import math
import random
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from tool_calling.processes import count_devices
from tool_calling.samples import Sample, choose
from tool_calling.streams import Layout, count_tokens, fill_up, split_rows, to_tree
from tool_calling.terminal import plural, say

MEASURED_EPOCHS = 50  # a run of more epochs is planned by the streams of so many
READ_BACK_ROWS = 64  # held-out samples on which the losses of merged model and adapter are compared
READ_BACK_LOGITS = 25_000_000  # held of them at once: 100 MB, with Qwen3's vocabulary those of 4 answers of 40 tokens


@dataclass(frozen=True)
class Batching:
    """How many samples are computed together, and for how long: the flags of the same names."""

    batch_size: int
    gradient_accumulation_steps: int
    max_seq_length: int
    share_prefix: bool
    num_epochs: int
    max_steps: int | None
    seed: int
    num_generations: int | None = None
    hard_rows: float | None = None  # known before training; which rows these are is not


def group_samples(samples: list[Sample]) -> list[list[list[int]]]:
    """Return indices of samples: groups (prompts share half their tokens) of conversations (the same row) of turns.

    Each edition has its own groups.
    """
    index_of = {id(sample): i for i, sample in enumerate(samples)}
    groups: list[dict[int, list[int]]] = []
    for _, edition in groupby(samples, lambda sample: sample.edition):
        for sample, shared in to_tree([*edition]):  # the first of an edition shares nothing
            if not groups or shared < sample.prompt_length / 2:
                groups.append({})
            groups[-1].setdefault(sample.row, []).append(index_of[id(sample)])
    return [list(group.values()) for group in groups]


@dataclass(frozen=True)
class Schedule:
    """The steps of a run: `batch_size` x `accumulation_steps` x `devices` samples each, in streams of `layout.rows`.

    The same samples, seed and epoch give the same order for the same samples per step, however a step is cut into
    streams. So a resumed run goes on as planned, also on another number of devices. Where samples are in several
    editions, equally many in each and one after the other, each epoch takes the next edition, and begins anew after the
    last.
    """

    samples: list[Sample]
    batch_size: int  # samples of a padded micro-batch, as the flag says
    accumulation_steps: int
    layout: Layout
    epochs: int = 1
    max_steps: int | None = None
    seed: int = 0
    devices: int = 1
    answers: int = 1  # trained for each sample: its reference, or with --method grpo several that the model draws
    groups: list[list[list[int]]] | None = None  # see group_samples; computed once

    def __post_init__(self):
        if self.groups is None:
            object.__setattr__(self, "groups", group_samples(self.samples))

    @property
    def editions(self) -> int:
        return self.samples[-1].edition + 1 if self.samples else 1

    @property
    def rows(self) -> int:  # samples of an epoch
        return len(self.samples) // self.editions

    @property
    def rows_per_step(self) -> int:  # the effective batch, on all devices
        return self.batch_size * self.accumulation_steps * self.devices

    @property
    def streams_per_step(self) -> int:  # on each device
        return self.batch_size * self.accumulation_steps // self.layout.rows

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.rows_per_step)

    @property
    def steps(self) -> int:  # of the whole run
        return self.max_steps or self.epochs * self.steps_per_epoch

    def order(self, epoch: int) -> list[int]:
        """Return the order of the samples in one epoch: random, yet with samples of the same tools in small runs.

        With one list of tools this is a plain shuffle. With many, samples that can share their prefix meet in a step:
        half of it is of one list, so that it mixes several; but no more than three, if each has as many samples.
        """
        generator, piece = random.Random(f"{self.seed} {epoch}"), max(1, self.rows_per_step // 2)
        pieces, edition = [], epoch % self.editions
        for group in (group for group in self.groups if self.samples[group[0][0]].edition == edition):
            rows = [row for conversation in generator.sample(group, len(group)) for row in conversation]
            count = max(1, len(rows) // piece)  # a step could mix many pieces that are shorter than half of it
            pieces += [rows[len(rows) * i // count : len(rows) * (i + 1) // count] for i in range(count)]
        generator.shuffle(pieces)
        return [row for rows in pieces for row in rows]

    def streams(self, epoch: int) -> list[list[int]]:
        """Return the samples of each stream of one epoch, step by step; within a step the devices take turns.

        What is left for the last step is spread evenly. With fewer samples than devices, some of its streams are empty.
        """
        order, streams, size = self.order(epoch), [], self.rows_per_step
        for rows in (order[i : i + size] for i in range(0, len(order), size)):
            count = self.devices * math.ceil(len(rows) / (self.layout.rows * self.devices))
            streams += [rows[len(rows) * i // count : len(rows) * (i + 1) // count] for i in range(count)]
        return streams

    def measure(self, streams: list[list[int]]) -> list[int]:
        """Return how many tokens are computed for each stream that has samples; drawn answers are as long as theirs."""
        parts = [[self.samples[i] for i in stream] * self.answers for stream in streams if stream]
        if not self.layout.share_prefix:
            return [len(part) * max(len(sample.input_ids) for sample in part) for part in parts]
        return [fill_up(count_tokens(part), self.layout.lengths) for part in parts]

    def measure_run(self) -> list[int]:
        """Return how many tokens are computed for each stream of the run, of at most MEASURED_EPOCHS."""
        arrays = [sample._replace(input_ids=np.asarray(sample.input_ids, dtype=">u4")) for sample in self.samples]
        fast = replace(self, samples=arrays)  # converted once for all epochs
        return [size for epoch in self._measured_epochs() for size in fast.measure(self.streams(epoch))]

    def _measured_epochs(self) -> range:
        return range(min(MEASURED_EPOCHS, math.ceil(self.steps / self.steps_per_epoch)))

    def padded(self) -> "Schedule":
        """Return the same steps in ordinary batches of --batch_size."""
        return replace(self, layout=Layout(self.batch_size, share_prefix=False))

    def fuse(self, limit: float, fill: bool) -> "Schedule":
        """Return the schedule with as many accumulation steps in one stream as `limit` tokens allow in every step.

        With `fill`, the streams get a few lengths to be filled up to (see choose_lengths).
        """
        for fused in range(self.accumulation_steps, 0, -1):
            if self.accumulation_steps % fused == 0:
                planned = replace(self, layout=Layout(self.batch_size * fused, limit=limit))
                sizes = planned.measure_run()
                if max(sizes) <= limit or fused == 1:
                    break
        return replace(planned, layout=replace(planned.layout, lengths=choose_lengths(sizes))) if fill else planned

    def divide(self, size: int) -> Layout:
        """Return the layout that computes each stream in parts of at most `size` samples.

        The parts have lengths of their own: filled up to those of whole streams they would need as much memory.
        """
        if not self.layout.lengths:
            return replace(self.layout, rows=size)
        streams = (stream for epoch in self._measured_epochs() for stream in self.streams(epoch) if stream)
        parts = (part for stream in streams for part in split_rows([self.samples[i] for i in stream], size))
        return replace(self.layout, rows=size, lengths=choose_lengths([*map(count_tokens, parts)]))

    def digest(self) -> str:
        """Return a SHA-256 over tokens and prompt lengths of the samples, in order."""
        found = hashlib.sha256()
        for sample in self.samples:
            numbers = [sample.prompt_length, len(sample.input_ids), *sample.input_ids]
            found.update(np.array(numbers, dtype="<i8").tobytes())
        return found.hexdigest()

    def count_samples(self, step: int) -> int:
        """Return how many samples are trained on up to a step; the last step of an epoch has what is left."""
        epochs, more = divmod(step, self.steps_per_epoch)
        return epochs * self.rows + more * self.rows_per_step

    def count_tokens(self, steps: range) -> int:
        """Return how many tokens are computed in these steps of the run."""
        total, per_epoch, size = 0, self.steps_per_epoch, self.streams_per_step * self.devices
        for epoch, inside in groupby(steps, lambda step: step // per_epoch):
            inside = [step % per_epoch for step in inside]  # the last step of an epoch may have fewer streams
            total += sum(self.measure(self.streams(epoch)[inside[0] * size : (inside[-1] + 1) * size]))
        return total

    def list_saves(self, every: int | None) -> list[int]:
        """Return the steps after which a checkpoint is written: each `every` steps (None: each epoch), and the last."""
        every = every or self.steps_per_epoch
        return [*range(every, self.steps, every), self.steps]


def plan_schedule(samples: list[Sample], batching: Batching, engine: str) -> Schedule:
    """Return which samples are computed together in which step: streams as long as the flags allow a padded batch.

    For Unsloth, whose attention is compiled for each length, they get a few lengths to be filled up to.
    """
    size, accumulation = batching.batch_size, batching.gradient_accumulation_steps
    run = {"epochs": batching.num_epochs, "max_steps": batching.max_steps, "seed": batching.seed}
    run["answers"] = batching.num_generations or 1
    layout = Layout(size, batching.share_prefix)
    schedule = Schedule(samples, size, accumulation, layout, devices=count_devices(), **run)
    return schedule.fuse(size * batching.max_seq_length, engine == "unsloth") if batching.share_prefix else schedule


class StreamSampler:
    """The batch sampler that gives PyTorch's DataLoader one stream after the other.

    In place of an empty stream it gives the index after the last sample, that of one that trains nothing.
    """

    def __init__(self, schedule: Schedule, find_epoch):
        self.schedule, self.find_epoch = schedule, find_epoch

    def __len__(self):
        return len(self.schedule.streams(epoch=0))

    def __iter__(self):
        empty = [len(self.schedule.samples)]
        return iter([stream or empty for stream in self.schedule.streams(self.find_epoch())])


def choose_lengths(sizes: list[int]) -> tuple[int, ...]:
    """Return the few lengths that streams are filled up to, because attention is compiled anew for each length.

    Quartiles, rounded up to the kernel's 128; a length less than a quarter below the next is not worth compiling.
    """
    sizes = sorted(sizes)
    quartiles = [sizes[(len(sizes) - 1) * quarter // 4] for quarter in (4, 3, 2, 1)]
    lengths: list[int] = []
    for length in (math.ceil(size / 128) * 128 for size in quartiles):
        if not lengths or length <= 0.75 * lengths[-1]:
            lengths.append(length)
    return tuple(reversed(lengths))


def build_small_batches(samples: list[Sample], layout: Layout, vocabulary: int) -> list[dict]:
    """Return the batches on which losses of saved models are compared: small, as little memory may be left."""
    small = replace(layout, rows=min(layout.rows, max(1, READ_BACK_LOGITS // (40 * vocabulary))), lengths=())
    return small.batch(choose(samples, READ_BACK_ROWS))


def show_plan(schedule: Schedule) -> None:
    """Print how many tokens the first step computes, beside what padded batches would."""
    streams, batches = (
        plan.measure(plan.streams(epoch=0)[: plan.streams_per_step * plan.devices])
        for plan in (schedule, schedule.padded())
    )
    devices = f" on {schedule.devices} devices" if schedule.devices > 1 else ""
    step = f"{plural(min(schedule.rows, schedule.rows_per_step), 'row')} per step{devices}"
    step += f", {schedule.answers} answers to each," if schedule.answers > 1 else ""
    kind = "stream" if schedule.layout.share_prefix else "padded batch"
    text = f"{step} in {plural(len(streams), kind)} of about {sum(streams) // len(streams):,} tokens"
    if schedule.layout.share_prefix:
        text += f" instead of {plural(len(batches), 'batch')} of {sum(batches) // len(batches):,}"
        text += f" ({sum(batches) / sum(streams):.1f} times fewer)"
    say("plan", text)


def show_cost(schedule: Schedule, plain: list[Sample]) -> None:
    """Print how many tokens an epoch of all editions computes, beside one of the rows as they are."""
    layout = replace(schedule.layout, lengths=())
    plans = (replace(schedule, layout=layout), replace(schedule, layout=layout, samples=plain, groups=None))
    sizes = [sum(sum(plan.measure(plan.streams(epoch))) for epoch in range(plan.editions)) for plan in plans]
    tokens, before = (size // plan.editions for size, plan in zip(sizes, plans))
    say("", f"with --augment an epoch computes {tokens:,} tokens instead of {before:,} ({tokens / before:.2f} times)")
