"""What a run would compute, hold and write, for the dry run."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from tool_calling.checkpoints import list_checkpoints
from tool_calling.engines.answers import GPU_ROWS, limit_answers, measure_row
from tool_calling.engines.choices import find_optim
from tool_calling.engines.hub import can_share, count_parameters
from tool_calling.estimates import Footprint, Saving
from tool_calling.files import find_existing
from tool_calling.samples import Sample
from tool_calling.schedule import Batching, Schedule, plan_schedule

CACHE_BYTES = 2  # of a number in keys and values


@dataclass(frozen=True)
class Training:
    """What decides how much memory a run takes: the flags of the same names."""

    engine: str
    load_in_4bit: bool
    trust_remote_code: bool
    lora_rank: int
    lora_dropout: float
    target_modules: list[str]
    optim: str | None
    gradient_checkpointing: str
    cuda_graphs: bool
    fsdp: bool
    max_new_tokens: int | None = None

    def estimate_drawing(self, config, schedule: Schedule, memory: dict[str, float]) -> dict[str, float]:
        """Return the GiB of GPU memory while answers are drawn, with all their keys and values, and the new total."""
        rows = min(GPU_ROWS, schedule.batch_size * schedule.accumulation_steps * schedule.answers)
        numbers = measure_row(config, schedule.samples, self.max_new_tokens or limit_answers(schedule.samples))
        drawing = round(memory["base"] + memory["adapter"] + rows * numbers * CACHE_BYTES / 2**30, 2)
        return {"drawing": drawing} | {name: max(drawing, memory[name]) for name in ("total", "without_graphs")}

    def measure(self, config, schedule: Schedule) -> Footprint:
        """Return the footprint of training a model on CUDA."""
        return Footprint(
            config,
            count_parameters(config, self.lora_rank, self.trust_remote_code, self.target_modules),
            self.load_in_4bit,
            find_optim(self.optim, self.lora_rank, self.fsdp, cuda=True),
            checkpointing=self.gradient_checkpointing != "off",
            may_keep=self.gradient_checkpointing == "auto" and self.engine != "transformers",
            recorded=self.cuda_graphs and bool(schedule.layout.lengths) and not self.lora_dropout,
            split_over=schedule.devices if self.fsdp else 1,
        )


def preview_run(
    samples: list[Sample], longest: int, config, batching: Batching, saving: Saving, training: Training
) -> dict:
    """Return plan, tokens of an epoch and files of a run on CUDA; with a config also its memory and disk.

    Args:
        longest: tokens of the longest sample, held-out ones included.
    """
    engine = "transformers" if training.engine == "transformers" else "unsloth"
    share = batching.share_prefix and (config is None or can_share(engine, config, longest))
    schedule = plan_schedule(samples, replace(batching, share_prefix=share), engine=engine)
    checkpoints = schedule.list_saves(saving.save_steps)
    audit = audit_schedule(schedule, checkpoints)
    audit["files"] = list_writes(saving, bool(training.lora_rank), checkpoints)
    if config is not None:
        audit |= audit_costs(training.measure(config, schedule), saving, audit["plan"], schedule.layout.lengths)
    if schedule.answers > 1:
        audit["drawn"] = audit_answers(schedule) | {"hard_rows": batching.hard_rows}
        if config is not None:
            audit["memory_gib"] |= training.estimate_drawing(config, schedule, audit["memory_gib"])
    return audit


def audit_answers(schedule: Schedule) -> dict:
    """Return how many answers a run draws, and about how many tokens they have: as many as the references."""
    samples, steps = schedule.samples, schedule.steps
    answers = schedule.answers * schedule.count_samples(steps)
    mean = sum(len(sample.input_ids) - sample.prompt_length for sample in samples) / len(samples)
    return {"answers": answers, "tokens": round(answers * mean)}


def audit_costs(footprint: Footprint, saving: Saving, plan: dict, lengths: tuple[int, ...]) -> dict:
    """Return the memory and the disk that a run takes, by the plan of audit_schedule and the lengths of its streams."""
    kept = saving.count_checkpoints(plan["checkpoints"])
    disk = saving.estimate_disk(footprint.parameters, footprint.optim, kept)
    free = shutil.disk_usage(find_existing(saving.final_model_dir)).free
    sizes = {name: round(size / 1e9, 2) for name, size in disk.items()} | {"free": round(free / 1e9, 1)}
    memory = footprint.estimate(plan["stream_sizes"]["max"], lengths)
    return {"memory_gib": memory, "disk_gb": {**sizes, "checkpoints_kept": kept}}


def audit_schedule(schedule: Schedule, checkpoints: list[int]) -> dict:
    """Return the steps, streams and checkpoints of a run, and the tokens of its first epoch in three layouts."""
    sizes, layout = schedule.measure_run(), schedule.layout
    unfilled = replace(schedule, layout=replace(layout, lengths=(), share_prefix=True))
    epoch = {
        "padded": sum_epoch(schedule.padded()),
        "packed": schedule.answers * sum(len(sample.input_ids) for sample in schedule.samples[: schedule.rows]),
        "shared_prefix": sum_epoch(unfilled),
    }
    counts = ("rows_per_step", "answers", "streams_per_step", "steps_per_epoch", "steps")
    plan = {
        **{name: getattr(schedule, name) for name in counts},
        "share_prefix": layout.share_prefix,
        "stream_sizes": {"min": min(sizes), "mean": round(sum(sizes) / len(sizes), 1), "max": max(sizes)},
        "checkpoints": checkpoints,
    }
    return {"epoch": epoch, "plan": plan}


def sum_epoch(schedule: Schedule) -> int:
    """Return how many tokens the first epoch computes."""
    return sum(schedule.measure(schedule.streams(epoch=0)))


def list_writes(saving: Saving, lora: bool, checkpoints: list[int]) -> dict:
    """Return the paths that a run would write, and those that it would remove or replace."""
    output = Path(saving.output_dir)
    names = ["run.yaml", *(f"checkpoint-{step}" for step in checkpoints), *["adapter"] * lora, "answers.jsonl"]
    written = [output / name for name in (*names, "report.json", "report.html")]
    written += [Path(saving.final_model_dir)] if saving.save_method != "lora" else []
    earlier = list_checkpoints(output)
    replaced = [path for path in written if path.exists() and path not in earlier and path.name != "run.yaml"]
    return {"written": [str(path) for path in written], "replaced": [str(path) for path in (*earlier, *replaced)]}
