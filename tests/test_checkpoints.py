"""Checkpoints are found, and damaged ones are named."""

import json
import os
import re

import pytest
from jobs import make_checkpoint

from tool_calling.checkpoints import find_best, find_checkpoint, list_checkpoints, to_step
from tool_calling.files import MANIFEST, find_damage
from tool_calling.terminal import UserError


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: os.truncate(folder / "weights", 4), "weights has 4 bytes instead of 10"),
        (lambda folder: (folder / "weights").write_bytes(b"0123456788"), "weights is not as it was written"),
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text('{"weights": 1}'), "manifest.json cannot be read"),
    ],
)
def test_each_damage_is_found_and_named(tmp_path, capsys, damage, message):
    old, new = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)  # the newest by number, not by name
    assert find_checkpoint(str(tmp_path), "newest") == str(new) and find_damage(new) is None
    damage(new)
    assert find_checkpoint(str(tmp_path), "newest") == str(old)
    assert capsys.readouterr().err == f"warning: {new} is damaged: {message}; the one before is used\n"
    with pytest.raises(UserError, match=re.escape(f"{new}: is damaged: {message}; expected a whole checkpoint")):
        find_checkpoint(str(tmp_path), str(new))
    damage(old)
    with pytest.raises(UserError, match="holds no whole checkpoint; leave the flag out to start"):
        find_checkpoint(str(tmp_path), "newest")


def test_none_is_looked_for_unless_one_is_wanted(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 3)
    assert find_checkpoint(str(tmp_path), None) is None and to_step(None) == 0
    assert find_checkpoint("elsewhere", f"{checkpoint}{os.sep}") == str(checkpoint) and to_step(checkpoint) == 3


def test_the_oldest_comes_first_and_what_only_looks_like_one_is_none(tmp_path):
    steps = (100, 9, 20)
    for step in steps:
        make_checkpoint(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-1.partial", ".checkpoint-5.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").touch()
    assert list_checkpoints(tmp_path) == [tmp_path / f"checkpoint-{step}" for step in sorted(steps)]
    assert list_checkpoints(tmp_path / "none") == []


def test_the_best_checkpoint_is_found_also_where_the_run_began(tmp_path):
    first, later = tmp_path / "a" / "checkpoint-100", tmp_path / "b" / "checkpoint-400"
    for folder in (first, later):
        folder.mkdir(parents=True)
    (later / "trainer_state.json").write_text(
        json.dumps({"best_global_step": 100, "best_model_checkpoint": str(first)})
    )
    assert find_best(str(later)) == first
    (tmp_path / "b" / "checkpoint-100").mkdir()
    assert find_best(str(later)) == tmp_path / "b" / "checkpoint-100"
    (later / "trainer_state.json").write_text(json.dumps({"best_global_step": None, "best_model_checkpoint": None}))
    assert find_best(str(later)) is None
