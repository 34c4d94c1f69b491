"""What training leaves on the disk: the adapter, and the merged or fully trained model."""

import json
import shutil
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import GenerationConfig

from tool_calling.engines.answers import find_stop_tokens
from tool_calling.engines.device import free_gpu, leave_group
from tool_calling.engines.fsdp import gather_model, held_part, is_split
from tool_calling.engines.graphs import empty_weights
from tool_calling.engines.hub import load_config
from tool_calling.engines.loading import find_place, load_adapter, load_base
from tool_calling.engines.losses import measure_loss, score_batches, to_metrics
from tool_calling.engines.tokens import fit_vocabulary
from tool_calling.files import discard_partial, partial_folder, put_in_place, write_file
from tool_calling.origins import list_ancestors
from tool_calling.run_folder import CLIENT, TOOLS, write_run
from tool_calling.samples import Sample, list_plain
from tool_calling.saving.portable import make_portable, read_own, save_tokenizer, write_json
from tool_calling.schedule import build_small_batches
from tool_calling.terminal import UserError, list_first, say, warn

MERGE_SLACK = 0.02  # nats per token (a share of losses over 1), and share of the rows, that a merge may cost
ROUNDED_ANSWERS = 0.05  # share of the rows whose exact answers rounding may tip: some become exact instead
# What of the base's settings for answers stays: all else says how to sample, and scores are those of greedy answers.
KEPT = ("bos_token_id", "pad_token_id", "max_length", "max_new_tokens", "cache_implementation")
GENERATION, BASE_GENERATION = "generation_config.json", "generation_config.base.json"
ROUNDED_WEIGHTS = 2**26  # numbers of a weight that are rounded or summed at a time: it takes as much memory again


@dataclass(frozen=True)
class Trained:
    """What was trained, and what is to be made of it."""

    model_id: str  # the model that was trained on
    base_id: str  # the 16-bit model that an adapter is merged into
    dtype: object  # the type of the base's weights
    engine: str  # that trained it
    final: str  # the folder of the model to keep
    method: str  # merged_16bit, merged_4bit, or lora: the adapter alone is kept
    settings: dict  # of the run: load_in_4bit, trust_remote_code, seed, fsdp, and all that run.yaml repeats
    adapter: str | None = None  # its folder; None if all weights were trained
    start: str | None = None  # the adapter that training went on from
    tools: tuple[dict, ...] = ()  # with which it was trained; empty if that is no one list
    alike: bool = False  # whether each row that has tools was trained with exactly these

    @property
    def trust(self) -> bool:
        return self.settings["trust_remote_code"]

    @property
    def four_bit(self) -> bool:
        return self.settings["load_in_4bit"]

    def find_place(self, four_bit: bool = False) -> str:
        return find_place(four_bit, self.settings["fsdp"])


def keep_trained(trained: Trained, trainer, tokenizer, samples: list[Sample]) -> tuple[Trained, float | None] | None:
    """Save what a trainer has trained, and free its memory; None in all processes but the first.

    Args:
        samples: on which the loss of fully trained weights is measured before they are saved.
    Returns: the same with its adapter's folder, and that loss (None for an adapter).
    """
    model, before, lora = trainer.model, None, trained.settings["lora_rank"]
    if not lora:
        batches = build_small_batches(samples, trainer.layout, model.config.vocab_size)
        model, before = round_trained(trained, model, batches)
    if not leave_group():
        return None
    plain = list_plain(trainer.schedule.samples)  # of variants, no client sends the tools
    tools = collect_tools(plain)
    alike = all(tuple(sample.tools) in ((), tools) for sample in plain)
    trained = replace(trained, tools=tools, alike=alike)
    if lora:
        adapter = save_adapter(model, trained.settings, tokenizer, trained.tools)
        trained = replace(trained, adapter=adapter)
        say("save", f"adapter: {adapter}")
    else:
        save_whole(trained, model, tokenizer)
    if trained.engine == "unsloth":
        empty_weights(trainer.model)
    return trained, before


def collect_tools(samples: list[Sample]) -> tuple[dict, ...]:
    """Return the tools of all samples in the order in which they first appear; none if two of one name differ."""
    found: dict[str, dict] = {}
    for tool in chain.from_iterable(sample.tools for sample in samples):
        name = tool["function"]["name"]
        if found.setdefault(name, tool) != tool:
            lists = len({json.dumps(sample.tools) for sample in samples})
            say("tools", f'no {TOOLS}: the rows bring {lists:,} lists, and "{name}" is not the same in all of them')
            return ()
    return tuple(found.values())


def write_tools(folder: str | Path, tools: tuple[dict, ...]) -> None:
    """Write the tools that a model was trained with into its folder, and a client that sends them."""
    if tools:
        shutil.copyfile(Path(__file__).with_name(f"{CLIENT}.txt"), Path(folder) / CLIENT)
        write_file(Path(folder) / TOOLS, json.dumps(tools, indent=1, ensure_ascii=False) + "\n")


def save_adapter(model, settings: dict, tokenizer, tools: tuple[dict, ...] = ()) -> str:
    """Save the LoRA weights to OUTPUT_DIR/adapter, with tokenizer, tools and settings of the run; return that path."""
    adapter = str(Path(settings["output_dir"]) / "adapter")
    with discard_partial(adapter) as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's empty form; a card with scores comes later
        save_tokenizer(tokenizer, folder)
        to_greedy(model, tokenizer).save_pretrained(folder)  # for servers: PEFT and Transformers use the base's
        write_tools(folder, tools)
        write_run(settings, folder, ancestors=list_ancestors(settings["model_id"]))
        put_in_place(adapter)
    return adapter


def to_greedy(model, tokenizer) -> GenerationConfig:
    """Return the settings by which servers answer as scored, greedily, and stop where the chat template ends a turn.

    Taking the likeliest token alone is greedy everywhere; vLLM samples even where `do_sample` is false.
    """
    kept = {key: getattr(model.generation_config, key, None) for key in KEPT}
    return GenerationConfig(do_sample=True, top_k=1, eos_token_id=find_stop_tokens(model, tokenizer), **kept)


def save_whole(trained: Trained, model, tokenizer) -> Path:
    """Save a model with its tokenizer, its tools and the run's settings; return its folder, not yet the final one."""
    folder = partial_folder(trained.final)
    shutil.rmtree(folder, ignore_errors=True)
    model.config.use_cache = True  # off only in training
    model.generation_config = to_greedy(model, tokenizer)
    config = load_config(trained.base_id, trust=trained.trust)
    alone = config.get_text_config(decoder=True) is not config  # servers look for the names that it has alone
    model.save_pretrained(folder, save_original_format=not alone)
    make_portable(folder)
    if own := read_own(trained.base_id, BASE_GENERATION) or read_own(trained.base_id, GENERATION):
        write_json(folder / BASE_GENERATION, own)
    save_tokenizer(tokenizer, folder)
    write_tools(folder, trained.tools)
    write_run(trained.settings, folder, ancestors=list_ancestors(trained.settings["model_id"]))
    return folder


def sum_weights(model) -> dict[str, float]:
    """Return the sum of each weight by name, of those that are in memory."""
    return {
        name: sum(part.double().sum().item() for part in parameter.detach().flatten().split(ROUNDED_WEIGHTS))
        for name, parameter in model.named_parameters()
        if parameter.device.type != "meta"
    }


def refuse_same_adapter(trained: Trained) -> None:
    """Refuse an adapter that equals the one that training went on from."""
    before, after = (load_peft_weights(folder, device="cpu") for folder in (trained.start, trained.adapter))
    if before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before):
        reason = "training changed nothing; train longer or raise --learning_rate"
        raise UserError(f"the trained adapter equals {trained.start}: {reason}")


def refuse_unchanged(sums: dict[str, float], model) -> None:
    """Refuse a model that equals the base, of which `sums` are the sum_weights."""
    if sums == sum_weights(model):
        reason = "training changed nothing that 16-bit weights can hold; train longer or raise --learning_rate"
        raise UserError(f"the trained model equals the base: {reason}")


def round_at_random(weights) -> None:
    """Round fp32 weights in place to numbers that bf16 has: up or down at random, the nearer the likelier.

    What training adds to a weight is often less than half the way to bf16's next number. Rounded to the nearest it is
    lost in all weights alike; at random, their sum keeps it. A number that bf16 has does not change.
    """
    for part in weights.view(-1).split(ROUNDED_WEIGHTS):
        bits = part.view(torch.int32)  # bf16 is the upper half of fp32, and the lower half decides how often it carries
        carry = torch.randint_like(bits, 2**16).masked_fill_(~part.isfinite(), 0)
        bits.add_(carry).bitwise_and_(-(2**16))


def merge_layers(model) -> None:
    """Merge the adapter into each layer in fp32; round bf16 weights at random, others to the nearest."""
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        weights = [*layer.get_base_layer().parameters(recurse=False)]
        types = [weight.dtype for weight in weights]
        for weight in weights:
            weight.data = weight.data.float()
        layer.merge()
        for weight, dtype in zip(weights, types):
            if dtype == torch.bfloat16:
                round_at_random(weight.data)
            weight.data = weight.data.to(dtype)


def requantise(model) -> None:
    """Give the linear layers the numbers that they have in bitsandbytes' 4 bits, each still in its own type.

    An adapter that was trained on 4-bit weights has learned to correct these numbers.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            packed, state = quantize_4bit(layer.weight.data.to(device), compress_statistics=True, quant_type="nf4")
            layer.weight.data.copy_(dequantize_4bit(packed, state))


def merge_adapter(trained: Trained, tokenizer, four_bit: bool = False):
    """Return the 16-bit base with the adapter merged; with `four_bit`, on the numbers of requantise."""

    def load(place):
        return load_base(trained.base_id, False, trained.trust, "auto", place)

    base = load(trained.find_place())
    if any(weight.device.type == "meta" for weight in base.parameters()):  # more than the GPUs hold
        del base
        free_gpu()
        base = load("cpu")
    base = fit_vocabulary(base, tokenizer)
    sums = sum_weights(base)
    if four_bit:
        requantise(base)
    model = load_adapter(base, trained.adapter)
    torch.manual_seed(trained.settings["seed"])
    merge_layers(model)
    merged = model.unload()
    refuse_unchanged(sums, merged)
    return merged


def save_merged(trained: Trained, tokenizer, batches: list[dict]) -> Path:
    """Merge the adapter, save the model whole; return its folder, not yet the final one.

    Trained on 4-bit weights, the adapter fits these best, and the 16-bit base knows more. Of both merges, the one is
    kept that reproduces more of the held-out `batches`; of equals, the one with the lower loss. What is put into 4 bits
    again stands on the 16-bit base: a 4-bit number with a little added would be rounded to what it was. Weights that
    came quantised have other numbers than requantise gives.
    """
    if not trained.four_bit or trained.base_id != trained.model_id or trained.method == "merged_4bit":
        return save_whole(trained, merge_adapter(trained, tokenizer), tokenizer)
    found, merged = {}, None
    for four_bit in (False, True):
        merged = None
        free_gpu()
        merged = merge_adapter(trained, tokenizer, four_bit)
        found[four_bit] = to_metrics(score_batches(merged, batches, "transformers"))
    best = max(found, key=lambda four_bit: (found[four_bit]["exact_match"], -found[four_bit]["loss"]))
    if best is False:
        merged = None
        free_gpu()
        merged = merge_adapter(trained, tokenizer)
    on_16, on_4 = (f"{scores['exact_match']:.1%} (loss {scores['loss']:.4f})" for scores in found.values())
    kept = "the latter" if best else "the former"
    say("merge", f"exact match {on_16} on the 16-bit base, {on_4} on its 4-bit weights in 16 bits: {kept} is kept")
    return save_whole(trained, merged, tokenizer)


def quantise_folder(folder: Path, trust: bool, place: str) -> None:
    """Put the linear layers of a model that was saved in 16 bits into bitsandbytes' 4 bits, in the same folder."""
    model = load_base(str(folder), True, trust, load_config(str(folder), trust=trust).dtype, place)
    for file in folder.glob("model*.safetensors*"):  # the model may still read it: removed, not written over
        file.unlink()
    model.save_pretrained(folder)
    make_portable(folder)


def read_back(folder: Path, trust: bool = False, place: str | None = None):
    """Return the saved model, loaded with plain Transformers and checked: no weights too few or many, all finite."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt", "cuda" if torch.cuda.is_available() else "cpu") as weights:
            if broken := [name for name in weights.keys() if not weights.get_tensor(name).isfinite().all()]:
                raise UserError(f"{folder}: weights that are not finite: {list_first(broken, 3)}")
    model = load_base(str(folder), False, trust, place=place)
    if model.unknown_weights:
        raise UserError(f"{folder}: has unknown weights: {list_first(model.unknown_weights, 3)}")
    return model


def is_worse(loss: float, expected: float) -> bool:
    """Return whether a held-out loss is above the expected one by more than rounding explains, or is not a number."""
    return not loss <= expected + MERGE_SLACK * max(1, expected)


def round_trained(trained: Trained, model, batches: list[dict]) -> tuple:
    """Put fully trained fp32 weights into the type of their base; return (the model whole, its held-out loss).

    After a short run with a low rate, 16 bits may not hold what the steps changed: that is warned of. All processes
    must call this, and the first one gets the model.
    """
    before, dtype = measure_loss(model, batches, trained.engine), trained.dtype or model.dtype
    torch.manual_seed(trained.settings["seed"])
    for parameter in model.parameters():
        if dtype == torch.bfloat16:
            round_at_random(held_part(parameter.data))
        parameter.data.copy_(parameter.data.to(dtype))
    after = measure_loss(model, batches, trained.engine)
    if is_worse(after, before):
        found, advice = f"{after:.4f}, in 32 bits {before:.4f}", "train longer or raise --learning_rate"
        warn(f"{dtype} holds less than training changed: held-out loss {found}; {advice}")
    return gather_model(model, dtype, trained.trust) if is_split(model) else model.to(dtype), after
