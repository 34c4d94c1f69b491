"""Throughput of this script beside the recipes in use today: same rows, same LoRA, one table.

    python tests/bench_throughput.py --model_id Qwen/Qwen3-0.6B       # a CUDA machine: tables 1 and 2
    python tests/bench_throughput.py --cpu                            # two CPU cores, the embedded base

Every recipe trains in a process of its own (Unsloth changes the libraries for good) through TRL's SFTTrainer. The
processes load their models side by side and then wait for each other, so that one at a time uses the GPU. A step is
timed from the end of the one before to its own, with the device synchronised; the first steps are not counted.
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# ruff: noqa: E402
import train_qwen3_tool_calling as script
from tool_calling.arguments import number, pick
from tool_calling.data.examples import read_examples
from tool_calling.environment import return_pages
from tool_calling.processes import is_main
from tool_calling.samples import Sample, render_examples
from tool_calling.terminal import report_problems

# All else is imported inside of functions: torch after return_pages, and Unsloth before trl, transformers and peft.

# name: label, engine, how rows are batched, flags, batch size, accumulation steps
FOUR_BIT, SIXTEEN_BIT = ["--load_in_4bit"], ["--no-load_in_4bit", "--gradient_checkpointing", "off"]
PADDED, PACKED, SHARED = "padded", "packed", "shared"
RECIPES = {
    "a": ("Unsloth, 4-bit, padded", "unsloth", PADDED, FOUR_BIT, 2, 4),
    "b16": ("Unsloth, 4-bit, padded", "unsloth", PADDED, FOUR_BIT, 16, 1),
    "b32": ("Unsloth, 4-bit, padded", "unsloth", PADDED, FOUR_BIT, 32, 1),
    "b64": ("Unsloth, 4-bit, padded", "unsloth", PADDED, FOUR_BIT, 64, 1),
    "c": ("Unsloth, 4-bit, packed to 8,192", "unsloth", PACKED, FOUR_BIT, 4, 1),
    "d4": ("Transformers + PEFT + TRL, 4-bit, padded", "transformers", PADDED, FOUR_BIT, 8, 1),
    "d16": ("Transformers + PEFT + TRL, 16-bit, padded", "transformers", PADDED, SIXTEEN_BIT, 32, 1),
    "e8": ("this script, 4-bit, defaults", "unsloth", SHARED, FOUR_BIT, 2, 4),
    "e128": ("this script, 4-bit", "unsloth", SHARED, FOUR_BIT, 128, 1),
    "e16": ("this script, 16-bit", "unsloth", SHARED, SIXTEEN_BIT, 128, 1),
}
GROWTH = {
    f"tools {tools}, rows {rows}": (tools, rows) for tools, rows in [(6, 128), (60, 128), (8, 8), (8, 32), (8, 512)]
}
CPU_RECIPES = {
    # TRL 1.15's own loss is a Triton kernel wherever Triton is installed, and fails without a GPU: so our loss here.
    "padded": ("the same, padded batches", "transformers", SHARED, [*FOUR_BIT, "--no-share_prefix"], 2, 4),
    "e8": ("this script, 4-bit, defaults", "transformers", SHARED, FOUR_BIT, 2, 4),
    "e32": ("this script, 4-bit", "transformers", SHARED, FOUR_BIT, 32, 1),
    "e128": ("this script, 4-bit", "transformers", SHARED, FOUR_BIT, 128, 1),
}


def make_rows(args: argparse.Namespace, tokenizer, tools: int | None) -> list[Sample]:
    """Return the training samples; with `tools`, every row lists that many (renamed copies make up the number)."""
    examples, _ = read_examples(args.dataset_path, script.to_reading(args))
    if tools:
        own = examples[0].tools
        copies = [
            {**tool, "function": {**tool["function"], "name": f"{tool['function']['name']}_{i // len(own) + 1}"}}
            for i, tool in enumerate(own * (tools // len(own) + 1))
        ]
        listed = [*own, *copies[len(own) :]][:tools]
        names = {tool["function"]["name"] for tool in listed}
        called = [
            {call["function"]["name"] for m in example.messages for call in m.get("tool_calls", [])}
            for example in examples
        ]
        examples = [example._replace(tools=listed) for example, calls in zip(examples, called) if calls <= names]
    groups, problems = render_examples(tokenizer, examples, args.max_seq_length)
    report_problems(problems, "error", len(examples))
    return [sample for group in groups for sample in group]


def make_stock_trainer(args, model, tokenizer, train, packing: bool):
    """Return TRL's SFTTrainer as its users set it up, on the same tokens and labels."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    cuda = model.device.type == "cuda"
    rows = {
        "input_ids": [row.input_ids for row in train],
        "labels": [[-100] * row.prompt_length + row.input_ids[row.prompt_length :] for row in train],
    }
    config = SFTConfig(
        output_dir=args.output_dir,
        per_device_train_batch_size=args.batch_size,
        max_steps=args.max_steps,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        bf16=cuda,
        optim="adamw_8bit" if cuda else "adamw_torch",
        gradient_checkpointing=cuda and args.gradient_checkpointing != "off",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not cuda,
        seed=args.seed,
        packing=packing,
        max_length=8192 if packing else None,
        remove_unused_columns=not packing,
        dataset_kwargs=None if packing else {"skip_prepare_dataset": True},
    )
    return SFTTrainer(model=model, args=config, processing_class=tokenizer, train_dataset=Dataset.from_dict(rows))


def count_rows(inputs: dict):
    """Return how many training rows a micro-batch holds: an int or a tensor, so that no one waits for the GPU."""
    if "subtree_end" in inputs:
        labels = inputs["labels"][0]
        return ((labels[1:] != -100) & (labels[:-1] == -100)).sum()
    if "packed_seq_lengths" in inputs:
        return (inputs["packed_seq_lengths"] > 1).sum()
    if "position_ids" in inputs:
        return (inputs["position_ids"] == 0).sum()
    return len(inputs["input_ids"])


def time_steps(trainer, warm_up: int) -> dict:
    """Train, and return the median step in seconds, rows and tokens per step, and the peak memory in GiB.

    The GPU notes by itself when it has come to the end of a step: to wait for it would slow down what is measured.
    """
    import torch
    from transformers import TrainerCallback

    cuda, steps, micro_step = trainer.model.device.type == "cuda", [], trainer.training_step

    def note_time():
        if not cuda:
            return time.perf_counter()
        moment = torch.cuda.Event(enable_timing=True)
        moment.record()
        return moment

    def count_seconds(start, end) -> float:
        return start.elapsed_time(end) / 1000 if cuda else end - start

    def counted(model, inputs, *args, **kwargs):
        steps[-1]["rows"] += count_rows(inputs)
        steps[-1]["tokens"] += inputs["input_ids"].numel()
        return micro_step(model, inputs, *args, **kwargs)

    class Timer(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append({"rows": 0, "tokens": 0, "start": note_time()})

        def on_step_end(self, args, state, control, **kwargs):
            steps[-1]["end"] = note_time()

    trainer.training_step = counted
    trainer.add_callback(Timer())
    torch.cuda.reset_peak_memory_stats() if cuda else None
    trainer.train()
    torch.cuda.synchronize() if cuda else None
    timed = steps[warm_up:]
    # From one step's end to the next one's: the time to fetch the data counts too.
    seconds = statistics.median(
        count_seconds(before["end"], after["end"]) for before, after in zip(steps[warm_up - 1 :], timed)
    )
    rows = statistics.mean(int(step["rows"]) for step in timed)
    return {
        "seconds": seconds,
        "rows": rows,
        "tokens": statistics.mean(step["tokens"] for step in timed),
        "samples_per_second": rows / seconds,
        "first_step": count_seconds(steps[0]["start"], steps[0]["end"]),
        "first_loss": next(log["loss"] for log in trainer.state.log_history if "loss" in log),
        "peak": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
        "steps": len(timed),
    }


def wait_for_turn(result: Path) -> None:
    """Say that this process has loaded, and wait until it may be timed; in a process that run_in_turn started."""
    if is_main():
        result.with_suffix(".ready").touch()
    while not result.with_suffix(".go").exists():  # no collective: that would keep a GPU busy
        time.sleep(0.05)


def run_in_turn(commands: list[list[str]], places: list[str] | None = None):
    """Start commands side by side, and let one at a time go on when all have loaded; yield what each one wrote.

    Each is started with `--result FILE`, and on the GPUs of its place. One that fails is yielded as its error, a text.
    """
    folder, running = Path(tempfile.mkdtemp()), []
    for index, command in enumerate(commands):
        result = folder / f"{index}.json"
        place = {"CUDA_VISIBLE_DEVICES": places[index]} if places else {}
        with open(result.with_suffix(".log"), "w") as log:
            process = subprocess.Popen(
                [*command, "--result", str(result)], stdout=log, stderr=log, env={**os.environ, **place}
            )
        running.append((process, result))
    while any(process.poll() is None and not result.with_suffix(".ready").exists() for process, result in running):
        time.sleep(0.1)
    for process, result in running:
        result.with_suffix(".go").touch()
        process.wait()
        if result.is_file():
            yield json.loads(result.read_text())
            continue
        lines = [line.removeprefix("[rank0]: ") for line in result.with_suffix(".log").read_text().splitlines()]
        errors = [line for line in lines if re.match(r"[\w.]*Error\b", line)]
        yield (errors or lines[-1:] or ["no error"])[0][:300]


def run_recipe(
    options, engine: str, kind: str, flags: list[str], batch_size: int, accumulation: int, tools: int | None = None
) -> dict:
    """Load, wait for the device to be free, train and time one recipe in this process."""
    folder, max_length = tempfile.mkdtemp(), 16384 if tools else 8192 if kind == PACKED else 2048
    args = script.parse_args(
        [
            *("--model_id", options.model_id, "--engine", engine, "--output_dir", folder, *flags),
            *("--max_steps", str(options.warm_up + options.steps), "--max_seq_length", str(max_length)),
            *("--batch_size", str(batch_size), "--gradient_accumulation_steps", str(accumulation)),
            *("--dataset_path", options.dataset_path, "--tools_path", options.tools_path),
        ]
    )
    args.share_prefix = args.share_prefix and kind == SHARED  # the others run with Unsloth's own settings
    return_pages()  # for all of them: it is Unsloth's own setting
    from tool_calling.engines.start import start_engine

    start_engine(args.engine, args.share_prefix, args.output_dir, args.seed)
    import torch

    from tool_calling.engines.hub import load_tokenizer
    from tool_calling.schedule import Batching, plan_schedule
    from tool_calling.training.selfcheck import check_sharing

    tokenizer = load_tokenizer(args.model_id)
    samples = make_rows(args, tokenizer, tools)
    schedule = plan_schedule(samples, pick(Batching, args), engine=engine)
    model = script.load_model(args, engine, schedule, tokenizer)
    wait_for_turn(Path(options.result))
    if kind != SHARED:
        torch.backends.cuda.enable_cudnn_sdp(True)  # as PyTorch has it
        trainer = make_stock_trainer(args, model, tokenizer, samples, packing=kind == PACKED)
        return time_steps(trainer, options.warm_up)
    trainer = script.build_run_trainer(args, model, tokenizer, schedule, [], engine)
    start = time.perf_counter()
    if args.share_prefix and not check_sharing(trainer.model, schedule, engine):
        raise RuntimeError("sharing is switched off")
    checked = time.perf_counter() - start
    result = time_steps(trainer, options.warm_up)
    return {**result, "first_step": result["first_step"] + checked}


def time_answers(options, rows: int = 150, tokens: int = 64) -> None:
    """Print how long it takes to answer `rows` prompts with `tokens` tokens each, the stop token ignored."""
    import torch

    from tool_calling.engines.answers import generate_tokens
    from tool_calling.engines.device import autocast
    from tool_calling.engines.hub import load_tokenizer
    from tool_calling.engines.loading import load_base
    from tool_calling.engines.start import start_engine

    args = script.parse_args(
        ["--engine", "transformers", "--dataset_path", options.dataset_path, "--tools_path", options.tools_path]
    )
    start_engine(args.engine, args.share_prefix, args.output_dir, args.seed)
    train = make_rows(args, load_tokenizer(options.model_id), None)[:rows]
    prompts = [row.input_ids[: row.prompt_length] for row in train]
    for four_bit in (False, True):
        model = load_base(options.model_id, four_bit).eval()
        start = time.perf_counter()
        with torch.inference_mode(), autocast(model):
            for i in range(0, rows, args.eval_batch_size):
                generate_tokens(model, prompts[i : i + args.eval_batch_size], [-1], tokens)
        print(f"{rows} answers of {tokens} tokens, {4 if four_bit else 16}-bit: {time.perf_counter() - start:.1f} s")


def run_all(options, jobs: dict[str, list]) -> dict[str, dict]:
    """Run each job in its own process; return the results of those that succeeded."""
    results = {}
    commands = [
        [
            *(sys.executable, __file__, "--job", json.dumps(job), "--model_id", options.model_id),
            *("--dataset_path", options.dataset_path, "--tools_path", options.tools_path),
            *("--warm_up", str(options.warm_up), "--steps", str(options.steps)),
        ]
        for job in jobs.values()
    ]
    for name, result in zip(jobs, run_in_turn(commands)):
        if isinstance(result, str):
            print(f"{name}: failed: {result}", file=sys.stderr)
            continue
        results[name] = result
        print(f"{name}: {result['samples_per_second']:.1f} samples/s", file=sys.stderr, flush=True)
    return results


def print_tables(options, jobs: dict, results: dict) -> None:
    """Print table 1 (recipes) and table 2 (growth) in Markdown, ready for the README."""
    columns = (
        "",
        "recipe",
        "rows per step",
        "samples/s",
        "tokens computed per row",
        "ms per step",
        "peak GiB",
        "first step s",
        "first loss",
    )
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, job in jobs.items():
        if name in results and not name.startswith("tools"):
            r = results[name]
            cells = (
                name,
                job[0],
                f"{r['rows']:.0f}",
                f"{r['samples_per_second']:.1f}",
                f"{r['tokens'] / r['rows']:,.0f}",
                f"{1000 * r['seconds']:.0f}",
                f"{r['peak']:.2f}",
                f"{r['first_step']:.1f}",
                f"{float(r['first_loss']):.3f}",
            )
            print(f"| {' | '.join(cells)} |")
    speed = {name: result["samples_per_second"] for name, result in results.items()}
    others = {name: speed[name] for name in speed if not name.startswith(("tools", "e"))}
    if others:
        best = max(others, key=others.get)
        for name in speed:
            if name.startswith("e"):
                base = f" and {speed[name] / speed['a']:.1f} times (a)" if "a" in speed else ""
                print(f"\n({name}) is {speed[name] / others[best]:.1f} times ({best}), the best of the others{base}")
    growth = [name for name in results if name.startswith("tools")]
    if growth:
        print("\n| growth, this script, 4-bit | samples/s | ms per row | peak GiB |\n|---|---|---|---|")
        for name in growth:
            r = results[name]
            print(
                f"| {name} | {r['samples_per_second']:.1f} | {1000 / r['samples_per_second']:.2f} | {r['peak']:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", default=script.MODEL_ID)
    parser.add_argument("--dataset_path", default=str(ROOT / script.DATASET_PATH))
    parser.add_argument("--tools_path", default=str(ROOT / script.TOOLS_PATH))
    parser.add_argument("--cpu", action="store_true", help="compare padded and shared on CPU with the embedded base")
    parser.add_argument("--answers", action="store_true", help="time 150 answers of 64 tokens, nothing else")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="recipes, as the tables name them")
    parser.add_argument("--warm_up", type=number(int, 1), default=10)
    parser.add_argument("--steps", type=number(int, 1), default=20)
    for hidden in ("--job", "--result"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        result = run_recipe(options, *json.loads(options.job)[1:])
        Path(options.result).write_text(json.dumps(result))
        return
    if options.answers:
        return time_answers(options)
    jobs = {name: list(recipe) for name, recipe in (CPU_RECIPES if options.cpu else RECIPES).items()}
    if options.cpu:
        options.model_id = str(ROOT / "models" / "tiny-qwen3")
    else:
        jobs |= {name: [name, "unsloth", SHARED, FOUR_BIT, rows, 1, tools] for name, (tools, rows) in GROWTH.items()}
        ours = {name: job for name, job in jobs.items() if job[2] == SHARED}
        if importlib.util.find_spec("flash_attn"):  # each recipe of this script with its kernels, too
            for name, (label, engine, batching, flags, *sizes) in ours.items():
                flags = [*flags, "--flash_attention"]
                jobs[f"{name} flash"] = [f"{label}, FlashAttention", engine, batching, flags, *sizes]
    if options.only:
        jobs = {name: job for name, job in jobs.items() if name in options.only}
    start = time.perf_counter()
    results = run_all(options, jobs)
    print_tables(options, jobs, results)
    print(
        f"\n{options.warm_up} warm-up and {options.steps} timed steps each; {time.perf_counter() - start:.0f} s in all"
    )


if __name__ == "__main__":
    main()
