"""Models loaded by plain Transformers, with an adapter if there is one."""

import argparse

import torch
from accelerate.utils import get_max_memory
from peft import PeftModel
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.masking_utils import sdpa_mask

from tool_calling.engines.attention import attend_in_blocks
from tool_calling.engines.hub import load_config
from tool_calling.engines.start import free_gpu, to_dtype
from tool_calling.files import is_disk_full
from tool_calling.terminal import UserError, list_first, warn


def load_base(
    model_id: str, load_in_4bit: bool, trust: bool = False, dtype=None, place: str | None = None, storage=None
):
    """Return a model with plain Transformers, in 4 bits if asked, on the GPU if there is one or where `place` says.

    4-bit numbers are held as bytes, or several of them in a number of the type `storage`. Here as in every load,
    weights are read from safetensors alone, because a pickle can run code.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or to_dtype(device)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )
    AttentionInterface.register("blocks", attend_in_blocks)
    AttentionMaskInterface.register("blocks", sdpa_mask)
    options = {"quantization_config": four_bit} if load_in_4bit else {}  # None would undo that of the folder
    if place == "auto" and getattr(load_config(model_id, trust=trust), "quantization_config", None):
        place = device  # Transformers counts on far too little room, and would leave a part of it on the CPU
    if place == "auto":  # of the GPUs' free memory a quarter is left, for what answers need
        free_gpu()  # or what PyTorch keeps of the model before this one would not count as free
        room = {name: int(0.75 * size) if isinstance(name, int) else size for name, size in get_max_memory().items()}
        options |= {"max_memory": room}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            model_id,
            dtype=dtype,
            attn_implementation="blocks",
            device_map=place or device,
            use_safetensors=True,
            trust_remote_code=trust,
            output_loading_info=True,
            **options,
        )
    except (OSError, RuntimeError) as error:
        if is_disk_full(error) or isinstance(error, RuntimeError) and "mismatched" not in str(error):
            raise
        raise UserError(f"{model_id}: its weights cannot be loaded: {str(error).splitlines()[0]}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{model_id}: has no weights for {list_first(missing, 3)}; download it again")
    for module in model.modules():
        # On CPU, the first inference makes bitsandbytes repack 4-bit weights for bf16, in training from then on too.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_adapter(model, adapter: str):
    """Return a model with its adapter, each part where it is.

    PEFT would spread it anew by what is free now, and so count weights twice that are there already.
    """
    places = getattr(model, "hf_device_map", {})
    return PeftModel.from_pretrained(
        model, adapter, device_map={f"base_model.model.{name}".rstrip("."): place for name, place in places.items()}
    )


def warn_of_frozen_experts(model) -> None:
    """Say if the experts of a mixture get no adapter: PEFT knows under what names only for some kinds of models."""
    experts = [weight.requires_grad for name, weight in model.named_parameters() if ".experts." in name]
    if experts and not any(experts):
        warn(f"the experts of this {model.config.model_type} get no adapter: the layers beside them alone are trained")


def find_place(args: argparse.Namespace, four_bit: bool = False) -> str:
    """Return the device map of a trained model: all GPUs and, for what they cannot hold, the machine's memory.

    In 16 bits it may be too large for the GPU that trained it in 4. Weights in 4 bits must be on GPUs; a model that is
    saved so is loaded on one (see load_base).
    """
    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if four_bit and not args.fsdp else "auto"


def warn_if_spread(model) -> None:
    """Say that a part of a model is not on the GPU."""
    places = set(getattr(model, "hf_device_map", {}).values())
    if "cpu" in places and len(places) > 1:
        warn(
            "the 16-bit model is larger than the GPU's memory: a part of it stays in the machine's, and answers take "
            "longer; a smaller --eval_samples writes fewer"
        )
