"""What a run would compute, hold and write, for the dry run."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from tool_calling.checkpoints import list_checkpoints
from tool_calling.engines.choices import find_optim
from tool_calling.engines.graphs import can_record
from tool_calling.engines.hub import can_share, count_parameters
from tool_calling.estimates import Footprint, Saving
from tool_calling.files import find_existing
from tool_calling.samples import Sample
from tool_calling.schedule import Batching, Schedule, plan_schedule
from tool_calling.terminal import list_first, plural, say

SHOWN_PATHS = 5


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

    def measure(self, config, schedule: Schedule) -> Footprint:
        """Return the footprint of training a model on CUDA."""
        return Footprint(
            config,
            count_parameters(config, self.lora_rank, self.trust_remote_code, self.target_modules),
            self.load_in_4bit,
            find_optim(self.optim, whole=not self.lora_rank and not self.fsdp, cuda=True),
            checkpointing=self.gradient_checkpointing != "off",
            recorded=self.engine != "transformers" and self.cuda_graphs and can_record(schedule, self.lora_dropout),
            split_over=schedule.devices if self.fsdp else 1,
        )


def preview_run(samples: list[Sample], config, batching: Batching, saving: Saving, training: Training) -> dict:
    """Return plan, tokens of an epoch and files of a run on CUDA; with a config also its memory and disk."""
    engine = "transformers" if training.engine == "transformers" else "unsloth"
    share = batching.share_prefix and (config is None or can_share(engine, config))
    batching = replace(batching, share_prefix=share)
    schedule = plan_schedule(samples, batching, fill=engine == "unsloth")
    checkpoints = schedule.list_saves(saving.save_steps)
    audit = audit_schedule(schedule, checkpoints)
    audit["files"] = list_writes(saving, bool(training.lora_rank), checkpoints)
    if config is None:
        return audit
    return audit | audit_costs(training.measure(config, schedule), saving, audit["plan"], schedule.layout.lengths)


def audit_costs(footprint: Footprint, saving: Saving, plan: dict, lengths: tuple[int, ...]) -> dict:
    """Return the memory and the disk that a run takes, by the plan of audit_schedule and the lengths of its streams."""
    kept = saving.count_checkpoints(plan["checkpoints"])
    disk = saving.estimate_disk(footprint.parameters, footprint.optim, kept)
    free = shutil.disk_usage(find_existing(saving.final_model_dir)).free
    return {
        "memory_gib": footprint.estimate(plan["stream_sizes"]["max"], lengths),
        "disk_gb": {
            **{name: round(size / 1e9, 2) for name, size in disk.items()},
            "free": round(free / 1e9, 1),
            "checkpoints_kept": kept,
        },
    }


def audit_schedule(schedule: Schedule, checkpoints: list[int]) -> dict:
    """Return the steps, streams and checkpoints of a run, and the tokens of its first epoch in three layouts."""
    sizes, layout = schedule.measure_run(), schedule.layout
    unfilled = replace(schedule, layout=replace(layout, lengths=(), share_prefix=True))
    epoch = {
        "padded": sum_epoch(schedule.padded()),
        "packed": sum(len(sample.input_ids) for sample in schedule.samples),
        "shared_prefix": sum_epoch(unfilled),
    }
    plan = {
        "rows_per_step": schedule.rows_per_step,
        "streams_per_step": schedule.streams_per_step,
        "steps_per_epoch": schedule.steps_per_epoch,
        "steps": schedule.steps,
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


def show_run(audit: dict) -> None:
    """Print what a run would compute, hold and write."""
    epoch, plan, unit = audit["epoch"], audit["plan"], audit["unit"]
    say(
        "epoch",
        f"{epoch['padded']:,} {unit} in padded batches, {epoch['packed']:,} packed, "
        f"{epoch['shared_prefix']:,} with shared prefix ({epoch['padded'] / epoch['shared_prefix']:.1f} times "
        "fewer than padded)",
    )
    name, sizes = "stream" if plan["share_prefix"] else "padded batch", plan["stream_sizes"]
    span = " to ".join(f"{size:,}" for size in sorted({sizes["min"], sizes["max"]}))
    say(
        "plan",
        f"{plan['steps']:,} steps, {plan['steps_per_epoch']:,} an epoch, of {plan['rows_per_step']:,} rows in "
        f"{plural(plan['streams_per_step'], name)} of {span} {unit}",
    )
    if "memory_gib" in audit:
        memory, disk = audit["memory_gib"], audit["disk_gb"]
        graphs = f"; without CUDA graphs {memory['without_graphs']:.2f}" * (memory["without_graphs"] < memory["total"])
        say(
            "memory",
            f"about {memory['total']:.2f} GiB of GPU memory (an estimate): base {memory['base']:.2f}, "
            f"trained weights and optimizer {memory['adapter']:.2f}, longest {name} "
            f"{memory['longest_stream']:.2f}{graphs}",
        )
        say(
            "disk",
            f"{disk['merged_model']:.2f} GB for the final model, {disk['checkpoints']:.2f} GB for "
            f"{plural(disk['checkpoints_kept'], 'checkpoint')}; {disk['free']:,.1f} GB free",
        )
    else:
        say("memory", "not estimated, nor disk: that takes tokenizer and config.json of the model")
    written, replaced = audit["files"]["written"], audit["files"]["replaced"]
    names = {f"checkpoint-{step}" for step in plan["checkpoints"]}
    say(
        "writes",
        ", ".join(
            [path for path in written if Path(path).name not in names]
            + [plural(len(plan["checkpoints"]), "checkpoint")]
        ),
    )
    if replaced:
        say("", f"instead of: {list_first(replaced, SHOWN_PATHS)}")
