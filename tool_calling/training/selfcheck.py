"""The self-check: the first rows of a run computed in one stream and one by one, and compared."""

import math
import sys
import time

import torch
from accelerate.utils import broadcast_object_list, gather_object

from tool_calling.engines.device import free_gpu, to_dtype
from tool_calling.engines.fsdp import is_split
from tool_calling.engines.graphs import make_room
from tool_calling.engines.losses import compute_gradient
from tool_calling.samples import Sample
from tool_calling.schedule import Schedule, choose_lengths
from tool_calling.streams import build_padded, build_stream, count_tokens
from tool_calling.terminal import plural, say, warn

CHECKED_ROWS = {"cpu": 4, "cuda": 8}  # compared at the start of each run; in 16 bits more rows average the rounding


def check_sharing(model, schedule: Schedule, engine: str) -> bool:
    """Compute the first rows of the run in a stream and one by one; print how they differ, return whether by rounding.

    Rounding changes gradients by less than 1e-4 in fp32. In 16 bits it changes them by less than 2 % as a rule, but by
    up to 11 % where a trained model's loss is near zero. A mask that is not used, or positions that run on, change the
    gradient of the embedded base by 180 % and more: hence a limit of 20 %.
    """
    start = time.perf_counter()
    count = min(CHECKED_ROWS.get(model.device.type, 8), schedule.layout.rows)  # no more than a stream of the run holds
    rows = [schedule.samples[i] for i in schedule.order(epoch=0)[:count]]
    try:
        rows, loss, gradient = compare_what_fits(model, rows, schedule.layout.lengths, engine)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # usually the compiler's, which only Unsloth's attention needs
        if engine != "unsloth" or schedule.devices > 1:
            raise
        reason = str(error).splitlines()[0]
        warn(f"attention with a shared prefix cannot be computed here ({reason}): sharing is switched off")
        return False
    if schedule.devices > 1:
        compute_lengths(model, schedule, engine)
    free_gpu()
    limit = 1e-4 if to_dtype(model.device.type) == torch.float32 else 0.2
    if not broadcast_object_list([gradient <= limit])[0]:  # all devices do as the first one finds
        change = f"the loss by {loss:.1e} and the gradient by {gradient:.1e} of its norm"
        warn(f"sharing the prefix changes {change}, more than rounding ({limit:.0e}): sharing is switched off")
        return False
    verdict = "rounding" if gradient <= 0.02 else "more than usual, as rounding can where the loss is near zero"
    change = f"the loss of {plural(len(rows), 'row')} by {loss:.1e} and their gradient by {gradient:.1e} of its norm"
    say("check", f"sharing changes {change}: {verdict} ({time.perf_counter() - start:.1f} s)")
    return True


def compare_what_fits(model, rows: list[Sample], lengths: tuple[int, ...], engine: str) -> tuple:
    """Return (rows compared, and what compare_sharing finds): half of the rows whenever memory runs out."""
    while True:
        try:
            return rows, *compare_sharing(model, rows, lengths, engine)
        except torch.OutOfMemoryError:
            if len(rows) == 1 or is_split(model):  # one device alone cannot try again
                raise
        make_room(model)  # not above, where the failed computation is still held
        rows = rows[: len(rows) // 2]
        lengths = choose_lengths([count_tokens(rows)]) if lengths else ()


def compare_sharing(model, rows: list[Sample], lengths: tuple[int, ...], engine: str) -> tuple[float, float]:
    """Return the relative difference of the loss, and of the gradient, between rows in one stream and one by one.

    One by one: as ordinary padded batches through the model's own causal attention, with nothing of the stream.
    """
    was_training = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # each way would draw masks of its own
            module.eval()
    shared = compute_gradient(model, [build_stream(rows, lengths)], engine)
    single = compute_gradient(model, [build_padded(rows[i : i + 2]) for i in range(0, len(rows), 2)], engine)
    model.train(was_training)
    loss = abs(shared[0] - single[0]) / max(abs(single[0]), sys.float_info.min)
    return loss, relative_difference(shared[1], single[1])


def relative_difference(gradient, other) -> float:
    """Return how much a gradient differs from another, as a share of the other's norm, over all devices' parts."""
    norms = gather_object([((gradient - other).norm().item(), other.norm().item())])
    return math.hypot(*(norm for norm, _ in norms)) / max(math.hypot(*(norm for _, norm in norms)), sys.float_info.min)


def compute_lengths(model, schedule: Schedule, engine: str) -> None:
    """Compute a stream of each length of the schedule, so that Unsloth's are recorded as CUDA graphs before training.

    On several GPUs later is too late: DistributedDataParallel ties the gradients to the CUDA stream on which it is
    built, and CUDA refuses to record what belongs to another. If memory runs out, nothing stays recorded.
    """
    model.train()
    shortest, fits = min(schedule.samples, key=lambda row: len(row.input_ids)), True  # no stream is shorter
    try:
        for length in schedule.layout.lengths:
            compute_gradient(model, [build_stream([shortest], (length,))], engine)
    except torch.OutOfMemoryError:
        fits = False
    if not fits:  # not above, where the failed computation is still held
        make_room(model)
