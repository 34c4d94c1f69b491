"""The device of a run: its compute type, its memory, and the group of processes that share the work."""

import gc
import os

import torch
import torch.distributed as distributed
from torch.distributed.tensor import DTensor

from tool_calling.processes import GROUP, is_main
from tool_calling.terminal import say


def to_dtype(device: str) -> torch.dtype:
    """Return the compute type of a device: bf16 where a GPU computes it, fp16 on older GPUs, fp32 on CPU."""
    if device != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def autocast(model):
    """Return the mixed-precision context that the trainer uses too."""
    dtype = to_dtype(model.device.type)
    return torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)


def is_on_one_gpu(model) -> bool:
    """Return whether all weights of a model are on one GPU."""
    devices = {weight.device for weight in model.parameters()}
    return len(devices) == 1 and devices.pop().type == "cuda"


def free_gpu() -> None:
    """Give GPU memory that nothing holds any more back to the driver, for other processes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def report_gpu() -> None:
    """Print the GPU's name and its peak memory; nothing on CPU."""
    if torch.cuda.is_available():
        name, total = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 2**30
        peak = torch.cuda.max_memory_reserved() / 2**30
        say("gpu", f"{name}, {total:.1f} GiB; {peak:.2f} GiB reserved at peak ({peak / total:.1%} of the card)")


def list_shared(weights: list) -> list:
    """Return those of the weights of which each of several devices has a copy; none on one device."""
    return [weight for weight in weights if not isinstance(weight, DTensor)] if distributed.is_initialized() else []


def begin_alike(weights: list) -> None:
    """Give all devices the first one's values of weights."""
    for weight in list_shared(weights):
        distributed.broadcast(weight.data, 0)


def join_gradients(weights: list):
    """Return a copy of the gradients of weights as one tensor [numbers]."""
    gradients = (torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights)
    return torch.cat([gradient.flatten() for gradient in gradients])


def set_gradients(weights: list, together) -> None:
    """Give weights the gradients that join_gradients has joined."""
    for weight, gradient in zip(weights, together.split([weight.numel() for weight in weights])):
        weight.grad = gradient.view_as(weight)


def average_gradients(weights: list) -> None:
    """Replace the gradients of weights by their mean over all devices; FSDP has averaged those that it has split.

    DistributedDataParallel would exchange them while they are computed. But of a replayed CUDA graph they come all at
    once, and then they are exchanged faster as one tensor than handled one by one.
    """
    weights = list_shared(weights)
    if weights:
        together = join_gradients(weights)
        distributed.all_reduce(together)
        set_gradients(weights, together / distributed.get_world_size())


def leave_group() -> bool:
    """End the work that several processes share; return whether this process goes on alone."""
    main = is_main()
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if main:  # otherwise its libraries would wait for the others
        for name in GROUP:
            os.environ.pop(name, None)
    return main
