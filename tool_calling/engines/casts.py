"""An adapter's weights in fp32, cast to the compute type of mixed precision."""

from functools import partial

import torch


class CastTogether(torch.autograd.Function):
    """Copies of tensors in another type, made in a few launches; their gradients are cast back likewise."""

    @staticmethod
    def forward(ctx, dtype, *weights):
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, weights)
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients):
        found = [torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device) for gradient in gradients]
        torch._foreach_copy_(found, gradients)
        return None, *found


def cast_together(model) -> None:
    """Let each layer of Unsloth's decoder cast its adapter's weights at once: else each product casts its own.

    The numbers are the same. A small model launched a third of its kernels for these casts.
    """
    for layer in model.get_base_model().model.layers:
        found = (module for name, module in layer.named_modules() if ".lora_" in name)
        linears = [module for module in found if isinstance(module, torch.nn.Linear)]
        layer.forward = partial(run_with_copies, layer.forward, linears)


def run_with_copies(forward, linears: list, *inputs, **more):
    """Compute a layer with the weights of these modules in the type of autocast, where gradients are wanted."""
    weights, kind = [linear.weight for linear in linears], "cuda" if torch.cuda.is_available() else "cpu"
    if not (weights and torch.is_grad_enabled() and torch.is_autocast_enabled(kind)):
        return forward(*inputs, **more)
    try:
        for linear, copy in zip(linears, CastTogether.apply(torch.get_autocast_dtype(kind), *weights)):
            linear._parameters["weight"] = copy
        return forward(*inputs, **more)
    finally:
        for linear, weight in zip(linears, weights):
            linear._parameters["weight"] = weight
