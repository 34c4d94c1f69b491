#!/usr/bin/env python3
"""What --tools_in_prompt none gives and costs: one base trained with and without the list of tools in its prompts.

    python tests/bench_baked.py outputs/baked [--num_epochs 3]
    python tests/bench_baked.py outputs/baked --model_id FOLDER [flags of training]

Trains a base on the bundled rows both ways; then each merged model answers some of the held-out rows again, one after
the other and only with their first token. The embedded base is trained as by README's first command, another one with
the script's defaults. Flags that this program does not have go to the training runs; a model that is already in the
folder is not trained again. The table is also in table.md.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

from bench_forgetting import BASE, FLAGS, ROOT, finish, read_report, start, write_table

HEAD = [
    "`--tools_in_prompt`",
    "prompt tokens",
    "held-out loss",
    "exact: base",
    "exact: merged",
    "ms to the first token",
]
TIMED = 30  # rows


def time_first_tokens(folder: Path, flags: list[str]) -> float:
    """Return the median of the milliseconds that a merged model takes for the first token of an answer."""
    import train_qwen3_tool_calling as script
    from tool_calling.engines.hub import load_tokenizer
    from tool_calling.engines.start import quiet_libraries
    from tool_calling.samples import Rendering, choose, render_valid
    from tool_calling.saving.proof import Questions, load_scored

    quiet_libraries()
    args = script.parse_args(flags)
    tokenizer = load_tokenizer(str(folder))
    examples, held_out, _ = script.read_sides(args)
    _, samples = render_valid(tokenizer, examples, held_out, script.pick(Rendering, args))
    model, times = load_scored(str(folder), str(folder), False, args.trust_remote_code, tokenizer), []
    for sample in choose(samples, TIMED):
        began = time.perf_counter()
        Questions([sample], 1, 1).ask(model, tokenizer, folder.name)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where models, reports and the table go")
    parser.add_argument("--model_id", default=str(BASE), help="the base to train")
    args, more = parser.parse_known_args()
    folder, base = args.folder.resolve(), args.model_id
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)  # where the training runs start, too: paths mean the same
    flags = ["--model_id", base, *(FLAGS if base == str(BASE) else []), *more]
    lines = []
    for value in ("all", "none"):
        output, model = folder / f"out_{value}", folder / f"model_{value}"
        if not model.exists():
            finish([start(*flags, "--output_dir", output, "--final_model_dir", model, "--tools_in_prompt", value)])
        report = read_report(output)
        loss = [log["eval_loss"] for log in report["train"]["history"] if "eval_loss" in log][-1]
        exact = [f"{report['scores'][name]['exact_match']:.1%}" for name in ("base", "merged")]
        prompt, first = report["data"]["tokens"]["prompt"], time_first_tokens(model, flags)
        lines.append([f"`{value}`", f"{prompt:,.0f}", f"{loss:.4f}", *exact, f"{first:.1f}"])
    print(write_table(folder / "table.md", HEAD, lines), end="")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
