"""Settings from a file, main as a function, and the modes that settings choose."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, WEATHER, native, qwen3_config, write_jsonl
from small import TRAIN, make_schedule
from train_small import make_base

import train_qwen3_tool_calling as script
from tool_calling.data.examples import Reading, check_rows
from tool_calling.engines.choices import find_optim
from tool_calling.engines.hub import count_parameters, load_tokenizer
from tool_calling.estimates import Footprint
from tool_calling.run_folder import NOT_REPEATED, write_run
from tool_calling.samples import render_examples
from tool_calling.terminal import FlagError


def write_config(folder, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_goes_before_the_file_and_the_file_before_the_defaults(tmp_path):
    path = write_config(
        tmp_path,
        """
batch_size: 3
dataset_path: [a.jsonl, b.jsonl]
learning_rate: 2e-5
load_in_4bit: no
share_prefix: false
thinking: off
trust_remote_code: true
warmup_ratio: 0.5
resume_from_checkpoint: newest
max_steps: null
seed:
""",
    )
    args = script.parse_args(["--seed", "1", "--config", path, "--batch_size", "4", "--share_prefix"])
    assert (args.batch_size, args.seed, args.share_prefix) == (4, 1, True)
    assert (args.dataset_path, args.learning_rate, args.load_in_4bit) == (["a.jsonl", "b.jsonl"], 2e-5, False)
    assert (args.thinking, args.trust_remote_code, args.resume_from_checkpoint) == ("off", True, "newest")
    assert (args.max_steps, args.lora_rank, args.warmup_steps, args.warmup_ratio) == (None, 16, None, 0.5)
    args = script.parse_args(["--config", path, "--warmup_steps", "10", "--dataset_path", "c"])
    assert (args.dataset_path, args.warmup_steps, args.warmup_ratio) == (["c"], 10, None)
    args = script.parse_args(["--config", write_config(tmp_path, "warmup_steps: 7"), "--warmup_ratio", "0"])
    assert (args.warmup_steps, args.warmup_ratio) == (None, 0)


def test_wrong_flags_are_one_line(tmp_path):
    no_file = f"{tmp_path}/no.yaml"
    for flags, message in {
        ("--warmup_steps", "10", "--warmup_ratio", "0.1"): (
            "argument --warmup_ratio: not allowed with argument --warmup_steps"
        ),
        ("--lora_rnak", "3"): "unrecognized arguments: --lora_rnak 3; did you mean --lora_rank?",
        ("--warmup_ratio", "1"): "argument --warmup_ratio: must be at least 0 and below 1, got 1",
        ("--config", no_file): f"--config {no_file}: not a file; expected YAML, `flag: value` a line",
    }.items():
        with pytest.raises(FlagError) as error:
            script.parse_args([*flags])
        assert str(error.value) == message


@pytest.mark.parametrize(
    "name, card, hidden, inner, layers, heads, tied",
    [("config_8gb.yaml", 8, 2048, 6144, 28, 16, True), ("config_80gb.yaml", 80, 4096, 12288, 36, 32, False)],
)
def test_the_example_files_give_reasons_and_fit_their_cards(name, card, hidden, inner, layers, heads, tied):
    lines = (ROOT / "data" / name).read_text().split("\n\n")[1].splitlines()
    assert len(lines) > 10 and all(re.fullmatch(r"\w+: \S+  # \w.{7,}", line) for line in lines)
    args = script.parse_args(["--config", str(ROOT / "data" / name)])
    assert {line.split(":")[0] for line in lines} <= set(vars(args))
    config = qwen3_config(hidden, inner, layers, heads, tied)
    parameters = count_parameters(config, args.lora_rank)
    footprint = Footprint(
        config,
        parameters,
        args.load_in_4bit,
        find_optim(args.optim, args.lora_rank, args.fsdp, cuda=True),
        checkpointing=args.gradient_checkpointing != "off",
        recorded=args.cuda_graphs and not args.lora_dropout,
    )
    training = footprint.estimate(args.batch_size * args.max_seq_length)["total"]
    cache = args.eval_batch_size * 1000 * layers * 2 * 8 * 128 * 2  # of so many answers to requests of 1,000 tokens
    scoring = (2 * (parameters["linear"] + parameters["other"]) + cache) / 2**30
    assert training < 0.85 * card and scoring < 0.85 * card


def test_warmup_is_a_number_or_a_share_of_the_steps(tmp_path):
    def warmup(*flags):
        args = script.parse_args(["--output_dir", str(tmp_path), *flags])
        return script.to_sft_config(args, make_schedule(TRAIN, 8), False).get_warmup_steps(50)

    assert [
        warmup(),
        warmup("--warmup_steps", "0"),
        warmup("--warmup_steps", "1"),
        warmup("--warmup_ratio", "0.1"),
        warmup("--warmup_ratio", "0"),
    ] == [10, 0, 1, 5, 0]


def test_the_named_layers_are_a_set():
    args = script.parse_args(["--target_modules", "v_proj", "q_proj", "v_proj"])
    assert args.target_modules == ["q_proj", "v_proj"]
    assert script.parse_args(["--target_modules=v_proj q_proj"]).target_modules == args.target_modules  # as in YAML


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora_rank", "0", "--load_in_4bit"], "--lora_rank 0 trains the 16-bit weights themselves"),
        (
            ["--lora_rank", "0", "--engine", "unsloth"],
            "leave out --load_in_4bit, --engine unsloth and --save_method lora",
        ),
        (["--lora_rank", "0", "--save_method", "lora"], "--lora_rank 0 trains the 16-bit weights themselves"),
        (["--lora_rank", "-1"], "argument --lora_rank: must be at least 0, got -1"),
        (["--method", "grpo", "--engine", "unsloth"], "with Transformers: leave out --fsdp and --engine unsloth"),
        (["--num_generations", "4"], "--reward, --beta and --metric_for_best reward are for --method grpo"),
        (["--hard_rows", "0"], "are for --method grpo"),
        (["--method", "grpo", "--hard_rows", "1.1"], "argument --hard_rows: must be at least 0 and at most 1, got 1.1"),
        (["--reward", "a.py:f"], "are for --method grpo"),
        (["--beta", "0.1"], "are for --method grpo"),
        (["--metric_for_best", "reward"], "are for --method grpo"),
        (["--temperature", "0.7"], "are for --method grpo"),
        (["--method", "grpo", "--num_generations", "1"], "argument --num_generations: must be at least 2, got 1"),
        (["--save_method", "gguf"], "argument --save_method: invalid choice: 'gguf'"),
        (["--save_gguf", "q8_0,q9_0"], "argument --save_gguf: must be one of f32, f16, bf16, q8_0, q6_k"),
        (
            ["--save_gguf", "q8_0", "--save_method", "merged_4bit"],
            "--save_gguf is made from the 16-bit model: leave out --save_method merged_4bit",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(FlagError) as error:  # exit code 2
        script.parse_args(flags)
    assert message in str(error.value)


def test_what_a_flag_leaves_open_depends_on_what_is_trained():
    args = script.parse_args(["--lora_rank", "0"])
    assert (args.load_in_4bit, args.learning_rate, args.engine) == (False, 2e-5, "transformers")
    args = script.parse_args(["--lora_rank", "0", "--no-load_in_4bit", "--learning_rate", "1e-4"])
    assert (args.load_in_4bit, args.learning_rate) == (False, 1e-4)
    args = script.parse_args([])
    assert (args.load_in_4bit, args.learning_rate, args.engine, args.save_method) == (
        True,
        2e-4,
        "auto",
        "merged_16bit",
    )


def test_answers_that_are_drawn_have_defaults_of_their_own():
    args = script.parse_args(["--method", "grpo"])
    assert (args.num_generations, args.temperature, args.max_steps, args.learning_rate) == (8, 1.0, 100, 1e-5)
    assert (args.metric_for_best, args.eval_steps, args.save_steps, args.engine) == (
        "exact_match",
        25,
        25,
        "transformers",
    )
    assert (args.hard_rows, args.reward, args.beta) == (0.1, None, 0.0)
    assert script.parse_args(["--method", "grpo", "--hard_rows", "0"]).hard_rows == 0
    assert script.parse_args(["--method", "grpo", "--hard_rows", "1"]).hard_rows == 1
    own = script.parse_args(["--method", "grpo", "--reward", "mine.py:rate"])
    assert (own.hard_rows, own.metric_for_best) == (1.0, "reward")
    args = script.parse_args(["--method", "grpo", "--max_steps", "7", "--eval_steps", "3", "--num_generations", "4"])
    assert (args.num_generations, args.max_steps, args.eval_steps, args.save_steps) == (4, 7, 3, 3)


ASK = {"role": "user", "content": "rain in Rome?"}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}],
}
TURNS = [
    ASK,
    {**CALL, "reasoning_content": "Rome it is."},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "No, sun."},
]


@pytest.fixture
def thinking_rows(tmp_path, tokenizer):
    """Return a function: --thinking and rows of messages -> (rendered samples as text, problems)."""

    def render(thinking, *rows):
        path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": row, "tools": [WEATHER]} for row in rows])
        checked = check_rows([path], Reading(script.TOOLS_PATH, thinking=thinking))
        assert checked.total == len(rows)
        groups, unrendered = render_examples(tokenizer, checked.examples, 4096)
        assert not unrendered
        return [
            [(tokenizer.decode(turn.input_ids[: turn.prompt_length]), turn.completion) for turn in group]
            for group in groups
        ], [(source.rsplit("/", 1)[1], problem) for source, problem in checked.problems]

    return render


def test_thinking_off_trains_and_prompts_without_any_thought(thinking_rows, tokenizer):
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    bare = [ASK, {**CALL, "content": ""}, *TURNS[2:]]
    prompts = [
        tokenizer.apply_chat_template(
            bare[:turn], tools=[WEATHER], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for turn in (1, 3)
    ]
    assert thinking_rows("off", TURNS) == ([[(prompts[0], call), (prompts[1], "No, sun.")]], [])
    (((prompt, answer), (later, _)),), problems = thinking_rows("auto", TURNS)
    assert answer == f"<think>\nRome it is.\n</think>\n\n{call}" and "Rome it is." in later and not problems
    assert prompt + "<think>\n\n</think>\n\n" == prompts[0]


def test_thinking_on_wants_a_thought_in_every_trained_turn(thinking_rows, tokenizer):
    thought = {**TURNS[3], "reasoning_content": "It is sunny."}
    rows = [TURNS, [*TURNS[:3], thought], [ASK, {**CALL, "weight": 0}, TURNS[2], thought], [ASK, TURNS[3]]]
    groups, problems = thinking_rows("on", *rows)
    problem = "has no reasoning; with --thinking on every trained answer needs it"
    assert problems == [("rows.jsonl:1", f"message 4: {problem}"), ("rows.jsonl:4", f"message 2: {problem}")]
    assert [len(group) for group in groups] == [2, 1]
    for prompt, answer in (turn for group in groups for turn in group):
        assert prompt.endswith("<|im_start|>assistant\n") and answer.startswith("<think>\n")


def test_importing_does_nothing(tmp_path):
    code = (
        "import os, sys\nbefore = dict(os.environ), os.getcwd(), list(sys.argv)\n"
        "import train_qwen3_tool_calling\n"
        "assert (dict(os.environ), os.getcwd(), list(sys.argv)) == before\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))\n"
    )
    result = subprocess.run(
        [sys.executable, "-B", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (result.stdout, result.stderr) == ("set()\n", "") and not list(tmp_path.iterdir())


# As a user would write it: nothing keeps a process that imports this file again from running it again.
PROGRAM = """
import json, sys
from train_qwen3_tool_calling import FlagError, UserError, main
folder, flags = sys.argv.pop(), json.loads(sys.argv.pop())
sys.argv[1:] = ["--no-such-flag"]
report = main(flags)
assert report == json.load(open(folder + "/out/report.json")), "report"
print("COMMAND", report["command"])
files = ("run.yaml", "adapter/adapter_model.safetensors")
run, adapter = (open(folder + "/out/" + name, "rb").read() for name in files)
again = main(["--config", folder + "/out/run.yaml"])
assert again["scores"] == report["scores"] and again["args"] == report["args"]
assert open(folder + "/out/run.yaml", "rb").read() == run, "run.yaml"
assert open(folder + "/out/adapter/adapter_model.safetensors", "rb").read() == adapter, "adapter"
audit = main(["--config", folder + "/out/run.yaml", "--dry_run"])
assert audit == json.load(open(folder + "/out/audit.json")), "audit"
tested = main(["--config", folder + "/out/run.yaml", "--eval_only", folder + "/final"])
assert tested == json.load(open(folder + "/out/eval_only/report.json"))
assert tested["scores"]["model"] == report["scores"]["merged"]
more = main(["--config", folder + "/out/eval_only/run.yaml"])
assert more["scores"] == tested["scores"] and more["args"] == tested["args"]
for wrong, kind in ((["--seed", "x"], FlagError), (["--config", folder + "/out/run.yaml", "--resume_from_checkpoint",
                                                    "--thinking", "auto"], UserError),
                    (["--config", folder + "/out/run.yaml", "--target_modules", "experts"], UserError)):
    try:
        main(wrong)
    except kind as error:
        print("ERROR", error)
"""


@pytest.mark.slow
def test_main_returns_its_report_and_a_run_yaml_repeats_its_run(tmp_path):
    make_base(tmp_path / "base")
    rows = [native(f"rain in {city}", ("get_weather", {"city": city})) for city in ("Rome", "Oslo", "Lima", "Cairo")]
    write_jsonl(tmp_path / "rows.jsonl", rows * 4)
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    flags = [
        *("--model_id", tmp_path / "base"),
        *("--dataset_path", tmp_path / "rows.jsonl"),
        *("--tools_path", tmp_path / "tools.json"),
        *("--output_dir", tmp_path / "out"),
        *("--final_model_dir", tmp_path / "final"),
        *("--no-load_in_4bit", "--train_test_split", 0.25),
        *("--num_epochs", 2),
        *("--batch_size", 1),
        *("--lora_rank", 4),
        *("--lora_alpha", 6),
        *("--use_rslora", "--target_modules", "v_proj", "q_proj"),
        *("--learning_rate", 0.1),
        *("--warmup_ratio", 0.5),
        *("--lr_scheduler_type", "cosine"),
        *("--thinking", "off"),
        *("--max_new_tokens", 4),
        *("--eval_samples", 4),
    ]
    (tmp_path / "program.py").write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, "program.py", json.dumps(list(map(str, flags))), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    said = [line for line in result.stdout.splitlines() if line.startswith(("COMMAND", "ERROR"))]
    assert said[0] == f"COMMAND python {ROOT / 'train_qwen3_tool_calling.py'} " + " ".join(map(str, flags))
    assert said[1] == "ERROR argument --seed: invalid whole number value: 'x'"
    assert said[2].startswith("ERROR --thinking is auto, and off in the run that ") and len(said) == 4
    assert said[3].startswith("ERROR --target_modules experts: the model has no such linear layer; expected")
    adapter = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["use_rslora"], sorted(adapter["target_modules"])) == (True, ["q_proj", "v_proj"])
    history = json.loads((tmp_path / "out" / "report.json").read_text())["train"]["history"]
    rates = [log["learning_rate"] for log in history if "learning_rate" in log]
    assert rates == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1, 0.075, 0.025])  # 6 steps, half of them to warm up
    run = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert run["facts"].keys() == {"training_rows", "rows_per_step", "optimizer"} and not run.keys() & set(NOT_REPEATED)


def test_rslora_scales_by_the_root_of_the_rank(tmp_path):
    make_base(tmp_path / "base")
    for flag, scale in (("--use_rslora", 3.0), ("--no-use_rslora", 1.5)):
        args = script.parse_args(
            [
                *("--model_id", str(tmp_path / "base")),
                *("--no-load_in_4bit", "--lora_rank", "4"),
                *("--lora_alpha", "6"),
                *("--target_modules", "q_proj", flag),
            ]
        )
        model = script.load_model(args, "transformers", make_schedule(TRAIN, 1), load_tokenizer(args.model_id))
        layers = {
            name: layer.scaling["default"]
            for name, layer in model.named_modules()
            if hasattr(layer, "scaling") and isinstance(layer.scaling, dict)
        }
        assert len(layers) == 2 and set(layers.values()) == {scale} and all("q_proj" in name for name in layers)


def test_no_module_at_all_is_refused():
    with pytest.raises(FlagError, match="^--target_modules: expected at least one name$"):
        script.parse_args(["--target_modules", ""])
    assert script.parse_args(["--target_modules", "v_proj q_proj"]).target_modules == ["q_proj", "v_proj"]


def test_a_home_folder_is_found_where_no_shell_sees_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tmp_path / "run.yaml"
    config.write_text("dataset_path: [~/a.json, b.json]\ntools_path: ~/tools.json\noutput_dir: ~/out\n")
    args = script.parse_args(["--config", str(config)])
    assert args.dataset_path == [f"{tmp_path}/a.json", "b.json"]
    assert (args.tools_path, args.output_dir) == (f"{tmp_path}/tools.json", f"{tmp_path}/out")


def test_tools_count_as_named_if_a_flag_or_a_file_names_them(tmp_path):
    """The default serves native rows only; a run.yaml repeats that, as it has null there."""
    named, repeated = tmp_path / "named.yaml", tmp_path / "run.yaml"
    named.write_text(f"tools_path: {script.TOOLS_PATH}\n")
    write_run(vars(script.parse_args([])), tmp_path)
    readings = {
        words: script.to_reading(script.parse_args([*words]))
        for words in ((), ("--tools_path", script.TOOLS_PATH), ("--config", str(named)), ("--config", str(repeated)))
    }
    assert {reading.tools_path for reading in readings.values()} == {script.TOOLS_PATH}
    assert [reading.named_tools for reading in readings.values()] == [False, True, True, False]
