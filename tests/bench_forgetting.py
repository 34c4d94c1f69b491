#!/usr/bin/env python3
"""What fine-tuning forgets: the embedded base before and after, on requests for tools that it was not fine-tuned on.

    python tests/bench_forgetting.py outputs/forgetting

Trains the base on the bundled rows, once for each share of rows of other tools among them; then scores the base and the
tuned models side by side on 200 rows of still other tools. Each of these rows brings a list of invented tools of its
own, as those that the base was made with (models/make_tiny_qwen3.py). Flags that this program does not have go to the
training runs.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "models" / "tiny-qwen3"
SCORED = 200  # rows of other tools
FLAGS = """--num_epochs 1 --batch_size 32 --gradient_accumulation_steps 1 --learning_rate 1e-2 --no-load_in_4bit
    --on_invalid skip""".split()


def make_rows(kind: str, count: int) -> list[dict]:
    """Return rows of invented tools in the OpenAI format; those of two kinds have no list of tools in common."""
    from models.make_tiny_qwen3 import make_request, make_tools

    rows = []
    for number in range(count):
        rng = random.Random(f"{kind} {number}")
        tools = make_tools(rng)
        request, answer = make_request(tools, rng)
        turns = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns, "tools": [tool["definition"] for tool in tools]})
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    """Write rows to a JSONL file; return its path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(path: Path, head: list[str], lines: list[list]) -> str:
    """Write a table in Markdown to a file and return it."""
    text = "".join(f"| {' | '.join(map(str, line))} |\n" for line in [head, ["---"] * len(head), *lines])
    path.write_text(text, encoding="utf-8")
    return text


def read_report(folder: Path) -> dict:
    """Return the report.json of a run's folder."""
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def start(*arguments: object) -> subprocess.Popen:
    """Start the command line of the project."""
    command = [sys.executable, ROOT / "train_qwen3_tool_calling.py", *arguments]
    return subprocess.Popen([*map(str, command)], cwd=ROOT)


def finish(runs: list[subprocess.Popen]) -> None:
    """Wait for runs; end with an error if one of them did."""
    if max(run.wait() for run in runs):
        sys.exit("a run failed")


def read_exact(report: Path) -> dict[str, float]:
    """Return {model: exact match} of a report.json."""
    return {model: scores["exact_match"] for model, scores in json.loads(report.read_text())["scores"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where rows, models and reports go")
    parser.add_argument("--shares", type=int, nargs="+", default=[0, 2, 5, 10], help="of other tools' rows, in percent")
    parser.add_argument("--at_once", action="store_true", help="train all at the same time")
    args, flags = parser.parse_known_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    bundled = json.loads((ROOT / "data" / "synthetic_finetune_dataset.json").read_text(encoding="utf-8"))
    held_out = write(folder / "held_out.jsonl", bundled[::10])
    bundled = [row for number, row in enumerate(bundled) if number % 10]
    other = write(folder / "other.jsonl", make_rows("scored", SCORED))
    runs, models = [], {}
    for share in args.shares:
        added = make_rows("trained", round(len(bundled) * share / (100 - share)))
        rows = write(folder / f"train_{share}.jsonl", bundled + added)
        models[share], out = folder / f"model_{share}", folder / f"out_{share}"
        places = ("--output_dir", out, "--final_model_dir", models[share])
        data = ("--dataset_path", rows, "--eval_dataset_path", held_out)
        runs.append(start("--model_id", BASE, *data, *places, *FLAGS, *flags))
        if not args.at_once:
            finish(runs)
    finish(runs)
    data = ("--eval_dataset_path", other, "--on_invalid", "skip", "--eval_samples", SCORED)
    finish([start("--eval_only", BASE, *models.values(), *data, "--output_dir", folder / "out_other")])

    others = read_exact(folder / "out_other" / "eval_only" / "report.json")
    first = read_exact(folder / f"out_{args.shares[0]}" / "report.json")
    print("| rows of other tools | bundled rows, held out | rows of tools never seen |\n|---|---|---|")
    print(f"| base | {first['base']:.1%} | {others[str(BASE)]:.1%} |")
    for share, model in models.items():
        own = read_exact(folder / f"out_{share}" / "report.json")["merged"]
        print(f"| {share} % | {own:.1%} | {others[str(model)]:.1%} |")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
