"""Checkpoints of a run: found, read and compared with their manifests."""

import json
from pathlib import Path

from tool_calling.files import find_damage
from tool_calling.terminal import UserError, warn


def read_state(checkpoint: str | Path) -> dict:
    """Return the trainer's state in a checkpoint."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))


def to_step(checkpoint: str | Path | None) -> int:
    """Return the optimizer step after which a checkpoint was written; 0 without one."""
    return read_state(checkpoint)["global_step"] if checkpoint else 0


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoint folders in `folder`, the oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def find_best(checkpoint: str | Path) -> Path | None:
    """Return the best checkpoint up to this one: beside it, or in the folder in which the run began."""
    state = read_state(checkpoint)
    beside = Path(checkpoint).with_name(f"checkpoint-{state.get('best_global_step')}")
    places = [Path(place) for place in (beside, state.get("best_model_checkpoint")) if place]
    return next((place for place in places if place.is_dir()), None)


def find_checkpoint(output_dir: str, wanted: str | None) -> str | None:
    """Return the checkpoint to resume from: the folder `wanted`, or for "newest" the newest whole one in `output_dir`.

    UserError if there is none; None if none is wanted.
    """
    if wanted is None:
        return None
    if wanted != "newest":
        if not (Path(wanted) / "trainer_state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {wanted}: not a checkpoint; expected a folder checkpoint-N")
        if damage := find_damage(Path(wanted)):
            raise UserError(f"--resume_from_checkpoint {wanted}: is damaged: {damage}; expected a whole checkpoint")
        return str(Path(wanted))
    found = list_checkpoints(output_dir)
    for path in reversed(found):
        damage = find_damage(path)
        if not damage:
            return str(path)
        warn(f"{path} is damaged: {damage}; the one before is used")
    kind = "whole checkpoint" if found else "checkpoint"
    raise UserError(f"--resume_from_checkpoint: {output_dir} holds no {kind}; leave the flag out to start")
