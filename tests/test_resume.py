"""Nothing is lost: interrupts, resume, damaged checkpoints, full disks and two runs at once, by doing the damage."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, WEATHER, native, write_jsonl
from forks import Fork
from jobs import CITIES, STOPPING, errors, names, start, wait, wait_for
from train_small import make_base

from tool_calling.checkpoints import list_checkpoints, to_step
from tool_calling.files import find_damage

pytestmark = pytest.mark.slow


def is_gone(group: int) -> bool:
    """Say whether no process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def read_adapter(folder: Path) -> bytes:
    return (folder / "out" / "adapter" / "adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------------------
# Killed at random moments: tests/train_small.py goes through many lives without loading the libraries again
# ---------------------------------------------------------------------------------------------------------------
SMALL_FLAGS = [
    *("--num_epochs", "10"),
    *("--save_steps", "1"),
    *("--batch_size", "2"),
    *("--gradient_accumulation_steps", "2"),
    *("--max_seq_length", "16"),
    *("--lora_dropout", "0.1"),
    *("--warmup_steps", "3"),
    *("--learning_rate", "0.01"),
]


def train_small(folder: Path, kills: int, *flags: str) -> subprocess.CompletedProcess:
    return wait(Fork(ROOT / "tests" / "train_small.py", folder, kills, *flags), 180)


def test_20_kills_at_random_moments_change_no_bit(tmp_path):
    whole = train_small(tmp_path / "whole", 0, *SMALL_FLAGS)
    assert whole.returncode == 0 and "Traceback" not in whole.stderr, whole.stderr
    killed = train_small(tmp_path / "killed", 20, *SMALL_FLAGS)
    assert killed.returncode == 0 and "Traceback" not in killed.stderr, killed.stderr
    assert sum(line.startswith("killed") for line in killed.stdout.splitlines()) == 20
    assert "warning" not in killed.stderr  # no checkpoint was ever found damaged
    assert len(set(re.findall(r"resume   from \S+checkpoint-(\d+)$", killed.stdout, re.MULTILINE))) >= 3
    assert read_adapter(tmp_path / "killed") == read_adapter(tmp_path / "whole")
    settings = json.loads((tmp_path / "whole" / "out" / "adapter" / "adapter_config.json").read_text())
    assert settings["lora_dropout"] == 0.1  # what is random is in the steps, too
    states = [
        json.loads((tmp_path / run / "out" / "checkpoint-60" / "trainer_state.json").read_text())
        for run in ("killed", "whole")
    ]
    losses = [[log["loss"] for log in state["log_history"] if "loss" in log] for state in states]
    assert losses[0] == losses[1] and len(losses[0]) == 60
    assert not list((tmp_path / "killed" / "out").glob(".*.partial"))


def test_early_stopping_and_the_best_checkpoint_survive_kills(tmp_path):
    flags = [
        *SMALL_FLAGS,
        *("--metric_for_best", "loss"),
        *("--eval_steps", "1"),
        *("--early_stopping_patience", "6"),
        *("--save_total_limit", "2"),
        *("--learning_rate", "0.3"),
    ]
    whole = train_small(tmp_path / "whole", 0, *flags)
    assert whole.returncode == 0, whole.stderr
    killed = train_small(tmp_path / "killed", 4, *flags)
    assert killed.returncode == 0, killed.stderr
    assert read_adapter(tmp_path / "killed") == read_adapter(tmp_path / "whole")
    kept = [path.name for path in list_checkpoints(tmp_path / "whole" / "out")]
    state = json.loads((tmp_path / "whole" / "out" / kept[-1] / "trainer_state.json").read_text())
    best, last = state["best_global_step"], state["global_step"]
    assert last == best + 6 < 60  # six evaluations without improvement
    assert kept == [f"checkpoint-{step}" for step in (best, last - 1, last)]  # the two newest, and the best
    assert state["best_model_checkpoint"] == str(tmp_path / "whole" / "out" / f"checkpoint-{best}")
    assert kept == [path.name for path in list_checkpoints(tmp_path / "killed" / "out")]
    of_best, of_last = (
        (tmp_path / "whole" / "out" / kept[i] / "adapter_model.safetensors").read_bytes() for i in (0, -1)
    )
    assert read_adapter(tmp_path / "whole") == of_best != of_last


# ---------------------------------------------------------------------------------------------------------------
# The real command line, on a small random base
# ---------------------------------------------------------------------------------------------------------------
ROWS = [
    native("good evening", content="Good evening."),  # without it the run would warn
    *(native(f"is it raining in {city}", ("get_weather", {"city": city})) for city in CITIES[1:]),
]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A folder with base, rows and tools, and out and final of one run of 60 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("job")
    make_base(folder / "base")
    write_jsonl(folder / "rows.jsonl", ROWS)
    (folder / "tools.json").write_text(json.dumps([WEATHER]))
    result = wait(Fork(*command(folder, folder)))
    assert result.returncode == 0, result.stderr
    return folder


def command(job: Path, folder: Path, *more: object) -> list:
    """Return the command line of a run that writes to `folder`/out and `folder`/final."""
    return [
        ROOT / "train_qwen3_tool_calling.py",
        *("--model_id", job / "base"),
        *("--dataset_path", job / "rows.jsonl"),
        *("--tools_path", job / "tools.json"),
        *("--output_dir", folder / "out"),
        *("--final_model_dir", folder / "final"),
        *("--no-load_in_4bit", "--max_steps", 60),
        *("--num_epochs", 30),
        *("--save_steps", 20),
        *("--eval_steps", 30),
        *("--train_test_split", 0.2),
        *("--batch_size", 2),
        *("--learning_rate", 0.01),
        *("--max_new_tokens", 4),
        *more,
    ]


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_all_whole(out: Path) -> None:
    assert {path: find_damage(path) for path in list_checkpoints(out)} == dict.fromkeys(list_checkpoints(out))
    assert not list(out.glob(".*.partial")) and not list(out.glob(".*.old"))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_training_leaves_a_checkpoint_and_the_command_that_goes_on(job, tmp_path, number, code):
    process = Fork(*command(job, tmp_path))
    wait_for(lambda: "step     3 of 60" in process.stdout.readline())
    second = wait(Fork(*command(job, tmp_path)))  # two runs at once
    assert (
        errors(second)
        == [
            f"error: --output_dir {tmp_path / 'out'}: in use by another run (process {process.pid}); "
            "wait for its end or choose another folder"
        ]
        and second.returncode == 1
    )
    process.send_signal(number)
    result = wait(process)
    found = list_checkpoints(tmp_path / "out")
    go_on = shlex.join(["python", *map(str, command(job, tmp_path)), "--resume_from_checkpoint"])
    assert result.returncode == code
    assert result.stderr.split("\n") == ["", STOPPING, f"interrupted by {number.name}; go on with: {go_on}", ""]
    assert 3 <= to_step(found[-1]) < 60
    assert_all_whole(tmp_path / "out")
    assert names(tmp_path) == ["out"] and not (tmp_path / "out" / "adapter").exists()
    if number == signal.SIGINT:  # the printed command is to be the one that goes on
        line = result.stderr.splitlines()[-1].split("go on with: python ")[1]
        resumed = wait(Fork(*shlex.split(line)))
        assert resumed.returncode == 0, resumed.stderr
        assert f"resume   from {found[-1]}" in resumed.stdout.splitlines()
        assert read_adapter(tmp_path) == read_adapter(job)
        merged = [folder / "final" / "model.safetensors" for folder in (tmp_path, job)]
        assert merged[0].read_bytes() == merged[1].read_bytes()


def test_sigkill_of_the_real_command_changes_no_bit(job, tmp_path):
    more = []
    for _ in range(2):
        process = Fork(*command(job, tmp_path, *more))
        wait_for(lambda process=process: " of 60  loss" in process.stdout.readline())
        time.sleep(0.4)
        process.kill()
        assert wait(process).returncode == -signal.SIGKILL
        more = ["--resume_from_checkpoint"] if list_checkpoints(tmp_path / "out") else []
    result = wait(start(*command(job, tmp_path, *more)))  # with another seed of hashes, too
    assert result.returncode == 0 and result.stderr == ""
    assert read_adapter(tmp_path) == read_adapter(job)


def test_a_second_signal_stops_at_once(tmp_path):
    """One step takes a minute here; the first signal waits for its end, the second does not."""
    flags = [*SMALL_FLAGS, "--slow_from", "4"]
    process = Fork(ROOT / "tests" / "train_small.py", tmp_path, 0, *flags)
    wait_for(lambda: (tmp_path / "out" / "checkpoint-3").is_dir())
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: STOPPING in process.stderr.readline())
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    result = wait(process, 10)
    assert result.returncode == 130 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("interrupted by SIGINT; go on with: python ")
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == [f"checkpoint-{i}" for i in (1, 2, 3)]
    assert_all_whole(tmp_path / "out")


def test_a_signal_before_training_is_one_line_and_changes_nothing(job, tmp_path):
    process = start(*command(job, tmp_path))  # a new process, which imports the libraries now
    wait_for(lambda: process.stdout.readline().startswith("read "))
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    result = wait(process)
    assert (result.returncode, names(tmp_path)) == (143, [])
    assert result.stderr == (
        "interrupted by SIGTERM before a checkpoint was written; start again with the same command\n"
    )


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_while_merging_leaves_the_adapter_and_no_final_folder(job, tmp_path, number, code):
    shutil.copytree(job / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "adapter")
    resume = command(job, tmp_path, "--resume_from_checkpoint")
    process = (start if number == signal.SIGKILL else Fork)(*resume)
    wait_for((tmp_path / ".final.partial").is_dir)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)  # as a terminal does
    result = wait(process)
    assert result.returncode == code and not (tmp_path / "final").exists()
    assert read_adapter(tmp_path) == read_adapter(job)
    assert f"resume   from {tmp_path / 'out' / 'checkpoint-60'}, where training had ended" in result.stdout.splitlines()
    if number != signal.SIGKILL:
        assert result.stderr == (
            f"interrupted by {number.name}; go on with: {shlex.join(['python', *map(str, resume)])}\n"
        )
        assert names(tmp_path) == ["out"]
    else:
        wait_for(lambda: is_gone(process.pid), 10)  # the process that merges follows its parent
        again = wait(Fork(*resume))
        assert again.returncode == 0 and names(tmp_path) == ["final", "out"]
        assert json.loads((tmp_path / "out" / "report.json").read_text())["train"]["steps"] == 0


def test_another_run_is_not_gone_on_with(job, tmp_path):
    shutil.copytree(job / "out", tmp_path / "out")
    before = read_tree(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:-1])
    other = ["--lora_rank", 8, "--max_steps", 59, "--dataset_path", tmp_path / "rows.jsonl"]
    result = wait(Fork(*command(job, tmp_path, "--resume_from_checkpoint", *other)))
    newest = tmp_path / "out" / "checkpoint-60"
    assert result.returncode == 1
    assert errors(result) == [
        f"error: --lora_rank is 8, and 16 in the run that {newest} is from; expected the same",
        f"error: the training rows are not those in the run that {newest} is from; "
        "expected the same rows in the same order",
        f"error: {newest} is from step 60, and --max_steps or --num_epochs ends at 59; expected no fewer steps",
    ]
    after = read_tree(tmp_path)
    assert {name: after[name] for name in after if name not in ("out/.lock", "rows.jsonl")} == {
        name: before[name] for name in before if name != "out/.lock"
    }


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(job, tmp_path):
    shutil.copytree(job / "out", tmp_path / "out")
    newest = tmp_path / "out" / "checkpoint-60"
    os.truncate(newest / "optimizer.pt", 1000)
    size = (job / "out" / "checkpoint-60" / "optimizer.pt").stat().st_size
    damage = f"optimizer.pt has 1,000 bytes instead of {size:,}"
    result = wait(Fork(*command(job, tmp_path, "--resume_from_checkpoint", newest)))
    assert errors(result) == [
        f"error: --resume_from_checkpoint {newest}: is damaged: {damage}; expected a whole checkpoint"
    ]
    result = wait(Fork(*command(job, tmp_path, "--resume_from_checkpoint")))
    assert result.returncode == 0
    assert result.stderr == f"warning: {newest} is damaged: {damage}; the one before is used\n"
    assert f"resume   from {tmp_path / 'out' / 'checkpoint-40'}" in result.stdout.splitlines()
    assert read_adapter(tmp_path) == read_adapter(job)
    assert_all_whole(tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a disk at a folder which has space but takes only so many files."""
    mounted = []

    def mount(folder: Path, files: int) -> None:
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size=1g,nr_inodes={files}", "tmpfs", folder],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_fills_in_training_keeps_the_earlier_checkpoints(job, tmp_path, small_disk):
    small_disk(tmp_path / "out", 40)  # two checkpoints and a part of the third
    result = wait(Fork(*command(job, tmp_path)))
    assert result.returncode == 1
    assert errors(result) == [
        f"error: {tmp_path / 'out' / 'checkpoint-60'}: the disk is full; free some space, then "
        "go on from the last checkpoint with --resume_from_checkpoint"
    ]
    assert names(tmp_path) == ["out"]
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-20", "checkpoint-40"]
    assert_all_whole(tmp_path / "out")


def test_a_disk_that_fills_in_merging_keeps_the_adapter(job, tmp_path, small_disk):
    shutil.copytree(job / "out", tmp_path / "out")
    small_disk(tmp_path / "models", 4)
    final = tmp_path / "models" / "final"
    result = wait(Fork(*command(job, tmp_path, "--resume_from_checkpoint", "--final_model_dir", final)))
    assert result.returncode == 1
    assert errors(result) == [
        f"error: {final}: the disk is full; free some space, then go on from the last checkpoint "
        "with --resume_from_checkpoint"
    ]
    assert names(tmp_path / "models") == [] and read_adapter(tmp_path) == read_adapter(job)
