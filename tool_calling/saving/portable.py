"""Configs and tokenizer files that Transformers 4 and what is built on it read as well as Transformers 5.

In silence, Transformers 4.57 takes the default base of rotary embeddings for the one that 5 writes elsewhere. It does
not know 5's plain tokenizer, nor a list of tokens where it has a dict.
"""

import json
from pathlib import Path

from transformers.utils import cached_file

from tool_calling.files import write_file

SETTINGS = "tokenizer_config.json"
OLD_TYPES = ("linear", "dynamic", "yarn", "longrope", "llama3")  # of rotary embeddings, beside the default
OF_THIS_MACHINE = ("is_local", "local_files_only")  # how Transformers 5 found the tokenizer


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file as Transformers does."""
    write_file(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def add_old_keys(config: dict) -> dict:
    """Return a config of Transformers 5, parts of it included, with the keys beside its own that 4 looks for."""
    config = {key: add_old_keys(value) if isinstance(value, dict) else value for key, value in config.items()}
    if isinstance(config.get("dtype"), str):
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:  # layers with a window, as Gemma 3's, have another base
        local, rope = rope.get("sliding_attention") or {}, {**rope["full_attention"]}
        rope.pop("partial_rotary_factor", None)  # 5 would take it for that of all layers
        if local.get("rope_theta", rope["rope_theta"]) != rope["rope_theta"]:
            config["rope_local_base_freq"] = local["rope_theta"]
    config |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type") in OLD_TYPES:  # Phi 3 takes no key more than these
        known = {"rope_theta", "partial_rotary_factor", "rope_type" if "type" in rope else None}
        known |= {"original_max_position_embeddings"} & config.keys()
        config["rope_scaling"] = {key: value for key, value in rope.items() if key not in known}
    return config


def make_portable(folder: str | Path) -> None:
    """Add to the config.json of a saved model what Transformers 4 looks for."""
    path = Path(folder) / "config.json"
    write_json(path, add_old_keys(json.loads(path.read_text(encoding="utf-8"))))


def read_own(model_id: str, name: str) -> dict:
    """Return a JSON file of a folder or repository; {} if there is none."""
    try:
        return json.loads(Path(cached_file(model_id, name)).read_text(encoding="utf-8"))
    except OSError:
        return {}


def to_settings(tokenizer, saved: dict) -> dict:
    """Return a tokenizer's own settings, changed only where this run or Transformers 4 needs it.

    Args:
        saved: as Transformers 5 writes them; of a tokenizer that comes without settings these are taken.
    """
    named = read_own(tokenizer.name_or_path, "special_tokens_map.json")
    named = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
    settings = named | (read_own(tokenizer.name_or_path, SETTINGS) or saved)
    for key in (*OF_THIS_MACHINE, "chat_template"):  # the template has a file of its own
        settings.pop(key, None)
    settings["eos_token"] = saved["eos_token"]
    if "added_tokens_decoder" in settings:
        added = {str(number): token.__getstate__() for number, token in tokenizer.added_tokens_decoder.items()}
        settings["added_tokens_decoder"] = added | settings["added_tokens_decoder"]
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
    return settings


def save_tokenizer(tokenizer, folder: str | Path) -> None:
    """Save a tokenizer with its chat template so that Transformers 4 reads it, too."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / SETTINGS
    write_json(path, to_settings(tokenizer, json.loads(path.read_text(encoding="utf-8"))))
