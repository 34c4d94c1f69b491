"""--method grpo on the real command line: the model that it began with gets better, or stays."""

import json
import shutil

import pytest
import yaml
from bench_forgetting import make_rows
from conftest import ALARM, ROOT, WEATHER, write_jsonl
from forks import Fork
from jobs import ROWS, arguments, errors, names, run_forked, wait
from safetensors.torch import load_file

FLAGS = [
    *("--method", "grpo", "--num_generations", 4, "--batch_size", 4, "--gradient_accumulation_steps", 1),
    *("--no-load_in_4bit", "--metric_for_best", "reward", "--warmup_steps", 0, "--max_new_tokens"),
]
WHOLE, SHORT = [*FLAGS, 40], [*FLAGS, 12]  # answers that come to their end, and the beginnings of some


@pytest.fixture
def job(tmp_path):
    """A folder with rows and tools."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER, ALARM]))
    return tmp_path


@pytest.mark.slow
def test_a_run_gets_better_by_its_own_answers(job):
    result = run_forked(*arguments(job, *WHOLE, "--max_steps", 12, "--eval_steps", 6, "--learning_rate", 0.003))
    assert result.returncode == 0, result.stderr
    report = json.loads((job / "out" / "report.json").read_text())
    held = [log["eval_reward"] for log in report["train"]["history"] if "eval_reward" in log]
    drawn = [log["reward"] for log in report["train"]["history"] if "reward" in log]
    assert len(held) == 3 and max(held) > held[0] and len(drawn) == 12 and -1 <= min(drawn) <= max(drawn) <= 1
    assert report["train"]["kept_step"] in (6, 12) and (job / "final" / "model.safetensors").exists()
    assert "4 rows per step, 4 answers to each, in 1 stream of " in result.stdout


@pytest.mark.slow
def test_a_run_that_improves_nothing_writes_no_model(job):
    result = run_forked(*arguments(job, *WHOLE, "--max_steps", 1, "--eval_steps", 1, "--learning_rate", 1e-12))
    assert result.returncode == 1 and names(job) == ["out", "rows.jsonl", "tools.json"]
    (line,) = errors(result)
    assert line.startswith("error: training has not improved the model: held-out reward was ")
    assert "adapter" not in names(job / "out") and "checkpoint-1" in names(job / "out")


MINE = """
import json, os
from pathlib import Path

def rate(prompts, completions, completion_ids, trainer_state, expected_calls, **columns):
    rewards = [len(ids) % 7 / 7 - abs(len(calls) - 1) for ids, calls in zip(completion_ids, expected_calls)]
    seen = {"step": trainer_state.global_step, "drawn": len({*prompts}) < len(prompts), "rewards": rewards}
    seen["tokens"] = [*map(len, completion_ids)]
    with open(Path(__file__).with_name(f"seen_{os.environ.get('RANK', 0)}.jsonl"), "a") as file:
        file.write(json.dumps(seen) + "\\n")
    return rewards
"""


def read_logs(folder, step: int) -> list[dict]:
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


def read_chosen(folder) -> dict:
    return yaml.safe_load((folder / "run.yaml").read_text())["facts"]["hard_rows_chosen"]


@pytest.fixture
def other(job):
    """The folder with rows of which the embedded base has some right, those for invented tools, and a reward."""
    write_jsonl(job / "rows.jsonl", [*ROWS[:8], *make_rows("scored", 4)])
    (job / "mine.py").write_text(MINE)
    return job


@pytest.mark.slow
def test_a_resumed_run_trains_the_same_rows_to_the_same_weights(other):
    flags = [*SHORT, "--max_steps", 4, "--eval_steps", 2, "--learning_rate", 0.003, "--hard_rows", 0]
    flags += ["--beta", 0.01]
    flags += ["--reward", f"{other / 'mine.py'}:rate"]
    result = run_forked(*arguments(other, *flags))
    assert "Traceback" not in result.stderr
    out, whole, chosen = other / "out", other / "whole", read_chosen(other / "out")
    assert 0 < chosen["right"] < chosen["rows"] and chosen["trained"] == chosen["rows"] - chosen["right"]
    line = "{right} of {rows} rows are surely right already: {right} of them are left out, and {trained} "
    line = line.format(**chosen)
    assert line in result.stdout
    shutil.copytree(out / "checkpoint-4", whole)
    shutil.rmtree(out / "checkpoint-4")
    result = run_forked(*arguments(other, *flags, "--resume_from_checkpoint"))
    assert line in result.stdout and "resume   from" in result.stdout and read_chosen(out) == chosen
    before, after = (load_file(path / "adapter_model.safetensors") for path in (whole, out / "checkpoint-4"))
    assert all((before[name] == after[name]).all() for name in before) and before.keys() == after.keys()
    (other / "mine.py").write_text(MINE + "\n")
    result = run_forked(*arguments(other, *flags, "--resume_from_checkpoint"))
    (line,) = errors(result)
    assert line.startswith("error: the file of --reward is not as it was in the run that ")


@pytest.mark.slow
def test_two_processes_draw_for_each_other_and_log_what_both_have(other):
    flags = [*SHORT[:4], "--batch_size", 2, *SHORT[6:], "--max_steps", 2, "--eval_steps", 1, "--hard_rows", 0]
    words = arguments(other, *flags, "--learning_rate", 0.003, "--reward", f"{other / 'mine.py'}:rate")
    words = ["-m", "torch.distributed.run", "--nproc_per_node", 2, ROOT / "train_qwen3_tool_calling.py", *words]
    result = wait(Fork(*words), 240)  # whether it gets better or not
    assert (other / "out" / "checkpoint-2").is_dir(), result.stderr
    both = [[json.loads(line) for line in open(other / f"seen_{rank}.jsonl")] for rank in (0, 1)]
    logs = read_logs(other / "out", 2)

    def mean(step: int, drawn: bool, key: str) -> float:
        parts = [seen[key] for side in both for seen in side if (seen["step"], seen["drawn"]) == (step, drawn)]
        assert len(parts) == 2
        return sum(map(sum, parts)) / sum(map(len, parts))

    drawn = [log for log in logs if "reward" in log]
    assert [log["step"] for log in drawn] == [1, 2]
    for log in drawn:
        assert log["reward"] == pytest.approx(mean(log["step"] - 1, True, "rewards"))
        assert log["answer_tokens"] == pytest.approx(mean(log["step"] - 1, True, "tokens"))
        assert log["groups_without_gradient"] in (0, 0.25, 0.5, 0.75, 1)  # of two prompts on each side
    evaluated = {log["step"]: log["eval_reward"] for log in logs if "eval_reward" in log}
    assert evaluated == {step: pytest.approx(mean(step, False, "rewards")) for step in (0, 1, 2)}
    assert both[0][1]["tokens"] != both[1][1]["tokens"]  # each has drawn its own
    chosen = read_chosen(other / "out")
    shutil.rmtree(other / "out")
    run_forked(*arguments(other, *SHORT, "--max_steps", 1, "--hard_rows", 0))
    assert read_chosen(other / "out") == chosen and 0 < chosen["right"] < chosen["rows"]
