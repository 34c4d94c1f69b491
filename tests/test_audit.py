"""--dry_run and --show_row: the audit of hand-made files, through the real command line."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from conftest import ALARM, ROOT, TINY, WEATHER, native, run_here, run_script, write_jsonl
from transformers import Qwen3Config

import train_qwen3_tool_calling as script
from tool_calling.data.examples import Example
from tool_calling.data.splits import find_warnings
from tool_calling.engines.hub import load_tokenizer
from tool_calling.plan import Training, audit_schedule
from tool_calling.run_folder import WRITTEN_BY
from tool_calling.samples import NOT_HELD_OUT, Sample, show_rows
from tool_calling.schedule import Schedule
from tool_calling.streams import Layout

TIMER = {
    "type": "function",
    "function": {"name": "set_timer", "description": "T.", "parameters": {"type": "object", "properties": {}}},
}
ROME = ("get_weather", {"city": "Rome"})
ROWS = [
    native("rain in Rome?", ROME),
    native("wake me at 7", ("set_alarm", {"time": "07:00"})),
    native("rain in Rome?", ROME),  # the first again
    native("rain in Rome?", ("get_weather", {"city": "Rome", "days": 2})),  # and with another answer
    native("Rome and Oslo?", ROME, ("get_weather", {"city": "Oslo"})),
    native("hello", content="Hello!"),
]
NO_REFUSAL = "warning: no row without a call: the model will forget to refuse\n"


def audit(folder, *flags, rows=ROWS, tools=(WEATHER, ALARM, TIMER), run=run_here):
    """Return (audit or None, result) of a dry run on these rows, all of them for training."""
    (folder / "tools.json").write_text(json.dumps(tools))
    path = write_jsonl(folder / "rows.jsonl", rows)
    result = run(
        "--dry_run",
        "--dataset_path",
        path,
        "--tools_path",
        folder / "tools.json",
        "--model_id",
        TINY,
        "--output_dir",
        folder / "out",
        "--final_model_dir",
        folder / "final",
        "--train_test_split",
        0,
        *flags,
    )
    assert "Traceback" not in result.stderr
    written = folder / "out" / "audit.json"
    return json.loads(written.read_text()) if written.exists() else None, result


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The audit of ROWS: (folder, audit, result)."""
    folder = tmp_path_factory.mktemp("dry")
    return folder, *audit(folder)


def spread(values):
    return {
        "mean": round(float(np.mean(values)), 1),
        **{f"p{share}": round(float(np.percentile(values, share)), 1) for share in (50, 90, 95, 99)},
        "max": max(values),
    }


def line(result, stage):
    return next(line for line in result.stdout.splitlines() if line.startswith(f"{stage:<9}"))


@pytest.mark.slow
def test_a_new_process_finds_and_prints_the_same(dry, tmp_path):
    folder, found, result = dry
    again, printed = audit(tmp_path, run=run_script)
    assert (printed.returncode, printed.stderr) == (0, result.stderr)

    def settle(text):
        """Leave out where the files are, how long it took and what is free on the disk."""
        text = text.replace(str(tmp_path), str(folder))
        return re.sub(r"\(\d+\.\d s\)|[\d,.]+ GB free|\"free\": [\d.]+", "", text)

    assert settle(printed.stdout) == settle(result.stdout)
    assert settle(json.dumps(again)) == settle(json.dumps(found))


def test_rows_tools_and_calls_are_counted(dry):
    folder, found, result = dry
    assert result.returncode == 0, result.stderr
    assert found["rows"] == {"total": 6, "valid": 6, "with_problems": 0, "training": 6, "held_out": 0}
    assert found["formats"] == {"native": 6} and found["tools"] == {"distinct": 3, "lists": 1}
    assert found["calls_per_tool"] == {"get_weather": 5, "set_alarm": 1} and found["never_called"] == ["set_timer"]
    assert (found["no_call_share"], found["parallel_share"], found["turns"]) == (1 / 6, 1 / 6, 6)
    assert found["problems"] == {"count": 0, "rows": []} and found["warnings"] == [] and result.stderr == ""
    assert result.stdout.startswith(
        "rows     6 valid, 0 with problems; 6 for training, 0 held out\n"
        f"file     {folder}/rows.jsonl: 6 valid (6 native), 0 with problems; 0 turns with reasoning; tools 6 filled\n"
        "calls    6 in 6 trained turns; 16.7% of the rows without a call, 16.7% with parallel calls; 3 tools in 1 list"
        "\n"
        "         5 get_weather, 1 set_alarm\n"
        "         never called: set_timer\n"
    )


def test_each_file_says_what_its_rows_are(tmp_path):
    thought = {"role": "assistant", "content": "No.", "reasoning_content": "Hm."}
    written = {"role": "assistant", "content": 'get_weather(city="Rome")'}
    ask = {"role": "user", "content": "rain?"}
    rows = [
        {"id": 1, "messages": [ask, {**thought, "weight": 0}, ask, thought], "tools": [WEATHER]},
        {"id": 2, "messages": [ask, written], "tools": [WEATHER]},
        {"id": 3, "messages": [{**ask, "mood": "dull"}, {"role": "assistant", "content": "No."}]},
        {"x": 1},
    ]
    other = tmp_path / "other.csv"
    other.write_text('input,output,lang\nrain?,"{""content"": ""Yes.""}",en\n')
    named = ("--on_invalid", "skip", "--dataset_path", tmp_path / "rows.jsonl", f"{other}:2")
    found, result = audit(tmp_path, *named, rows=rows)
    assert found["inputs"] == {
        f"{tmp_path}/rows.jsonl": {
            "valid": 3,
            "with_problems": 1,
            "thinking_turns": 1,
            "formats": {"openai": 3},
            "calls_in_text": {"python": 1},
            "tools": {"brought": 2, "filled": 1},
            "not_read": {'row "id"': 3, 'turn "mood"': 1},
        },
        str(other): {
            "valid": 2,
            "with_problems": 0,
            "thinking_turns": 0,
            "formats": {"native": 2},
            "calls_in_text": {},
            "tools": {"filled": 2},
            "not_read": {'row "lang"': 2},
        },
    }
    assert [line for line in result.stdout.splitlines() if line.startswith("file ")] == [
        f"file     {tmp_path}/rows.jsonl: 3 valid (3 openai), 1 with problems; 1 turn with reasoning; tools 2 brought, "
        '1 filled; calls in text 1 python; not read 3 row "id", 1 turn "mood"',
        f"file     {other}: 2 valid (2 native), 0 with problems; 0 turns with reasoning; tools 2 filled; "
        'not read 2 row "lang"',
    ]


def test_equal_and_contradicting_rows_are_named(dry):
    folder, found, result = dry
    one, three, four = (f"{folder}/rows.jsonl:{number}" for number in (1, 3, 4))
    assert found["repeats"] == {
        "duplicates": {"count": 1, "rows": [[one, three]]},
        "conflicts": {"count": 1, "rows": [[one, four]]},
        "held_out_in_training": {"count": 0, "rows": []},
    }
    assert (
        "repeats  1 exact duplicates, 1 equal requests with different answers, 0 held-out rows that also occur in "
        f"training\n         exact duplicates: {one} and {three}\n"
        f"         equal requests with different answers: {one} and {four}\n"
    ) in result.stdout


def test_the_ids_of_calls_are_no_difference(tmp_path):
    def row(name, days):
        call = {
            "id": name,
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Rome", "days": days}},
        }
        return {
            "tools": [WEATHER],
            "messages": [
                {"role": "user", "content": "rain in Rome?"},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": name, "content": "yes"},
                {"role": "assistant", "content": "Yes."},
            ],
        }

    found, _ = audit(tmp_path, rows=[row("a", 1), row("b", 1), row("c", 2)])
    path = tmp_path / "rows.jsonl"
    assert found["repeats"]["duplicates"] == {"count": 1, "rows": [[f"{path}:1", f"{path}:2"]]}
    assert found["repeats"]["conflicts"] == {"count": 1, "rows": [[f"{path}:1", f"{path}:3"]]}


def test_a_row_that_the_template_refuses_is_a_problem_and_not_a_crash(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(str(TINY))
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system text') }}{% endif %}"
        + (tokenizer.chat_template)
    )
    monkeypatch.setattr("tool_calling.audit.find_model", lambda *_: (tokenizer, "", None))
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "Hello."},
            ],
            "tools": [],
        },
        *ROWS,
    ]
    found, result = audit(tmp_path, rows=rows)
    assert result.returncode == 1 and found["rows"]["with_problems"] == 1 and found["turns"] == 6
    assert f"error: {tmp_path / 'rows.jsonl'}:1: message 3: " in result.stderr and "no system text" in result.stderr


def test_the_best_checkpoint_needs_held_out_rows(tmp_path):
    _, result = audit(tmp_path, "--metric_for_best", "loss")
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == (
        "error: --metric_for_best: no row is held out to choose a checkpoint by; raise --train_test_split or give "
        "--eval_dataset_path"
    )
    _, result = audit(tmp_path, "--early_stopping_patience", 2)
    assert result.stderr.splitlines()[-1].startswith("error: --early_stopping_patience: no row is held out ")


def render(tokenizer, row, tools):
    """Return (prompt tokens, answer tokens) of a native row, without the script's own functions."""
    output = row["output"]
    calls = output.get("function_calls") or ([output["function_call"]] if "function_call" in output else [])
    messages = [
        {"role": "user", "content": row["input"]},
        {
            "role": "assistant",
            "content": output.get("content", ""),
            "tool_calls": [{"type": "function", "function": call} for call in calls],
        },
    ]
    prompt = tokenizer.apply_chat_template(
        messages[:1], tools=tools, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    return len(tokenizer.tokenize(prompt)), len(tokenizer.tokenize(whole.removeprefix(prompt).rstrip("\n")))


def test_tokens_are_counted_part_by_part(dry, tokenizer):
    _, found, result = dry
    tools = [WEATHER, ALARM, TIMER]
    sizes = [render(tokenizer, row, tools) for row in ROWS]
    bare = [render(tokenizer, row, None)[0] for row in ROWS]
    assert found["unit"] == "tokens" and found["sizes"] == {
        "tools": spread([prompt - short for (prompt, _), short in zip(sizes, bare)]),
        "prompt": spread(bare),
        "answer": spread([answer for _, answer in sizes]),
        "all": spread([sum(size) for size in sizes]),
    }
    longest = max(map(sum, sizes))
    assert found["length"] == {"max_seq_length": 2048, "smallest": longest, "too_long": [], "turns_too_long": 0}
    assert line(result, "length") == (
        f"length   0 rows over --max_seq_length 2,048; the smallest that loses nothing is {longest}"
    )
    names = ["mean", "p50", "p90", "p95", "p99", "max"]
    assert result.stdout.splitlines()[6:11] == [
        " " * 15 + "".join(f"{name:>11}" for name in names),
        *(
            f"{'':9}{name:<6}" + "".join(f"{found['sizes'][name][key]:11,.0f}" for key in names)
            for name in ("tools", "prompt", "answer", "all")
        ),
    ]
    assert found["epoch"]["packed"] == sum(map(sum, sizes))


def test_the_plan_is_the_runs(dry):
    folder, found, result = dry
    plan = found["plan"]
    assert (plan["rows_per_step"], plan["streams_per_step"], plan["steps_per_epoch"], plan["steps"]) == (8, 1, 1, 3)
    assert plan["checkpoints"] == [1, 2, 3] and plan["share_prefix"] is True
    shared = found["epoch"]["shared_prefix"]
    assert shared < found["epoch"]["packed"] < found["epoch"]["padded"]
    filled = -(-shared // 128) * 128  # one stream of all rows, filled up to the kernel's 128
    assert plan["stream_sizes"] == {"min": filled, "mean": filled, "max": filled}
    assert line(result, "plan") == f"plan     3 steps, 1 an epoch, of 8 rows in 1 stream of {filled:,} tokens"
    out, final = folder / "out", folder / "final"
    assert found["files"] == {
        "replaced": [],
        "written": [
            str(path)
            for path in (
                out / "run.yaml",
                out / "checkpoint-1",
                out / "checkpoint-2",
                out / "checkpoint-3",
                out / "adapter",
                out / "answers.jsonl",
                out / "report.json",
                out / "report.html",
                final,
            )
        ],
    }


def test_drawn_answers_are_counted_in_the_plan(dry, tmp_path):
    """As references are: the plan knows no others."""
    rows = tmp_path / "held_out.jsonl"
    write_jsonl(rows, ROWS[:1])
    found, result = audit(tmp_path, "--method", "grpo", "--num_generations", 4, "--eval_dataset_path", rows)
    plan, epoch, once = found["plan"], found["epoch"], dry[1]["epoch"]
    assert (plan["steps"], plan["answers"], plan["checkpoints"]) == (100, 4, [25, 50, 75, 100])
    assert line(result, "plan").startswith(
        "plan     100 steps, 1 an epoch, of 8 rows, 4 answers to each, in 1 stream of "
    )
    assert (epoch["packed"], epoch["padded"]) == (4 * once["packed"], 4 * once["padded"])
    assert once["shared_prefix"] < epoch["shared_prefix"] < 2 * once["shared_prefix"]
    mean = found["sizes"]["answer"]["mean"]  # of all rows and one that is held out
    assert found["drawn"]["answers"] == 100 * 4 * len(ROWS) and found["drawn"]["hard_rows"] == 0.1  # all in each step
    assert found["drawn"]["tokens"] == pytest.approx(100 * 4 * len(ROWS) * mean, rel=0.1)
    assert line(result, "drawn").startswith(
        f"drawn    {400 * len(ROWS):,} answers of about {found['drawn']['tokens']:,} "
    )
    assert "of the rows that the start answers right, 10.0% stay (--hard_rows)" in result.stdout
    assert f"; while answers are drawn {found['memory_gib']['drawing']:.2f}" in line(result, "memory")


@pytest.mark.parametrize("answers, rows", [(4, 32), (64, 256)])  # at most 256 at once
def test_the_memory_of_drawn_answers(answers, rows):
    """That of keys and values of 8 prompts, which share 1,000 tokens, in 16 bits."""
    config = Qwen3Config(num_hidden_layers=28, num_key_value_heads=8, head_dim=128)
    samples = [Sample(f"x:{n}", [*range(1000), 2000 + n, 3000, *range(50)], 1002, row=n) for n in range(8)]
    training = Training(*[None] * 10, max_new_tokens=100)
    memory = {"base": 1.0, "adapter": 0.25, "total": 1.5, "without_graphs": 1.5}
    found = training.estimate_drawing(config, Schedule(samples, 8, 1, Layout(8), answers=answers), memory)
    drawing = round(1.25 + rows * (2 + 100) * 2 * 28 * 8 * 128 * 2 / 2**30, 2)
    assert found == {"drawing": drawing, "total": max(drawing, 1.5), "without_graphs": max(drawing, 1.5)}


def test_batches_are_counted_as_the_run_orders_them():
    """Rows of 5, 6, 7 tokens that share 3 of them, two in a stream; the prompt's last token is never shared."""
    rows = [Sample(f"x:{n}", [1, 2, 3, 10 + n, *range(20, 20 + n), 9], 4 + n - 1, row=n) for n in range(3)]
    rows = [row._replace(prompt_length=4) for row in rows]
    schedule = Schedule(rows, 2, 1, Layout(2, lengths=(8, 16)), epochs=2, seed=script.SEED, groups=[[[0], [1], [2]]])
    assert schedule.measure([[0, 1], [2], []]) == [8, 8]  # 5 + 6 - 3 = 8; 7 is filled up to 8
    unshared = replace(schedule, layout=replace(schedule.layout, share_prefix=False))
    assert unshared.measure([[0, 1], [2]]) == [12, 7]
    first, second, third = (rows[i] for i in schedule.order(0))
    padded = 2 * max(len(first.input_ids), len(second.input_ids)) + len(third.input_ids)
    facts = audit_schedule(schedule, schedule.list_saves(None))
    assert facts["epoch"] == {"padded": padded, "packed": 18, "shared_prefix": 15}
    plan = facts["plan"]
    assert plan["steps_per_epoch"] == 2 and plan["steps"] == 4 and plan["checkpoints"] == [2, 4]
    count = schedule.padded().count_tokens
    assert count(range(1)) == 2 * max(len(first.input_ids), len(second.input_ids))
    assert count(range(2)) == padded
    assert count(range(1, 2)) == len(third.input_ids)  # resumed
    assert count(range(4)) == sum(count(range(step, step + 1)) for step in range(4)) > padded
    assert count(range(4, 4)) == 0
    assert replace(schedule, max_steps=3).list_saves(2) == [2, 3]


def test_disk_is_estimated_for_the_checkpoints_that_are_kept(tmp_path):
    rows = [native(f"rain in Rome on day {n}?", ROME) for n in range(20)]
    found, _ = audit(tmp_path, "--save_total_limit", 1, rows=rows)
    assert found["plan"]["checkpoints"] == [3, 6, 9] and found["disk_gb"]["checkpoints_kept"] == 2
    adapter = 8 * 16 * (4 * (320 + 320) + 3 * (320 + 896))
    assert found["disk_gb"]["checkpoints"] == round(2 * adapter * (4 + 8) / 1e9, 2) == 0.02


def test_memory_is_that_of_recorded_streams_where_some_can_be(tmp_path, dry):
    memory = dry[1]["memory_gib"]
    assert memory["total"] > memory["without_graphs"] and "; without CUDA graphs " in line(dry[2], "memory")
    for flags in (["--no-cuda_graphs"], ["--lora_dropout", 0.1], ["--engine", "transformers"]):
        found, result = audit(tmp_path, *flags)
        assert found["memory_gib"]["total"] == found["memory_gib"]["without_graphs"]
        assert found["memory_gib"]["total"] == pytest.approx(memory["without_graphs"], abs=0.011)  # one fills no stream
        assert "without CUDA graphs" not in result.stdout
    found, _ = audit(tmp_path, "--no-load_in_4bit", "--lora_rank", 32)
    assert found["memory_gib"]["base"] == 0.02 != memory["base"]  # 11.5 million weights of 2 bytes
    assert found["memory_gib"]["adapter"] == 0.02  # 16 bytes for each of 1.6 million weights


def test_only_the_audit_and_the_marker_are_written(dry):
    folder, _, result = dry
    assert sorted(path.name for path in folder.rglob("*")) == [
        "audit.json",
        "out",
        "rows.jsonl",
        "run.yaml",
        "tools.json",
    ]
    assert yaml.safe_load((folder / "out" / "run.yaml").read_text())["max_seq_length"] == 2048
    assert line(result, "audit").startswith(f"audit    {folder}/out/audit.json (")
    assert result.stdout.splitlines()[-1] == line(result, "audit")


def test_an_earlier_run_is_left_as_it_is(tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    kept = {"run.yaml": WRITTEN_BY + "seed: 1\n", "report.json": "{}", "checkpoint-5/trainer_state.json": "{}"}
    for name, text in kept.items():
        (tmp_path / "out" / name).write_text(text)
    found, result = audit(tmp_path)
    assert result.returncode == 0 and {name: (tmp_path / "out" / name).read_text() for name in kept} == kept
    assert found["files"]["replaced"] == [str(checkpoint), str(tmp_path / "out" / "report.json")]
    assert f"         instead of: {checkpoint}, {tmp_path / 'out' / 'report.json'}\n" in result.stdout


def test_only_what_a_run_removes_is_said_to_be_removed(tmp_path):
    for name in ("checkpoint-1000", "checkpoint-225", "checkpoint-best"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / "run.yaml").write_text(WRITTEN_BY)
    found, _ = audit(tmp_path)
    assert found["files"]["replaced"] == [str(tmp_path / "out" / f"checkpoint-{step}") for step in (225, 1000)]


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    found, result = audit(tmp_path)
    assert result.returncode == 1 and found is None and result.stdout == ""
    assert result.stderr == (
        f"error: --output_dir {tmp_path}/out: holds files that this script did not write; choose "
        "another folder or empty it\n"
    )


def test_problems_are_listed_and_the_other_rows_audited(tmp_path):
    bad = [native(f"alarm {n}", ("set_alarm", {})) for n in range(25)]
    found, result = audit(tmp_path, rows=ROWS + bad)
    assert result.returncode == 1
    missing = 'call 1 "set_alarm": arguments.time is missing'
    assert result.stderr.splitlines() == [
        *(f"error: {tmp_path}/rows.jsonl:{n}: {missing}" for n in range(7, 27)),
        "error: 25 problems in 25 of 31 rows, the first 20 above; fix them or skip these rows with --on_invalid skip",
    ]
    assert found["rows"] == {"total": 31, "valid": 6, "with_problems": 25, "training": 6, "held_out": 0}
    assert found["problems"]["count"] == 25 and found["problems"]["rows"][24] == [f"{tmp_path}/rows.jsonl:31", missing]
    assert found["calls_per_tool"] == {"get_weather": 5, "set_alarm": 1}

    _, result = audit(tmp_path, "--on_invalid", "skip", rows=ROWS + bad)
    assert result.returncode == 0
    assert result.stderr.splitlines() == [f"skipped: {tmp_path}/rows.jsonl:{n}: {missing}" for n in range(7, 32)]


def test_without_a_valid_row_there_is_no_audit(tmp_path):
    found, result = audit(tmp_path, rows=[native("alarm", ("set_alarm", {}))])
    assert result.returncode == 1 and found is None and not (tmp_path / "out").exists()
    assert result.stderr.splitlines()[-1].startswith("error: 1 problem in 1 of 1 row;")


def test_rows_that_are_too_long_are_named(tmp_path, dry):
    smallest = dry[1]["length"]["smallest"]
    found, result = audit(tmp_path, "--max_seq_length", smallest - 1)
    where = f"{tmp_path}/rows.jsonl:5"  # the parallel calls
    assert found["length"] == {
        "max_seq_length": smallest - 1,
        "smallest": smallest,
        "too_long": [[where, smallest]],
        "turns_too_long": 1,
    }
    assert found["rows"]["training"] == 5 and found["rows"]["with_problems"] == 1
    assert line(result, "length") == (
        f"length   1 row over --max_seq_length {smallest - 1}, in 1 answer: {where} ({smallest}); "
        f"the smallest that loses nothing is {smallest}"
    )
    assert result.returncode == 1 and result.stderr.splitlines()[0] == (
        f"error: {where}: {smallest} tokens; --max_seq_length is {smallest - 1} and no answer is ever cut"
    )

    found, result = audit(tmp_path, "--max_seq_length", 9, "--on_invalid", "skip")  # none is left
    assert result.returncode == 1 and "plan" not in found and len(found["length"]["too_long"]) == 6
    assert result.stderr.splitlines()[-1] == (
        f"error: {tmp_path}/rows.jsonl: no row is left to train on; lower --train_test_split or add rows"
    )


def test_only_the_answers_that_do_not_fit_are_left_out(tmp_path):
    """A trace of thirteen calls whose last two are over the limit."""
    calls = [{"function": {"name": "get_weather", "arguments": {"city": f"Town {i}"}}} for i in range(13)]
    turns = [[{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "x " * 50}] for call in calls]
    trace = {"messages": [{"role": "user", "content": "Weather?"}, *sum(turns, [])[:-1]], "tools": [WEATHER]}
    whole, _ = audit(tmp_path, rows=[trace, *ROWS])
    limit = whole["length"]["smallest"] - 200  # more than a turn takes, less than two do
    found, result = audit(tmp_path, "--max_seq_length", limit, "--on_invalid", "skip", rows=[trace, *ROWS])
    path, size = f"{tmp_path}/rows.jsonl:1", whole["length"]["smallest"]
    assert found["length"] == {
        "max_seq_length": limit,
        "smallest": size,
        "too_long": [[path, size]],
        "turns_too_long": 2,
    }
    assert found["rows"] == {"total": 7, "valid": 7, "with_problems": 0, "training": 7, "held_out": 0}
    assert result.returncode == 0 and found["plan"]["steps"] == 3 * math.ceil((11 + 6) / 8)
    problem = f"{size:,} tokens; --max_seq_length is {limit:,} and no answer is ever cut"
    assert f"skipped: {path}: answer 13 of 13: {problem}\n" in result.stderr
    assert result.stderr.count(f"skipped: {path}: answer ") == 2
    assert line(result, "skip") == "skip     2 problems in 1 of 7 rows, named above"
    _, result = audit(tmp_path, "--max_seq_length", limit, rows=[trace, *ROWS])
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == (
        "error: 2 problems in 1 of 7 rows; fix them or skip these rows with --on_invalid skip"
    )


def test_rows_that_are_taken_twice_are_no_duplicates(tmp_path):
    path = write_jsonl(tmp_path / "twice.jsonl", [ROWS[5], ROWS[1], native("?", ("nobody", {}))])
    found, result = audit(tmp_path, "--dataset_path", f"{path}:2", "--on_invalid", "skip")
    assert found["rows"] == {"total": 6, "valid": 4, "with_problems": 2, "training": 4, "held_out": 0}
    assert found["repeats"]["duplicates"] == {"count": 0, "rows": []}
    assert found["problems"]["count"] == 1 and result.stdout.startswith(f"read     {path}:2: 6 rows of 3\n")


def test_a_model_never_shown_a_refusal_is_warned_of(tmp_path):
    found, result = audit(tmp_path, rows=ROWS[:5])
    assert result.returncode == 0 and result.stderr == NO_REFUSAL and found["no_call_share"] == 0
    assert find_warnings([Example("x:1", [{"role": "assistant", "content": "a"}], [])], []) == []


def test_held_out_rows_that_are_trained_on_are_named(tmp_path):
    held_out = write_jsonl(
        tmp_path / "held_out.jsonl",
        [
            native("wake me at 8", ("set_alarm", {"time": "08:00"})),
            native("wake me at 7", ("set_alarm", {"time": "19:00"})),
        ],
    )
    found, result = audit(tmp_path, "--eval_dataset_path", held_out)
    pair = [f"{held_out}:2", f"{tmp_path}/rows.jsonl:2"]
    assert found["repeats"]["held_out_in_training"] == {"count": 1, "rows": [pair]}
    assert found["rows"] == {"total": 8, "valid": 8, "with_problems": 0, "training": 6, "held_out": 2}
    assert result.returncode == 0 and result.stderr == (
        f"warning: 1 of 2 held-out rows also occur in training ({pair[0]} is {pair[1]}): their score says nothing "
        "about new requests\n"
    )


def test_without_a_tokenizer_characters_are_counted(tmp_path):
    rows = [native("rain in Rome?", ROME), native("hello", content="Hello!")]
    found, result = audit(tmp_path, "--model_id", "nobody/nothing", "--max_seq_length", 9, "--show_row", 1, rows=rows)
    assert result.returncode == 0 and found["unit"] == "characters" and found["length"] == {}
    assert (
        "\nsizes    characters instead of tokens: --model_id nobody/nothing: its tokenizer cannot be loaded: "
        in result.stdout
    )
    tools = sum(len(json.dumps(tool)) + 1 for tool in (WEATHER, ALARM, TIMER)) + len("<tools>\n</tools>\n")
    prompts = [
        len(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n") for text in ("rain in Rome?", "hello")
    ]
    call = '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    answers = [len(call), len("Hello!<|im_end|>")]
    assert found["sizes"] == {
        "tools": spread([tools, tools]),
        "prompt": spread(prompts),
        "answer": spread(answers),
        "all": spread([tools + prompt + answer for prompt, answer in zip(prompts, answers)]),
    }
    assert found["epoch"]["packed"] == 2 * tools + sum(prompts) + sum(answers) and found["plan"]["steps"] == 3
    assert "memory_gib" not in found and "disk_gb" not in found
    assert (
        line(result, "memory") == "memory   not estimated, nor disk: that takes tokenizer and config.json of the model"
    )
    assert result.stderr == "warning: --show_row: without the tokenizer a row cannot be shown as the model sees it\n"
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["max_seq_length"] == 9


def test_no_weights_are_needed_and_a_config_only_for_memory(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(TINY / name, bare)
    found, result = audit(tmp_path, "--model_id", bare)
    assert result.returncode == 0 and found["unit"] == "tokens" and result.stderr == ""
    assert found["disk_gb"]["merged_model"] == 0.02  # 11.5 million weights of 2 bytes
    config = json.loads((bare / "config.json").read_text())
    windows = {"use_sliding_window": True, "sliding_window": 100, "layer_types": ["sliding_attention"] * 8}
    (bare / "config.json").write_text(json.dumps(config | windows))
    found, result = audit(tmp_path, "--model_id", bare)
    padded = "plan     ordinary padded batches: this qwen3 has windows of 100 tokens, and samples of "
    assert result.returncode == 0 and padded in result.stdout and not found["plan"]["share_prefix"]
    (bare / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3Model"]}))
    found, result = audit(tmp_path, "--model_id", bare)
    assert result.returncode == 1 and result.stderr.startswith(
        f"error: --model_id {bare}: not a causal language model (Qwen3Model)"
    )
    (bare / "config.json").unlink()
    found, result = audit(tmp_path, "--model_id", bare)
    assert result.returncode == 0 and found["unit"] == "tokens" and "memory_gib" not in found


def test_torch_waits_for_the_rows(tmp_path, tools_path):
    """A broken file must be reported in a moment, by a dry run too."""
    path = write_jsonl(tmp_path / "rows.jsonl", [native("alarm", ("set_alarm", {}))])
    code = (
        "import sys, train_qwen3_tool_calling as script\nfrom tool_calling.terminal import UserError\n"
        f"try: script.main(['--dry_run', '--dataset_path', {path!r}, '--tools_path', {tools_path!r}])\n"
        "except UserError: print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert result.stdout == "set()\n", result.stderr


CHAT = {
    "messages": [
        {"role": "user", "content": "rain in Rome?"},
        {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}],
        },
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "No, sun."},
    ],
    "tools": [],
}


def test_show_row_prints_every_trained_turn_whole(tmp_path, tokenizer):
    row = {**CHAT, "tools": [WEATHER]}
    _, result = audit(tmp_path, "--show_row", 2, rows=[ROWS[5], row])
    assert result.returncode == 0, result.stderr
    call = row["messages"][1]["tool_calls"][0]["function"]
    answers = [f"<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>", "No, sun.<|im_end|>"]
    expected = ""
    for turn, answer in zip((1, 3), answers):
        messages = [{"content": "", **message} for message in row["messages"][:turn]]
        prompt = tokenizer.apply_chat_template(
            messages, tools=[WEATHER], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        expected += (
            f"\n{tmp_path}/rows.jsonl:2  ({len(tokenizer.tokenize(prompt))} prompt tokens, "
            f"{len(tokenizer.tokenize(answer))} supervised)\n{prompt}▶{answer}◀\n"
        )
    assert expected in result.stdout and result.stdout.count("▶") == 2
    assert result.stdout.split(expected)[1].startswith("audit    ")


def test_rows_with_compact_tools_are_counted_and_shown_so(dry, tmp_path):
    found, result = audit(tmp_path, "--compact_tools", 0.5, "--show_row", 4)
    assert result.returncode == 0, result.stderr
    assert found["rows"] == {**dry[1]["rows"], "compact": 2}  # the fourth and the last
    assert line(result, "rows") == (
        "rows     6 valid, 0 with problems; 6 for training (2 with compact tools), 0 held out"
    )
    shown = '{"type": "function", "function": {"name":"get_weather","description":"Weather of a city.","parameters":'
    assert result.stdout.count(shown) == 1 and json.dumps(WEATHER) not in result.stdout
    assert found["epoch"]["shared_prefix"] > dry[1]["epoch"]["shared_prefix"]  # two lists of tools instead of one
    assert found["sizes"] == dry[1]["sizes"]  # of the rows as they are


def test_rows_without_their_list_of_tools_are_measured_and_shown_so(dry, tmp_path):
    found, result = audit(tmp_path, "--tools_in_prompt", "none", "--show_row", 4)
    assert result.returncode == 0, result.stderr
    assert found["sizes"]["tools"]["max"] == 0 and found["sizes"]["prompt"] == dry[1]["sizes"]["prompt"]
    assert "<tools>" not in result.stdout and "▶<tool_call>" in result.stdout


def test_show_row_beyond_the_end_is_one_line(tmp_path):
    found, result = audit(tmp_path, "--show_row", 7)
    assert result.returncode == 1 and found is None and result.stdout == ""
    assert result.stderr == "error: --show_row 7: no such row; expected 1 to 6, the valid rows\n"


def test_a_run_shows_the_chosen_row_and_not_the_first_two(tokenizer, capsys):
    rows = [Sample(f"x:{n}", tokenizer(f"question {n} answer {n}")["input_ids"], 2, row=n - 1) for n in (1, 2, 3)]
    show_rows(tokenizer, rows, None)
    assert [text for text in capsys.readouterr().out.splitlines() if text.startswith("x:")] == [
        f"x:{n}  (2 prompt tokens, {len(rows[n - 1].input_ids) - 2} supervised)" for n in (1, 2)
    ]
    show_rows(tokenizer, rows, 3)
    shown = capsys.readouterr().out
    assert shown.count("supervised") == 1 and shown.startswith("\nx:3  (")
    show_rows(tokenizer, rows, 4)
    assert capsys.readouterr() == ("", "warning: --show_row 4: the row is left out; expected one without a problem\n")


@pytest.mark.parametrize("flags", [["--dry_run"], ["--show_row", "1"], ["--resume_from_checkpoint"], ["--serve_check"]])
def test_eval_only_has_nothing_to_audit(flags):
    result = run_here("--eval_only", "x", *flags)
    assert result.returncode == 2
    listed = "--dry_run, --show_row, --resume_from_checkpoint and --serve_check"
    assert f"--eval_only trains nothing: leave out {listed}\n" in result.stderr


def test_few_rows_of_which_none_is_held_out_are_warned_of(tmp_path):
    for share, warned in ((0.1, True), (0, False)):
        found, result = audit(tmp_path, "--train_test_split", share, rows=ROWS[:1])
        assert (NOT_HELD_OUT in found["warnings"]) == (NOT_HELD_OUT in result.stderr) == warned


def test_calls_of_turns_that_are_not_trained_do_not_count(tmp_path):
    row = {
        "messages": [
            {"role": "user", "content": "rain in Rome?"},
            {
                "role": "assistant",
                "weight": 0,
                "tool_calls": [
                    {"type": "function", "id": "1", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
            {"role": "assistant", "content": "Yes, it rains."},
        ]
    }
    found, result = audit(tmp_path, rows=[row] * 3)
    assert line(result, "calls").startswith("calls    0 in 3 trained turns; 100.0% of the rows without a call, ")
    assert found["calls_per_tool"] == {} and NO_REFUSAL not in result.stderr
