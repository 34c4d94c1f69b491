"""Nothing is lost: interrupts, resume, damaged checkpoints, full disks and two runs at once, by doing the damage."""

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
from tool_calling.files import MANIFEST, find_damage, write_manifest
from tool_calling.prompts import Sample
from tool_calling.run_folder import (
    check_final,
    check_folder,
    check_resume,
    find_best,
    find_checkpoint,
    list_checkpoints,
    read_run,
    start_output,
    to_step,
)
from tool_calling.schedule import Plan, count_checkpoints, count_steps, count_trained, hash_rows
from tool_calling.terminal import UserError
from tool_calling.training.callbacks import build_stopper

# One thread: the same sums in the same order, and no fight for the cores.
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
STOPPING = "stopping after this step, with a checkpoint; once more stops at once"


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
    "--num_epochs",
    "10",
    "--save_steps",
    "1",
    "--batch_size",
    "2",
    "--gradient_accumulation_steps",
    "2",
    "--max_seq_length",
    "16",
    "--lora_dropout",
    "0.1",
    "--warmup_steps",
    "3",
    "--learning_rate",
    "0.01",
]


def train_small(folder: Path, kills: int, *flags: str) -> subprocess.CompletedProcess:
    return wait(start(ROOT / "tests" / "train_small.py", folder, kills, *flags), 180)


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
        "--metric_for_best",
        "loss",
        "--eval_steps",
        "1",
        "--early_stopping_patience",
        "6",
        "--save_total_limit",
        "2",
        "--learning_rate",
        "0.3",
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
    result = wait(start(*command(folder, folder)))
    assert result.returncode == 0, result.stderr
    return folder


def command(job: Path, folder: Path, *more: object) -> list:
    """Return the command line of a run that writes to `folder`/out and `folder`/final."""
    return [
        ROOT / "train_qwen3_tool_calling.py",
        "--model_id",
        job / "base",
        "--dataset_path",
        job / "rows.jsonl",
        "--tools_path",
        job / "tools.json",
        "--output_dir",
        folder / "out",
        "--final_model_dir",
        folder / "final",
        "--no-load_in_4bit",
        "--max_steps",
        60,
        "--num_epochs",
        30,
        "--save_steps",
        20,
        "--eval_steps",
        30,
        "--train_test_split",
        0.2,
        "--batch_size",
        2,
        "--learning_rate",
        0.01,
        "--max_new_tokens",
        4,
        *more,
    ]


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_all_whole(out: Path) -> None:
    assert {path: find_damage(path) for path in list_checkpoints(out)} == dict.fromkeys(list_checkpoints(out))
    assert not list(out.glob(".*.partial")) and not list(out.glob(".*.old"))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_training_leaves_a_checkpoint_and_the_command_that_goes_on(job, tmp_path, number, code):
    process = start(*command(job, tmp_path))
    wait_for(lambda: "step     3 of 60" in process.stdout.readline())
    second = wait(start(*command(job, tmp_path)))  # two runs at once
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
        resumed = wait(start(*shlex.split(line)))
        assert resumed.returncode == 0, resumed.stderr
        assert f"resume   from {found[-1]}" in resumed.stdout.splitlines()
        assert read_adapter(tmp_path) == read_adapter(job)
        merged = [folder / "final" / "model.safetensors" for folder in (tmp_path, job)]
        assert merged[0].read_bytes() == merged[1].read_bytes()


def test_sigkill_of_the_real_command_changes_no_bit(job, tmp_path):
    more = []
    for _ in range(2):
        process = start(*command(job, tmp_path, *more))
        wait_for(lambda: " of 60  loss" in process.stdout.readline())
        time.sleep(0.4)
        process.kill()
        assert wait(process).returncode == -signal.SIGKILL
        more = ["--resume_from_checkpoint"] if list_checkpoints(tmp_path / "out") else []
    result = wait(start(*command(job, tmp_path, *more)))
    assert result.returncode == 0 and result.stderr == ""
    assert read_adapter(tmp_path) == read_adapter(job)


def test_a_second_signal_stops_at_once(tmp_path):
    """One step takes a minute here; the first signal waits for its end, the second does not."""
    flags = [*SMALL_FLAGS, "--slow_from", "4"]
    process = start(ROOT / "tests" / "train_small.py", tmp_path, 0, *flags)
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
    process = start(*command(job, tmp_path))
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
    process = start(*resume)
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
        again = wait(start(*resume))
        assert again.returncode == 0 and names(tmp_path) == ["final", "out"]
        assert json.loads((tmp_path / "out" / "report.json").read_text())["train"]["steps"] == 0


def test_another_run_is_not_gone_on_with(job, tmp_path):
    shutil.copytree(job / "out", tmp_path / "out")
    before = read_tree(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:-1])
    result = wait(
        start(
            *command(
                job,
                tmp_path,
                "--resume_from_checkpoint",
                "--lora_rank",
                8,
                "--max_steps",
                59,
                "--dataset_path",
                tmp_path / "rows.jsonl",
            )
        )
    )
    newest = tmp_path / "out" / "checkpoint-60"
    assert result.returncode == 1
    assert errors(result) == [
        f"error: --lora_rank is 8, and 16 in the run that {newest} is from; expected the same",
        f"error: the training rows are not those of the run that {newest} is from; "
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
    result = wait(start(*command(job, tmp_path, "--resume_from_checkpoint", newest)))
    assert errors(result) == [
        f"error: --resume_from_checkpoint {newest}: is damaged: {damage}; expected a whole checkpoint"
    ]
    result = wait(start(*command(job, tmp_path, "--resume_from_checkpoint")))
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
    result = wait(start(*command(job, tmp_path)))
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
    result = wait(start(*command(job, tmp_path, "--resume_from_checkpoint", "--final_model_dir", final)))
    assert result.returncode == 1
    assert errors(result) == [
        f"error: {final}: the disk is full; free some space, then go on from the last checkpoint "
        "with --resume_from_checkpoint"
    ]
    assert names(tmp_path / "models") == [] and read_adapter(tmp_path) == read_adapter(job)


# ---------------------------------------------------------------------------------------------------------------
# Functions by themselves
# ---------------------------------------------------------------------------------------------------------------
def make_checkpoint(out: Path, step: int) -> Path:
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "stateful_callbacks": {}}))
    (folder / "weights").write_bytes(b"0123456789")
    write_manifest(folder)
    return folder


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
    args = script.parse_args(["--output_dir", str(tmp_path), "--resume_from_checkpoint"])
    assert find_checkpoint(args) == str(new) and find_damage(new) is None
    damage(new)
    assert find_checkpoint(args) == str(old)
    assert capsys.readouterr().err == f"warning: {new} is damaged: {message}; the one before is used\n"
    args.resume_from_checkpoint = str(new)
    with pytest.raises(UserError, match=re.escape(f"{new}: is damaged: {message}; expected a whole checkpoint")):
        find_checkpoint(args)
    damage(old)
    args.resume_from_checkpoint = "newest"
    with pytest.raises(UserError, match="holds no whole checkpoint; leave the flag out to start"):
        find_checkpoint(args)


SAMPLES = [Sample("row:1", [1, 2, 3], 2), Sample("row:2", [4, 5, 6], 1)]


def agreed_run() -> tuple:
    """Return (settings, what run.yaml holds of them)."""
    args = script.parse_args(["--num_epochs", "4"])
    return args, vars(args) | {"training_rows": hash_rows(SAMPLES), "rows_per_step": 8}


@pytest.mark.parametrize(
    "name, value",
    [
        ("model_id", "other/model"),
        ("load_in_4bit", False),
        ("lora_rank", 8),
        ("lora_alpha", 8),
        ("lora_dropout", 0.5),
        ("share_prefix", False),
        ("learning_rate", 0.5),
        ("lr_scheduler_type", "cosine"),
        ("warmup_steps", 0),
        ("weight_decay", 0.0),
        ("optim", "sgd"),
        ("seed", 1),
        ("metric_for_best", "loss"),
        ("early_stopping_patience", 3),
        ("use_rslora", True),
        ("target_modules", ["q_proj"]),
        ("thinking", "off"),
        ("warmup_ratio", 0.5),
    ],
)
def test_each_difference_is_refused_by_name(tmp_path, name, value):
    checkpoint = str(make_checkpoint(tmp_path, 3))
    args, former = agreed_run()
    check_resume(args, checkpoint, former, SAMPLES)
    setattr(args, name, value)
    with pytest.raises(UserError) as error:
        check_resume(args, checkpoint, former, SAMPLES)
    was = "adamw_torch" if name == "optim" else former[name]  # on the CPU, of a run that named none
    assert str(error.value) == f"--{name} is {value}, and {was} in the run that {checkpoint} is from; expected the same"


def test_a_damaged_best_checkpoint_is_found_before_training(tmp_path):
    best, last = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 3)
    state = {"global_step": 3, "best_global_step": 2, "stateful_callbacks": {}}
    (last / "trainer_state.json").write_text(json.dumps(state))
    args, former = agreed_run()
    args.metric_for_best = former["metric_for_best"] = "loss"
    check_resume(args, str(last), former, SAMPLES)
    (best / "weights").write_bytes(b"0123456788")
    with pytest.raises(UserError) as error:
        check_resume(args, str(last), former, SAMPLES)
    assert str(error.value) == (
        f"{best}, the best so far, is damaged: weights is not as it was written; remove it to go on without"
    )


def test_where_the_best_checkpoint_is_gone_the_best_is_sought_anew(tmp_path, capsys):
    from transformers import TrainerState, TrainingArguments

    best, last = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 3)
    state = {"global_step": 3, "best_global_step": 2, "best_metric": 0.9, "stateful_callbacks": {}}
    (last / "trainer_state.json").write_text(json.dumps(state))
    for there in (True, False):
        loaded = TrainerState.load_from_json(str(last / "trainer_state.json"))
        build_stopper(str(last)).on_train_begin(TrainingArguments(str(tmp_path), use_cpu=True), loaded, None)
        assert (loaded.best_global_step, loaded.best_metric) == ((2, 0.9) if there else (None, None))
        assert (
            capsys.readouterr().err == ""
            if there
            else ("warning: the best checkpoint, of step 2, is gone: the best is sought anew\n")
        )
        shutil.rmtree(best, ignore_errors=True)


def test_a_run_may_grow_and_not_shrink_and_says_what_that_does_to_its_rate(tmp_path, capsys):
    checkpoint = str(make_checkpoint(tmp_path, 3))
    args, former = agreed_run()
    planned = count_steps(args, SAMPLES)[0]
    for epochs, steps in ((9, None), (4, 3), (1, 7)):
        args.num_epochs, args.max_steps = epochs, steps
        check_resume(args, checkpoint, former, SAMPLES)
        expected = count_steps(args, SAMPLES)[0]
        assert expected != planned and capsys.readouterr().err == (
            f"warning: {checkpoint} is from a run of {planned} steps, and this one has {expected}: from here on the learning "
            "rate is that of the latter\n"
        )
    args.lr_scheduler_type = former["lr_scheduler_type"] = "constant_with_warmup"
    check_resume(args, checkpoint, former, SAMPLES)
    assert capsys.readouterr().err == ""
    args.max_steps = 2
    with pytest.raises(UserError, match="-3 is from step 3, and --max_steps or --num_epochs ends at 2; "):
        check_resume(args, checkpoint, former, SAMPLES)


def test_rows_are_the_same_only_in_the_same_order_with_the_same_prompts():
    first, second = SAMPLES
    hashes = {
        hash_rows(rows)
        for rows in (
            [first, second],
            [second, first],
            [first],
            [first, second._replace(prompt_length=2)],
            [first, second._replace(input_ids=[4, 5, 7])],
            [Sample("", [1, 2, 3, 4, 5, 6], 2)],
        )
    }
    assert len(hashes) == 6
    assert hash_rows([first._replace(source="elsewhere"), second]) == hash_rows(SAMPLES)


def test_what_is_not_of_the_run_is_removed_at_its_start(tmp_path):
    args = script.parse_args(["--output_dir", str(tmp_path)])
    plan = Plan(8, 1, [])
    for step in (3, 6, 12):
        make_checkpoint(tmp_path, step)
    (tmp_path / ".checkpoint-15.partial").mkdir()
    (tmp_path / "notes").mkdir()
    start_output(args, str(tmp_path / "checkpoint-6"), SAMPLES, plan)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6", "notes", "run.yaml"]
    former = read_run(str(tmp_path / "checkpoint-6"), vars(script.parse_args([])))
    assert former["rows_per_step"] == 8 and former["training_rows"] == hash_rows(SAMPLES)
    start_output(args, None, SAMPLES, plan)
    assert names(tmp_path) == ["notes", "run.yaml"]


def test_checkpoints_on_the_disk_at_once_are_counted(tmp_path):
    def count(*flags, checkpoint=None):
        return count_checkpoints(script.parse_args([*flags]), SAMPLES * 20, checkpoint)  # 5 steps an epoch

    assert count("--num_epochs", "4") == 4
    assert count("--num_epochs", "4", "--save_steps", "3") == 7  # the last step is saved too
    assert count("--num_epochs", "4", "--save_total_limit", "2") == 3
    assert count("--num_epochs", "4", "--save_total_limit", "2", "--metric_for_best", "loss") == 4
    assert count("--num_epochs", "4", checkpoint=str(make_checkpoint(tmp_path, 10))) == 2
    stopped = str(make_checkpoint(tmp_path, 3))  # by a signal: the run goes on to save steps 4, 8 and 10
    assert count("--max_steps", "10", "--save_steps", "4", checkpoint=stopped) == 3


@pytest.mark.parametrize(
    "final, flags, reason",
    [
        ("out", [], "is replaced as a whole, and --output_dir {folder}/out is in it; choose another folder"),
        ("", [], "is replaced as a whole, and --output_dir {folder}/out is in it; choose another folder"),
        ("base", [], "is replaced as a whole, and --model_id {folder}/base is in it; choose another folder"),
        (
            "whole",
            ["--merge_model_id", "{folder}/whole"],
            "is replaced as a whole, and --merge_model_id {folder}/whole is in it; choose another folder",
        ),
        (
            "/",
            ["--model_id", "Qwen/Qwen3-0.6B"],
            "is replaced as a whole, and --output_dir {folder}/out is in it; choose another folder",
        ),
        (
            "data",
            ["--dataset_path", "{folder}/rows.jsonl", "{folder}/data/rows.jsonl"],
            "is replaced as a whole, and --dataset_path {folder}/data/rows.jsonl is in it; choose another folder",
        ),
        (
            "other",
            ["--resume_from_checkpoint", "{folder}/other/checkpoint-5"],
            "is replaced as a whole, and --resume_from_checkpoint {folder}/other/checkpoint-5 is in it; choose another folder",
        ),
        ("other", [], "is replaced as a whole, and is the --output_dir of a run; choose another folder"),
        ("done", [], "is replaced as a whole, and is the --output_dir of a run; choose another folder"),
        ("/proc", ["--model_id", "Qwen/Qwen3-0.6B"], "cannot be written and renamed there; choose another folder"),
    ],
)
def test_a_final_folder_that_would_take_others_with_it_is_refused(tmp_path, final, flags, reason):
    for name in ("base", "whole", "data", "other/checkpoint-5", "done/adapter"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / "rows.jsonl").touch()
    final = os.path.join(tmp_path, final) if final else str(tmp_path)
    args = script.parse_args(
        [
            "--output_dir",
            f"{tmp_path}/out",
            "--model_id",
            f"{tmp_path}/base",
            "--final_model_dir",
            final,
            *(flag.format(folder=tmp_path) for flag in flags),
        ]
    )
    with pytest.raises(UserError) as error:
        check_final(args)
    assert str(error.value) == f"--final_model_dir {final}: {reason.format(folder=tmp_path)}"


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


def test_rows_are_counted_as_the_epochs_have_them():
    # 20 rows, 8 in a step: epochs of 8, 8 and 4
    assert [count_trained(step, 20, 8) for step in range(8)] == [0, 8, 16, 20, 28, 36, 40, 48]


def test_what_unsloth_leaves_of_a_run_that_failed_early_makes_no_folder_foreign(tmp_path):
    (tmp_path / "unsloth_compiled").mkdir()
    (tmp_path / ".lock").touch()  # and a lock alone
    check_folder(tmp_path, "--output_dir")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that this script did not write"):
        check_folder(tmp_path, "--output_dir")
