"""The rows that --method grpo trains on: those that the start surely answers right are left out, but for a share.

Answers to such a row are mostly all right. Their rewards are equal then, and nothing is learned from them.
"""

import math
import time
from dataclasses import replace

from accelerate.utils import gather_object

from tool_calling.engines.answers import generate_answers
from tool_calling.engines.losses import score_batch
from tool_calling.rewards import rate_answer
from tool_calling.samples import Sample, is_in_share
from tool_calling.terminal import UserError, say
from tool_calling.training.policy import PolicyTrainer

SURE = 0.95  # probability of an answer: of eight drawn, all are this one in two groups of three


def leave_out(trainer: PolicyTrainer, share: float, former: dict | None) -> dict:
    """Let a trainer do without rows that its model, the start of the run, surely answers right; print and return which.

    A row that is trained in several editions is right if it is so in all of them.

    Args:
        share: of these rows, chosen by hash, that stays.
        former: what this returned at the start of a run that goes on.
    Returns: how many "rows" there are, are "right" and "trained"; and those "left_out", bits of a hexadecimal number.
    """
    schedule, start = trainer.schedule, time.perf_counter()
    rows = schedule.samples[: schedule.rows]
    if former is None:
        right = find_right(trainer)
        wrong = {name_turn(sample) for index, sample in enumerate(schedule.samples) if index not in right}
        right = [name_turn(sample) not in wrong for sample in rows]
        out = [hit and not is_in_share(["hard", s.request, s.completion], share) for hit, s in zip(right, rows)]
        bits = sum(1 << index for index, left in enumerate(out) if left)
        counts = {"rows": len(rows), "right": sum(right), "trained": len(rows) - sum(out)}
        former = {**counts, "left_out": f"{bits:x}"}
    bits = int(former["left_out"], 16)
    kept = {name_turn(sample) for index, sample in enumerate(rows) if not bits >> index & 1}
    if not kept:
        raise UserError(f"--hard_rows {share:g}: the model is sure of all {len(rows):,} training rows")
    found = f"{former['right']:,} of {len(rows):,} rows are surely right already"
    seconds = f" ({time.perf_counter() - start:.1f} s)"
    say("rows", f"{found}: {bits.bit_count():,} of them are left out, and {len(kept):,} rows are trained{seconds}")
    samples = [sample for sample in schedule.samples if name_turn(sample) in kept]
    trainer.take(replace(schedule, samples=samples, groups=None))
    return former


def name_turn(sample: Sample) -> tuple[int, int]:
    """Return what the editions of a sample have in common."""
    return sample.row, sample.turn


def find_right(trainer: PolicyTrainer) -> set[int]:
    """Return the indices of the training samples that the model of a trainer surely answers right, by all its devices.

    A forward pass finds those that it reproduces token for token, and how likely that is when answers are drawn. Others
    may be right all the same, as most answers without a call are: to these it answers.
    """
    model, accelerator, samples = trainer.model, trainer.accelerator, trainer.schedule.samples
    index_of = {id(sample): index for index, sample in enumerate(samples)}
    right: list[Sample] = []
    others: list[Sample] = []
    layout = trainer.scoring_layout
    for part in layout.split(samples)[accelerator.process_index :: accelerator.num_processes]:
        losses, hits = score_batch(model, layout.build(part), trainer.engine)
        for sample, loss, hit in zip(part, losses.tolist(), hits.tolist()):
            if not hit:
                others.append(sample)
            elif loss < -math.log(SURE):
                right.append(sample)
    if others:
        answers = generate_answers(model, trainer.processing_class, others, None, trainer.max_new_tokens)
        right += [sample for sample, answer in zip(others, answers) if rate_answer(answer, sample).exact]
    model.train()
    return set(gather_object([index_of[id(sample)] for sample in right]))
