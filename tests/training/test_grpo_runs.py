"""--method grpo on the real command line: the model that it began with gets better, or stays."""

import json

import pytest
from conftest import ALARM, WEATHER, write_jsonl
from jobs import ROWS, arguments, errors, names, run_forked

FLAGS = [
    *("--method", "grpo", "--num_generations", 4, "--batch_size", 4, "--gradient_accumulation_steps", 1),
    *("--no-load_in_4bit", "--metric_for_best", "reward", "--max_new_tokens", 40, "--warmup_steps", 0),
]


@pytest.fixture
def job(tmp_path):
    """A folder with rows and tools."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER, ALARM]))
    return tmp_path


@pytest.mark.slow
def test_a_run_gets_better_by_its_own_answers(job):
    result = run_forked(*arguments(job, *FLAGS, "--max_steps", 12, "--eval_steps", 6, "--learning_rate", 0.003))
    assert result.returncode == 0, result.stderr
    report = json.loads((job / "out" / "report.json").read_text())
    held = [log["eval_reward"] for log in report["train"]["history"] if "eval_reward" in log]
    drawn = [log["reward"] for log in report["train"]["history"] if "reward" in log]
    assert len(held) == 3 and max(held) > held[0] and len(drawn) == 12 and -1 <= min(drawn) <= max(drawn) <= 1
    assert report["train"]["kept_step"] in (6, 12) and (job / "final" / "model.safetensors").exists()
    assert "4 rows per step, 4 answers to each, in 1 stream of " in result.stdout


@pytest.mark.slow
def test_a_run_that_improves_nothing_writes_no_model(job):
    result = run_forked(*arguments(job, *FLAGS, "--max_steps", 1, "--eval_steps", 1, "--learning_rate", 1e-12))
    assert result.returncode == 1 and names(job) == ["out", "rows.jsonl", "tools.json"]
    (line,) = errors(result)
    assert line.startswith("error: training has not improved the model: held-out reward was ")
    assert "adapter" not in names(job / "out") and "checkpoint-1" in names(job / "out")
