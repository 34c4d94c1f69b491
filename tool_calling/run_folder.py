"""The folders of a run: what may be written where, run.yaml, and what a resumed run must share with its beginning."""

import math
import os
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from tool_calling.checkpoints import find_best, list_checkpoints, read_state, to_step
from tool_calling.files import LOCK, digest, find_damage, find_existing, move_aside, write_file
from tool_calling.processes import is_main
from tool_calling.prompts import find_date
from tool_calling.terminal import UserError, Watch, hide_secrets, warn

if TYPE_CHECKING:  # a schedule needs torch, and folders are checked before torch is imported
    from tool_calling.schedule import Schedule

WRITTEN_BY = "# written by train_qwen3_tool_calling.py\n"  # first line of run.yaml: this folder may be replaced
EARLY_FILES = {LOCK, "unsloth_compiled"}  # in the output folder of a run that ended before it trained
NOT_REPEATED = ("resume_from_checkpoint", "dry_run", "show_row")  # left out of run.yaml, which repeats a run
TOOLS = "tools.json"  # beside adapter and model: the tools of training, as a client sends them
CLIENT = "client.py"  # beside it: sends them
# A resumed run must share these with the run that it continues.
AGREED = """model_id chat_template load_in_4bit lora_rank lora_alpha lora_dropout use_rslora target_modules
    train_tokens thinking compact_tools augment holdout_tools tools_in_prompt method num_generations temperature
    hard_rows reward beta share_prefix learning_rate lr_scheduler_type warmup_steps warmup_ratio weight_decay optim
    seed metric_for_best early_stopping_patience""".split()


def check_folder(path: str, flag: str) -> None:
    """Refuse a folder that holds anything and was not written by this script."""
    folder, marker = Path(path), Path(path) / "run.yaml"
    if os.path.lexists(path) and not folder.is_dir():
        raise UserError(f"{flag} {path}: is a file or a broken link; expected a folder")
    nearest = find_existing(path)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{flag} {path}: {nearest} cannot be written; choose another folder")
    ours = marker.is_file() and marker.read_text(encoding="utf-8", errors="replace").startswith(WRITTEN_BY)
    if folder.is_dir() and not ours and any(file.name not in EARLY_FILES for file in folder.iterdir()):
        raise UserError(f"{flag} {path}: holds files that this script did not write; choose another folder or empty it")


def check_final(final: Path, output: Path, inputs: dict[str, list[str]]) -> None:
    """Refuse a final folder that cannot be replaced as a whole, or that contains what the run still needs.

    Args:
        inputs: flag without dashes: the paths or Hub names that were given for it.
    """
    needed = [("output_dir", str(output))]
    needed += [(flag, path) for flag, paths in inputs.items() for path in paths if Path(path).exists()]
    for flag, path in needed:
        if Path(path).resolve().is_relative_to(final.resolve()):
            found = f"is replaced as a whole and contains --{flag} {path}"
            raise UserError(f"--final_model_dir {final}: {found}; choose another folder")
    if is_result(final, output):
        raise UserError(f"--final_model_dir {final}: is where --output_dir has its {final.name}; choose another folder")
    if list_checkpoints(final) or (final / "adapter").exists():
        found = "is replaced as a whole and is the --output_dir of a run"
        raise UserError(f"--final_model_dir {final}: {found}; choose another folder")
    if not final.name or final.is_symlink() or final.is_mount() or not os.access(find_existing(final.parent), os.W_OK):
        raise UserError(f"--final_model_dir {final}: cannot be written and renamed there; choose another folder")


def is_result(path: Path, output: Path) -> bool:
    """Say whether a path is where the run of an output folder has its adapter, its checkpoints or its scores."""
    inside = path.resolve().parent == output.resolve()
    return inside and bool(re.fullmatch(r"adapter|eval_only|checkpoint-\d+", path.resolve().name))


def check_models_stay(output: Path, model_ids: list[str]) -> None:
    """Refuse to train on an adapter or a model that the run itself would replace or remove."""
    for model_id in model_ids:
        if is_result(Path(model_id), output):
            found = f"its {Path(model_id).name} is replaced by this run and is what --model_id trains on"
            raise UserError(f"--output_dir {output}: {found}; choose another folder")


def write_run(settings: dict, folder: str | Path, **facts) -> None:
    """Write settings, and facts of the run, to `folder`/run.yaml, whose first line marks the folder as ours.

    --config reads it: it repeats the settings and ignores the facts.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
    content = {name: value for name, value in settings.items() if name not in NOT_REPEATED}
    content |= {"facts": facts} if facts else {}
    write_file(Path(folder) / "run.yaml", WRITTEN_BY + hide_secrets(yaml.safe_dump(content, sort_keys=False)))


def mark_output(settings: dict, folder: str | Path) -> None:
    """Mark the output folder as ours by a run.yaml, unless it has that of an earlier run."""
    if not (Path(folder) / "run.yaml").exists():
        write_run(settings, folder)


def read_run(checkpoint: str | None, defaults: dict) -> dict:
    """Return settings and facts of the run that a checkpoint is from; UserError if its run.yaml cannot be read.

    Args:
        defaults: the settings of a run without flags, for flags that came with a later version of this script.
    """
    if checkpoint is None:
        return {}
    path = Path(checkpoint).absolute().parent / "run.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: cannot be read; expected the settings of the run that {checkpoint} is from")
    return defaults | settings | (settings.get("facts") or {})


@dataclass(frozen=True)
class Run:
    """A run and its output folder; all that is known about resuming is known here.

    `settings` are the flags of this run by name. `checkpoint` is the one to go on from, and `former` the settings and
    facts of the run that it is from (see read_run).
    """

    output: Path
    settings: dict
    checkpoint: str | None = None
    former: dict = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    date: str | None = None  # that the chat template writes into prompts: the day on which the run began

    @property
    def first_step(self) -> int:
        """The optimizer step from which this run goes on."""
        return to_step(self.checkpoint)

    @property
    def reward_digest(self) -> str | None:
        """A hash of the file of --reward, if there is one."""
        path = (self.settings.get("reward") or "").rpartition(":")[0]
        return digest(Path(path).read_text(encoding="utf-8")) if path else None

    def with_date(self, tokenizer) -> "Run":
        """Return the run with the date of its prompts, if the chat template writes one."""
        return replace(self, date=self.former.get("prompt_date") or find_date(tokenizer))

    def check_agrees(self, schedule: "Schedule", optim: str) -> None:
        """Refuse to go on from a run with other rows or settings: the result would be that of neither."""
        if self.checkpoint is None:
            return
        former, source = self.former, f"in the run that {self.checkpoint} is from; expected the same"
        settings = self.settings | {"optim": optim}
        before = former | {"optim": former.get("optimizer") or former.get("optim") or optim}
        problems = [
            f"--{name} is {settings[name]}, and {before.get(name)} {source}"
            for name in AGREED
            if settings[name] != before.get(name)
        ]
        if former.get("rows_per_step") != schedule.rows_per_step:
            name, rows = "--batch_size x --gradient_accumulation_steps x devices", former.get("rows_per_step")
            problems.append(f"{name} is {schedule.rows_per_step}, and {rows} {source}")
        if self.reward_digest != former.get("reward_digest"):
            problems.append(f"the file of --reward is not as it was {source} file")
        if former.get("training_rows") != schedule.digest():
            problems.append(f"the training rows are not those {source} rows in the same order")
        best = find_best(self.checkpoint) if settings["metric_for_best"] else None
        if best and (damage := find_damage(best)):
            problems.append(f"{best}, the best so far, is damaged: {damage}; remove it to go on without")
        if self.first_step > schedule.steps:
            end = f"--max_steps or --num_epochs ends at {schedule.steps:,}; expected no fewer steps"
            problems.append(f"{self.checkpoint} is from step {self.first_step:,}, and {end}")
        if problems:
            raise UserError("\n".join(problems))
        self._warn_of_other_rates(schedule)

    def _warn_of_other_rates(self, schedule: "Schedule") -> None:
        epochs, steps = self.former.get("num_epochs", schedule.epochs), self.former.get("max_steps", schedule.max_steps)
        planned = replace(schedule, epochs=epochs, max_steps=steps).steps
        if planned != schedule.steps and not self.settings["lr_scheduler_type"].startswith("constant"):
            found = f"{self.checkpoint} is from a run of {planned:,} steps, and this one has {schedule.steps:,}"
            warn(f"{found}: from here on the learning rate follows this run")

    def is_complete(self, steps: int) -> bool:
        """Say whether training had ended with the checkpoint: at its last step, or early without improvement."""
        if self.checkpoint is None:
            return False
        state, patience = read_state(self.checkpoint), self.settings["early_stopping_patience"] or math.inf
        stopping = state["stateful_callbacks"].get("EarlyStoppingCallback", {})
        waited = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
        return state["global_step"] >= steps or waited >= patience

    def start(self, schedule: "Schedule", optim: str, **facts) -> None:
        """Mark the output folder as this run's, and remove checkpoints and unfinished folders of other runs.

        The checkpoint to go on from stays, and those before it. `facts` are for a run that goes on from this one.
        """
        if not is_main():
            return
        resumed = self.checkpoint and Path(self.checkpoint).resolve().parent == self.output.resolve()
        last = self.first_step if resumed else 0
        for old in list_checkpoints(self.output):
            if int(old.name[11:]) > last:
                shutil.rmtree(move_aside(old), ignore_errors=True)
        for leftover in (*self.output.glob(".*.partial"), *self.output.glob(".*.old")):
            shutil.rmtree(leftover, ignore_errors=True)
        facts |= {"training_rows": schedule.digest(), "rows_per_step": schedule.rows_per_step, "optimizer": optim}
        facts |= {"reward_digest": self.reward_digest} if self.reward_digest else {}
        write_run(self.settings, self.output, **facts, **({"prompt_date": self.date} if self.date else {}))
