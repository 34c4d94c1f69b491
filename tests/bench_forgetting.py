#!/usr/bin/env python3
"""What fine-tuning forgets: the embedded base before and after, on requests for tools that it was not fine-tuned on.

    python tests/bench_forgetting.py outputs/forgetting --shares 0 2 5 10

Trains the base on the bundled rows once for each share of rows of other tools among them, each such row with a list of
tools of its own; then scores base and tuned models side by side on 200 rows of still other tools, and on the held-out
bundled rows. The rows come from models/make_tiny_qwen3.py, as those that the base was made with.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, ROWS = ROOT / "train_qwen3_tool_calling.py", ROOT / "data" / "synthetic_finetune_dataset.json"
SCORED, MIXED = 200, 400
FLAGS = """--num_epochs 1 --batch_size 32 --gradient_accumulation_steps 1 --learning_rate 1e-2 --no-load_in_4bit
    --eval_samples 1 --eval_steps 1000""".split()


def write_rows(path: Path, kind: str, count: int) -> None:
    """Write rows of invented tools in the OpenAI format; two kinds share no list of tools."""
    from models.make_tiny_qwen3 import make_request, make_tools

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            rng = random.Random(f"{kind} {number}")
            tools = make_tools(rng)
            request, answer = make_request(tools, rng)
            messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
            tools = [tool["definition"] for tool in tools]
            file.write(json.dumps({"messages": messages, "tools": tools}, ensure_ascii=False) + "\n")


def start(*arguments: object) -> subprocess.Popen:
    """Start the command line with these arguments."""
    return subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments)], cwd=ROOT)


def read_scores(folder: Path) -> dict[str, str]:
    """Return {model: its exact matches with their interval} of a report."""
    scores = json.loads((folder / "eval_only" / "report.json").read_text())["scores"]
    return {model: f"{values['exact_match']:.1%}" for model, values in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where rows, models and reports go")
    parser.add_argument("--model_id", default=str(ROOT / "models" / "tiny-qwen3"))
    parser.add_argument("--shares", type=int, nargs="+", default=[0, 2, 5, 10], help="percent of the rows trained on")
    parser.add_argument("--side_by_side", action="store_true", help="train all at once")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    other, mixed = folder / "other.jsonl", folder / "mixed.jsonl"
    write_rows(other, "scored", SCORED)
    write_rows(mixed, "mixed", MIXED)
    print(other, mixed)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
