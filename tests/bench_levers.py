"""What each lever of a training step on CUDA gives: the step without it, one lever at a time; and ways of attention.

    python tests/bench_levers.py MODEL [--rows 8 128]    # the step
    python tests/bench_levers.py --attention             # attention alone, of streams of three shapes

Each variant is a process of its own; they load side by side and are timed one after the other. Flags that this program
does not have go to all variants: `--gradient_checkpointing on` shows what a step takes where memory is short,
`--rows 8 --batch_size 1 --gradient_accumulation_steps 8 --max_seq_length 1536` a step of two streams.
"""

import argparse
import json
import math
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
        compat.compile_attention = lambda: None


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
COPIES = 4


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


def compile_flex(tokens: int, starts, ends, aux: bool = False):
    """Return FlexAttention, compiled, in which key k is seen by the queries from starts[k] until ends[k]."""
    import torch
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    def sees(batch, head, query, key):
        return (starts[key] <= query) & (query < ends[key])

    mask = create_block_mask(sees, None, None, tokens, len(ends), device="cuda")
    more = {"return_aux": AuxRequest(lse=True)} if aux else {}

    def attend(query, key, value):
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=True, **more)

    return torch.compile(attend, dynamic=False, fullgraph=True)


def copy_prefix(ends, prefix: int):
    """Return attention in which each of COPIES parts of the queries has a copy of the prefix to itself.

    The backward pass computes the gradient of a block of keys in one program: a few of them, those of the prefix, are
    seen by all queries.
    """
    import torch

    tokens, held = len(ends), -(-prefix // 128) * 128
    step, index = -(-(tokens - held) // (128 * COPIES)) * 128, torch.arange(len(ends), device="cuda")
    borders = [0, *(held + copy * step for copy in range(1, COPIES)), tokens]
    starts = [index[:held].clamp(min=low) for low in borders[:-1]] + [index[held:]]
    stops = [ends[:held].clamp(max=high) for high in borders[1:]] + [ends[held:]]
    attend = compile_flex(tokens, torch.cat(starts), torch.cat(stops))

    def repeat(keys):
        return torch.cat([keys[:, :, :held]] * COPIES + [keys[:, :, held:]], dim=2)

    return lambda query, key, value: attend(query, repeat(key), repeat(value))


def join(ends, prefix: int, kind: str):
    """Return attention in parts: the prefix by a dense kernel, the rest of each row by FlexAttention, joined by LSE.

    The gradient of each part follows from the joint output and its log-sum-exp.
    """
    import torch

    index = torch.arange(len(ends) - prefix, device="cuda")
    own = compile_flex(len(index), index, ends[prefix:] - prefix, aux=True)
    forward = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention")
    backward = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention_backward")
    scale = 1 / math.sqrt(SIZE)

    def attend(query, key, value, causal):
        more = (None, True) if kind == "cudnn" else ()  # no bias, but the log-sum-exp
        return forward(query, key, value, *more, 0.0, causal, False, scale=scale)

    def go_back(gradient, inputs, output, lse, found, causal):
        lengths, numbers = found[2:6], found[6:8]
        more = (*numbers, None, *lengths, 0.0, causal) if kind == "cudnn" else (*lengths, 0.0, causal, *numbers)
        return backward(gradient, *inputs, output, lse, *more, scale=scale)

    @torch.compile(dynamic=False)
    def merge(one, lse, other, other_lse):
        both = torch.logaddexp(lse, other_lse)
        weights = (lse - both).exp()[..., None], (other_lse - both).exp()[..., None]
        return (one.float() * weights[0] + other.float() * weights[1]).to(one.dtype), both

    @torch.compile(dynamic=False)
    def divide(gradient, output, part, lse, part_lse):
        share, wide = (part_lse - lse).exp(), gradient.float()
        of_lse = share * ((wide * part.float()).sum(-1) - (wide * output.float()).sum(-1))
        return (wide * share[..., None]).to(gradient.dtype), of_lse

    class Joined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            root = [tensor[:, :, :prefix] for tensor in (query, key, value)]
            with torch.enable_grad():
                rest = [tensor[:, :, prefix:].detach().requires_grad_() for tensor in (query, key, value)]
                part, aux = own(*rest)
            first, dense = attend(*root, True), attend(rest[0].detach(), *root[1:], False)
            output, lse = merge(dense[0], dense[1].reshape(aux.lse.shape), part.detach(), aux.lse.detach())
            ctx.kept = root, rest, part, aux.lse, first, dense, output, lse
            return torch.cat([first[0], output], dim=2)

        @staticmethod
        def backward(ctx, gradient):
            root, rest, part, part_lse, first, dense, output, lse = ctx.kept
            upper, lower = gradient[:, :, :prefix], gradient[:, :, prefix:]
            a = go_back(upper, root, first[0], first[1], first, True)
            inputs = (rest[0].detach(), *root[1:])
            b = go_back(lower, inputs, output, lse.reshape(dense[1].shape), dense, False)
            of_part = divide(lower, output, part.detach(), lse, part_lse.detach())
            c = torch.autograd.grad((part, part_lse), rest, of_part, retain_graph=True)
            heads = torch.cat([a[0], b[0] + c[0]], dim=2)
            return heads, *(torch.cat([a[i] + b[i], c[i]], dim=2) for i in (1, 2))

    return Joined.apply


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


def list_ways(ends, prefix: int) -> dict:
    """Return functions that make each way of attention."""
    import torch

    index = torch.arange(len(ends), device="cuda")
    ways = {"FlexAttention": lambda: compile_flex(len(ends), index, ends)}
    ways[f"the same, the prefix in {COPIES} copies"] = lambda: copy_prefix(ends, prefix)
    for kind in ("cudnn", "flash"):
        ways[f"prefix by {kind}, rest by FlexAttention"] = lambda kind=kind: join(ends, prefix, kind)
    return ways


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
        for name, make in list_ways(ends, prefix).items():
            forward, backward, found = time_graph(make(), inputs, gradient)
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
