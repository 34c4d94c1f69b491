"""Config, tokenizer and weights of a model, checked before it is loaded."""

import json
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tool_calling.engines.reach import find_reach
from tool_calling.origins import is_adapter, read_adapter
from tool_calling.prompts import find_end_token
from tool_calling.templates import list_tokens
from tool_calling.terminal import UserError, cut_text, list_first, say

CHAT_MODEL = "Qwen/Qwen3-0.6B"  # suggested in place of a model without a usable chat template
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNSLOTH_TREES = ("llama", "qwen2", "qwen3")  # config.model_type of models whose layers take a stream with Unsloth
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")


def explain_hub_error(message: str, folder: Path) -> str:
    """Return what a user can do about a model that could not be loaded."""
    text = message.lower()
    if folder.is_file():
        return "is a file; expected the folder of a model"
    if is_adapter(str(folder)):
        return "is an adapter; expected the model that it belongs to, its base"
    if "trust_remote_code" in text:
        return "brings Python code of its own, which is not run; if you know who wrote it, add --trust_remote_code"
    if folder.is_dir() or "model type" in text or "model_type" in text:
        return f"nothing that Transformers can load: {cut_text(message)}"
    if "gated" in text or "401" in text or "403" in text:
        return "gated or private; accept its terms on the Hub, then run `hf auth login`"
    if "connect" in text or "offline" in text or "cached" in text or "resolve" in text:
        return "no such folder, not in the cache, and the Hub cannot be reached; check the network, or give a folder"
    return "no such folder and no such model on the Hub; check the spelling"


def load_config(model_id: str, flag: str = "--model_id", trust: bool = False):
    """Return the config of a model; UserError if it cannot be had.

    Here and in every load, Python code that comes with a model is run only with `trust`.
    """
    try:
        return AutoConfig.from_pretrained(model_id, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{flag} {model_id}: {explain_hub_error(str(error), Path(model_id))}") from None


def find_tokenizer(model_id: str, base: str) -> str:
    """Return which of the two a model is served with: its own tokenizer, if its folder has one, or that of its base."""
    return model_id if (Path(model_id) / "tokenizer_config.json").is_file() else base


def add_tokens(tokenizer, template: str) -> None:
    """Add to a tokenizer what a chat template writes and the tokenizer would split, and say what that is.

    Turns are special. Calls and thoughts are not, as in Qwen3: a server that leaves special tokens out of an answer
    would leave no mark for its parser.
    """
    known = {*map(str, tokenizer.added_tokens_decoder.values())}
    if added := [token for token in list_tokens(template) if token not in known]:
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=text.startswith("<|")) for text in added])
        say("tokens", f"added for the chat template: {' '.join(added)}")


def load_tokenizer(model_id: str, trust: bool = False, flag: str = "--model_id", template: str | None = None):
    """Return the model's own tokenizer; its eos_token is set to the one that ends the answers of its chat template.

    Bases have the template of their chat models and another eos_token, which would never be written.

    Args:
        template: the text of a chat template in place of the model's own; tokens that it needs are added.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        reason = explain_hub_error(str(error), Path(model_id))
        raise UserError(f"{flag} {model_id}: its tokenizer cannot be loaded: {reason}") from None
    if template:
        tokenizer.chat_template = template
        add_tokens(tokenizer, template)
    advice = f"use a chat model such as {CHAT_MODEL}, or give another template with --chat_template"
    if not tokenizer.chat_template:
        raise UserError(f"{flag} {model_id}: has no chat template; {advice}")
    end = find_end_token(tokenizer)
    if end is None:
        reason = "its chat template does not end an answer with a token of its own, so the model could not stop"
        raise UserError(f"{flag} {model_id}: {reason}; {advice}")
    if end != tokenizer.eos_token:
        tokenizer.eos_token = end
    return tokenizer


def check_model(model_id: str, flag: str = "--model_id", trust: bool = False):
    """Return the config of a causal language model with weights; UserError for anything else."""
    folder = Path(model_id)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise UserError(f"{flag} {model_id}: the folder holds no *.safetensors; give a folder saved by save_pretrained")
    config = load_config(model_id, flag, trust)
    config = check_kind(config, model_id, flag)
    check_weights(folder, f"{flag} {model_id}")
    return config


def check_weights(folder: Path, what: str) -> None:
    """Refuse a folder that lacks a file of its index, or holds a truncated one or a git-lfs pointer."""
    index = folder / "model.safetensors.index.json"
    try:
        parts = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()} if index.is_file() else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{what}: {index.name} does not say which weights are where; download it again") from None
    if missing := sorted(name for name in parts if not (folder / name).is_file()):
        raise UserError(f"{what}: has no {list_first(missing, 3)}; download it again")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{what}: {file.name} holds no whole weights ({error}); download it again") from None


def check_kind(config, model_id: str, flag: str = "--model_id"):
    """Return the config of the language model; UserError if that is not one that Transformers loads alone."""
    names, kind = config.architectures or [], MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if any(name.endswith("ForCausalLM") for name in names):
        return config
    composed = any(name.endswith("ForConditionalGeneration") for name in names)
    if not composed or not kind or not kind.__name__.endswith("ForCausalLM"):
        found = f"not a causal language model ({', '.join(names) or config.model_type})"
        if composed and kind:
            found += ", and Transformers loads its language model only with the rest; expected a model of text alone"
        raise UserError(f"{flag} {model_id}: {found}")
    text = config.get_text_config(decoder=True)  # of a model that sees images, too: what is trained and saved
    for name in ("dtype", "quantization_config"):
        if getattr(text, name, None) is None and getattr(config, name, None) is not None:
            setattr(text, name, getattr(config, name))
    say("model", f"the language model of {model_id} alone, without what reads images")
    return text


def can_share(engine: str, config, longest: int) -> bool:
    """Return whether samples of up to `longest` tokens can share prefixes; say so if that is no matter of course."""
    reach, limit = find_reach(config)
    named = engine != "unsloth" or config.model_type in UNSLOTH_TREES
    if named and longest <= reach:
        if limit:
            say("plan", f"prefixes are shared: {limit} hold the longest sample, {longest:,} tokens")
        return True
    if longest > reach:
        reason = f"this {config.model_type} has {limit}" + (f", and samples of {longest:,} tokens" if reach else "")
    else:
        reason = f"with Unsloth, only {', '.join(UNSLOTH_TREES)} share prefixes, and this is {config.model_type}"
        reason += "; --engine transformers shares them, too"
    say("plan", f"ordinary padded batches: {reason}")
    return False


def find_base(model_id: str, flag: str = "--model_id") -> tuple[str, str]:
    """Return (base, flag for messages) of what a flag names: an adapter's base, or the model itself.

    UserError if an adapter cannot be used.
    """
    if not is_adapter(model_id):
        return model_id, flag
    base, what = read_adapter(model_id, flag)["base_model_name_or_path"], f"{flag} {model_id}"
    if not list(Path(model_id).glob("*.safetensors")):
        raise UserError(f"{what}: the adapter holds no *.safetensors; expected one saved by PEFT")
    check_weights(Path(model_id), what)
    return base, f"{what}: its base"


def check_dropout(dropout: float, config, model_id: str) -> None:
    """Refuse dropout for a mixture of experts: PEFT has none for experts, whose weights are one tensor per layer."""
    if dropout and any(
        getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
    ):
        reason = f"{model_id} is a mixture of experts, whose adapters have no dropout"
        raise UserError(f"--lora_dropout {dropout}: {reason}; expected 0")


def check_quantised(config, model_id: str, adapter: bool) -> bool:
    """Return whether a model is quantised; UserError if it is in a way in which it cannot be trained."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return False
    if (method := quantised.get("quant_method", "bitsandbytes")) != "bitsandbytes":
        reason = f"is quantised by {method}, on which no adapter is trained here"
        expected = "expected the original, which is put into 4 bits while it is loaded"
        raise UserError(f"--model_id {model_id}: {reason}; {expected}")
    if not adapter:
        reason = "is quantised, and --lora_rank 0 trains 16-bit weights"
        raise UserError(f"--model_id {model_id}: {reason}; give the original, or train an adapter")
    return True


def check_merge_base(config, model_id: str, merge_model_id: str | None, trust: bool) -> str:
    """Return the 16-bit model to merge the adapter into; UserError if there is none or it is another model.

    Args:
        config: that of `model_id`, the model that is trained.
    """
    if merge_model_id in (None, model_id):
        if getattr(config, "quantization_config", None) is None:
            return model_id
        advice = "a merge needs the 16-bit weights; name the original with --merge_model_id"
        raise UserError(f"--model_id {model_id}: is already quantised, and {advice}")
    what, other = f"--merge_model_id {merge_model_id}", check_model(merge_model_id, "--merge_model_id", trust)
    if getattr(other, "quantization_config", None) is not None:
        raise UserError(f"{what}: is quantised too; expected the 16-bit original")
    for name in SHAPE:
        trained, found = (getattr(model, name, None) for model in (config, other))
        if found != trained:
            advice = "expected the same model in 16 bits"
            raise UserError(f"{what}: {name} is {found}, and {trained} in --model_id; {advice}")
    return merge_model_id


def check_base(model_id: str, merge_model_id: str | None, adapter: bool, merged: bool, trust: bool) -> tuple:
    """Return (the model to train on, its config, the 16-bit model to merge into), after checks of all of them.

    Args:
        model_id: a model, or an adapter, which is trained on its base.
    """
    base, flag = find_base(model_id)
    config = check_model(base, flag, trust)
    quantised = check_quantised(config, base, adapter)
    if merge_model_id or (quantised and merged):
        return base, config, check_merge_base(config, base, merge_model_id, trust)
    return base, config, base


def build_skeleton(config, trust: bool):
    """Return the model that a config describes, on the meta device: shapes of weights without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


def count_parameters(config, rank: int, trust: bool = False, targets=PROJECTIONS) -> dict[str, int]:
    """Return how many weights are in linear layers (which 4 bits hold), elsewhere, and in an adapter."""
    skeleton = build_skeleton(config, trust)
    layers = {
        name: module
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.startswith("lm_head")
    }
    linear = sum(layer.weight.numel() for layer in layers.values())
    other, adapter = sum(weight.numel() for weight in skeleton.parameters()) - linear, 0
    if rank:
        experts = any(name.endswith("experts.gate_up_proj") for name, _ in skeleton.named_parameters())
        check_targets({*targets}, {name.rsplit(".", 1)[-1] for name in layers}, experts)
        lora = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=[*targets], init_lora_weights=False)
        try:
            with torch.device("meta"):
                adapted = get_peft_model(skeleton, lora)
        except ValueError as error:  # layers that PEFT refuses, as Mamba's out_proj
            raise UserError(f"--target_modules {' '.join(targets)}: {cut_text(str(error))}") from None
        adapter = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    return {"linear": linear, "other": other, "adapter": adapter}


def check_targets(targets: set[str], names: set[str], experts: bool) -> None:
    """Refuse targets that no linear layer is named; of the default ones, as other families have, some are enough.

    What they leave out is then said: families have layers with other names, as Mamba's and linear attention's are.

    Args:
        names: of the linear layers.
        experts: whether there are experts, whose weights PEFT knows by the names of projections.
    """
    known = names | ({"gate_proj", "up_proj", "down_proj"} if experts else set())
    missing, default = targets - known, targets == {*PROJECTIONS}
    if missing and not (default and targets & names):
        expected = f"expected some of {', '.join(sorted(known))}"
        raise UserError(f"--target_modules {' '.join(sorted(missing))}: the model has no such linear layer; {expected}")
    left_out = sorted(name for name in names - targets if not name.endswith(("gate", "router")))
    if default and left_out:
        found = ", ".join(sorted(targets & names))
        say("lora", f"on {found}; --target_modules can name more: {list_first(left_out, 10)}")
