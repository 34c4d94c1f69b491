"""The folders of a run: what may be written where, run.yaml, and what a resumed run shares with its beginning."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import make_checkpoint, names

import train_qwen3_tool_calling as script
from tool_calling.arguments import pick
from tool_calling.engines.choices import find_optim
from tool_calling.files import find_damage
from tool_calling.run_folder import (
    NOT_REPEATED,
    WRITTEN_BY,
    Run,
    check_final,
    check_folder,
    mark_output,
    read_run,
    write_run,
)
from tool_calling.samples import Sample
from tool_calling.schedule import Batching, plan_schedule
from tool_calling.terminal import UserError

SAMPLES = [Sample("row:1", [1, 2, 3], 2), Sample("row:2", [4, 5, 6], 1)]
DEFAULTS = vars(script.parse_args([]))


# ---------------------------------------------------------------------------------------------------------------
# What may be written where
# ---------------------------------------------------------------------------------------------------------------
def test_what_unsloth_leaves_of_a_run_that_failed_early_makes_no_folder_foreign(tmp_path):
    (tmp_path / "unsloth_compiled").mkdir()
    (tmp_path / ".lock").touch()  # and a lock alone
    check_folder(tmp_path, "--output_dir")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that this script did not write"):
        check_folder(tmp_path, "--output_dir")


def test_a_folder_is_ours_by_the_first_line_of_its_run_yaml(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "run.yaml").write_text(WRITTEN_BY + "seed: 1\n")
    check_folder(tmp_path, "--output_dir")
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe seed: 1\n")  # of somebody else
    with pytest.raises(UserError, match="^--output_dir .*: holds files that this script did not write"):
        check_folder(tmp_path, "--output_dir")


@pytest.mark.parametrize(
    "final, flags, reason",
    [
        ("out", [], "is replaced as a whole and contains --output_dir {folder}/out; choose another folder"),
        ("", [], "is replaced as a whole and contains --output_dir {folder}/out; choose another folder"),
        ("base", [], "is replaced as a whole and contains --model_id {folder}/base; choose another folder"),
        (
            "whole",
            ["--merge_model_id", "{folder}/whole"],
            "is replaced as a whole and contains --merge_model_id {folder}/whole; choose another folder",
        ),
        (
            "/",
            ["--model_id", "Qwen/Qwen3-0.6B"],
            "is replaced as a whole and contains --output_dir {folder}/out; choose another folder",
        ),
        (
            "data",
            ["--dataset_path", "{folder}/rows.jsonl", "{folder}/data/rows.jsonl"],
            "is replaced as a whole and contains --dataset_path {folder}/data/rows.jsonl; choose another folder",
        ),
        (
            "data",
            ["--dataset_path", "{folder}/data/rows.jsonl:0.5"],
            "is replaced as a whole and contains --dataset_path {folder}/data/rows.jsonl; choose another folder",
        ),
        (
            "data",
            ["--chat_template", "{folder}/data/mine.jinja"],
            "is replaced as a whole and contains --chat_template {folder}/data/mine.jinja; choose another folder",
        ),
        (
            "other",
            ["--resume_from_checkpoint", "{folder}/other/checkpoint-5"],
            "is replaced as a whole and contains --resume_from_checkpoint {folder}/other/checkpoint-5; choose another "
            "folder",
        ),
        ("other", [], "is replaced as a whole and is the --output_dir of a run; choose another folder"),
        ("done", [], "is replaced as a whole and is the --output_dir of a run; choose another folder"),
        ("/proc", ["--model_id", "Qwen/Qwen3-0.6B"], "cannot be written and renamed there; choose another folder"),
    ],
)
def test_a_final_folder_that_would_take_others_with_it_is_refused(tmp_path, final, flags, reason):
    for name in ("base", "whole", "data", "other/checkpoint-5", "done/adapter"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / "rows.jsonl").touch()
    (tmp_path / "data" / "mine.jinja").write_text("{{ messages }}")
    final = os.path.join(tmp_path, final) if final else str(tmp_path)
    flags = [flag.format(folder=tmp_path) for flag in flags]
    args = script.parse_args(["--output_dir", f"{tmp_path}/out", "--model_id", f"{tmp_path}/base", *flags])
    with pytest.raises(UserError) as error:
        check_final(Path(final), Path(args.output_dir), script.list_inputs(args))
    assert str(error.value) == f"--final_model_dir {final}: {reason.format(folder=tmp_path)}"


# ---------------------------------------------------------------------------------------------------------------
# run.yaml
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--warmup_ratio", "0.03", "--learning_rate", "1e-5", "--no-load_in_4bit", "--trust_remote_code"],
        [
            *("--dataset_path", "a.jsonl", "b c"),
            *("--target_modules", "v_proj", "q_proj"),
            *("--use_rslora", "--thinking", "off"),
        ],
        ["--early_stopping_patience", "2", "--eval_steps", "5", "--gradient_checkpointing", "off", "--optim", "sgd"],
    ],
)
def test_the_run_yaml_of_a_run_gives_its_settings_back(tmp_path, flags):
    args = script.parse_args(flags)
    write_run(vars(args), tmp_path, training_rows="ab", rows_per_step=8)
    assert vars(script.parse_args(["--config", str(tmp_path / "run.yaml")])) == vars(args)
    assert read_run(str(tmp_path / "checkpoint-1"), DEFAULTS) == vars(args) | {
        "facts": {"training_rows": "ab", "rows_per_step": 8},
        "training_rows": "ab",
        "rows_per_step": 8,
    }


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_run_yaml(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("run")
    write_run(vars(script.parse_args([f"--run_name={text}"])), folder)
    assert script.parse_args(["--config", str(folder / "run.yaml")]).run_name == text


def test_what_belongs_to_one_call_is_not_repeated(tmp_path):
    for once in (["--resume_from_checkpoint"], ["--dry_run", "--show_row", "3"]):
        write_run(vars(script.parse_args([*once, "--seed", "5"])), tmp_path)
        assert not yaml.safe_load((tmp_path / "run.yaml").read_text()).keys() & {*NOT_REPEATED}
        again = script.parse_args(["--config", str(tmp_path / "run.yaml")])
        assert (again.resume_from_checkpoint, again.dry_run, again.show_row, again.seed) == (None, False, None, 5)


def test_a_mark_leaves_the_run_yaml_of_an_earlier_run(tmp_path):
    mark_output({"seed": 1}, tmp_path / "out")
    mark_output({"seed": 2}, tmp_path / "out")
    assert (tmp_path / "out" / "run.yaml").read_text() == WRITTEN_BY + "seed: 1\n"


def test_a_run_yaml_that_cannot_be_read_is_one_line(tmp_path):
    checkpoint, path = tmp_path / "checkpoint-3", tmp_path / "run.yaml"
    assert read_run(None, DEFAULTS) == {}
    for content in (None, b"[1, 2]", b"a: [", b"\xff"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_run(str(checkpoint), DEFAULTS)
        assert str(error.value) == (
            f"{path}: cannot be read; expected the settings of the run that {checkpoint} is from"
        )
    path.write_text("seed: 5\n")  # of a version with fewer flags
    assert read_run(str(checkpoint), DEFAULTS) == DEFAULTS | {"seed": 5}


# ---------------------------------------------------------------------------------------------------------------
# What a resumed run shares with its beginning
# ---------------------------------------------------------------------------------------------------------------
def make_run(folder: Path, checkpoint: Path | None = None, **facts) -> Run:
    """Return a run of 4 epochs that goes on from a checkpoint of the same run."""
    flags = vars(script.parse_args(["--num_epochs", "4", "--output_dir", str(folder)]))
    facts = {"training_rows": plan(flags).digest(), "rows_per_step": 8} | facts
    return Run(folder, flags, str(checkpoint) if checkpoint else None, flags | facts)


def plan(flags: dict):
    """Return the schedule of SAMPLES with these settings."""
    args = script.parse_args([])
    vars(args).update(flags)
    return plan_schedule(SAMPLES, pick(Batching, args), engine="transformers")


def check(run: Run, **changes) -> None:
    """Check whether a run with these changes of its settings may go on."""
    run = replace(run, settings=run.settings | changes)
    run.check_agrees(plan(run.settings), find_optim(run.settings["optim"], 16, fsdp=False))


@pytest.mark.parametrize(
    "name, value",
    [
        ("model_id", "other/model"),
        ("chat_template", "qwen3"),
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
        ("compact_tools", 0.1),
        ("augment", "masked"),
        ("holdout_tools", "set_alarm"),
        ("tools_in_prompt", "none"),
        ("warmup_ratio", 0.5),
        ("hard_rows", 0.5),
        ("beta", 0.1),
    ],
)
def test_each_difference_is_refused_by_name(tmp_path, name, value):
    checkpoint = make_checkpoint(tmp_path, 3)
    run = make_run(tmp_path, checkpoint, optimizer="adamw_torch")  # which a run notes that names none
    check(run)
    with pytest.raises(UserError) as error:
        check(run, **{name: value})
    was = "adamw_torch" if name == "optim" else run.former[name]
    assert str(error.value) == f"--{name} is {value}, and {was} in the run that {checkpoint} is from; expected the same"


def test_a_file_of_rewards_that_has_changed_is_refused(tmp_path):
    mine, checkpoint = tmp_path / "mine.py", make_checkpoint(tmp_path, 3)
    mine.write_text("def rate(**given): return [1]")
    run = make_run(tmp_path, checkpoint, optimizer="adamw_torch")
    run = replace(run, settings=run.settings | {"reward": f"{mine}:rate"})
    run = replace(run, former=run.former | {"reward": f"{mine}:rate", "reward_digest": run.reward_digest})
    check(run)
    mine.write_text("def rate(**given): return [2]")
    with pytest.raises(UserError, match="^the file of --reward is not as it was in the run that .*; expected the same"):
        check(run)


def test_all_differences_are_named_at_once(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 3)
    run = make_run(tmp_path, checkpoint, training_rows="others", optim="adamw_torch")
    with pytest.raises(UserError) as error:
        check(run, seed=1, batch_size=4, optim="sgd")
    assert str(error.value).splitlines() == [
        f"--optim is sgd, and adamw_torch in the run that {checkpoint} is from; expected the same",
        f"--seed is 1, and 3407 in the run that {checkpoint} is from; expected the same",
        f"--batch_size x --gradient_accumulation_steps x devices is 16, and 8 in the run that {checkpoint} is from; "
        "expected the same",
        f"the training rows are not those in the run that {checkpoint} is from; expected the same rows in the same "
        "order",
    ]
    check(make_run(tmp_path), seed=1)  # a run that starts agrees with anything


def test_a_damaged_best_checkpoint_is_found_before_training(tmp_path):
    best, last = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 3)
    state = {"global_step": 3, "best_global_step": 2, "stateful_callbacks": {}}
    (last / "trainer_state.json").write_text(json.dumps(state))
    run = make_run(tmp_path, last, metric_for_best="loss")
    check(run, metric_for_best="loss")
    (best / "weights").write_bytes(b"0123456788")
    with pytest.raises(UserError) as error:
        check(run, metric_for_best="loss")
    assert str(error.value) == (
        f"{best}, the best so far, is damaged: weights is not as it was written; remove it to go on without"
    )


def test_a_run_may_grow_and_not_shrink_and_says_what_that_does_to_its_rate(tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path, 3)
    run = make_run(tmp_path, checkpoint)
    for epochs, steps, expected in ((9, None, 9), (4, 3, 3), (1, 7, 7)):
        check(run, num_epochs=epochs, max_steps=steps)
        assert capsys.readouterr().err == (
            f"warning: {checkpoint} is from a run of 4 steps, and this one has {expected}: from here on the learning "
            "rate follows this run\n"
        )
    check(run)
    assert capsys.readouterr().err == ""
    constant = make_run(tmp_path, checkpoint, lr_scheduler_type="constant_with_warmup")
    check(constant, lr_scheduler_type="constant_with_warmup", max_steps=7)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="-3 is from step 3, and --max_steps or --num_epochs ends at 2; "):
        check(constant, lr_scheduler_type="constant_with_warmup", max_steps=2)


@pytest.mark.parametrize("patience, waited, complete", [(None, 9, False), (3, 2, False), (3, 3, True)])
def test_training_had_ended_at_its_last_step_or_for_want_of_improvement(tmp_path, patience, waited, complete):
    checkpoint = make_checkpoint(tmp_path, 3)
    attributes = {"attributes": {"early_stopping_patience_counter": waited}}
    state = {"global_step": 3, "stateful_callbacks": {"EarlyStoppingCallback": attributes}}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    run = make_run(tmp_path, checkpoint)
    run = replace(run, settings=run.settings | {"early_stopping_patience": patience})
    assert run.first_step == 3 and run.is_complete(4) is complete and run.is_complete(3) is True
    assert make_run(tmp_path).first_step == 0 and make_run(tmp_path).is_complete(4) is False


def test_what_is_not_of_the_run_is_removed_at_its_start(tmp_path):
    for step in (3, 6, 12):
        make_checkpoint(tmp_path, step)
    (tmp_path / ".checkpoint-15.partial").mkdir()
    (tmp_path / "notes").mkdir()
    run = make_run(tmp_path, tmp_path / "checkpoint-6")
    schedule = plan(run.settings)
    run.start(schedule, "adamw_torch")
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6", "notes", "run.yaml"]
    assert find_damage(tmp_path / "checkpoint-6") is None
    former = read_run(str(tmp_path / "checkpoint-6"), DEFAULTS)
    assert former["rows_per_step"] == 8 and former["training_rows"] == schedule.digest()
    assert former["optimizer"] == "adamw_torch" and "prompt_date" not in former
    replace(run, checkpoint=None, date="2026-01-31").start(schedule, "adamw_torch")
    assert names(tmp_path) == ["notes", "run.yaml"]
    assert read_run(str(tmp_path / "checkpoint-6"), DEFAULTS)["prompt_date"] == "2026-01-31"


def test_a_checkpoint_of_another_folder_saves_none_here(tmp_path):
    elsewhere = make_checkpoint(tmp_path / "elsewhere", 6)
    make_checkpoint(tmp_path / "out", 3)
    run = make_run(tmp_path / "out", elsewhere)
    run.start(plan(run.settings), "adamw_torch")
    assert names(tmp_path / "out") == ["run.yaml"] and elsewhere.is_dir()
