"""A model whose weights are split over all GPUs."""

from datetime import timedelta

import torch
from accelerate import PartialState
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from tool_calling.engines.hub import build_skeleton
from tool_calling.engines.start import to_dtype
from tool_calling.processes import PATIENCE, is_main
from tool_calling.terminal import UserError


def split_model(model):
    """Return the model with its weights split over all devices (FSDP2); they must be floats or stored as such.

    Each device gathers a layer when it computes it, and then lets it go. An adapter, which is small, stays whole on
    each device, and its gradients are averaged as those of a whole model would be (DDP, told to leave the rest alone).
    Without an adapter all weights are trained in fp32, and what belongs to them is split like them: gradients, which
    FSDP averages, and the optimizer's moments. What is saved is whole, and what is loaded may be: so checkpoints,
    resuming and results are those of a run without FSDP (up to rounding: norms, too, are then computed in 16 bits).
    """
    if any(not weight.is_floating_point() for weight in model.parameters()):
        raise UserError(
            "--fsdp splits floating-point weights, and those of --model_id are quantised; use the 16-bit original"
        )
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=PATIENCE))
    # After forward too, or the one device that saves a checkpoint after an evaluation would let go alone.
    how = {"mesh": init_device_mesh(state.device.type, (state.num_processes,)), "reshard_after_forward": True}
    adapter = isinstance(model, PeftModel)
    if adapter:
        how["ignored_params"] = {parameter for parameter in model.parameters() if parameter.requires_grad}
        for parameter in how["ignored_params"]:
            parameter.data = parameter.data.to(state.device)
        model._ddp_params_and_buffers_to_ignore = [
            name for name, weight in model.named_parameters() if not weight.requires_grad
        ]
    else:
        how["mp_policy"] = MixedPrecisionPolicy(to_dtype(state.device.type), torch.float32)  # computed in, averaged in
        model.register_load_state_dict_pre_hook(split_weights)
    for module in (*(model.get_base_model() if adapter else model).model.layers, model):
        fully_shard(module if adapter else module.float(), **how)
    return model


def held_part(tensor):
    """Return the part of a split tensor that this device holds; of any other the whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def split_as(weight, value):
    """Return a whole tensor split over the devices as a weight of its shape is; others as they are."""
    if not isinstance(weight, DTensor) or weight.shape != value.shape:
        return value
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)  # each has the whole


def split_weights(model, weights: dict, *_) -> None:
    """Split whole weights as the model's are, before it loads them (a hook of load_state_dict)."""
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name in weights:
            weights[name] = split_as(weight, weights[name])


def gather_whole(state):
    """Return a state of split tensors with each of them whole, on the CPU of the first process; all must call this."""

    def gather(tensor):
        whole = tensor.full_tensor()
        return whole.cpu() if is_main() else None

    return tree_map_only(DTensor, gather, state)


def gather_weights(model) -> dict:
    """Return a split model's weights by name, as gather_whole does; one that has two names stands there once."""
    again = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return gather_whole({name: value for name, value in model.state_dict().items() if name not in again})


def gather_model(model, dtype, trust: bool):
    """Return a split model whole, in `dtype` and on the CPU, on the first process; all must call this."""
    weights = gather_weights(model)
    if not is_main():
        return None
    whole = build_skeleton(model.config, trust)
    whole.load_state_dict(weights, strict=False, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole.to(dtype)
