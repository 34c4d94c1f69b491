"""Nothing is lost: interrupts, resume, damaged checkpoints, full disks and two runs at once, by doing the damage."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, WEATHER, native, write_jsonl
from test_command_line import CITIES, errors, names
from train_small import make_base

import train_qwen3_tool_calling as script

# One thread: the same sums in the same order, and no fight for the cores.
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
STOPPING = "stopping after this step, with a checkpoint; once more stops at once"


def start(*command: object) -> subprocess.Popen:
    """Start a Python script in a process group of its own, as a terminal does, and do not wait for it."""
    return subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=ENVIRONMENT, cwd=ROOT, start_new_session=True)


def wait(process: subprocess.Popen, seconds: float = 120) -> subprocess.CompletedProcess:
    """Return what a started process ended with."""
    stdout, stderr = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_for(condition, seconds: float = 90) -> None:
    """Return when the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def read_adapter(folder: Path) -> bytes:
    return (folder / "out" / "adapter" / "adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------------------
# Killed at random moments: tests/train_small.py goes through many lives without loading the libraries again
# ---------------------------------------------------------------------------------------------------------------
SMALL_FLAGS = ["--num_epochs", "10", "--save_steps", "1", "--batch_size", "2", "--gradient_accumulation_steps", "2",
               "--max_seq_length", "16", "--lora_dropout", "0.1", "--warmup_steps", "3", "--learning_rate", "0.01"]


def train_small(folder: Path, kills: int, seconds: float, *flags: str) -> subprocess.CompletedProcess:
    return wait(start(ROOT / "tests" / "train_small.py", folder, kills, seconds, *flags), 180)


def test_20_kills_at_random_moments_change_no_bit(tmp_path):
    whole = train_small(tmp_path / "whole", 0, 0, *SMALL_FLAGS)
    assert whole.returncode == 0 and "Traceback" not in whole.stderr, whole.stderr
    killed = train_small(tmp_path / "killed", 20, 1.2, *SMALL_FLAGS)
    assert killed.returncode == 0 and "Traceback" not in killed.stderr, killed.stderr
    assert sum(line.startswith("killed") for line in killed.stdout.splitlines()) == 20
    assert "warning" not in killed.stderr  # no checkpoint was ever found damaged
    assert len(set(re.findall(r"resume   from \S+checkpoint-(\d+)$", killed.stdout, re.MULTILINE))) >= 3
    assert read_adapter(tmp_path / "killed") == read_adapter(tmp_path / "whole")
    states = [json.loads((tmp_path / run / "out" / "checkpoint-60" / "trainer_state.json").read_text())
              for run in ("killed", "whole")]
    losses = [[log["loss"] for log in state["log_history"] if "loss" in log] for state in states]
    assert losses[0] == losses[1] and len(losses[0]) == 60
    assert not list((tmp_path / "killed" / "out").glob(".*.partial"))


def test_early_stopping_and_the_best_checkpoint_survive_kills(tmp_path):
    flags = [*SMALL_FLAGS, "--metric_for_best", "loss", "--eval_steps", "1", "--early_stopping_patience", "6",
             "--save_total_limit", "2", "--learning_rate", "0.3"]
    whole = train_small(tmp_path / "whole", 0, 0, *flags)
    assert whole.returncode == 0, whole.stderr
    killed = train_small(tmp_path / "killed", 4, 1.2, *flags)
    assert killed.returncode == 0, killed.stderr
    assert read_adapter(tmp_path / "killed") == read_adapter(tmp_path / "whole")
    kept = [path.name for path in script.list_checkpoints(tmp_path / "whole" / "out")]
    state = json.loads((tmp_path / "whole" / "out" / kept[-1] / "trainer_state.json").read_text())
    best, last = state["best_global_step"], state["global_step"]
    assert last == best + 6 < 60  # six evaluations without improvement
    assert kept == [f"checkpoint-{best}", f"checkpoint-{last}"]
    assert state["best_model_checkpoint"] == str(tmp_path / "whole" / "out" / f"checkpoint-{best}")
    assert kept == [path.name for path in script.list_checkpoints(tmp_path / "killed" / "out")]
