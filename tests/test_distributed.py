"""Several devices: two processes of torchrun on the CPU do what one does, and go on from each other's checkpoints."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
from conftest import ROOT, WEATHER, native, write_jsonl
from forks import Fork
from jobs import CITIES, ENVIRONMENT, FINAL_FILES, STOPPING, names, start, wait, wait_for
from safetensors.numpy import load_file
from train_small import make_base

import train_qwen3_tool_calling as script
from tool_calling.arguments import pick
from tool_calling.checkpoints import list_checkpoints, to_step
from tool_calling.engines.choices import find_optim
from tool_calling.engines.start import start_engine
from tool_calling.files import find_damage
from tool_calling.run_folder import Run
from tool_calling.samples import Sample
from tool_calling.schedule import Batching, plan_schedule
from tool_calling.terminal import FlagError, UserError

TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", 2]
# 23 rows: of three epochs of two steps, each second step has a single row, so that one of two devices has none.
SMALL = [ROOT / "tests" / "train_small.py"]
FLAGS = [
    *("--num_epochs", 3, "--save_steps", 1, "--batch_size", 11, "--max_seq_length", 60),
    *("--warmup_steps", 0, "--learning_rate", "0.01", "--lr_scheduler_type", "constant"),
]


def run(folder, devices, *more):
    if not (folder / "base").exists():
        make_base(folder / "base")
    words = [*SMALL, folder, 0, *FLAGS, "--gradient_accumulation_steps", 2 // devices, *more]
    result = wait(Fork(*(TORCHRUN if devices == 2 else []), *words))
    assert result.returncode == 0, result.stderr
    return result


def train(folder, devices, *more):
    return run(folder, devices, *more).stdout


def copy_until(run, step, folder):
    """Copy a run as it was when it had made so many steps."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("adapter", "final"))
    settings = folder / "out" / "run.yaml"
    settings.write_text(settings.read_text().replace(str(run), str(folder)))
    for checkpoint in list_checkpoints(folder / "out"):
        if to_step(checkpoint) > step:
            shutil.rmtree(checkpoint)


def difference(one, other, file="out/adapter/adapter_model.safetensors"):
    """Return the largest difference of two adapters or models, as a share of the largest weight of each tensor."""
    weights, others = (load_file(folder / file) for folder in (one, other))
    assert weights.keys() == others.keys()
    return max(numpy.abs(weights[name] - others[name]).max() / numpy.abs(weights[name]).max() for name in weights)


# Sums in another order round a gradient by about 6 units of fp32, 4e-7 of its norm. With train_small's ADAM_EPSILON
# above the typical gradient, a weight then differs by at most 1.25 * sqrt(numbers of its tensor) <= 40 times that share
# of the largest weight. This bound leaves room for 42 units; a wrong split, or gradients that are not averaged, give
# 0.4 and more.
ROUNDING = 1e-4


def logs(folder, step):
    state = json.loads((folder / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [log["loss"] for log in state["log_history"] if "loss" in log]


@pytest.mark.slow
def test_two_devices_do_what_one_does_and_go_on_from_each_others_checkpoints(tmp_path):
    one, two, mixed = (tmp_path / name for name in ("one", "two", "mixed"))
    train(one, 1)
    output = train(two, 2)
    assert [int(step) for step in re.findall(r"step +(\d+) of 6  loss", output)] == [1, 2, 3, 4, 5, 6]  # said once
    assert logs(two, 6) == pytest.approx(logs(one, 6), rel=1e-5) and len(logs(one, 6)) == 6
    assert difference(two, one) < ROUNDING
    assert (two / "out" / "checkpoint-6" / "rng_state_1.pth").is_file() and find_damage(
        two / "out" / "checkpoint-6"
    ) is None
    copy_until(two, 3, mixed)  # in the middle of the second epoch
    assert "resume   from" in train(mixed, 1, "--max_steps", 4)
    output = train(mixed, 2, "--fsdp")
    assert "resume   from" in output and "holds 0.5" in output
    assert difference(mixed, one) < ROUNDING
    assert logs(mixed, 6) == pytest.approx(logs(one, 6), rel=1e-5)


@pytest.mark.slow
def test_a_device_that_runs_out_of_memory_computes_its_share_in_smaller_streams(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--eval_steps", 1]
    train(one, 1, *more)
    warnings = [line for line in run(two, 2, *more, "--room", 80).stderr.splitlines() if "out of GPU memory" in line]
    failed = "warning: device 2 of 2 is out of GPU memory at step 1 with a stream of 130 tokens"  # 20 + 11 * 10
    assert warnings == [
        f"{failed}: from here on each step is computed in 2 streams of at most 6 rows; the result is the same"
    ]
    assert difference(two, one) < ROUNDING and logs(two, 6) == pytest.approx(logs(one, 6), rel=1e-5)
    held = [
        [log["eval_loss"] for log in state["log_history"] if "eval_loss" in log]
        for state in (json.loads((each / "out/checkpoint-6/trainer_state.json").read_text()) for each in (one, two))
    ]
    assert len(held[0]) == 6 and held[1] == pytest.approx(held[0], rel=1e-5)


@pytest.mark.slow
def test_a_4_bit_base_split_over_two_devices_trains_the_same_adapter(tmp_path):
    one, split = tmp_path / "one", tmp_path / "split"
    assert "holds 1.00 of the weights" in train(one, 1, "--load_in_4bit")
    held = re.search("holds (.*) of the weights", train(split, 2, "--load_in_4bit", "--fsdp"))
    assert 0.5 < float(held[1]) < 0.6  # half of the base, the whole adapter
    assert difference(split, one) < ROUNDING
    assert logs(split, 6) == pytest.approx(logs(one, 6), rel=1e-5)


@pytest.mark.slow
def test_full_fine_tuning_with_all_weights_split_is_that_of_whole_models(tmp_path):
    whole, split, mixed = (tmp_path / name for name in ("whole", "split", "mixed"))
    full = [
        *("--lora_rank", 0, "--optim", "adamw_torch"),
        *("--metric_for_best", "loss", "--save_steps", 1, "--eval_steps", 1),
    ]
    train(whole, 1, *full)
    assert "holds 0.50 of the weights" in train(split, 2, *full, "--fsdp")
    assert difference(split, whole, "final/model.safetensors") < ROUNDING
    assert difference(split, whole, "out/checkpoint-6/model.safetensors") < ROUNDING
    assert (split / "final" / "config.json").read_text() == (whole / "final" / "config.json").read_text()
    copy_until(split, 3, mixed)
    assert "resume   from" in train(mixed, 1, *full, "--max_steps", 4)
    assert "resume   from" in train(mixed, 2, *full, "--fsdp")
    assert logs(mixed, 6) == pytest.approx(logs(whole, 6), rel=1e-5) and len(logs(mixed, 6)) == 6
    saved = (mixed / "final" / "model.safetensors").read_bytes()
    output = train(mixed, 2, *full, "--fsdp")
    assert ", where training had ended" in output and "\ntrain " not in output
    assert (mixed / "final" / "model.safetensors").read_bytes() == saved


def test_fsdp_needs_several_devices_transformers_and_an_optimizer_that_can_be_split(monkeypatch):
    for devices, more in ((1, []), (2, ["--engine", "unsloth"])):
        monkeypatch.setenv("WORLD_SIZE", str(devices))
        with pytest.raises(FlagError, match="--fsdp splits the weights over several GPUs, with Transformers"):
            script.parse_args(["--fsdp", *more])
    full = ["--fsdp", "--lora_rank", "0"]
    for args in (script.parse_args(["--fsdp"]), script.parse_args(full)):
        assert args.engine == "transformers"
        assert find_optim(args.optim, args.lora_rank, args.fsdp, cuda=True) == "adamw_torch_fused"
    assert script.parse_args([*full, "--optim", "adamw_torch_fused"]).optim == "adamw_torch_fused"
    with pytest.raises(FlagError, match="leave out --optim adamw_8bit, or give adamw_torch"):
        script.parse_args([*full, "--optim", "adamw_8bit"])


def test_what_one_process_does_the_others_leave_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for flags in (["--dry_run"], ["--eval_only", "no/model"], ["--convert_to", tmp_path / "rows.json"]):
        assert script.main([*flags, "--output_dir", tmp_path / "out"]) is None
    assert names(tmp_path) == []


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="^4 processes for 2 GPUs; expected --nproc_per_node 2$"):
        start_engine("auto", share_prefix=True, output_dir="out", seed=1)


@pytest.mark.slow
def test_processes_that_are_signalled_one_after_the_other_stop_together(tmp_path):
    make_base(tmp_path / "base")
    more = ["--gradient_accumulation_steps", 1, "--num_epochs", 300, "--eval_steps", 1]
    process = start(*TORCHRUN, *SMALL, tmp_path, 0, *FLAGS, *more)
    wait_for(lambda: "  loss " in process.stdout.readline())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"train_small" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    for worker in reversed(workers):
        os.kill(worker, signal.SIGTERM)
        time.sleep(0.02)
    result = wait(process)
    assert result.stderr.count(STOPPING) == result.stderr.count("interrupted by SIGTERM; go on with: ") == 1


def test_another_effective_batch_is_refused(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3}')
    rows = [Sample("row:1", [1, 2, 3], 2)]
    args = script.parse_args(["--batch_size", "2", "--gradient_accumulation_steps", "4"])
    schedule = plan_schedule(rows, pick(Batching, args), engine="transformers")
    former = vars(args) | {"training_rows": schedule.digest(), "rows_per_step": 16}
    run = Run(tmp_path, vars(args), str(tmp_path / "checkpoint-3"), former)
    with pytest.raises(UserError) as error:
        run.check_agrees(schedule, "adamw_torch")
    assert str(error.value) == (
        "--batch_size x --gradient_accumulation_steps x devices is 8, and 16 in the run that "
        f"{tmp_path / 'checkpoint-3'} is from; expected the same"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    run.check_agrees(plan_schedule(rows, pick(Batching, args), engine="transformers"), "adamw_torch")


# ---------------------------------------------------------------------------------------------------------------
# The real command line
# ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command of a run on two processes, without its output folders."""
    folder = tmp_path_factory.mktemp("job")
    make_base(folder / "base")
    write_jsonl(
        folder / "rows.jsonl",
        [
            native("good evening", content="Good evening."),
            *(native(f"is it raining in {city}", ("get_weather", {"city": city})) for city in CITIES[1:]),
        ],
    )
    (folder / "tools.json").write_text(json.dumps([WEATHER]))
    return [
        *TORCHRUN,
        ROOT / "train_qwen3_tool_calling.py",
        *("--model_id", folder / "base", "--no-load_in_4bit"),
        *("--dataset_path", folder / "rows.jsonl"),
        *("--tools_path", folder / "tools.json"),
        *("--train_test_split", 0.2, "--learning_rate", 0.01, "--max_new_tokens", 4),
    ]


@pytest.mark.slow
def test_the_command_line_on_two_processes_speaks_once_stops_together_and_goes_on_with_a_split_base(command, tmp_path):
    command = [*command, "--output_dir", tmp_path / "out", "--final_model_dir", tmp_path / "final", "--num_epochs", 200]
    process = start(*command)
    wait_for(lambda: "  loss " in process.stdout.readline())
    process.send_signal(signal.SIGTERM)  # torchrun hands it to both
    result = wait(process)
    assert result.returncode != 0 and result.stderr.count(STOPPING) == 1
    assert result.stderr.count("interrupted by SIGTERM; go on with: torchrun --nproc_per_node 2 ") == 1
    step = to_step(list_checkpoints(tmp_path / "out")[-1])
    result = wait(start(*command, "--resume_from_checkpoint", "--max_steps", step + 2, "--fsdp"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\nplan     ") == result.stdout.count("\ncheck    ") == 1
    assert " rows per step on 2 devices in " in result.stdout
    assert names(tmp_path) == ["final", "out"] and names(tmp_path / "final") == FINAL_FILES
    assert result.stdout.splitlines()[-3] == f"done     merged model: {tmp_path / 'final'}"


@pytest.mark.slow
def test_the_command_line_trains_all_weights_split_and_proves_the_model_that_it_saves(command, tmp_path):
    folders = ["--output_dir", tmp_path / "out", "--final_model_dir", tmp_path / "final"]
    result = wait(Fork(*command, *folders, "--fsdp", "--lora_rank", 0, "--num_epochs", 2))
    assert result.returncode == 0, result.stderr
    saved = re.search(r"16-bit, read back by a fresh process: held-out loss (\S+), before saving (\S+) ", result.stdout)
    assert float(saved[1]) == pytest.approx(float(saved[2]), rel=1e-3)
    assert names(tmp_path) == ["final", "out"] and names(tmp_path / "final") == FINAL_FILES
    assert result.stdout.splitlines()[-3] == f"done     trained model: {tmp_path / 'final'}"


@pytest.mark.slow
def test_two_machines_make_one_model(command, tmp_path):
    """Two torchruns that find each other by the name of one machine, as README says; here both are this one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    launcher = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d"]
    folders = ["--output_dir", tmp_path / "out", "--final_model_dir", tmp_path / "final"]
    words = [*launcher, "--rdzv_endpoint", endpoint, *command[len(TORCHRUN) :], *folders, "--num_epochs", 2]
    machines = [Fork(*words) for _ in range(2)]
    results = [wait(machine) for machine in machines]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    assert sorted(result.stdout.count("done     merged model: ") for result in results) == [0, 1]
    assert sum(result.stdout.count(" on 2 devices in ") for result in results) == 1
    assert names(tmp_path) == ["final", "out"] and names(tmp_path / "final") == FINAL_FILES


@pytest.mark.slow
def test_a_mistake_in_the_data_is_said_once(command, tmp_path):
    rows = write_jsonl(tmp_path / "wrong.jsonl", [native("is it raining", ("get_weather", {"city": 7}))])
    result = subprocess.run(
        [sys.executable, *map(str, command), "--dataset_path", rows, "--output_dir", tmp_path / "out"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        timeout=120,
    )
    assert result.returncode == 1
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]  # torchrun adds a traceback
    assert said == [
        f'error: {rows}:1: call 1 "get_weather": arguments.city must be a string, got 7',
        "error: 1 problem in 1 of 1 row; fix them or skip these rows with --on_invalid skip",
    ]
    assert names(tmp_path) == ["wrong.jsonl"]
