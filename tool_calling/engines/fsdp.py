"""A model whose weights are split over all GPUs (FSDP2), and its parts gathered again."""

from datetime import timedelta

import torch
from accelerate import PartialState
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from tool_calling.engines.device import to_dtype
from tool_calling.engines.hub import build_skeleton
from tool_calling.processes import PATIENCE, is_main
from tool_calling.terminal import UserError


def is_split(model) -> bool:
    """Return whether split_model has split the model's weights."""
    return isinstance(model, FSDPModule)


def split_model(model):
    """Return the model with its weights split over all devices; the weights must be floats or stored as floats.

    Each device gathers a layer when it computes it and then lets it go. An adapter, which is small, stays whole on each
    device, and its gradients are averaged as those of a whole model would be. Without an adapter all weights are
    trained in fp32, and FSDP splits gradients and optimizer moments too. Checkpoints and results are saved whole, and
    equal those of a run without FSDP up to rounding (norms are computed in 16 bits).
    """
    if any(not weight.is_floating_point() for weight in model.parameters()):
        reason = "--fsdp splits floating-point weights, and those of --model_id are quantised"
        raise UserError(f"{reason}; use the 16-bit original")
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=PATIENCE))
    # Resharding after forward as well: otherwise the one device that saves after an evaluation would reshard alone.
    how = {"mesh": init_device_mesh(state.device.type, (state.num_processes,)), "reshard_after_forward": True}
    adapter = isinstance(model, PeftModel)
    if adapter:
        how["ignored_params"] = {parameter for parameter in model.parameters() if parameter.requires_grad}
        for parameter in how["ignored_params"]:
            parameter.data = parameter.data.to(state.device)
    else:
        how["mp_policy"] = MixedPrecisionPolicy(to_dtype(state.device.type), torch.float32)  # computed in, averaged in
        model.register_load_state_dict_pre_hook(split_weights)
    for module in (*(model.get_base_model() if adapter else model).model.layers, model):
        fully_shard(module if adapter else module.float(), **how)
    return model


def held_part(tensor):
    """Return the part of a split tensor that this device holds, or the whole of any other tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_as(weight, value):
    """Return a whole tensor split over the devices as a weight of its shape is; others unchanged."""
    if not isinstance(weight, DTensor) or weight.shape != value.shape:
        return value
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)  # each has the whole


def split_weights(model, weights: dict, *_) -> None:
    """Split whole weights as the model's are, before it loads them (a hook of load_state_dict)."""
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name in weights:
            weights[name] = split_as(weight, weights[name])


def gather_whole(state):
    """Return a state with its split tensors whole, on the CPU of the first process. All processes must call this."""

    def gather(tensor):
        whole = tensor.full_tensor()
        return whole.cpu() if is_main() else None

    return tree_map_only(DTensor, gather, state)


def gather_weights(model) -> dict:
    """Return a split model's weights by name, as gather_whole does; a weight with two names is there once."""
    again = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return gather_whole({name: value for name, value in model.state_dict().items() if name not in again})


def gather_model(model, dtype, trust: bool):
    """Return a split model whole, in `dtype` and on the CPU, on the first process. All processes must call this."""
    weights = gather_weights(model)
    if not is_main():
        return None
    whole = build_skeleton(model.config, trust)
    whole.load_state_dict(weights, strict=False, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole.to(dtype)
