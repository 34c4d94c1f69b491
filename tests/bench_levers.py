"""What each lever of a training step on CUDA gives: the step without it, one lever at a time; and kernels of attention.

    python tests/bench_levers.py MODEL [--rows 8 128]    # the step
    python tests/bench_levers.py --attention             # attention alone, of streams of three shapes

Each variant is a process of its own; they load side by side and are timed one after the other. Flags that this program
does not have go to all variants: `--gradient_checkpointing on` shows what a step takes where memory is short,
`--rows 8 --batch_size 1 --gradient_accumulation_steps 8 --max_seq_length 1536` a step of two streams.
"""

import argparse
import importlib.util
import json
import random
import sys
import tempfile
from pathlib import Path

from bench_throughput import ROOT, make_rows, pick, return_pages, run_in_turn, time_steps, wait_for_turn

WARM_UP, STEPS = 20, 20
LEVERS = {
    "": "all levers",
    "recompute": "activations computed twice",
    "wait": "the numbers of a step read before the next one starts",
    "walk": "the library's walks through all modules and weights",
    "dynamic": "attention compiled for any length",
    "graphs": "kernels launched one by one",
    "memory": "both: activations computed twice, kernels launched one by one",
}
TWICE, ONE_BY_ONE = ["--gradient_checkpointing", "on"], ["--no-cuda_graphs"]
OFF = {"recompute": TWICE, "graphs": ONE_BY_ONE, "memory": TWICE + ONE_BY_ONE}  # levers that are flags


def take_away(lever: str) -> None:
    """Undo a lever that is no flag, before the model is loaded."""
    from tool_calling.engines import compat
    from tool_calling.training import trainer

    stream = trainer.StreamTrainer
    if lever == "wait":
        check = stream.check_steps
        stream.check_steps = lambda self, left: check(self, 0)
    elif lever == "walk":
        stream.trained = property(lambda self: [weight for weight in self.model.parameters() if weight.requires_grad])
        del stream.floating_point_ops
    elif lever == "dynamic":
        compat.compile_attention = lambda flash: None


def time_variant(model: str, lever: str, rows: int, flags: list[str], result: Path) -> dict:
    """Train and time a variant, when it is its turn."""
    sys.path.insert(0, str(ROOT))
    import train_qwen3_tool_calling as script

    batch = ["--batch_size", str(rows), "--gradient_accumulation_steps", "1"]
    steps = ["--max_steps", str(WARM_UP + STEPS), "--output_dir", tempfile.mkdtemp()]
    args = script.parse_args(["--model_id", model, *batch, *steps, *flags, *OFF.get(lever, [])])
    return_pages()
    from tool_calling.engines.start import start_engine

    engine = start_engine(args.engine, args.share_prefix, args.output_dir, args.seed)
    take_away(lever)
    from tool_calling.engines.hub import load_tokenizer
    from tool_calling.schedule import Batching, plan_schedule
    from tool_calling.training.selfcheck import check_sharing

    tokenizer = load_tokenizer(args.model_id)
    schedule = plan_schedule(make_rows(args, tokenizer, None), pick(Batching, args), engine=engine)
    loaded = script.load_model(args, engine, schedule, tokenizer)
    trainer = script.build_run_trainer(args, loaded, tokenizer, schedule, [], engine)
    check_sharing(trainer.model, schedule, engine)  # compiles and records
    wait_for_turn(result)
    return time_steps(trainer, WARM_UP)


def print_levers(model: str, rows: list[int], without: list[str], flags: list[str]) -> None:
    """Time the variants without one of these levers, and that with all, and print a table."""
    jobs = [(lever, count, flags) for count in rows for lever in ("", *without)]
    commands = [[sys.executable, __file__, model, "--job", json.dumps(job)] for job in jobs]
    print("| rows per step | without | ms per step | samples/s | peak GiB | first loss |\n|---|---|---|---|---|---|")
    for (lever, count, _), found in zip(jobs, run_in_turn(commands)):
        cells = [str(count), LEVERS[lever]]
        if isinstance(found, str):
            cells += [found, "", "", ""]
        else:
            speed, loss = f"{found['samples_per_second']:.1f}", f"{float(found['first_loss']):.4f}"
            cells += [f"{1000 * found['seconds']:.2f}", speed, f"{found['peak']:.2f}", loss]
        print(f"| {' | '.join(cells)} |", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Attention: 16 heads of 128 numbers, 8 for keys and values, as Qwen3-0.6B has them
# ----------------------------------------------------------------------------------------------------------------------
HEADS, KEY_HEADS, SIZE = 16, 8, 128
SHAPES = [(1792, 925), (8960, 925), (15232, 6528)]  # tokens of a stream, and of the prefix of all its rows


def grow_tree(tokens: int, prefix: int):
    """Return (subtree_end [tokens] of a prefix with rows of 40 to 90 tokens, how many tokens these fill)."""
    import torch

    sizes, ends, filled = random.Random(0), torch.arange(1, tokens + 1), prefix
    while filled + 90 <= tokens:
        size = sizes.randint(40, 90)
        ends[filled : filled + size] = filled + size
        filled += size
    ends[:prefix] = filled
    return ends.cuda(), filled


def compile_flex(ends, backend: str):
    """Return FlexAttention, compiled to Triton or FLASH, in which key k is seen by the queries from k until ends[k]."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(batch, head, query, key):
        return (key <= query) & (query < ends[key])

    mask = create_block_mask(sees, None, None, len(ends), len(ends), device="cuda")

    def attend(query, key, value):
        options = {"BACKEND": backend}
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=True, kernel_options=options)

    return torch.compile(attend, dynamic=False, fullgraph=True)


def time_graph(attend, inputs, gradient) -> tuple[float, float, list]:
    """Return the milliseconds of forward and backward, each replayed as a CUDA graph, and what they compute."""
    import torch
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(attend(*inputs), inputs, gradient)
    torch.cuda.synchronize()
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        output = attend(*inputs)
    with torch.cuda.graph(backward, pool=forward.pool()):
        gradients = torch.autograd.grad(output, inputs, gradient)
    times = [do_bench(graph.replay, return_mode="median") for graph in (forward, backward)]
    return *times, [output.detach().float(), *(found.float() for found in gradients)]


def print_attention() -> None:
    """Time each way of attention on streams of all shapes, and print a table."""
    import torch

    print("| tokens, prefix | attention | forward ms | backward ms | difference |\n|---|---|---|---|---|")
    for tokens, prefix in SHAPES:
        torch.manual_seed(0)
        ends, filled = grow_tree(tokens, prefix)
        query, key, value, gradient = (
            torch.randn(1, tokens, heads, SIZE, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
        )
        gradient[:, :, filled:] = 0  # of tokens that only fill the stream
        inputs, wanted = [tensor.requires_grad_() for tensor in (query, key, value)], None
        for name in ("TRITON", "FLASH") if importlib.util.find_spec("flash_attn") else ("TRITON",):
            forward, backward, found = time_graph(compile_flex(ends, name), inputs, gradient)
            found = [tensor[:, :, :filled] for tensor in found]
            wanted = wanted or found
            worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted))
            print(f"| {tokens:,}, {prefix:,} | {name} | {forward:.3f} | {backward:.3f} | {worst:.1e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a model")
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 128], help="per step")
    parser.add_argument("--without", nargs="+", choices=[*LEVERS][1:], default=[*LEVERS][1:], help="levers")
    parser.add_argument("--attention", action="store_true", help="time attention alone")
    for hidden in ("--job", "--result"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    if options.attention:
        return print_attention()
    if options.job:
        found = time_variant(options.model, *json.loads(options.job), Path(options.result))
        return Path(options.result).write_text(json.dumps(found))
    if not options.model:
        parser.error("expected a model, or --attention")
    print_levers(options.model, options.rows, options.without, flags)


if __name__ == "__main__":
    main()
