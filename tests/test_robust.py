"""What must not cost a run, or harm: memory that runs out, numbers that are none, a network, secrets."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ALARM, WEATHER, patch, run_here, run_script, write_jsonl
from jobs import ROWS, arguments, errors, names

import train_qwen3_tool_calling as script
from tool_calling.audit import write_audit
from tool_calling.report import write_report
from tool_calling.run_folder import write_run
from tool_calling.terminal import report_problems, say, warn


@pytest.mark.parametrize("error, kind", [(MemoryError(), "memory"), (torch.OutOfMemoryError("x"), "GPU memory")])
def test_memory_that_runs_out_elsewhere_is_one_line(monkeypatch, capsys, error, kind):
    def run_out(argv):
        raise error

    patch(monkeypatch, "main", run_out)
    monkeypatch.setattr(sys, "argv", ["train"])
    assert script.run_command_line() == 1
    assert capsys.readouterr().err == (
        f"error: out of {kind}; lower --batch_size or --max_seq_length (while answers are generated, "
        "--eval_batch_size), or choose a smaller --model_id\n"
    )


@pytest.mark.slow
def test_a_run_that_diverges_is_one_line(tmp_path, tools_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    result = run_here(
        *arguments(tmp_path), "--learning_rate", "1e30", "--warmup_steps", 0, "--save_steps", 1, "--no-load_in_4bit"
    )
    assert result.returncode == 1
    lines = errors(result)
    assert len(lines) == 1 and "the loss is nan; expected a finite number. Nothing of it" in lines[0]
    step = int(lines[0].removeprefix("error: step ").split(":")[0])
    checkpoints = sorted(name for name in names(tmp_path / "out") if name.startswith("checkpoint"))
    assert checkpoints == [f"checkpoint-{number}" for number in range(1, step)]
    assert not (tmp_path / "final").exists()


WATCH = """
import os, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        if not isinstance(arguments[-1], (str, bytes)) or "name" in event:  # not a Unix socket's path
            open(os.environ["ATTEMPTS"], "a").write(f"{event} {arguments}\\n")
            raise OSError(f"no network in this test: {event} {arguments}")

sys.addaudithook(watch)
"""


@pytest.mark.slow
def test_a_run_from_local_files_asks_nothing_of_the_network_even_when_it_may(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WATCH)
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER, ALARM]))
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    watched = {"ATTEMPTS": str(tmp_path / "attempts"), "PYTHONPATH": str(tmp_path / "site"), "CI": ""}
    flags = ["--max_steps", 2, "--warmup_steps", 0, "--eval_samples", 2, "--max_new_tokens", 9]
    result = run_script(*arguments(tmp_path), *flags, HF_HUB_OFFLINE="0", **watched)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "attempts").exists(), (tmp_path / "attempts").read_text()
    # The watch itself works.
    connect = "import socket; socket.create_connection(('192.0.2.1', 80))"
    assert subprocess.run(
        [sys.executable, "-c", connect], env={**os.environ, **watched}, capture_output=True
    ).returncode
    assert "192.0.2.1" in (tmp_path / "attempts").read_text()


def test_secrets_are_written_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    flags = ["--model_id", "https://me:hf_other@hub.example/x", "--run_name", "hf_abcdefghij, short"]
    settings = vars(script.parse_args([*flags, "--output_dir", str(tmp_path)]))
    write_run(settings, tmp_path)
    write_report(tmp_path, {"args": settings, "command": "python x.py --run_name hf_abcdefghij"})
    say("read", "from https://me:hf_other@hub.example/x")
    warn("hf_abcdefghij in https://me:hf_other@hub.example/x")
    report_problems([("x:1", "holds hf_abcdefghij")], "skip", 1)
    write_audit({"problems": ["holds hf_abcdefghij"]}, settings, str(tmp_path))
    assert "hf_abcdefghij" not in (tmp_path / "audit.json").read_text()
    assert capsys.readouterr() == (
        "read     from https://hub.example/x\nskip     1 problem in 1 of 1 row, named above\n",
        "warning: $HF_TOKEN in https://hub.example/x\nskipped: x:1: holds $HF_TOKEN\n",
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["args"]["model_id"] == "https://hub.example/x" and report["args"]["run_name"] == "$HF_TOKEN, short"
    for name in ("run.yaml", "report.json", "report.html"):
        text = (tmp_path / name).read_text()
        assert "hf_abcdefghij" not in text and "hf_other" not in text and "$HF_TOKEN" in text
