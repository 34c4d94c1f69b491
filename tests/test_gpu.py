"""What needs CUDA: both engines, by the real command line. `python -m pytest -m gpu` on a machine with a GPU."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ALARM, ROOT, TINY, WEATHER, native, run_script, write_jsonl
from test_command_line import FINAL_FILES, ROWS, names

import train_qwen3_tool_calling as script
from tool_calling.data.examples import Reading, read_examples
from tool_calling.engines.hub import load_tokenizer
from tool_calling.prompts import render_all
from tool_calling.schedule import plan_streams

try:
    import torch

    has_gpu = torch.cuda.is_available()
except ImportError:
    has_gpu = False
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu, reason="needs a CUDA GPU")]
MODEL = os.environ.get("GPU_TEST_MODEL", str(TINY))  # for example a full-size Qwen3
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES", "0")


def run(folder, *more, **changes):
    settings = {
        "--model_id": TINY,
        "--dataset_path": folder / "rows.jsonl",
        "--tools_path": folder / "tools.json",
        "--output_dir": folder / "out",
        "--final_model_dir": folder / "final",
        "--num_epochs": 2,
        "--train_test_split": 0.25,
        **changes,
    }
    flags = [item for pair in settings.items() for item in pair]
    result = run_script(*flags, *more, timeout=500, CUDA_VISIBLE_DEVICES=VISIBLE)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"step +\d+ of \d+  loss ([\d.]+)", output)]


def read_adapter(folder) -> "torch.Tensor":
    """Return all weights of the adapter as one vector."""
    from safetensors.torch import load_file

    weights = load_file(folder / "out" / "adapter" / "adapter_model.safetensors")
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "tools.json").write_text(json.dumps([WEATHER, ALARM]))
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder


def test_unsloth_trains_resumes_merges_and_matches_the_stock_engine(folder):
    output = run(folder)
    assert "Unsloth" in output and len(losses(output)) == 6
    assert sum(line.startswith("gpu      ") and "GiB reserved" in line for line in output.splitlines()) == 2
    assert names(folder / "final") == FINAL_FILES
    whole = read_adapter(folder)
    shutil.rmtree(folder / "out" / "checkpoint-6")
    resumed = run(folder, "--resume_from_checkpoint")
    assert losses(resumed) == losses(output)[3:]
    difference = (read_adapter(folder) - whole).norm() / whole.norm()
    print("difference of the weights after resuming", difference.item())
    assert difference < 1e-6
    stock = run(
        folder, **{"--engine": "transformers", "--output_dir": folder / "stock", "--max_steps": 1, "--warmup_steps": 0}
    )
    assert losses(stock)[0] == pytest.approx(losses(output)[0], rel=0.01)


def test_both_engines_put_the_same_adapter_on_the_same_layers(folder):
    found = {}
    for engine in ("unsloth", "transformers"):
        output = run(
            folder,
            "--use_rslora",
            "--target_modules",
            "q_proj",
            "down_proj",
            "--no-load_in_4bit",
            **{"--engine": engine, "--output_dir": folder / engine, "--warmup_ratio": 0.5, "--lora_alpha": 8},
        )
        settings = json.loads((folder / engine / "adapter" / "adapter_config.json").read_text())
        history = json.loads((folder / engine / "report.json").read_text())["train"]["history"]
        found[engine] = (
            settings["use_rslora"],
            sorted(settings["target_modules"]),
            [log["learning_rate"] for log in history if "learning_rate" in log],
            losses(output)[0],
        )
    assert found["unsloth"][:2] == found["transformers"][:2] == (True, ["down_proj", "q_proj"])
    assert found["unsloth"][2] == pytest.approx(found["transformers"][2])
    assert found["unsloth"][3] == pytest.approx(found["transformers"][3], rel=0.01)


GRADIENTS = """
import sys, torch, weakref
import train_qwen3_tool_calling as s
args = s.parse_args(["--model_id", sys.argv[1], "--dataset_path", sys.argv[2], "--tools_path", sys.argv[3], *sys.argv[4:]])
engine = s.start_engine(args)
assert engine == "unsloth"
tokenizer = s.load_tokenizer(args.model_id)
train, held_out = s.render_all(args, tokenizer, s.read_examples(args.dataset_path, s.Reading(args.tools_path))[0])
plan = s.Plan(8, 1, s.group_rows(train), (1024, 2048))
model = s.build_trainer(args, engine, s.load_model(args, engine, plan), tokenizer, train, held_out, plan).model
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.02)
model.train()

def difference(one, other):
    return s.relative_difference(one[1], other[1])

rows = [train[:8], train[8:16]]
streams = [[s.build_stream(part, plan.lengths)] for part in rows]
replayed = [s.compute_gradient(model, stream, engine) for stream in streams]
rotary = model.get_base_model().model.rotary_emb
table = weakref.ref(rotary.get_cached()[0])
s.compute_gradient(model, [s.build_stream(train[:1], (2 * model.config.max_position_embeddings,))], engine)
print("replaced", rotary.get_cached()[0] is not table(), "kept", table() is not None)
print("again", difference(s.compute_gradient(model, streams[0], engine), replayed[0]))
s.drop_graphs(model)
launched = [s.compute_gradient(model, stream, engine) for stream in streams]
padded = [s.compute_gradient(model, [s.build_padded([row]) for row in part], engine) for part in rows]
alone = [s.compute_gradient(model, [s.build_stream([row], plan.lengths) for row in part], engine) for part in rows]
for i in range(2):
    print("loss", abs(replayed[i][0] / padded[i][0] - 1), "norm", difference(replayed[i], padded[i]),
          "rounding", difference(alone[i], padded[i]), "graph", difference(replayed[i], launched[i]))
"""


@pytest.mark.parametrize("flags", [[], ["--no-load_in_4bit"]])
def test_unsloth_shared_gradients_are_those_of_single_rows_also_from_a_cuda_graph(folder, flags):
    result = subprocess.run(
        [sys.executable, "-c", GRADIENTS, MODEL, folder / "rows.jsonl", folder / "tools.json", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = re.findall(r"loss (\S+) norm (\S+) rounding (\S+) graph (\S+)", result.stdout)
    assert len(found) == 2
    for loss, norm, rounding, graph in [map(float, line) for line in found]:
        assert loss < 0.02 and norm < max(0.02, 2 * rounding) < 0.2  # bf16: coarse on losses near zero
        assert graph < 1e-3
    # A stream longer than Unsloth's table of rotations makes a new one; recorded streams go on reading theirs.
    assert "replaced True kept True" in result.stdout
    assert float(re.search(r"again (\S+)", result.stdout)[1]) < 1e-3


def test_where_the_kernel_cannot_be_compiled_rows_are_padded(folder, monkeypatch):
    """As on a GPU with less shared memory than the kernel's tiles take; of 96, the mask's blocks are no multiple."""
    padded = run(folder, "--no-share_prefix", **{"--max_steps": 2, "--output_dir": folder / "padded"})
    monkeypatch.setenv("PG_FLEX_BF16_BLOCK_N", "96")
    output = run(folder, **{"--max_steps": 2, "--output_dir": folder / "uncompiled"})
    assert "\ncheck " not in output and losses(output) == pytest.approx(losses(padded), rel=0.01)


SHORT_OF_MEMORY = """
import sys, torch
import train_qwen3_tool_calling as s

def peak(batches):
    s.free_gpu()
    torch.cuda.reset_peak_memory_stats()
    s.compute_gradient(model, batches, engine)
    s.free_gpu()
    return torch.cuda.max_memory_allocated()

if __name__ == "__main__":
    args = s.parse_args(sys.argv[2:])
    s.refuse_telemetry()
    s.return_pages()
    engine = s.start_engine(args)
    tokenizer = s.load_tokenizer(args.model_id)
    train, held_out = s.render_all(args, tokenizer, s.read_examples(args.dataset_path, s.Reading(args.tools_path))[0])
    plan = s.plan_streams(train, args, engine)
    model = s.load_model(args, engine, plan)
    trainer = s.build_trainer(args, script.to_sft_config(args, plan, False), engine, model, tokenizer, train, [], plan)
    model = trainer.model.train()
    rows = [train[i] for i in s.order_rows(plan, args.seed, epoch=0)[: plan.rows]]
    halves = s.divide_plan(plan, plan.rows // 2, train, args)
    parts = s.to_batches(rows, halves)
    decoder = model.get_base_model().model
    graphs, decoder.graphs = getattr(decoder, "graphs", None), None  # measured without them
    peak(parts)  # what is allocated once and for all
    small, whole = peak(parts), peak([s.build_batch(rows, plan)])
    decoder.graphs = graphs
    if sys.argv[1] == "short":
        limit = (small + whole) / 2
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    trainer.train()
    print("losses", *[log["loss"] for log in trainer.state.log_history if "loss" in log])
"""
WORDS = ["amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "knoll", "larch"]


@pytest.mark.parametrize("flags", [["--engine", "transformers"], ["--no-cuda_graphs"], []])
def test_a_step_that_does_not_fit_goes_on_in_smaller_streams(folder, flags):
    generator = random.Random(0)  # long requests that share nothing: memory grows with the rows
    write_jsonl(
        folder / "long.jsonl",
        [native(" ".join(generator.choices(WORDS, k=300)), ("set_alarm", {"time": word})) for word in WORDS * 4],
    )
    (folder / "short.py").write_text(SHORT_OF_MEMORY)
    results = {}
    for kind in ("plenty", "short"):
        results[kind] = subprocess.run(
            [
                sys.executable,
                folder / "short.py",
                kind,
                "--model_id",
                MODEL,
                "--dataset_path",
                folder / "long.jsonl",
                "--tools_path",
                folder / "tools.json",
                "--output_dir",
                folder / kind,
                "--max_steps",
                "3",
                "--batch_size",
                "16",
                "--gradient_accumulation_steps",
                "1",
                "--gradient_checkpointing",
                "off",
                *flags,
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=500,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            },
        )
        assert results[kind].returncode == 0, results[kind].stderr[-3000:]
    warnings = re.findall("warning: out of GPU memory at step ([0-9]+) with a stream of", results["short"].stderr)
    assert warnings and set(warnings) == {"1"} and "out of GPU memory" not in results["plenty"].stderr
    short, plenty = (
        [float(loss) for loss in re.search("losses (.*)", results[kind].stdout)[1].split()]
        for kind in ("short", "plenty")
    )
    assert len(short) == 3 and short == pytest.approx(plenty, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------
# Two GPUs
# ---------------------------------------------------------------------------------------------------------------
two_gpus = pytest.mark.skipif(not has_gpu or torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


def run_on_two(folder, name, *flags) -> str:
    """Run the command line on two GPUs, with the Transformers engine if no other is named; return what it prints."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        ROOT / "train_qwen3_tool_calling.py",
        "--model_id",
        MODEL,
        "--engine",
        "transformers",
        "--dataset_path",
        folder / "rows.jsonl",
        "--tools_path",
        folder / "tools.json",
        "--train_test_split",
        "0.25",
        "--output_dir",
        folder / name,
        "--final_model_dir",
        folder / f"{name}-final",
        "--max_steps",
        "2",
        "--batch_size",
        "1",
        "--gradient_accumulation_steps",
        "1",
        "--warmup_steps",
        "0",
        "--max_new_tokens",
        "4",
        *flags,
    ]
    result = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=500,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@two_gpus
@pytest.mark.parametrize("bits", ["--load_in_4bit", "--no-load_in_4bit"])
def test_a_base_split_over_two_gpus_computes_what_a_whole_one_does(folder, bits):
    """As bf16, 4-bit numbers that look like NaN changed on the way, and the first loss by 0.2 %."""
    whole, split = (
        losses(run_on_two(folder, f"{bits[2:4]}{name}", bits, "--save_method", "lora", *flags))
        for name, flags in (("whole", []), ("split", ["--fsdp"]))
    )
    assert split[0] == pytest.approx(whole[0], rel=3e-4) and len(split) == 2


@two_gpus
def test_all_weights_split_over_two_gpus_are_trained_saved_and_resumed(folder):
    output = run_on_two(folder, "full", "--fsdp", "--lora_rank", "0", "--save_steps", "1")
    loss, before = re.search(r"held-out loss (\S+), before saving (\S+) ", output).groups()
    assert float(loss) == pytest.approx(float(before), rel=1e-3)
    shutil.rmtree(folder / "full" / "checkpoint-2")
    resumed = run_on_two(folder, "full", "--fsdp", "--lora_rank", "0", "--save_steps", "1", "--resume_from_checkpoint")
    assert losses(resumed) == pytest.approx(losses(output)[1:], rel=1e-3)


@two_gpus
def test_unsloth_on_two_gpus_replays_streams_of_several_lengths(folder):
    """CUDA refuses to record a stream once DistributedDataParallel is built on another: all come before."""
    generator = random.Random(0)
    rows = [
        native(" ".join(generator.choices(WORDS, k=words)), ("set_alarm", {"time": "6"}))
        for words in (10, 100, 250, 500) * 6
    ]
    write_jsonl(folder / "lengths.jsonl", rows)
    args = script.parse_args(
        [
            "--dataset_path",
            str(folder / "lengths.jsonl"),
            "--batch_size",
            "1",
            "--tools_path",
            str(folder / "tools.json"),
            "--gradient_accumulation_steps",
            "1",
            "--train_test_split",
            "0.25",
        ]
    )
    train, _ = render_all(args, load_tokenizer(MODEL), read_examples(args.dataset_path, Reading(args.tools_path))[0])
    assert len(plan_streams(train, args, "unsloth").lengths) > 2
    output = run_on_two(
        folder,
        "lengths",
        "--engine",
        "unsloth",
        "--dataset_path",
        folder / "lengths.jsonl",
        "--max_steps",
        "8",
        "--save_method",
        "lora",
    )
    assert "Unsloth" in output and len(losses(output)) == 8
