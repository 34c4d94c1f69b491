"""The output folder of a run: run.yaml, checkpoints, and what a resumed run must share."""

import argparse
import json
import math
import os
import re
import shutil
from pathlib import Path

import yaml

from tool_calling.data.literals import as_list
from tool_calling.files import LOCK, find_damage, find_existing, move_aside, write_file
from tool_calling.processes import is_main
from tool_calling.prompts import Sample
from tool_calling.terminal import UserError, hide_secrets, warn

WRITTEN_BY = "# written by train_qwen3_tool_calling.py\n"  # first line of run.yaml: marks a folder as ours to replace
# Settings that a resumed run must share with the one it goes on from.
AGREED = (
    "model_id",
    "load_in_4bit",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "thinking",
    "share_prefix",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "optim",
    "seed",
    "metric_for_best",
    "early_stopping_patience",
)
ONCE = ("resume_from_checkpoint", "dry_run", "show_row")  # not in run.yaml: who repeats a run wants none of these


def read_state(checkpoint: str | Path) -> dict:
    """Return what the trainer wrote of its state into a checkpoint."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))


def to_step(checkpoint: str | Path) -> int:
    """Return the optimizer step that a checkpoint was written after."""
    return read_state(checkpoint)["global_step"]


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoint folders in `folder`, the oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def find_checkpoint(args: argparse.Namespace) -> str | None:
    """Return the checkpoint to resume from, the newest that is whole, or None; if there is none, a UserError."""
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint != "newest":
        path = Path(args.resume_from_checkpoint)
        if not (path / "trainer_state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {path}: not a checkpoint; expected a folder checkpoint-N")
        if damage := find_damage(path):
            raise UserError(f"--resume_from_checkpoint {path}: is damaged: {damage}; expected a whole checkpoint")
        return str(path)
    found = list_checkpoints(args.output_dir)
    for path in reversed(found):
        damage = find_damage(path)
        if not damage:
            return str(path)
        warn(f"{path} is damaged: {damage}; the one before is used")
    raise UserError(
        f"--resume_from_checkpoint: {args.output_dir} holds no {'whole ' if found else ''}checkpoint; "
        "leave the flag out to start"
    )


def read_run(checkpoint: str | None, defaults: dict) -> dict:
    """Return settings and facts of the run that a checkpoint is from; a run.yaml that cannot be read is a UserError."""
    if checkpoint is None:
        return {}
    path = Path(checkpoint).absolute().parent / "run.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: cannot be read; expected the settings of the run that {checkpoint} is from")
    # A flag that came with a later version of this script had its default.
    return defaults | settings | (settings.get("facts") or {})


def check_resume(args: argparse.Namespace, checkpoint: str | None, former: dict, train: list[Sample]) -> None:
    """Refuse to go on from a checkpoint of a run with other rows or settings: the result would be of neither run."""
    from tool_calling.engines.start import find_optim
    from tool_calling.schedule import count_rows_per_step, count_steps, hash_rows

    if checkpoint is None:
        return
    settings = vars(args) | {"optim": find_optim(args)}
    former = former | {"optim": former.get("optimizer") or find_optim(argparse.Namespace(**former))}
    problems = [
        f"--{name} is {settings[name]}, and {former.get(name)} in the run that {checkpoint} is from; expected the same"
        for name in AGREED
        if settings[name] != former.get(name)
    ]
    if former.get("rows_per_step") != count_rows_per_step(args):
        problems.append(
            f"--batch_size x --gradient_accumulation_steps x devices is {count_rows_per_step(args)}, and "
            f"{former.get('rows_per_step')} in the run that {checkpoint} is from; expected the same"
        )
    if former.get("training_rows") != hash_rows(train):
        problems.append(
            f"the training rows are not those of the run that {checkpoint} is from; "
            "expected the same rows in the same order"
        )
    best = find_best(checkpoint) if args.metric_for_best else None
    if best and (damage := find_damage(best)):
        problems.append(f"{best}, the best so far, is damaged: {damage}; remove it to go on without")
    steps, done = count_steps(args, train)[0], to_step(checkpoint)
    planned = count_steps(
        argparse.Namespace(**vars(args) | {name: former[name] for name in former.keys() & {"max_steps", "num_epochs"}}),
        train,
    )[0]
    if done > steps:
        problems.append(
            f"{checkpoint} is from step {done:,}, and --max_steps or --num_epochs ends at "
            f"{steps:,}; expected no fewer steps"
        )
    if problems:
        raise UserError("\n".join(problems))
    if steps != planned and not args.lr_scheduler_type.startswith("constant"):
        warn(
            f"{checkpoint} is from a run of {planned:,} steps, and this one has {steps:,}: from here on the learning "
            "rate is that of the latter"
        )


def is_complete(args: argparse.Namespace, checkpoint: str, train: list[Sample]) -> bool:
    """Say whether training had ended with this checkpoint: at its last step, or early for want of improvement."""
    from tool_calling.schedule import count_steps

    state = read_state(checkpoint)
    stopping = state["stateful_callbacks"].get("EarlyStoppingCallback", {})
    waited = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return state["global_step"] >= count_steps(args, train)[0] or waited >= (args.early_stopping_patience or math.inf)


def find_best(checkpoint: str) -> Path | None:
    """Return the best checkpoint up to this one: beside it, or where the run began that went on in another folder."""
    state = read_state(checkpoint)
    beside = Path(checkpoint).with_name(f"checkpoint-{state.get('best_global_step')}")
    places = [Path(place) for place in (beside, state.get("best_model_checkpoint")) if place]
    return next((place for place in places if place.is_dir()), None)


def check_folder(path: str, flag: str) -> None:
    """Refuse a folder that holds anything and was not written by this script."""
    folder, marker = Path(path), Path(path) / "run.yaml"
    if os.path.lexists(path) and not folder.is_dir():
        raise UserError(f"{flag} {path}: is a file, or a link to nothing; expected a folder")
    nearest = find_existing(path)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{flag} {path}: {nearest} cannot be written; choose another folder")
    ours = marker.is_file() and marker.read_text(encoding="utf-8", errors="replace").startswith(WRITTEN_BY)
    early = {LOCK, "unsloth_compiled"}  # there also of a run that ended before it trained
    if folder.is_dir() and any(file.name not in early for file in folder.iterdir()) and not ours:
        raise UserError(f"{flag} {path}: holds files that this script did not write; choose another folder or empty it")


def check_final(args: argparse.Namespace) -> None:
    """Refuse a final folder that cannot be replaced as a whole, or would take with it what the run still needs."""
    final = Path(args.final_model_dir)
    for flag in (
        "output_dir",
        "model_id",
        "merge_model_id",
        "dataset_path",
        "eval_dataset_path",
        "tools_path",
        "resume_from_checkpoint",
    ):
        for kept in as_list(getattr(args, flag) or []):
            is_path = flag == "output_dir" or Path(kept).exists()  # not a name on the Hub
            if is_path and Path(kept).resolve().is_relative_to(final.resolve()):
                raise UserError(
                    f"--final_model_dir {final}: is replaced as a whole, and --{flag} {kept} is in it; "
                    "choose another folder"
                )
    inside = final.resolve().parent == Path(args.output_dir).resolve()
    if inside and re.fullmatch(r"adapter|eval_only|checkpoint-\d+", final.name):
        raise UserError(f"--final_model_dir {final}: is where --output_dir has its {final.name}; choose another folder")
    if list_checkpoints(final) or (final / "adapter").exists():
        raise UserError(
            f"--final_model_dir {final}: is replaced as a whole, and is the --output_dir of a run; choose "
            "another folder"
        )
    if not final.name or final.is_symlink() or final.is_mount() or not os.access(find_existing(final.parent), os.W_OK):
        raise UserError(f"--final_model_dir {final}: cannot be written and renamed there; choose another folder")


def write_run(args: argparse.Namespace, folder: str | Path, **facts) -> None:
    """Write the resolved settings, and facts of the run, to `folder`/run.yaml, whose first line marks it as ours.

    --config reads it: the settings are those of the same run once more, and the facts are left out.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
    settings = {name: value for name, value in vars(args).items() if name not in ONCE}
    settings = hide_secrets(yaml.safe_dump(settings | ({"facts": facts} if facts else {}), sort_keys=False))
    write_file(Path(folder) / "run.yaml", WRITTEN_BY + settings)


def mark_output(args: argparse.Namespace) -> None:
    """Mark the output folder as ours by a run.yaml, unless it has that of an earlier run."""
    if not (Path(args.output_dir) / "run.yaml").exists():
        write_run(args, args.output_dir)


def start_output(
    args: argparse.Namespace, checkpoint: str | None, train: list[Sample], plan, date: str | None = None
) -> None:
    """Mark the output folder as this run's, and remove what is not of it: checkpoints and unfinished folders.

    Of the checkpoints there, only the one to go on from stays, and those before it.
    """
    from tool_calling.engines.start import find_optim
    from tool_calling.schedule import hash_rows

    if not is_main():
        return
    output = Path(args.output_dir)
    resumed = checkpoint is not None and Path(checkpoint).resolve().parent == output.resolve()
    last = to_step(checkpoint) if resumed else 0
    for old in list_checkpoints(output):
        if int(old.name[11:]) > last:
            shutil.rmtree(move_aside(old), ignore_errors=True)
    for leftover in (*output.glob(".*.partial"), *output.glob(".*.old")):
        shutil.rmtree(leftover, ignore_errors=True)
    write_run(
        args,
        output,
        training_rows=hash_rows(train),
        rows_per_step=plan.rows_per_step,
        optimizer=find_optim(args),
        **({"prompt_date": date} if date else {}),
    )
