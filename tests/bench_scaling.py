"""Steady speed and memory of this script: models of all sizes, in 4 and 16 bits, on one or several GPUs; one table.

    python tests/bench_scaling.py Qwen/Qwen3-0.6B Qwen/Qwen3-8B --gpus 1 2 4
    python tests/bench_scaling.py Qwen/Qwen3-8B --gpus 2 --flags="--engine transformers --fsdp"

Every GPU computes --rows rows per step, in one stream. All measurements load side by side, spread over the GPUs, which
must hold them all; then they are timed one after the other, with nothing else running. Small models make 60 steps and
large ones 25, of which the last 15 are timed: the first ones are slower, above all on several GPUs.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

from bench_throughput import make_rows, run_in_turn, script, time_steps, wait_for_turn

from tool_calling.arguments import number, pick
from tool_calling.environment import return_pages
from tool_calling.processes import is_main, leave

TIMED_STEPS = 15
COLUMNS = (
    "model",
    "bits",
    "GPUs",
    "rows per step",
    "samples/s",
    "ms per step",
    "of one GPU's",
    "GiB after loading",
    "peak GiB",
)


def count_bytes(model: str) -> int:
    """Return how large the weights of a model's folder are; 0 if it is not a folder."""
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))


def measure(words: list[str], file: Path, steps: int) -> None:
    """Load, wait for the turn, train, and write what was measured; in each process of one measurement."""
    return_pages()
    import torch

    from tool_calling.engines.start import start_engine

    args = script.parse_args([*words, "--max_steps", str(steps), "--output_dir", tempfile.mkdtemp()])
    engine = start_engine(args.engine, args.share_prefix, args.output_dir, args.seed)
    from tool_calling.engines.device import leave_group
    from tool_calling.engines.hub import load_tokenizer
    from tool_calling.schedule import Batching, plan_schedule
    from tool_calling.training.selfcheck import check_sharing

    tokenizer = load_tokenizer(args.model_id)
    schedule = plan_schedule(make_rows(args, tokenizer, None), pick(Batching, args), engine=engine)
    model = script.load_model(args, engine, schedule, tokenizer)
    loaded = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0
    trainer = script.build_run_trainer(args, model, tokenizer, schedule, [], engine)
    if not check_sharing(trainer.model, schedule, engine):
        raise RuntimeError("sharing is switched off")
    wait_for_turn(file)
    result = time_steps(trainer, steps - TIMED_STEPS)
    if is_main():
        facts = {"rows": schedule.rows_per_step, "seconds": result["seconds"], "peak": result["peak"], "loaded": loaded}
        file.write_text(json.dumps(facts))
    leave_group()


def spread(jobs: list[tuple]) -> list[str]:
    """Return for each job (model, bits, gpus) the GPUs that it shall use: those with the fewest bytes so far."""
    import torch

    load, places = [0.0] * max(1, torch.cuda.device_count()), {}
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(len(load))))).split(",")
    for index in sorted(range(len(jobs)), key=lambda index: -count_bytes(jobs[index][0])):
        model, bits, gpus = jobs[index]
        chosen = sorted(range(len(load)), key=load.__getitem__)[:gpus]
        for gpu in chosen:
            load[gpu] += count_bytes(model) * bits / 16 + 2e9
        places[index] = ",".join(names[gpu] for gpu in sorted(chosen))
    return [places[index] for index in range(len(jobs))]


def print_table(options, jobs: list[tuple]) -> None:
    """Measure all jobs, and print a line of the table for each."""
    commands, speeds = [], {}
    for model, bits, gpus in jobs:
        words = [
            *("--model_id", model, "--batch_size", str(options.rows), "--gradient_accumulation_steps", "1"),
            "--load_in_4bit" if bits == 4 else "--no-load_in_4bit",
            *shlex.split(options.flags),
        ]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)] if gpus > 1 else []
        steps = options.steps or (60 if count_bytes(model) < 10e9 else 25)
        commands.append(
            [sys.executable, *launcher, __file__, model, "--words", json.dumps(words), "--steps", str(steps)]
        )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for (model, bits, gpus), facts in zip(jobs, run_in_turn(commands, spread(jobs))):
        if isinstance(facts, str):
            print(f"{model}, {bits} bits, {gpus} GPUs failed: {facts}", flush=True)
            continue
        speed, milliseconds = facts["rows"] / facts["seconds"], 1000 * facts["seconds"]
        share = speed / gpus / speeds.setdefault((model, bits), speed / gpus)
        print(
            f"| {Path(model).name} | {bits} | {gpus} | {facts['rows']} | {speed:,.1f} | {milliseconds:,.0f} "
            f"| {share:.0%} | {facts['loaded']:.2f} | {facts['peak']:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders, or Hub ids, whose sizes count as small")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1], help="numbers of GPUs, the smallest first")
    parser.add_argument("--bits", nargs="+", type=int, choices=[4, 16], default=[4])
    parser.add_argument("--rows", type=int, default=64, help="rows per GPU and step")
    parser.add_argument("--steps", type=number(int, TIMED_STEPS + 1), help="of each measurement, for 60 or 25")
    parser.add_argument("--flags", default="", help="more flags of train_qwen3_tool_calling.py")
    for hidden in ("--words", "--result"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.words:
        measure(json.loads(options.words), Path(options.result), options.steps)
        leave(0)
    else:
        print_table(
            options, [(model, bits, gpus) for model in options.models for bits in options.bits for gpus in options.gpus]
        )


if __name__ == "__main__":
    main()
