"""Names that Transformers knows: optimizers and trackers, checked before a model is loaded."""

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import OptimizerNames

from tool_calling.terminal import UserError, suggest

CUDA_OPTIM = "adamw_torch_fused"  # on CUDA: a few launches for all weights of an adapter
FULL_CUDA_OPTIM = "adamw_8bit"  # a whole model on CUDA: the two moments of a weight take 2 bytes instead of 8


def find_optim(wanted: str | None, lora_rank: int, fsdp: bool, cuda: bool | None = None) -> str:
    """Return the optimizer `wanted`, or the default of this machine; with `cuda`, that on CUDA or on CPU.

    Bitsandbytes' optimizers cannot hold the moments of weights that --fsdp splits.
    """
    cuda = torch.cuda.is_available() if cuda is None else cuda
    whole = not lora_rank and not fsdp  # each GPU trains all weights of the model
    return wanted or ((FULL_CUDA_OPTIM if whole else CUDA_OPTIM) if cuda else "adamw_torch")


def check_optim(name: str) -> None:
    """Refuse an optimizer that Transformers does not know."""
    known = [optimizer.value for optimizer in OptimizerNames]
    if name not in known:
        raise UserError(f"--optim {name}: unknown to Transformers{suggest(name, known)}")


def check_report_to(name: str) -> None:
    """Refuse a tracker whose library is not installed."""
    known = ["none", "all", *get_available_reporting_integrations()]
    if name not in known:
        raise UserError(f"--report_to {name}: not installed, or unknown to Transformers; here: {', '.join(known)}")
