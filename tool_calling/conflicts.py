"""Flags that exclude each other, and what is said of them."""

from collections.abc import Callable
from types import SimpleNamespace

from tool_calling.origins import is_url
from tool_calling.processes import count_devices

NOT_WITH_DOUBT = """augment holdout_tools convert_to dry_run eval_only show_row resume_from_checkpoint metric_for_best
    early_stopping_patience save_gguf serve_check push_to_hub""".split()

# (whether settings are in conflict, what to say; in braces: settings)
RULES: list[tuple[Callable[[SimpleNamespace], bool], str]] = [
    (
        lambda s: s.method == "grpo" and (s.fsdp or s.engine == "unsloth"),
        "--method grpo lets the model answer while it trains, with Transformers: leave out --fsdp and --engine unsloth",
    ),
    (
        lambda s: (
            s.method == "sft"
            and (s.is_drawn or s.num_generations or s.reward or s.beta or s.metric_for_best == "reward")
        ),
        "--num_generations, --temperature, --hard_rows, --reward, --beta and --metric_for_best reward are for --method "
        "grpo",
    ),
    (lambda s: s.lora_rank and not s.target_modules, "--target_modules: expected at least one name"),
    (
        lambda s: s.eval_only and (s.dry_run or s.show_row or s.resume_from_checkpoint or s.serve_check),
        "--eval_only trains nothing: leave out --dry_run, --show_row, --resume_from_checkpoint and --serve_check",
    ),
    (
        lambda s: s.compact_tools and s.tools_in_prompt == "none",
        "--compact_tools writes the list that --tools_in_prompt none leaves out: give one of them",
    ),
    (
        lambda s: (s.augment or s.holdout_tools) and s.tools_in_prompt == "none",
        "--augment and --holdout_tools change the list that --tools_in_prompt none leaves out: give one of them",
    ),
    (
        lambda s: s.eval_model and not any(map(is_url, s.eval_only or [])),
        "--eval_model {eval_model} is a model of a server: give its address to --eval_only",
    ),
    (
        lambda s: s.convert_to and (s.dry_run or s.eval_only or s.show_row),
        "--convert_to only writes rows: leave out --dry_run, --eval_only and --show_row",
    ),
    (
        lambda s: s.dry_run and s.resume_from_checkpoint,
        "--dry_run shows a run from its start: leave out --resume_from_checkpoint",
    ),
    (
        lambda s: not s.lora_rank and (s.load_in_4bit or s.engine == "unsloth" or s.save_method == "lora"),
        "--lora_rank 0 trains the 16-bit weights themselves, with Transformers: leave out --load_in_4bit, --engine "
        "unsloth and --save_method lora",
    ),
    (
        lambda s: s.fsdp and (count_devices() == 1 or s.engine == "unsloth"),
        "--fsdp splits the weights over several GPUs, with Transformers: start it with torchrun, and leave out "
        "--engine unsloth",
    ),
    (
        lambda s: s.fsdp and not s.lora_rank and s.optim not in (None, "adamw_torch", "adamw_torch_fused"),
        "--fsdp --lora_rank 0 splits the optimizer too, which only PyTorch's can: leave out --optim {optim}, or give "
        "adamw_torch or adamw_torch_fused",
    ),
    (lambda s: s.doubt and count_devices() > 1, "--doubt computes on one GPU: start it with python, not with torchrun"),
    (
        lambda s: s.doubt and (s.method == "grpo" or s.engine == "unsloth"),
        "--doubt trains on labels, with Transformers: leave out --method grpo and --engine unsloth",
    ),
    (
        lambda s: s.doubt and s.not_with_doubt,
        "--doubt only ranks labels, and keeps no model: leave out {not_with_doubt}",
    ),
    (
        lambda s: s.serve_check and s.save_method == "lora",
        "--serve_check serves a whole model: leave out --save_method lora",
    ),
    (
        lambda s: s.save_gguf and s.save_method != "merged_16bit",
        "--save_gguf is made from the 16-bit model: leave out --save_method {save_method}",
    ),
    (
        lambda s: (s.metric_for_best or s.early_stopping_patience) and s.save_steps not in (None, s.eval_steps),
        "--metric_for_best keeps a checkpoint by its score: --save_steps must be --eval_steps",
    ),
]


def find_conflict(settings: dict, temperature: float) -> str | None:
    """Return what is wrong with settings that exclude each other, by flag; None if nothing is.

    Args:
        temperature: the default one, which is not a flag of --method grpo that was given.
    """
    given = [f"--{flag}" for flag in NOT_WITH_DOUBT if settings[flag]]
    given += ["--report_to"] * (settings["report_to"] != "none")
    settings = settings | {
        "is_drawn": settings["temperature"] != temperature or settings["hard_rows"] is not None,
        "not_with_doubt": " and ".join(given),
    }
    rules = SimpleNamespace(**settings)
    return next((text.format_map(settings) for conflicts, text in RULES if conflicts(rules)), None)
