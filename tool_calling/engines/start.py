"""Starting an engine: Unsloth on CUDA, Transformers elsewhere."""

import argparse
import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as distributed

from tool_calling.processes import is_main
from tool_calling.terminal import UserError, plural, say, suggest

CUDA_OPTIM = "adamw_torch_fused"  # on CUDA: a few launches for all weights of an adapter
FULL_CUDA_OPTIM = "adamw_8bit"  # of a whole model there: its two moments of a weight take 2 bytes instead of 8
COMPILED = "unsloth_compiled"  # in --output_dir: what Unsloth generates when it is imported


def start_engine(args: argparse.Namespace) -> str:
    """Import the engine and return its name; Unsloth patches trl, transformers and peft, so it must come first."""
    if torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise UserError(f"{here} processes for {plural(gpus, 'GPU')}; expected --nproc_per_node {gpus}")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    engine = args.engine if args.engine != "auto" else "unsloth" if torch.cuda.is_available() else "transformers"
    if engine == "unsloth":
        if not torch.cuda.is_available():
            raise UserError("--engine unsloth needs a CUDA GPU, and torch sees none; use --engine transformers")
        late = sorted({"trl", "transformers", "peft"} & sys.modules.keys())
        if late and "unsloth" not in sys.modules:
            raise RuntimeError(f"Unsloth must be imported before {', '.join(late)}: it patches them")
        # Its generated trainers belong with the run, not into the folder the user happens to stand in.
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(args.output_dir).resolve() / COMPILED))
        if args.share_prefix:
            os.environ.setdefault("UNSLOTH_BLOCK_COMPILE", "0")  # compiled blocks serve padded batches, for ten seconds
            os.environ.setdefault("UNSLOTH_LOGPROB_CHUNK_GB", "0.0625")  # scratch for logits and for cuBLAS: with
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # 0.3 GB more they are no faster
            if torch.cuda.get_device_capability() < (8, 0):  # 64 KiB of shared memory, of which Unsloth's tiles take 96
                os.environ.setdefault("PG_FLEX_BF16_BLOCK_M", "64")
                os.environ.setdefault("PG_FLEX_BF16_BLOCK_N", "32")
        import unsloth  # noqa: F401
    import transformers

    quiet_libraries()
    transformers.set_seed(args.seed)
    return engine


def quiet_libraries() -> None:
    """Keep the libraries' advice off the screen: errors still show."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_report_to(name: str) -> None:
    """Refuse a tracker whose library is not installed, before a model is loaded for it."""
    from transformers.integrations import get_available_reporting_integrations

    known = ["none", "all", *get_available_reporting_integrations()]
    if name not in known:
        raise UserError(f"--report_to {name}: not installed, or unknown to Transformers; here: {', '.join(known)}")


def check_optim(args: argparse.Namespace) -> None:
    """Refuse an optimizer that Transformers does not know, before a model is loaded for it."""
    from transformers.training_args import OptimizerNames

    known = [optimizer.value for optimizer in OptimizerNames]
    if find_optim(args) not in known:
        raise UserError(f"--optim {args.optim}: unknown to Transformers{suggest(args.optim, known)}")


def to_dtype(device: str):
    """Return the compute type of a device: bf16 where a GPU has it, fp16 on older ones, fp32 on CPU."""
    if device != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def find_optim(args: argparse.Namespace, cuda: bool = False) -> str:
    """Return the optimizer of a run as it is here, or on CUDA with `cuda`, also if it names none."""
    if args.optim or not (cuda or torch.cuda.is_available()):
        return args.optim or "adamw_torch"
    # The moments of a whole model that --fsdp splits, bitsandbytes' optimizers cannot hold.
    return CUDA_OPTIM if args.lora_rank or args.fsdp else FULL_CUDA_OPTIM


def use_checkpointing(args: argparse.Namespace) -> bool:
    """Return whether activations are computed twice instead of kept: less memory, a third more time."""
    return torch.cuda.is_available() if args.gradient_checkpointing == "auto" else args.gradient_checkpointing == "on"


def autocast(model):
    """Return the mixed-precision context that the trainer uses too."""
    dtype = to_dtype(model.device.type)
    return torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)


def free_gpu() -> None:
    """Give the GPU memory of models that are no longer held back to the driver, for the next process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def report_gpu() -> None:
    """Print the GPU's name and memory use; on CPU print nothing."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        peak = torch.cuda.max_memory_reserved() / 2**30
        say(
            "gpu",
            f"{torch.cuda.get_device_name(0)}, {total:.1f} GiB; {peak:.2f} GiB reserved at peak "
            f"({peak / total:.1%} of the card)",
        )


def leave_group() -> bool:
    """End the work that several processes share; return whether this is the one that goes on, alone."""
    main = is_main()
    if distributed.is_initialized():
        distributed.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if main else ():
        os.environ.pop(name, None)  # or else the libraries of the process that merges would wait for the others
    return main
