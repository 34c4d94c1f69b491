#!/usr/bin/env python3
"""What --compact_tools gives and costs: held-out rows with their tools as trained, and as Ollama writes them.

    python tests/bench_spacing.py outputs/spacing
    python tests/bench_spacing.py outputs/spacing --at_once --model_id FOLDER [flags of training]

Trains a base on the bundled rows, once for each share of compact rows; then each merged model answers the held-out rows
a second time, with compact tools. The embedded base is trained as by README's first command, another one with the
script's defaults. Flags that this program does not have go to the training runs. The table is also in table.md.
"""

import argparse
import os
import sys
from pathlib import Path

from bench_forgetting import BASE, FLAGS, ROOT, finish, read_report, start, write_table

HEAD = [
    "rows with compact tools",
    "tokens computed",
    "held-out loss",
    "exact as trained",
    "exact as Ollama writes them",
]


def score_compact(models: list[str], flags: list[str]) -> dict[str, float]:
    """Return {model: exact match} on the held-out rows of runs with these flags, all with compact tools."""
    import train_qwen3_tool_calling as script
    from tool_calling.engines.device import free_gpu
    from tool_calling.engines.hub import load_tokenizer
    from tool_calling.engines.start import quiet_libraries
    from tool_calling.samples import Rendering, choose, make_compact, render_valid
    from tool_calling.saving.proof import Questions, load_scored
    from tool_calling.scores import Proof

    quiet_libraries()
    args = script.parse_args(flags)
    tokenizer = load_tokenizer(models[-1])  # a trained model's, which has its base's tokens and chat template
    examples, held_out, _ = script.read_sides(args)
    _, samples = render_valid(tokenizer, examples, held_out, script.pick(Rendering, args))
    samples = choose(samples, args.eval_samples)
    compact = make_compact(tokenizer, samples, [*examples, *held_out], 1, sys.maxsize)
    questions, found = Questions.of(compact, args.eval_batch_size, args.max_new_tokens), {}
    for name in models:
        answers = questions.ask(load_scored(name, name, False, args.trust_remote_code, tokenizer), tokenizer, name)
        found[name] = Proof.of(compact, {name: {"answers": answers}}).scores[name]["exact_match"]
        free_gpu()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where models, reports and the table go")
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.1, 0.25], help="of compact rows")
    parser.add_argument("--model_id", default=str(BASE), help="the base to train")
    parser.add_argument("--at_once", action="store_true", help="train all at the same time")
    args, more = parser.parse_known_args()
    folder, base = args.folder.resolve(), args.model_id
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)  # where the training runs start, too: paths mean the same
    flags = ["--model_id", base, *(FLAGS if base == str(BASE) else []), *more]
    models, outputs = ([folder / f"{kind}_{share:g}" for share in args.shares] for kind in ("model", "out"))
    runs = []
    for share, model, output in zip(args.shares, models, outputs):
        places = ("--output_dir", output, "--final_model_dir", model)
        runs.append(start(*flags, *places, "--compact_tools", share))
        if not args.at_once:
            finish(runs)
    finish(runs)

    compact = score_compact([base, *map(str, models)], flags)
    reports = [*map(read_report, outputs)]
    lines = [["base", "", "", f"{reports[0]['scores']['base']['exact_match']:.1%}", f"{compact[base]:.1%}"]]
    for share, model, report in zip(args.shares, models, reports):
        train, plain = report["train"], report["scores"]["merged"]["exact_match"]
        loss = [log["eval_loss"] for log in train["history"] if "eval_loss" in log][-1]
        exact = (f"{plain:.1%}", f"{compact[str(model)]:.1%}")
        lines.append([f"{share:.0%}", f"{train['tokens_computed']:,}", f"{loss:.4f}", *exact])
    print(write_table(folder / "table.md", HEAD, lines), end="")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
