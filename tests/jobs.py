"""Runs of the real command line that several test files make: their rows, flags, processes and files."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, TINY, native
from forks import ENVIRONMENT, Fork
from safetensors.torch import load_file, save_file

from tool_calling.files import write_manifest

CITIES = ["Rome", "Oslo", "Paris", "Lima", "Cairo", "Quito", "Delhi", "Turin", "Kyoto", "Perth", "Accra", "Sofia"]
ROWS = [
    row
    for city in CITIES
    for row in (
        native(f"is it raining in {city}", ("get_weather", {"city": city})),
        native(f"how is {city} for the next 3 days", ("get_weather", {"city": city, "days": 3})),
    )
]
FINAL_FILES = [
    "README.md",
    "chat_template.jinja",
    "client.py",
    "config.json",
    "generation_config.base.json",
    "generation_config.json",
    "model.safetensors",
    "run.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "tools.json",
]
STOPPING = "stopping after this step, with a checkpoint; once more stops at once"


def names(folder: Path) -> list[str]:
    """Return the names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def errors(result: subprocess.CompletedProcess) -> list[str]:
    """Return the lines of errors that a run printed; none of them is a traceback."""
    assert "Traceback" not in result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def arguments(folder: Path, *more: object) -> list:
    """Return the flags of a run of two epochs over `folder`/rows.jsonl that writes to `folder`/out and /final."""
    return [
        *("--model_id", TINY),
        *("--dataset_path", folder / "rows.jsonl"),
        *("--tools_path", folder / "tools.json"),
        *("--output_dir", folder / "out"),
        *("--final_model_dir", folder / "final"),
        *("--num_epochs", 2),
        *("--train_test_split", 0.25),
        *more,
    ]


TAGS, UNUSED = [4084, 4085], 4090  # <tool_call>, </tool_call>, and a token that the texts of the embedded base lack


def make_blank_base(folder: Path) -> Path:
    """Write the embedded base to a folder with the rows of its call tags as if it had never read a call."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][TAGS] = weights["model.embed_tokens.weight"][UNUSED].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def start(*command: object) -> subprocess.Popen:
    """Start a Python script in a process group of its own, as a terminal does, and do not wait for it."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        start_new_session=True,
    )


def wait(process: subprocess.Popen | Fork, seconds: float = 120) -> subprocess.CompletedProcess:
    """Return what a started process ended with."""
    stdout, stderr = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_forked(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run the real command line in a fork that has the libraries; see forks.py for what only `run_script` shows."""
    return wait(Fork(ROOT / "train_qwen3_tool_calling.py", *arguments, **environment), 240)


def wait_for(condition, seconds: float = 90) -> None:
    """Return when the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def make_checkpoint(out: Path, step: int) -> Path:
    """Write a checkpoint that has a state and a manifest, but no weights that could be loaded."""
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "stateful_callbacks": {}}))
    (folder / "weights").write_bytes(b"0123456789")
    write_manifest(folder)
    return folder
