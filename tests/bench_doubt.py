#!/usr/bin/env python3
"""What --doubt finds: labels of the bundled rows are corrupted, and counted among the first of its ranking.

    python tests/bench_doubt.py outputs/doubt
    python tests/bench_doubt.py outputs/doubt --at_once --model_id FOLDER [flags of training, --doubt FOLDS]

Of the labels, a third each calls a wrong tool, has a value of another row, or lacks an optional argument, as a careless
annotator would write them: all fit the schemas of their tools. One run for each seed, by which labels are chosen and
corrupted. The embedded base is trained with the batches and the rate of README's first command, another one with the
script's defaults. Flags that this program does not have go to the runs. The table is also in table.md.
"""

import argparse
import json
import random
import sys
from copy import deepcopy
from pathlib import Path

from bench_forgetting import BASE, ROOT, finish, start, write, write_table

FLAGS = "--batch_size 32 --gradient_accumulation_steps 1 --learning_rate 1e-2 --no-load_in_4bit".split()
FIRST = (60, 120, 240)  # of the ranking


def list_calls(row: dict) -> list[dict]:
    """Return the calls of a native row."""
    output = row["output"]
    return [output["function_call"]] if "function_call" in output else output.get("function_calls", [])


def change_tool(call: dict, calls: list[dict], optional: dict, rng: random.Random) -> bool:
    """Give a call the tool and the arguments of another row's, but its own values where both have a name."""
    other = rng.choice([other for other in calls if other["name"] != call["name"]])
    own = {name: value for name, value in call["arguments"].items() if name in other["arguments"]}
    call.update(name=other["name"], arguments=deepcopy(other["arguments"]) | own)
    return True


def swap_value(call: dict, calls: list[dict], optional: dict, rng: random.Random) -> bool:
    """Give an argument the value that it has in another row's call of the same tool; say whether there is one."""
    name = rng.choice([*call["arguments"]])
    same = [other["arguments"] for other in calls if other["name"] == call["name"] and name in other["arguments"]]
    values = [arguments[name] for arguments in same if arguments[name] != call["arguments"][name]]
    if values:
        call["arguments"][name] = deepcopy(rng.choice(values))
    return bool(values)


def drop_argument(call: dict, calls: list[dict], optional: dict, rng: random.Random) -> bool:
    """Remove an argument that the schema does not require; say whether there is one."""
    names = [name for name in call["arguments"] if name in optional[call["name"]]]
    if names:
        del call["arguments"][rng.choice(names)]
    return bool(names)


KINDS = {"wrong tool": change_tool, "another value": swap_value, "dropped argument": drop_argument}


def corrupt(rows: list[dict], tools: list[dict], count: int, seed: int) -> tuple[list[dict], dict[int, str]]:
    """Return the rows with `count` labels corrupted, and {index of a row: how}."""
    rng, rows, done = random.Random(seed), deepcopy(rows), {}
    optional = {}
    for tool in (tool["function"] for tool in tools):
        optional[tool["name"]] = tool["parameters"]["properties"].keys() - set(tool["parameters"]["required"])
    calls = deepcopy([call for row in rows for call in list_calls(row)])
    for number in range(count):
        kind = [*KINDS][number % len(KINDS)]
        while True:
            index = rng.randrange(len(rows))
            if index not in done and (own := list_calls(rows[index])):
                if KINDS[kind](rng.choice(own), calls, optional, rng):
                    break
        done[index] = kind
    return rows, done


def count_found(folder: Path, done: dict[int, str]) -> list[object]:
    """Return the cells of a run in the table."""
    lines = (folder / "doubt.jsonl").read_text(encoding="utf-8").splitlines()
    ranking = [int(json.loads(line)["source"].rpartition(":")[2]) - 1 for line in lines]
    cells = [len(ranking), *(sum(index in done for index in ranking[:first]) for first in FIRST)]
    for kind in KINDS:
        found = sum(done.get(index) == kind for index in ranking[: FIRST[1]])
        cells.append(f"{found} of {sum(other == kind for other in done.values())}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where rows, rankings and the table go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    parser.add_argument("--labels", type=int, default=60, help="to corrupt")
    parser.add_argument("--rows", type=int, help="take the first of the bundled rows only")
    parser.add_argument("--model_id", default=str(BASE), help="the base to train")
    parser.add_argument("--at_once", action="store_true", help="make all runs at the same time")
    args, more = parser.parse_known_args()
    folder, base = args.folder.resolve(), args.model_id
    folder.mkdir(parents=True, exist_ok=True)
    bundled = json.loads((ROOT / "data" / "synthetic_finetune_dataset.json").read_text(encoding="utf-8"))[: args.rows]
    tools = json.loads((ROOT / "data" / "tools.json").read_text(encoding="utf-8"))
    flags = ["--model_id", base, *(FLAGS if base == str(BASE) else []), "--doubt", *more]
    runs, done = [], {}
    for seed in args.seeds:
        rows, done[seed] = corrupt(bundled, tools, args.labels, seed)
        path = write(folder / f"rows_{seed}.jsonl", rows)
        (folder / f"corrupted_{seed}.json").write_text(json.dumps(done[seed], indent=1))
        runs.append(start("--dataset_path", path, "--output_dir", folder / f"out_{seed}", *flags))
        if not args.at_once:
            finish(runs)
    finish(runs)
    head = ["seed", "in doubt", *(f"corrupted of the first {first}" for first in FIRST)]
    head += [f"{kind}, of the first {FIRST[1]}" for kind in KINDS]
    lines = [[seed, *count_found(folder / f"out_{seed}", done[seed])] for seed in args.seeds]
    print(write_table(folder / "table.md", head, lines), end="")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
