"""Argument types, the settings file of --config, and the commands to repeat or resume a run."""

import argparse
import math
import re

import pytest
import yaml
from conftest import run_script

from tool_calling.arguments import (
    CONVERTED_GGUF,
    GGUF_NAMES,
    SCHEDULERS,
    Parser,
    drop_resume,
    number,
    one_of,
    read_config,
    read_settings,
    to_command,
    to_words,
)
from tool_calling.terminal import FlagError


def make_parser() -> Parser:
    """Return a parser with flags of every kind."""
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--dataset_path", nargs="+")
    parser.add_argument("--batch_size", type=number(int, 1))
    parser.add_argument("--learning_rate", type=number(float, 0, low_open=True))
    parser.add_argument("--seed", type=number(int, 0, 2**32))
    parser.add_argument("--thinking", choices=["auto", "on", "off"])
    parser.add_argument("--save_gguf", type=one_of(GGUF_NAMES, several=True))
    parser.add_argument("--resume_from_checkpoint", nargs="?", const="newest")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--share_prefix", action=argparse.BooleanOptionalAction)
    warmup = parser.add_mutually_exclusive_group()
    warmup.add_argument("--warmup_steps", type=number(int, 0))
    warmup.add_argument("--warmup_ratio", type=number(float, 0, 1))
    return parser


def write_config(folder, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "parse, text, value",
    [
        (number(int, 1), "1", 1),
        (number(int, 0, 2**32), "4294967295", 4294967295),
        (number(float, 0, 1), "0", 0.0),
        (number(float, 0, low_open=True), "2e-5", 2e-5),
        (number(float, 0), "inf", "must be at least 0, got inf"),
        (number(float, 0), "nan", "must be at least 0, got nan"),
        (number(int, 1), "0", "must be at least 1, got 0"),
        (number(float, 0, low_open=True), "0", "must be above 0, got 0"),
        (number(float, 0, 1), "1", "must be at least 0 and below 1, got 1"),
        (number(float, 0, 1, low_open=True), "-0.5", "must be above 0 and below 1, got -0.5"),
        (one_of(SCHEDULERS), "inverse_sqrt", "inverse_sqrt"),
        (one_of(["one", "two"]), "Two", "must be one of one, two, got Two; did you mean two?"),
        (one_of(["one", "two"]), "one,two", "must be one of one, two, got one,two; did you mean two?"),
        (one_of(["linear", "cosine"]), "cosin", "must be one of linear, cosine, got cosin; did you mean cosine?"),
        (one_of(GGUF_NAMES, several=True), "Q8_0, q4_K_M", "q8_0,q4_k_m"),
        (one_of(CONVERTED_GGUF, several=True), "f16,,x", "must be one of f32, f16, bf16, q8_0, got "),
        (
            one_of(CONVERTED_GGUF, several=True),
            "f16,f17",
            "must be one of f32, f16, bf16, q8_0, got f17; did you mean f16?",
        ),
    ],
)
def test_values_and_what_is_none(parse, text, value):
    if isinstance(value, str) and value.startswith("must"):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            parse(text)
        assert str(error.value) == value
    else:
        assert parse(text) == value and type(parse(text)) is type(value)


def test_what_is_no_number_is_called_by_its_kind():
    for flag, kind in (("batch_size", "whole number"), ("learning_rate", "number")):
        with pytest.raises(FlagError, match=f"^argument --{flag}: invalid {kind} value: 'x'$"):
            make_parser().parse_args([f"--{flag}", "x"])
    assert number(float, 0)("1e308") < math.inf


def test_a_wrong_flag_is_an_error_that_names_the_nearest():
    with pytest.raises(FlagError, match="^unrecognized arguments: --batch_sise=3; did you mean --batch_size?"):
        make_parser().parse_args(["--batch_sise=3"])
    with pytest.raises(FlagError, match="^unrecognized arguments: word$"):
        make_parser().parse_args(["word"])


def test_settings_are_words_of_a_command_line(tmp_path):
    text = """\
batch_size: 3
dataset_path: [a.jsonl, "b c"]
learning_rate: 2e-5
thinking: off
dry_run: no
share_prefix: no
resume_from_checkpoint: newest
save_gguf: f16,q8_0
seed: null
warmup_steps:
facts: {optimizer: adamw_torch, rows: [1, 2]}
"""
    words = read_config(make_parser(), write_config(tmp_path, text))
    assert words == [
        *("--batch_size=3", "--dataset_path", "a.jsonl", "b c", "--learning_rate=2e-5", "--thinking=off"),
        *("--no-share_prefix", "--resume_from_checkpoint=newest", "--save_gguf=f16,q8_0"),
    ]
    args = make_parser().parse_args(words)
    assert (args.dataset_path, args.thinking) == (["a.jsonl", "b c"], "off")
    assert (args.dry_run, args.share_prefix) == (False, False)
    assert read_config(make_parser(), write_config(tmp_path, "dry_run: yes\ndataset_path: -x")) == [
        *("--dry_run", "--dataset_path=-x")
    ]
    assert read_config(make_parser(), write_config(tmp_path, "{}")) == []


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("seed", "0x10", ["--seed=0x10"]),
        ("seed", "~", []),
        ("share_prefix", "ON", ["--share_prefix"]),
        ("share_prefix", "False", ["--no-share_prefix"]),
        ("dry_run", "false", []),
        ("dataset_path", "[]", ["--dataset_path"]),
        ("dataset_path", "-a", ["--dataset_path=-a"]),
        ("dataset_path", "[-a]", "argument --dataset_path: must be one value, or a list of values without - in front"),
        ("dataset_path", "[[a]]", "argument --dataset_path: must be one value, or a list of values without - in front"),
        ("seed", "[1]", "argument --seed: must be one value"),
        ("dry_run", "{}", "argument --dry_run: must be one value"),
        ("dry_run", "1", "argument --dry_run: must be true or false, got 1"),
        ("sead", "1", "sead: unknown setting; did you mean seed?"),
    ],
)
def test_the_words_of_one_setting(name, value, words):
    actions = {action.dest: action for action in make_parser()._actions}
    node = yaml.compose(value, Loader=yaml.SafeLoader)
    if isinstance(words, list):
        assert to_words(actions, name, node) == words
    else:
        with pytest.raises(FlagError) as error:
            to_words(actions, name, node)
        assert str(error.value) == words


def test_settings_know_their_lines(tmp_path):
    found = read_settings(write_config(tmp_path, "# a remark\nseed: 1\n\nthinking: on\n"))
    assert [(key.value, value.value, key.start_mark.line + 1) for key, value in found] == [
        ("seed", "1", 2),
        ("thinking", "on", 4),
    ]
    with pytest.raises(FlagError) as error:
        read_settings(str(tmp_path))
    assert str(error.value) == f"--config {tmp_path}: not a file; expected YAML, `flag: value` a line"


def test_mistakes_are_found_together_and_do_not_hide_each_other(tmp_path):
    text = "warmup_steps: 1\nbatch_size: 0\nwarmup_ratio: 0.1\nseed: 5\nbatch_size: 2\nwarmup_steps: 2\n"
    path = write_config(tmp_path, text)
    with pytest.raises(FlagError) as error:
        read_config(make_parser(), path)
    assert str(error.value).splitlines() == [
        f"{path}:2: argument --batch_size: must be at least 1, got 0",
        f"{path}:3: argument --warmup_ratio: not allowed with argument --warmup_steps",
        f"{path}:5: batch_size: duplicate setting",
        f"{path}:6: warmup_steps: duplicate setting",
    ]


def test_every_mistake_in_the_file_has_its_line(tmp_path):
    path = write_config(
        tmp_path,
        """\
batch_size: 0
learning-rate: 0.1
lora_rank: 16.0
load_in_4bit: "false"
lr_scheduler_type: cosin
engine: [unsloth]
config: other.yaml
dataset_path: [a, --seed=4]
seed: {a: 1}
max_steps: true
batch_size: 3
help: true
[1]: 2
""",
    )
    result = run_script("--config", path)
    assert result.returncode == 2 and result.stdout == ""
    found = [re.sub(" invalid .* value:", " invalid:", line) for line in result.stderr.splitlines()]
    assert found == [
        f"error: {path}:{line}"
        for line in [
            "1: argument --batch_size: must be at least 1, got 0",
            "2: learning-rate: unknown setting; did you mean learning_rate?",
            "3: argument --lora_rank: invalid: '16.0'",
            "4: argument --load_in_4bit: must be true or false, got false",
            "5: argument --lr_scheduler_type: must be one of linear, cosine, cosine_with_restarts, polynomial, "
            "constant, constant_with_warmup, inverse_sqrt, got cosin; did you mean cosine?",
            "6: argument --engine: must be one value",
            "7: config: unknown setting",
            "8: argument --dataset_path: must be one value, or a list of values without - in front",
            "9: argument --seed: must be one value",
            "10: argument --max_steps: invalid: 'true'",
            "11: batch_size: duplicate setting",
            "12: help: unknown setting",
            "13: sequence: unknown setting",
        ]
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: 1\nlist: [1", ":2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("\x01", ": not valid YAML: unacceptable character #x0001: special characters are not allowed"),
        ("[" * 5000, ": not valid YAML: maximum recursion depth exceeded"),
        ("- seed", ": expected lines `flag: value`, such as batch_size: 4"),
        ("", ": expected lines `flag: value`, such as batch_size: 4"),
        ("warmup_steps: 1\nwarmup_ratio: 0.1", ":2: argument --warmup_ratio: not allowed with argument --warmup_steps"),
    ],
)
def test_a_file_that_is_no_list_of_settings_is_one_line(tmp_path, text, message):
    path = write_config(tmp_path, text)
    with pytest.raises(FlagError) as error:
        read_config(make_parser(), path)
    assert str(error.value).startswith(path + message) and "\n" not in str(error.value)


def test_the_command_that_goes_on_names_the_runs_own_settings():
    for words in (["--config", "my.yaml", "--seed", "1"], ["--seed", "1", "--config=my.yaml"]):
        assert to_command(["train.py", *words], "out") == (
            "python train.py --config out/run.yaml --resume_from_checkpoint"
        )


@pytest.mark.slow
def test_schedulers_are_those_that_work_as_they_are():
    import torch
    from transformers import SchedulerType, get_scheduler

    working = set()
    for name in SchedulerType:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        try:
            scheduler = get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=3)
            optimizer.step()
            scheduler.step()
            working.add(name.value)
        except (TypeError, ValueError):  # needs an argument or a metric
            pass
    assert working == set(SCHEDULERS)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--resume_from_checkpoint"],
        ["--resume_from_checkpoint", "out/checkpoint-3"],
        ["--resume_from_checkpoint=out/checkpoint-3"],
    ],
)
def test_the_command_that_goes_on_names_resume_once(words):
    argv = ["train it.py", "--seed", "1", *words, "--run_name", "it's"]
    assert drop_resume(argv) == ["train it.py", "--seed", "1", "--run_name", "it's"]
    assert to_command(argv, "out") == """python 'train it.py' --seed 1 --run_name 'it'"'"'s' --resume_from_checkpoint"""
