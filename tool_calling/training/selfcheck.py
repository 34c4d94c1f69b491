"""The self-check: the first rows of a run computed in one stream and one by one, and compared."""

import math
import sys
import time
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list, gather_object

from tool_calling.engines.device import free_gpu, to_dtype
from tool_calling.engines.fsdp import is_split
from tool_calling.engines.graphs import make_room
from tool_calling.engines.losses import compute_gradient
from tool_calling.samples import Sample
from tool_calling.schedule import Schedule, choose_lengths
from tool_calling.streams import build_padded, build_stream, count_tokens, to_tree
from tool_calling.terminal import UserError, plural, say, warn

CHECKED_ROWS = 4  # compared at the start of each run
FP32_LIMIT = 1e-4  # of the gradient's norm, and of the largest loss of a token: rounding in fp32 is less
# In 16 bits rounding is measured: between the same rows alone in streams and as padded batches. Sharing may change as
# much, so many times over; less than SURE (see Difference) is rounding anyway.
MARGIN, SURE = 3, (math.inf, 0.1, 0.1)
# At which losses are compared: a model that is trained already has next to none, and their gradient is all rounding.
TEMPERATURE = 10.0


class Difference(NamedTuple):
    """How two ways to compute the same rows differ; in losses at TEMPERATURE."""

    loss: float  # of the sum, as a share of it
    token: float  # of the token that differs the most, in nats
    gradient: float  # as a share of its norm


def check_sharing(model, schedule: Schedule, engine: str, flash: bool = False) -> bool:
    """Compute the first rows of the run in a stream and one by one; print how they differ, return whether by rounding.

    A mask that is not used, or positions that run on, change the gradient of the embedded base by 180 % and more; a
    single block that one row sees of another changes the losses of its tokens.
    """
    start = time.perf_counter()
    count = min(CHECKED_ROWS, schedule.layout.rows)  # no more than a stream of the run holds
    rows = [schedule.samples[i] for i in schedule.order(epoch=0)[:count]]
    try:
        rows, change, limit = compare_what_fits(model, rows, schedule.layout.lengths, engine)
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # usually the compiler's, which only Unsloth's attention needs
        if engine != "unsloth" or not flash and (schedule.devices > 1 or not isinstance(error, RuntimeError)):
            raise
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # after a fault of the GPU this fails, too: nothing can go on
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return switch_off(f"attention with a shared prefix cannot be computed here ({reason})", flash)
    free_gpu()
    changes = f"by {change.loss:.1e} and {{}} gradient by {change.gradient:.1e} of its norm"
    within = change.gradient <= limit.gradient and change.token <= limit.token
    if not broadcast_object_list([within])[0]:  # all devices do as the first one finds
        one = f" (that of one token by {change.token:.1e} nats)" if change.token > limit.token else ""
        changed = f"the loss{one} {changes.format('the')}"
        return switch_off(f"sharing the prefix changes {changed}, more than rounding ({limit.gradient:.0e})", flash)
    verdict = f"rounding, of which {limit.gradient:.1e} is allowed here" if limit.gradient > FP32_LIMIT else "rounding"
    changed = f"the loss of {plural(len(rows), 'row')} {changes.format('their')}"
    say("check", f"sharing changes {changed}: {verdict} ({time.perf_counter() - start:.1f} s)")
    return True


def switch_off(reason: str, flash: bool) -> bool:
    """Say why sharing is switched off, and return False; end the run if --flash_attention may be why."""
    if flash:
        raise UserError(f"--flash_attention: {reason}; leave it out")
    warn(f"{reason}: sharing is switched off")
    return False


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


def compare_sharing(model, rows: list[Sample], lengths: tuple[int, ...], engine: str) -> tuple[Difference, Difference]:
    """Return (how rows in one stream differ from rows one by one, how much they may).

    One by one: as ordinary padded batches through the model's own causal attention, with nothing of the stream.
    """
    rows = [row for row, _ in to_tree(rows)]  # as the stream has them, so that losses stand in one order
    was_training = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # each way would draw masks of its own
            module.eval()

    def compute(*batches):
        return compute_gradient(model, [batch | {"temperature": TEMPERATURE} for batch in batches], engine)

    shared = compute(build_stream(rows, lengths))
    single = compute(*(build_padded(rows[i : i + 2]) for i in range(0, len(rows), 2)))
    limit = Difference(math.inf, FP32_LIMIT * max(1.0, single[0].abs().max().item()), FP32_LIMIT)
    if to_dtype(model.device.type) != torch.float32:
        alone = compute(*(build_stream([row], lengths) for row in rows))
        limit = Difference(*(max(sure, MARGIN * noise) for sure, noise in zip(SURE, compare(alone, single))))
    model.train(was_training)
    return compare(shared, single), limit


def compare(found: tuple, other: tuple) -> Difference:
    """Return how (losses, gradient) differ from others."""
    loss = abs(found[0].sum() - other[0].sum()).item() / max(abs(other[0].sum().item()), sys.float_info.min)
    return Difference(loss, (found[0] - other[0]).abs().max().item(), relative_difference(found[1], other[1]))


def relative_difference(gradient, other) -> float:
    """Return how much a gradient differs from another, as a share of the other's norm, over all devices' parts."""
    norms = gather_object([((gradient - other).norm().item(), other.norm().item())])
    return math.hypot(*(norm for norm, _ in norms)) / max(math.hypot(*(norm for _, norm in norms)), sys.float_info.min)
