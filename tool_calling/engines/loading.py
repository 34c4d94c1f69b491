"""Models loaded by plain Transformers, with their adapters."""

import contextlib

import torch
from accelerate.utils import get_max_memory
from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tool_calling.engines.attention import BLOCKS
from tool_calling.engines.compat import keep_4_bit_layout
from tool_calling.engines.device import free_gpu, to_dtype
from tool_calling.engines.hub import load_config
from tool_calling.engines.reach import takes_sdpa
from tool_calling.files import is_disk_full
from tool_calling.terminal import UserError, list_first, warn

TOKEN_ROWS = "trainable_tokens_delta"  # ends the name of an adapter's own rows of an embedding


def load_base(
    model_id: str, load_in_4bit: bool, trust: bool = False, dtype=None, place: str | None = None, storage=None
):
    """Return a model with plain Transformers, in 4 bits if asked, on the GPU if there is one or where `place` says.

    Its `unknown_weights` are those of the folder that it has no place for, by name.
    Weights are read from safetensors alone, here and in every load, because a pickle can run code.

    Args:
        place: a device map; "auto" leaves a quarter of the GPUs' free memory for what answers need.
        storage: the type as which 4-bit numbers are held; bytes by default.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or to_dtype(device)
    options = {"dtype": dtype, "device_map": place or device, "trust_remote_code": trust, "use_safetensors": True}
    if load_in_4bit:  # None would undo the quantisation of the folder
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=storage,
        )
    if place == "auto" and getattr(load_config(model_id, trust=trust), "quantization_config", None):
        options["device_map"] = device  # Transformers would count on too little room and leave a part on the CPU
    elif place == "auto":
        free_gpu()  # otherwise memory that PyTorch keeps of the model before would not count as free
        room = get_max_memory().items()
        options["max_memory"] = {name: int(0.75 * size) if isinstance(name, int) else size for name, size in room}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            model_id, attn_implementation=BLOCKS, output_loading_info=True, **options
        )
    except (OSError, RuntimeError) as error:
        if is_disk_full(error) or isinstance(error, RuntimeError) and "mismatched" not in str(error):
            raise
        raise UserError(f"{model_id}: its weights cannot be loaded: {str(error).splitlines()[0]}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{model_id}: has no weights for {list_first(missing, 3)}; download it again")
    model.unknown_weights = sorted(info["unexpected_keys"])
    if not takes_sdpa(model, model.config):
        model.set_attn_implementation("eager")
    keep_4_bit_layout(model)
    return model


def load_trainable(model_id: str, load_in_4bit: bool, trust: bool, whole: bool, split: bool):
    """Return a base to train: with `whole` all of its weights, in fp32; with `split`, where split_model expects it.

    A model to be split comes from the CPU. Quantising there takes minutes, so a 4-bit base is on each GPU whole at
    first. Its numbers are held as fp32: PyTorch gathers bf16 through fp32, which changes numbers that look like NaN.
    """
    dtype, options = torch.float32 if whole else None, {}
    if split:
        options = {"place": None if load_in_4bit and torch.cuda.is_available() else "cpu", "storage": torch.float32}
        if whole:  # until it is split, it is held in the type that it was saved in
            dtype = load_config(model_id, trust=trust).dtype
    model = load_base(model_id, load_in_4bit, trust, dtype, **options)
    model.config.use_cache = False
    return model


def load_adapter(model, adapter: str):
    """Return a model with its adapter, each part on the device of the layer that it belongs to.

    PEFT alone would spread the model anew by the memory that is free now, and so count loaded weights twice.
    """
    places = getattr(model, "hf_device_map", {})
    device_map = {f"base_model.model.{name}".rstrip("."): place for name, place in places.items()}
    return PeftModel.from_pretrained(model, adapter, device_map=device_map)


def go_on_from(model, adapter: str, rows: dict):
    """Return a base with a copy of an adapter to be trained on, and the rows of tokens that prepare_tokens adds."""
    config = PeftConfig.from_pretrained(adapter)
    config.inference_mode = False
    config.trainable_token_indices = rows.get("trainable_token_indices")
    model = get_peft_model(model, config)
    set_adapter_weights(model, adapter)
    return model


def set_adapter_weights(model, adapter: str) -> None:
    """Give an adapter that was made fresh the weights of one in a folder; UserError if they are those of another."""
    weights, trained = load_peft_weights(adapter, device="cpu"), PeftConfig.from_pretrained(adapter)
    with refuse_other_base(f"--model_id {adapter}", model.get_base_model().name_or_path):
        for name in [name for name in weights if name.endswith(TOKEN_ROWS)]:
            table = name.removeprefix("base_model.model.").removesuffix(f".token_adapter.{TOKEN_ROWS}")
            ids, old = (config.trainable_token_indices for config in (model.peft_config["default"], trained))
            old = old[table] if isinstance(old, dict) else old
            rows = model.get_parameter(f"{name}.default").detach().clone()  # those of other tokens stay as they are
            rows[[ids[table].index(token) for token in old]] = weights[name].to(rows)
            weights[name] = rows
        result = set_peft_model_state_dict(model, weights)
        missing = [name for name in result.missing_keys if "lora_" in name]
        if strays := [*missing, *result.unexpected_keys]:
            raise ValueError(f"missing or unknown weights: {list_first(strays, 3)}")


def copy_trained(model) -> dict:
    """Return a copy of the weights that are trained, by name, in the machine's memory."""
    return {name: weight.detach().cpu().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def set_trained(model, weights: dict) -> None:
    """Give the weights that are trained the values of a copy."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(weights[name])


@contextlib.contextmanager
def refuse_other_base(what: str, base: str):
    """Turn the error of an adapter that does not fit its base into a UserError, a line that begins with `what`."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError
        raise
    except (RuntimeError, ValueError) as error:  # the last line names the first layer
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{what}: its base {base} is another model than it was trained on ({reason})") from None


def find_place(four_bit: bool = False, fsdp: bool = False) -> str:
    """Return the device map of a trained model: all GPUs and, for what they cannot hold, the machine's memory.

    In 16 bits a model may be too large for the GPU that trained it in 4. Weights in 4 bits must be on GPUs: on one,
    unless --fsdp trained them on several (see load_base).
    """
    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if four_bit and not fsdp else "auto"


def warn_if_spread(model) -> None:
    """Say that a part of a model is not on the GPU."""
    places = set(getattr(model, "hf_device_map", {}).values())
    if "cpu" in places and len(places) > 1:
        slow = "a part of it stays in the machine's memory, and answers take longer"
        warn(f"the 16-bit model is larger than the GPU's memory: {slow}; a smaller --eval_samples writes fewer")


def warn_of_frozen_experts(model) -> None:
    """Say that the experts of a mixture get no adapter: PEFT knows their names only in some kinds of models."""
    experts = [weight.requires_grad for name, weight in model.named_parameters() if ".experts." in name]
    if experts and not any(experts):
        warn(f"the experts of this {model.config.model_type} get no adapter: only the layers beside them are trained")
