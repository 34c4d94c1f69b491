"""The real command line, end to end on CPU: files, resume, reload, and one clear line for every mistake."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ALARM, ROOT, TINY, WEATHER, native, run_here, run_script, write_jsonl
from conversations import EMPTY_THOUGHT
from jobs import FINAL_FILES, ROWS, arguments, errors, names, run_forked
from transformers import AutoTokenizer

import train_qwen3_tool_calling as script
from tool_calling.data.examples import Reading, read_examples
from tool_calling.data.tools import to_tools
from tool_calling.engines.hub import load_tokenizer
from tool_calling.failures import report_failure
from tool_calling.page import SCORE_NAMES
from tool_calling.prompts import DEFAULT, HIDDEN
from tool_calling.run_folder import WRITTEN_BY
from tool_calling.samples import render_examples, to_sides
from tool_calling.terminal import UserError

SHORT = ("--max_new_tokens", 24)  # hardly more than the references have: so little training answers at length


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """One finished 4-bit run of two epochs: (folder, result). Later tests resume it and load what it wrote."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "tools.json").write_text(json.dumps([WEATHER, ALARM]))
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder, run_forked(*arguments(folder, *SHORT))


@pytest.mark.slow
def test_a_run_writes_exactly_these_files(job):
    folder, result = job
    assert result.returncode == 0, result.stderr
    assert names(folder / "final") == FINAL_FILES
    assert names(folder / "out") == [
        ".lock",
        "adapter",
        "answers.jsonl",
        "checkpoint-3",
        "checkpoint-6",
        "report.html",
        "report.json",
        "run.yaml",
    ]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(names(folder / "out" / "adapter"))
    assert names(folder) == ["final", "out", "rows.jsonl", "tools.json"]  # nothing half-written is left
    for model, library, served in (
        (folder / "final", "transformers", "vllm serve final "),
        (folder / "out" / "adapter", "peft", " --lora-modules tools=adapter "),
    ):
        card = (model / "README.md").read_text()
        assert yaml.safe_load(card.split("---\n")[1])["library_name"] == library and served in card
        assert json.loads((model / "tools.json").read_text()) == to_tools([WEATHER, ALARM])[0]


@pytest.mark.slow
def test_a_run_says_what_it_did(job):
    _, result = job
    lines = result.stdout.splitlines()
    assert lines[0].startswith("read     24 valid rows, 24 turns with calls, from ")
    assert lines[1].startswith("render   18 training and 6 held-out samples of ")
    assert sum(line.startswith("▶<tool_call>") for line in lines) == 2  # two rows shown, supervised part marked
    assert any(line.startswith("plan     8 rows per step in 1 stream of about ") for line in lines)
    assert sum("of 6  loss " in line for line in lines) == 6
    assert sum("held-out loss" in line and "epoch" in line for line in lines) == 2
    for name in ("expected ", "before ", "after "):
        assert sum(line.startswith(f"  {name}") for line in lines) == 3
    assert lines[-3].startswith("done     merged model: ") and lines[-2].startswith("serve    vllm serve ")
    assert (
        lines[-1].startswith("         # requests send the tools in ")
        and "/final/tools.json, as client.py" in lines[-1]
    )
    assert result.stderr == "warning: no row without a call: the model will forget to refuse\n"


@pytest.mark.slow
def test_a_share_of_the_rows_is_trained_with_compact_tools(job, tmp_path):
    folder, whole = job
    flags = arguments(folder, *SHORT, "--num_epochs", 1, "--learning_rate", 0.01, "--output_dir", tmp_path / "out")
    flags += ["--final_model_dir", tmp_path / "final", "--compact_tools"]
    result = run_forked(*flags, 0.5)
    assert result.returncode == 0, result.stderr
    count = re.match(
        r"render   18 training \((\d+) with compact tools\) and 6 held-out samples", result.stdout.splitlines()[1]
    )
    assert count and 4 < int(count[1]) < 14
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["compact_tools"] == 0.5
    reports = [json.loads((out / "report.json").read_text()) for out in (tmp_path / "out", folder / "out")]
    assert reports[0]["scores"]["base"] == reports[1]["scores"]["base"]  # asked with the same prompts
    assert json.loads((tmp_path / "final" / "tools.json").read_text()) == to_tools([WEATHER, ALARM])[0]
    again = run_forked(*flags, 0.25, "--resume_from_checkpoint")
    assert again.returncode == 1
    newest = tmp_path / "out" / "checkpoint-3"
    assert errors(again) == [
        f"error: --compact_tools is 0.25, and 0.5 in the run that {newest} is from; expected the same",
        f"error: the training rows are not those in the run that {newest} is from; expected the same rows in the same "
        "order",
    ]


@pytest.mark.slow
def test_a_model_is_trained_and_saved_without_the_list_of_tools(job, tmp_path):
    """The saved template renders a request with tools as it was trained; the base is asked in the same way."""
    folder, whole = job
    flags = arguments(folder, *SHORT, "--num_epochs", 1, "--learning_rate", 0.01, "--output_dir", tmp_path / "out")
    flags += ["--final_model_dir", tmp_path / "final", "--tools_in_prompt"]
    result = run_forked(*flags, "none")
    assert result.returncode == 0, result.stderr
    prompt = "<|im_start|>user\nis it raining in Rome<|im_end|>\n" + EMPTY_THOUGHT
    assert result.stdout.count("supervised)\n<|im_start|>user\n") == 2 and "<tools>" not in result.stdout
    own = (TINY / "chat_template.jinja").read_text()
    for saved in (tmp_path / "final", tmp_path / "out" / "adapter"):
        assert (saved / "chat_template.jinja").read_text() == DEFAULT.format("false") + HIDDEN + own
        assert json.loads((saved / "tools.json").read_text()) == to_tools([WEATHER, ALARM])[0]  # for requests
        request = [{"role": "user", "content": "is it raining in Rome"}]
        served = AutoTokenizer.from_pretrained(saved).apply_chat_template(
            request, tools=[WEATHER, ALARM], add_generation_prompt=True, tokenize=False
        )
        assert served == prompt
    reports = [json.loads((out / "report.json").read_text()) for out in (tmp_path / "out", folder / "out")]
    short, long = (report["data"]["tokens"]["prompt"] for report in reports)
    assert long > 10 * short and "| `tools_in_prompt` | none |" in (tmp_path / "final" / "README.md").read_text()
    again = run_forked(*flags, "all", "--resume_from_checkpoint")
    newest = tmp_path / "out" / "checkpoint-3"
    assert again.returncode == 1 and errors(again) == [
        f"error: --tools_in_prompt is all, and none in the run that {newest} is from; expected the same",
        f"error: the training rows are not those in the run that {newest} is from; expected the same rows in the same "
        "order",
    ]


@pytest.mark.parametrize("more", [(), ("--dry_run",)], ids=["run", "dry run"])
def test_several_lists_of_tools_are_not_left_out(tmp_path, more):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}]
    lists = [[], [WEATHER, ALARM], [ALARM, WEATHER], [WEATHER]]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns, "tools": tools} for tools in lists])
    flags = ["--model_id", TINY, "--dataset_path", path, "--output_dir", tmp_path / "out", "--tools_in_prompt", "none"]
    result = run_here(*flags, *more)
    assert result.returncode == 1 and errors(result) == [
        f"error: --tools_in_prompt none: {path}:2 and {path}:4 bring different tools, which prompts without the list "
        "cannot tell apart; give all rows the same list, or leave out the flag"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_report_holds_what_it_promises(job):
    folder, result = job
    report = json.loads((folder / "out" / "report.json").read_text())
    assert set(report) == {
        "scores",
        "per_tool",
        "confusion",
        "data",
        "failures",
        "versions",
        "args",
        "git",
        "command",
        "device",
        "finished",
        "train",
    }
    assert list(report["scores"]) == ["base", "adapter", "merged"]
    shares = {"exact_match", "call_exact", "no_call", "ast_match", "call_precision", "call_recall"}
    for scores in report["scores"].values():
        assert set(scores) == shares | {"tool_macro_f1", "broken_json", "n", "rows", "interval"} and scores["n"] == 6
        assert set(scores["rows"]) == set(scores["interval"]) == shares
    assert report["per_tool"]["get_weather"]["support"] == 6
    assert report["data"]["train"] == 18 and report["data"]["held_out"] == 6
    assert sum(report["data"]["lengths"]["counts"]) == 18
    train = report["train"]
    assert (
        train["steps"] == 6 and train["tokens_computed"] < train["tokens_padded"] and train["peak_memory_gib"] is None
    )
    evaluations = [log for log in train["history"] if "eval_loss" in log]
    assert [log["step"] for log in evaluations] == [3, 6] and all(
        0 <= log["eval_exact_match"] <= 1 for log in evaluations
    )
    assert len(report["failures"]) == round(6 * (1 - report["scores"]["merged"]["exact_match"]))
    lines = result.stdout.splitlines()
    table = lines.index(next(line for line in lines if line.startswith("score ")))
    assert lines[table].split()[-3:] == ["base", "adapter", "merged"]
    assert all(line.startswith(f"{'':<9}{name} ") for line, name in zip(lines[table + 1 :], SCORE_NAMES.values()))
    assert "<html" in (folder / "out" / "report.html").read_text()


@pytest.mark.slow
def test_a_model_and_an_adapter_are_scored_without_training(job, tmp_path):
    folder, _ = job
    trained = json.loads((folder / "out" / "report.json").read_text())["scores"]
    final, adapter = folder / "final", folder / "out" / "adapter"
    for name, models, scores in (
        ("alone", [adapter], {"model": trained["adapter"]}),
        ("both", [final, adapter], {str(final): trained["merged"], str(adapter): trained["adapter"]}),
    ):
        result = run_forked(*arguments(folder, *SHORT, "--output_dir", tmp_path / name, "--eval_only", *models))
        assert result.returncode == 0, result.stderr
        assert names(tmp_path / name) == ["eval_only", "run.yaml"]  # a report of training there would be kept
        assert names(tmp_path / name / "eval_only") == ["answers.jsonl", "report.html", "report.json", "run.yaml"]
        answers = [json.loads(line) for line in (tmp_path / name / "eval_only" / "answers.jsonl").open()]
        assert [answer["model"] for answer in answers] == [model for model in scores for _ in range(6)]
        report = json.loads((tmp_path / name / "eval_only" / "report.json").read_text())
        assert report["scores"] == scores and "train" not in report
        assert report["data"]["path"] == str(folder / "rows.jsonl") and report["data"]["held_out"] == 6


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_a_separate_file_is_held_out(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:16])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", ROWS[16:])
    result = run_here(
        *arguments(
            tmp_path,
            "--eval_dataset_path",
            held_out,
            "--num_epochs",
            6,
            "--eval_steps",
            1,
            "--metric_for_best",
            "loss",
            "--early_stopping_patience",
            1,
            "--learning_rate",
            0.05,
            "--warmup_steps",
            0,
            "--eval_samples",
            4,
            "--max_new_tokens",
            8,
        )
    )
    assert "render   16 training and 8 held-out samples" in result.stdout, result.stderr
    losses = [float(x) for x in re.findall(r"held-out loss ([\d.]+)", result.stdout.split("train  ")[0])]
    assert 2 <= len(losses) < 12 and losses[-1] >= min(losses[:-1])  # stopped early, one evaluation after the best
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    best, last = losses.index(min(losses)) + 1, len(losses)
    assert f"\nkeep     step {best}, the best on held-out rows; training ended at step {last} of 12\n" in result.stdout
    assert (report["train"]["kept_step"], report["train"]["last_step"]) == (best, last)
    assert report["scores"]["adapter"]["n"] == 4
    assert report["data"]["path"] == f"{tmp_path / 'rows.jsonl'} {held_out}" and report["data"]["skipped"] == 0


@pytest.mark.slow
def test_settings_are_written_down(job):
    folder, _ = job
    for place in ("out", "final"):
        text = (folder / place / "run.yaml").read_text()
        assert text.startswith(WRITTEN_BY)
        settings = yaml.safe_load(text)
        assert settings["lora_rank"] == 16 and settings["num_epochs"] == 2 and settings["load_in_4bit"] is True


@pytest.mark.slow
def test_the_merged_model_is_a_plain_qwen3_like_its_base(job):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = job
    base, merged = load_file(TINY / "model.safetensors"), load_file(folder / "final" / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in merged.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if any(target in name for target in script.TARGET_MODULES)}
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    off = "{% if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif %}\n"
    assert tokenizer.chat_template == off + AutoTokenizer.from_pretrained(TINY).chat_template
    assert tokenizer.eos_token == "<|im_end|>"
    config = json.loads((folder / "final" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.slow
def test_resume_ends_with_the_same_weights(job, tmp_path):
    folder, _ = job
    shutil.copytree(folder, tmp_path / "again")
    again = tmp_path / "again"
    shutil.rmtree(again / "out" / "checkpoint-6")
    shutil.rmtree(again / "out" / "adapter")
    result = run_forked(*arguments(again, *SHORT, "--resume_from_checkpoint"))
    assert result.returncode == 0, result.stderr
    assert f"resume   from {again / 'out' / 'checkpoint-3'}" in result.stdout.splitlines()
    assert "train    3 steps in" in result.stdout
    train = json.loads((again / "out" / "report.json").read_text())["train"]
    losses = [log["loss"] for log in train["history"] if "loss" in log]
    assert len(losses) == 6 and train["loss"] == pytest.approx(sum(losses[3:]) / 3)  # of the steps made now
    for file in ("out/adapter/adapter_model.safetensors", "final/model.safetensors"):
        assert (again / file).read_bytes() == (folder / file).read_bytes(), file
    assert names(again / "final") == FINAL_FILES  # replaced the earlier one, which this script had written


@pytest.mark.slow
def test_16_bit_training_answers_like_its_adapter_and_skips_what_it_must(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    bad = native("x", ("get_weather", {}))
    long = native("very " * 600 + "long", ("get_weather", {"city": "Rome"}))
    path = write_jsonl(tmp_path / "rows.jsonl", [bad, *ROWS[:12], long])
    result = run_here(
        *arguments(
            tmp_path,
            "--no-load_in_4bit",
            "--on_invalid",
            "skip",
            "--max_steps",
            2,
            "--max_seq_length",
            500,
            "--max_new_tokens",
            60,
        )
    )
    assert result.returncode == 0, result.stderr  # the run itself compares the answers
    skipped = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert skipped[0] == f'skipped: {path}:1: call 1 "get_weather": arguments.city is missing'
    assert skipped[1].startswith(f"skipped: {path}:14: ") and skipped[1].endswith(
        "--max_seq_length is 500 and no answer is ever cut"
    )
    assert len(skipped) == 2
    assert "render   9 training and 3 held-out samples" in result.stdout
    data = json.loads((tmp_path / "out" / "report.json").read_text())["data"]
    assert (data["rows"], data["train"], data["held_out"], data["skipped"]) == (12, 9, 3, 2)
    assert names(tmp_path / "final") == FINAL_FILES


@pytest.mark.slow
def test_a_quantised_model_trains_and_names_its_original(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(TINY, quantization_config=four_bit).save_pretrained(tmp_path / "quantised")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "quantised")
    command = arguments(tmp_path, *SHORT, "--max_steps", 2, "--model_id", tmp_path / "quantised")
    result = run_here(*command)
    assert result.returncode == 1
    assert errors(result) == [
        f"error: --model_id {tmp_path / 'quantised'}: is already quantised, and a merge needs the "
        "16-bit weights; name the original with --merge_model_id"
    ]
    assert names(tmp_path) == ["quantised", "rows.jsonl", "tools.json"]
    result = run_here(*command, "--merge_model_id", TINY)
    assert result.returncode == 0, result.stderr
    assert names(tmp_path / "final") == FINAL_FILES


def test_bad_data_ends_the_run_and_writes_nothing(tmp_path, tools_path):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [ROWS[0], native("x", ("get_weather", {"city": "Rome", "days": "7"})), "{oops"]
    )
    before = names(tmp_path)
    result = run_script(
        "--dataset_path",
        path,
        "--tools_path",
        tools_path,
        "--model_id",
        "no/such/model",
        "--output_dir",
        tmp_path / "out",
        "--final_model_dir",
        tmp_path / "final",
    )
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines() == [
        f'error: {path}:2: call 1 "get_weather": arguments.days must be an integer, got "7"',
        f"error: {path}:3: not valid JSON: Expecting property name enclosed in double quotes; "
        "expected one JSON object a line, or a JSON array",
        "error: 2 problems in 2 of 3 rows; fix them or skip these rows with --on_invalid skip",
    ]
    assert names(tmp_path) == before


def test_checks_need_no_heavy_library():
    """A broken file or --help must answer at once, so nothing up to the model may import torch."""
    code = (
        "import sys, train_qwen3_tool_calling as s\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "s.read_examples([s.DATASET_PATH], s.Reading(s.TOOLS_PATH))\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_size", "0"], "argument --batch_size: must be at least 1, got 0"),
        (["--num_epochs", "x"], "argument --num_epochs: invalid whole number value: 'x'"),
        (["--learning_rate", "0"], "argument --learning_rate: must be above 0, got 0"),
        (["--train_test_split", "1"], "argument --train_test_split: must be at least 0 and below 1, got 1"),
        (["--learning_rat", "1"], "unrecognized arguments: --learning_rat 1"),
        (["--engine", "magic"], "argument --engine: invalid choice: 'magic' (choose from"),
        (
            ["--metric_for_best", "loss", "--eval_steps", "2", "--save_steps", "3"],
            "--metric_for_best keeps a checkpoint by its score: --save_steps must be --eval_steps",
        ),
        (
            ["--metric_for_best", "loss", "--eval_steps", "1", "--save_steps", "2"],
            "--metric_for_best keeps a checkpoint by its score: --save_steps must be --eval_steps",
        ),
        (
            ["--dry_run", "--resume_from_checkpoint"],
            "--dry_run shows a run from its start: leave out --resume_from_checkpoint",
        ),
        (
            ["--convert_to", "x.jsonl", "--eval_only", "y"],
            "--convert_to only writes rows: leave out --dry_run, --eval_only and --show_row",
        ),
        (
            ["--convert_to", "x.jsonl", "--show_row", "1"],
            "--convert_to only writes rows: leave out --dry_run, --eval_only and --show_row",
        ),
        (
            ["--compact_tools", "0.5", "--tools_in_prompt", "none"],
            "--compact_tools writes the list that --tools_in_prompt none leaves out: give one of them",
        ),
        (
            ["--augment", "--tools_in_prompt", "none"],
            "--augment and --holdout_tools change the list that --tools_in_prompt none leaves out: give one of them",
        ),
        (["--augment", "mask"], "argument --augment: must be one of missing, shuffled, masked, got mask; did you mean"),
        (["--holdout_tools", " , "], "argument --holdout_tools: expected names, separated by commas"),
        (["--seed", str(2**32)], "argument --seed: must be at least 0 and below 4294967296, got 4294967296"),
    ],
)
def test_a_wrong_flag_exits_with_2(flags, message):
    result = run_here(*flags)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_nothing_to_score_is_said(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [native("hello", content="Hello!")])
    result = run_here(
        "--eval_only",
        TINY,
        "--dataset_path",
        path,
        "--max_seq_length",
        10,
        "--on_invalid",
        "skip",
        "--output_dir",
        tmp_path / "out",
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == f"error: {path}: no row is left to score; add rows"


def test_scoring_alone_holds_out_the_rows_that_training_did(tmp_path, monkeypatch):
    """Which rows are held out depends on how many there are: those that training left out must not count."""
    rows = [
        native(f"{'very ' * (300 * (i % 5 == 0))}loud alarm {i}", ("set_alarm", {"time": str(i)})) for i in range(60)
    ]
    flags = [
        "--model_id",
        TINY,
        "--dataset_path",
        write_jsonl(tmp_path / "rows.jsonl", rows),
        "--tools_path",
        tmp_path / "tools.json",
        "--max_seq_length",
        500,
        "--on_invalid",
        "skip",
        "--train_test_split",
        0.3,
    ]
    (tmp_path / "tools.json").write_text(json.dumps([ALARM]))
    examples, _ = read_examples([flags[3]], Reading(str(tmp_path / "tools.json"), on_invalid="skip"))
    groups, _ = render_examples(load_tokenizer(str(TINY)), examples, 500)
    train, held_out = to_sides(examples, [], groups, 0.3)
    assert (len(train), len(held_out)) == (34, 14)
    scored = []

    def answer(model, tokenizer, samples, *_):
        scored.extend(sample.source for sample in samples)
        return [""] * len(samples)

    monkeypatch.setattr("tool_calling.saving.evaluation.load_scored", lambda *_: None)
    monkeypatch.setattr("tool_calling.saving.proof.generate_answers", answer)
    result = run_here(*flags, "--eval_only", TINY, "--output_dir", tmp_path / "out")
    assert result.returncode == 0 and scored == [sample.source for sample in held_out], result.stderr
    report = json.loads((tmp_path / "out" / "eval_only" / "report.json").read_text())
    assert {name: report["data"][name] for name in ("train", "held_out", "skipped")} == {
        "train": 0,
        "held_out": 14,
        "skipped": 12,
    }


def test_an_adapter_without_a_base_is_one_line(tmp_path):
    path = tmp_path / "adapter" / "adapter_config.json"
    path.parent.mkdir()
    for text in ('{"r": 8', "{}", '{"base_model_name_or_path": null}'):
        path.write_text(text)
        result = run_here("--eval_only", path.parent, "--max_samples", 2, "--output_dir", tmp_path / "out")
        assert result.returncode == 1 and errors(result) == [
            f"error: --eval_only {path.parent}: adapter_config.json names no base; expected one saved by PEFT"
        ]


def test_an_adapter_of_another_base_is_one_line(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config, adapter, base = AutoConfig.from_pretrained(TINY), tmp_path / "adapter", tmp_path / "base"
    config.update(
        {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    )
    model = AutoModelForCausalLM.from_config(config)
    model.name_or_path = str(TINY)
    get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(adapter)
    flags = ["--eval_only", adapter, "--max_samples", 9, "--eval_samples", 1, "--output_dir", tmp_path / "out"]
    result = run_here(*flags)
    assert result.returncode == 1 and len(errors(result)) == 1
    assert errors(result)[0].startswith(
        f"error: --eval_only {adapter}: its base {TINY} is another model than it was "
        "trained on (size mismatch for base_model.model.model.layers."
    )
    settings = adapter / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(TINY), str(base)))
    base.mkdir()
    assert errors(run_here(*flags)) == [
        f"error: --eval_only {adapter}: its base {base}: the folder holds no "
        "*.safetensors; give a folder saved by save_pretrained"
    ]


@pytest.mark.parametrize(
    "harm, message",
    [
        (
            lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"),
            "model.safetensors holds no whole weights (",
        ),
        (lambda file: os.truncate(file, 10_000_000), "model.safetensors holds no whole weights ("),
        (lambda file: leave_out(file, "layers.1."), "has no weights for model.layers.1."),
        (
            lambda file: file.with_name("model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "2.safetensors"}}'
            ),
            "has no 2.safetensors",
        ),
        (
            lambda file: file.with_name("model.safetensors.index.json").write_text("{"),
            "model.safetensors.index.json does not say which weights are where",
        ),
    ],
)
def test_weights_that_are_not_whole_are_one_line(tmp_path, harm, message):
    shutil.copytree(TINY, tmp_path / "base")
    harm(tmp_path / "base" / "model.safetensors")
    result = run_here(
        "--eval_only",
        tmp_path / "base",
        "--max_samples",
        9,
        "--eval_samples",
        1,
        "--max_new_tokens",
        1,
        "--output_dir",
        tmp_path / "out",
    )
    assert result.returncode == 1 and len(errors(result)) == 1
    assert message in errors(result)[0] and errors(result)[0].endswith("; download it again")


def test_weights_of_another_shape_are_one_line(tmp_path):
    shutil.copytree(TINY, tmp_path / "base")
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 64}))
    result = run_here(
        "--eval_only", tmp_path / "base", "--max_samples", 9, "--eval_samples", 1, "--output_dir", tmp_path / "out"
    )
    assert result.returncode == 1 and len(errors(result)) == 1
    assert errors(result)[0].startswith(f"error: {tmp_path / 'base'}: its weights cannot be loaded: ")


def leave_out(file: Path, part: str) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: weight for name, weight in load_file(file).items() if part not in name}, file, {"format": "pt"})


@pytest.mark.slow
def test_an_output_that_nobody_reads_any_more_ends_nothing(tmp_path):
    command = (
        f"{sys.executable} train_qwen3_tool_calling.py --max_samples 50 --convert_to=~/rows.jsonl | true; "
        "exit ${PIPESTATUS[0]}"
    )
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 50
    # The rest is drawn by a library that would end the process.
    command = command.replace(
        "--convert_to=~/rows.jsonl", f"--dry_run --model_id {TINY} --output_dir=~/out --final_model_dir=~/m"
    )
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert (result.returncode, result.stderr) == (0, "") and (tmp_path / "out" / "audit.json").exists()


def test_a_path_that_the_system_refuses_is_one_line(tmp_path):
    name = tmp_path / ("x" * 300)
    result = run_here("--output_dir", name)
    assert result.returncode == 1 and errors(result) == [f"error: {name}: File name too long"]


def test_what_is_not_installed_is_one_line(capsys):
    command = [sys.executable, "-S", ROOT / "train_qwen3_tool_calling.py", "--help"]  # -S: the standard library alone
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    install = "run pip install -r requirements.txt\n"
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == f"error: not installed: jinja2, jsonschema, rich, yaml; {install}"
    assert report_failure(ModuleNotFoundError("No module named 'torch'", name="torch")) == 1
    assert capsys.readouterr().err == f"error: No module named 'torch'; {install}"


def test_help_names_every_flag_with_its_default():
    result = run_script("--help")
    assert result.returncode == 0 and "None" not in result.stdout
    described = {}  # flag: its help, from the lines that begin with the flag to the next ones that do
    for block in re.split(r"\n  (?=-)", result.stdout):
        described[re.match(r"-[\w-]+", block)[0] if block.startswith("-") else ""] = " ".join(block.split())
    for flag, default in {
        "--model_id": "Qwen/Qwen3-0.6B",
        "--dataset_path": "data/synthetic_finetune_dataset.json",
        "--tools_path": "data/tools.json",
        "--learning_rate": "0.0002, grpo 1e-05",
        "--num_epochs": "3",
        "--batch_size": "2",
        "--gradient_accumulation_steps": "4",
        "--max_seq_length": "2048",
        "--train_test_split": "0.1",
        "--output_dir": "outputs/qwen3_tool_calling_unsloth",
        "--lora_rank": "16",
        "--lora_alpha": "16",
        "--final_model_dir": "models/qwen3_tool_calling_merged",
        "--lora_dropout": "0.0",
        "--warmup_steps": "10",
        "--weight_decay": "0.01",
        "--lr_scheduler_type": "linear",
        "--load_in_4bit": "True",
        "--engine": "auto",
        "--seed": "3407",
        "--on_invalid": "error",
        "--report_to": "none",
    }.items():
        assert f"(default: {default})" in described[flag], flag
    readme = (ROOT / "README.md").read_text()
    flags = set(re.findall(r"--\w[\w-]+", result.stdout)) - {"--help"}
    assert len(flags) > 25 and not [flag for flag in flags if flag not in readme]


def small_job(tmp_path, tools_path, *more, run=run_here) -> subprocess.CompletedProcess:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    return run(
        "--dataset_path",
        path,
        "--tools_path",
        tools_path,
        "--model_id",
        TINY,
        "--engine",
        "transformers",
        "--output_dir",
        tmp_path / "out",
        "--final_model_dir",
        tmp_path / "final",
        *more,
    )


def test_a_foreign_folder_is_not_touched(tmp_path, tools_path):
    for flag, name in (("--output_dir", "out"), ("--final_model_dir", "final")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("mine")
        result = small_job(tmp_path, tools_path)
        assert result.returncode == 1
        assert errors(result) == [
            f"error: {flag} {tmp_path / name}: holds files that this script did not write; "
            "choose another folder or empty it"
        ]
        assert names(tmp_path / name) == ["precious.txt"]
        shutil.rmtree(tmp_path / name)
    (tmp_path / "out").write_text("a file")
    assert errors(small_job(tmp_path, tools_path)) == [
        f"error: --output_dir {tmp_path / 'out'}: is a file or a broken link; expected a folder"
    ]


def test_a_folder_that_cannot_be_written_is_known_at_the_start(tmp_path, tools_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to(tmp_path / "elsewhere")
    for flag, path, what in (
        ("--output_dir", file / "out", f"{file} cannot be written; choose another folder"),
        ("--final_model_dir", file / "final", f"{file} cannot be written; choose another folder"),
        ("--final_model_dir", link, "cannot be written and renamed there; choose another folder"),
    ):
        assert errors(small_job(tmp_path, tools_path, flag, path)) == [f"error: {flag} {path}: {what}"]
    assert names(tmp_path) == ["elsewhere", "file", "link", "rows.jsonl", "tools.json"]
    result = run_here("--eval_only", TINY, "--max_samples", 2, "--output_dir", file / "out")
    assert errors(result) == [f"error: --output_dir {file / 'out'}: {file} cannot be written; choose another folder"]


def test_the_final_folder_is_none_that_the_output_folder_uses(tmp_path, tools_path):
    for name in ("adapter", "eval_only", "checkpoint-7"):
        final = tmp_path / "out" / name
        assert errors(small_job(tmp_path, tools_path, "--final_model_dir", final)) == [
            f"error: --final_model_dir {final}: is where --output_dir has its {name}; choose another folder"
        ]


def test_a_folder_that_cannot_be_made_is_one_line():
    result = run_here(
        "--eval_only", TINY, "--max_samples", 2, "--eval_samples", 1, "--max_new_tokens", 1, "--output_dir", "/proc/x"
    )
    assert result.returncode == 1 and errors(result) == ["error: /proc/x: cannot be made: No such file or directory"]


def test_a_run_that_failed_lets_go_of_its_folder(tmp_path, tools_path):
    (tmp_path / "out").mkdir()
    path = write_jsonl(tmp_path / "rows.jsonl", ["not JSON"])
    argv = [
        "--dataset_path",
        path,
        "--tools_path",
        tools_path,
        "--model_id",
        str(TINY),
        "--dry_run",
        "--output_dir",
        str(tmp_path / "out"),
        "--final_model_dir",
        str(tmp_path / "final"),
    ]
    with pytest.raises(UserError, match="not valid JSON") as first:
        script.main(argv)
    with pytest.raises(UserError, match="not valid JSON"):  # and not: in use by another run
        script.main(argv)
    assert first.traceback  # which held the frame of main, and all in it


def test_resuming_from_nothing_is_one_line(tmp_path, tools_path):
    result = small_job(tmp_path, tools_path, "--resume_from_checkpoint")
    assert errors(result) == [
        f"error: --resume_from_checkpoint: {tmp_path / 'out'} holds no checkpoint; leave the flag out to start"
    ]
    result = small_job(tmp_path, tools_path, "--resume_from_checkpoint", tmp_path)
    assert errors(result) == [
        f"error: --resume_from_checkpoint {tmp_path}: not a checkpoint; expected a folder checkpoint-N"
    ]


@pytest.mark.parametrize("flags", [[], ["--save_method", "lora"], ["--merge_model_id", TINY], ["--lora_rank", 0]])
def test_a_base_that_is_quantised_otherwise_is_refused_before_training(tmp_path, tools_path, flags):
    shutil.copytree(TINY, tmp_path / "fp8")
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    result = small_job(tmp_path, tools_path, "--model_id", tmp_path / "fp8", *flags)
    assert result.returncode == 1 and errors(result) == [
        f"error: --model_id {tmp_path / 'fp8'}: is quantised by fp8, on which no adapter is trained here; expected the "
        "original, which is put into 4 bits while it is loaded"
    ]
    assert names(tmp_path) == ["fp8", "rows.jsonl", "tools.json"]


@pytest.mark.slow
def test_a_model_that_cannot_be_had_is_one_line(tmp_path, tools_path):
    empty, bert = tmp_path / "empty", tmp_path / "bert"
    empty.mkdir()
    bert.mkdir()
    (bert / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    (bert / "model.safetensors").write_bytes(b"")
    expected = {
        "no/such-model": "no such folder, not in the cache, and the Hub cannot be reached; check the network, or give "
        "a folder",
        str(empty): "the folder holds no *.safetensors; give a folder saved by save_pretrained",
        str(bert): "not a causal language model (BertForMaskedLM)",
    }
    for run, (model_id, message) in zip((run_forked, run_here, run_here), expected.items()):
        result = small_job(tmp_path, tools_path, "--model_id", model_id, run=run)
        assert result.returncode == 1
        assert errors(result) == [f"error: --model_id {model_id}: {message}"]
    assert not (tmp_path / "out").exists()


def test_an_optimizer_that_is_not_there_is_one_line(tmp_path, tools_path):
    assert errors(small_job(tmp_path, tools_path, "--optim", "adamw8bit")) == [
        "error: --optim adamw8bit: unknown to Transformers; did you mean adamw_8bit?"
    ]


def test_a_tracker_that_is_not_there_is_one_line(tmp_path, tools_path):
    result = small_job(tmp_path, tools_path, "--report_to", "notebook_of_mine")
    assert len(errors(result)) == 1 and errors(result)[0].startswith(
        "error: --report_to notebook_of_mine: not installed, or unknown to Transformers; here: none, all"
    )
    assert not (tmp_path / "out").exists()


def test_unsloth_without_a_gpu_is_one_line(tmp_path, tools_path):
    result = small_job(tmp_path, tools_path, "--engine", "unsloth", run=run_script)
    assert errors(result) == [
        "error: --engine unsloth needs a CUDA GPU, and torch sees none; use --engine transformers"
    ]
