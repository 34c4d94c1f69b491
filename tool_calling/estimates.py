"""Memory and disk that a run takes."""

import argparse
import math
import shutil

from tool_calling.arguments import CONVERTED_GGUF
from tool_calling.engines.graphs import EAGER_MEMORY, RECORDED_MEMORY, can_record, count_token_bytes
from tool_calling.engines.hub import count_parameters
from tool_calling.engines.start import find_optim
from tool_calling.files import find_existing
from tool_calling.schedule import Plan
from tool_calling.terminal import UserError, plural

SMALL_FILES = 2**24  # bytes of tokenizer, settings and state that are saved beside weights


def count_final_bytes(args: argparse.Namespace, parameters: dict[str, int]) -> int:
    """Return the bytes that --final_model_dir takes at most, while it is made too; 0 if only the adapter is saved."""
    whole = parameters["linear"] + parameters["other"]
    sizes = [2]  # bytes per weight
    if args.save_method == "merged_4bit":
        sizes.append((0.53 * parameters["linear"] + 2 * parameters["other"]) / whole)
    names = args.save_gguf.split(",") if args.save_gguf else []
    if not set(names) <= set(CONVERTED_GGUF):
        sizes.append(2)  # what the others are made from
    sizes += [{"f32": 4, "f16": 2, "bf16": 2}.get(name, 1.1) for name in names]
    return 0 if args.save_method == "lora" else math.ceil(sum(sizes) * whole)


def count_moment_bytes(optim: str) -> int:
    """Return the bytes of Adam's two moments of one weight."""
    return 2 if "8bit" in optim else 8


def estimate_disk(args: argparse.Namespace, parameters: dict[str, int], optim: str, checkpoints: int) -> dict[str, int]:
    """Return the bytes of the weights that a run saves at most, without the SMALL_FILES beside each."""
    trained = parameters["adapter"] or parameters["linear"] + parameters["other"]
    return {
        "merged_model": count_final_bytes(args, parameters),
        "adapter": 4 * parameters["adapter"],
        "checkpoints": checkpoints * trained * (4 + count_moment_bytes(optim)),
    }


def check_disk(args: argparse.Namespace, config, checkpoints: int) -> None:
    """Refuse to start when adapter, checkpoints and merged model would not fit beside what is on their disks."""
    parameters = count_parameters(config, args.lora_rank, args.trust_remote_code, args.target_modules)
    sizes, lora = estimate_disk(args, parameters, find_optim(args), checkpoints), parameters["adapter"]
    needs = [
        (
            "--output_dir",
            args.output_dir,
            "the adapter and " * bool(lora) + plural(checkpoints, "checkpoint"),
            sizes["adapter"] + sizes["checkpoints"] + (1 + checkpoints) * SMALL_FILES,
        )
    ]
    if args.save_method != "lora":
        needs.append(
            (
                "--final_model_dir",
                args.final_model_dir,
                f"the {'merged' if lora else 'trained'} model",
                sizes["merged_model"] + SMALL_FILES,
            )
        )
    disks: dict[int, list] = {}
    for need in needs:
        folder = find_existing(need[1])
        disks.setdefault(folder.stat().st_dev, []).append((*need, shutil.disk_usage(folder).free))
    for wanted in disks.values():
        flags, folders, names, sizes, free = zip(*wanted)
        if free[0] < sum(sizes):
            fewer = ", or keep fewer checkpoints with --save_total_limit" * ("--output_dir" in flags)
            raise UserError(
                f"{' and '.join(map(' '.join, zip(flags, folders)))}: for {' and '.join(names)} "
                f"{sum(sizes) / 1e9:.2f} GB are needed and the disk has {free[0] / 1e9:.2f} GB free; free "
                f"some space or choose another disk{fewer}"
            )


def estimate_memory(args: argparse.Namespace, config, parameters: dict[str, int], tokens: int, plan: Plan) -> dict:
    """Return the GiB of GPU memory that training holds at its peak when the longest micro-batch has so many tokens.

    "without_graphs" is the total when no stream is recorded, by wish or for want of memory. CUDA's own memory is not
    in it.
    """

    def hold(recorded: bool) -> float:
        fixed, working = RECORDED_MEMORY if recorded else EAGER_MEMORY
        held = sum(plan.lengths) if recorded and plan.lengths else tokens  # each recorded length has memory of its own
        return held * count_token_bytes(args, config, working) / 2**30 + fixed

    base = parameters["linear"] * (0.53 if args.load_in_4bit else 2) + 2 * parameters["other"]
    # Without an adapter all weights are trained in fp32, and "base" is their copy in 16 bits that autocast holds.
    trained = parameters["adapter"] or parameters["linear"] + parameters["other"]
    trained *= 8 + count_moment_bytes(find_optim(args, cuda=True))
    if args.fsdp:
        base, trained = base / plan.devices, trained / (1 if args.lora_rank else plan.devices)
    stream = hold(args.engine != "transformers" and can_record(args, plan))
    parts = {"base": base / 2**30, "adapter": trained / 2**30, "longest_stream": stream}
    total = sum(parts.values())
    found = {"total": total, **parts, "without_graphs": total - stream + hold(False)}
    return {name: round(part, 2) for name, part in found.items()}
