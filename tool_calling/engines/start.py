"""Starting an engine: Unsloth on CUDA, Transformers elsewhere."""

import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

import torch

from tool_calling.environment import keep_objects
from tool_calling.terminal import UserError, plural

# Transformers is imported inside of functions here: Unsloth patches it and must be imported before it.


def start_engine(engine: str, share_prefix: bool, output_dir: str, seed: int, flash: bool = False) -> str:
    """Import the engine, "unsloth", "transformers" or "auto", set the seed and return the engine's name.

    Args:
        flash: whether it must be able to compute streams by FlashAttention 4.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise UserError(f"{here} processes for {plural(gpus, 'GPU')}; expected --nproc_per_node {gpus}")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if engine == "auto":
        engine = "unsloth" if cuda else "transformers"
    if engine == "unsloth" and not cuda:
        raise UserError("--engine unsloth needs a CUDA GPU, and torch sees none; use --engine transformers")
    if flash and not (engine == "unsloth" and share_prefix and has_flash_attention()):
        needs = "Unsloth, shared prefixes, a Hopper or Blackwell GPU, and the package flash-attn-4"
        raise UserError(f"--flash_attention needs {needs}; leave it out")
    with keep_objects():
        if engine == "unsloth":
            import_unsloth(share_prefix, output_dir)
        quiet_libraries()
        import transformers

    transformers.set_seed(seed)
    return engine


def has_flash_attention() -> bool:
    """Return whether FlashAttention 4 is installed, and made for this GPU."""
    try:
        found = importlib.util.find_spec("flash_attn.cute")
    except ImportError:  # no flash_attn, or one that does not fit this PyTorch
        return False
    return found is not None and torch.cuda.get_device_capability() >= (9, 0)


def import_unsloth(share_prefix: bool, output_dir: str) -> None:
    """Import Unsloth with the settings that it reads from the environment; it patches trl, transformers and peft."""
    late = sorted({"trl", "transformers", "peft"} & sys.modules.keys())
    if late and "unsloth" not in sys.modules:
        raise RuntimeError(f"Unsloth must be imported before {', '.join(late)}: it patches them")
    # Its generated trainers belong to the run, not to the working folder.
    settings = {"UNSLOTH_COMPILE_LOCATION": str(Path(output_dir).resolve() / "unsloth_compiled")}
    settings["TOKENIZERS_PARALLELISM"] = "true"  # Unsloth would render rows with one core
    if share_prefix:
        settings |= {
            "UNSLOTH_BLOCK_COMPILE": "0",  # compiled blocks serve padded batches, and compiling takes ten seconds
            "CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8",  # 0.03 GB of scratch: more makes it no faster
        }
        if torch.cuda.get_device_capability() < (8, 0):  # 64 KiB of shared memory, of which Unsloth's tiles take 96
            settings |= {"PG_FLEX_BF16_BLOCK_M": "64", "PG_FLEX_BF16_BLOCK_N": "32"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if "unsloth" not in sys.modules:  # else nothing would ever take the finder out
        sys.meta_path.insert(0, OneTrainer())
    import unsloth  # noqa: F401


class OneTrainer(MetaPathFinder):
    """Let Unsloth rewrite TRL's SFTTrainer alone: all fifteen trainers would take a third of its import."""

    def find_spec(self, name, path, target=None):
        if name != "unsloth.models.rl":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_changed(module):
            run(module)
            module.patch_trl_rl_trainers = lambda: module._patch_trl_rl_trainers("sft_trainer")

        spec.loader.exec_module = run_changed
        return spec


def quiet_libraries() -> None:
    """Keep Transformers' advice off the screen; errors still show. Loggers of others: see tool_calling/engines."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
