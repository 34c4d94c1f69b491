"""Where a model comes from: the base and the shape of an adapter, and the models that a model was trained from."""

import json
from itertools import chain
from pathlib import Path

import yaml

from tool_calling.terminal import UserError

SETTINGS = "adapter_config.json"
LORA_FLAGS = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "target_modules": "target_modules",
}  # {flag: the same in adapter_config.json}
EXPERTS = {"gate_up_proj": ["gate_proj", "up_proj"]}  # {weight of experts: the targets for which PEFT adapts it}
FOREIGN = ("modules_to_save", "bias", "lora_bias", "layer_replication")  # what a merge of ours would lose


def is_url(model_id: str) -> bool:
    """Say whether a name is the address of a server."""
    return model_id.startswith(("http://", "https://"))


def is_adapter(model_id: str) -> bool:
    """Say whether a name is the folder of an adapter."""
    return (Path(model_id) / SETTINGS).is_file()


def read_adapter(folder: str, flag: str) -> dict:
    """Return the adapter_config.json of an adapter's folder; UserError if it is not whole or names no base."""
    try:
        settings = json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))
        base = settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not base or not isinstance(base, str):
        raise UserError(f"{flag} {folder}: {SETTINGS} names no base; expected one saved by PEFT")
    return settings


def read_shape(folder: str, flag: str) -> dict[str, object]:
    """Return {flag: its value} of the LoRA adapter in a folder; UserError for an adapter that is not plain LoRA."""
    settings = read_adapter(folder, flag)
    what, expected = f"{flag} {folder}: {SETTINGS}", "expected a LoRA adapter of linear layers, as this script saves it"
    if settings.get("peft_type") != "LORA" or not isinstance(settings.get("target_modules"), list):
        raise UserError(f"{what} is of {settings.get('peft_type')} on {settings.get('target_modules')}; {expected}")
    if missing := [name for name in LORA_FLAGS.values() if name not in settings]:
        raise UserError(f"{what} names no {', '.join(missing)}; {expected}")
    if foreign := [name for name in FOREIGN if settings.get(name) not in (None, False, "none", [], {})]:
        raise UserError(f"{what} sets {', '.join(foreign)}, which a run would not keep; {expected}")
    weights = [name.rsplit(".", 1)[-1] for name in settings.get("target_parameters") or []]
    targets = {*settings["target_modules"], *chain.from_iterable(EXPERTS.get(name, [name]) for name in weights)}
    return {flag: settings[name] for flag, name in LORA_FLAGS.items()} | {"target_modules": sorted(targets)}


def check_4_bits(model_id: str) -> None:
    """Refuse to put a merged model of ours into 4 bits again if its adapter was trained on 4-bit weights.

    Most of what it adds to a weight is less than a step of 4 bits: rounded again, the weight is what it was before.
    """
    known = {} if is_adapter(model_id) else read_yaml(Path(model_id) / "run.yaml")
    if known.get("load_in_4bit") and known.get("save_method") == "merged_16bit":
        found = "was trained on 4-bit weights, and in 4 bits again it may lose all that it learned"
        adapter = Path(str(known.get("output_dir"))) / "adapter"
        raise UserError(f"--model_id {model_id}: {found}; go on from its adapter, {adapter}, or add --no-load_in_4bit")


def list_trained_tokens(model_id: str) -> list[int]:
    """Return the ids of the tokens whose embedding rows an adapter has of its own; [] for anything else."""
    trained = read_yaml(Path(model_id) / SETTINGS).get("trainable_token_indices") or []
    return sorted({*chain.from_iterable(trained.values() if isinstance(trained, dict) else [trained])})


def list_ancestors(model_id: str) -> list[str]:
    """Return a model and those that it was trained from, the latest first, as far as its folder says so.

    The run.yaml of a model or an adapter of ours tells of all; an adapter names its base, a model card its base_model.
    """
    found = [model_id]
    while True:
        folder = Path(found[-1])
        known = read_yaml(folder / "run.yaml").get("facts") or {}
        parents = known.get("ancestors") if isinstance(known, dict) else None
        if not isinstance(parents, list):
            settings = read_yaml(folder / SETTINGS)  # JSON is YAML
            parents = [settings.get("base_model_name_or_path") or read_card(folder).get("base_model")]
        new = [name for name in parents if isinstance(name, str) and name and name not in found]
        if not new:
            return found
        found += new


def read_card(folder: Path) -> dict:
    """Return what the model card in a folder says in its head; {} if there is none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    return parse_yaml(text.split("---\n")[1]) if text.startswith("---\n") else {}


def read_yaml(path: Path) -> dict:
    """Return the mapping in a YAML file; {} if there is none."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def parse_yaml(text: str) -> dict:
    """Return the mapping that a YAML text is; {} if it is none."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
