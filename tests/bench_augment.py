#!/usr/bin/env python3
"""What --augment gives and costs: other lists of the same tools, tools held out, and requests for other tools.

    python tests/bench_augment.py outputs/augment
    python tests/bench_augment.py outputs/augment --at_once --augment missing missing,shuffled,masked
    python tests/bench_augment.py outputs/augment --model_id FOLDER [flags of training]

Trains a base on the bundled rows for each seed: with all tools and with two held out, each without --augment and with
each choice of its kinds. Then all models answer the same held-out rows side by side: with their own lists, with the
other lists that --augment names, and rows of invented tools as the embedded base was made with (see
bench_forgetting.py). The embedded base is trained for three epochs with the other flags of README's first command,
another one with the script's defaults; --learning_rate 2e-3 is the gentler rate that README names. Flags that this
program does not have go to the training runs. The table has means over seeds, and each seed's values; it is also in
table.md.
"""

import argparse
import statistics
import sys
from pathlib import Path

from bench_forgetting import BASE, FLAGS, ROOT, SCORED, finish, make_rows, read_report, start, write, write_table

PAIRS = ["set_timer,get_weather", "book_taxi,set_alarm", "control_light,send_message"]
COLUMNS = {
    "tokens": "tokens computed",
    "plain": "held-out rows",
    "shuffled": "shuffled list",
    "missing": "no call, tool missing",
    "masked": "masked names",
    "unseen": "tools held out",
    "other": "invented tools",
}


def read_shares(out: Path) -> dict[str, dict]:
    """Return {model: {column: share}} of a run in which models answered the same rows side by side."""
    report = read_report(out / "eval_only")
    found = {model: {"plain": scores["exact_match"]} for model, scores in report["scores"].items()}
    for kind, trials in report.get("trials", {}).items():
        for model, scores in trials.items():
            found[model][kind] = scores["exact_match"]
    return found


def show(name: str, values: dict[str, list[float]]) -> list[str]:
    """Return a line of the table: of each column the mean, and each value if there are several."""
    cells = [name]
    for column in COLUMNS:
        form = "{:,.0f}" if column == "tokens" else "{:.1%}"
        found = values.get(column, [])
        each = f" ({', '.join(map(form.format, found))})" if len(found) > 1 and column != "tokens" else ""
        cells.append(form.format(statistics.mean(found)) + each if found else "")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where rows, models, reports and the table go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3407, 1, 2])
    parser.add_argument("--model_id", default=str(BASE), help="the base to train")
    parser.add_argument("--holdout_tools", nargs="+", default=PAIRS, help="for the seeds in turn")
    parser.add_argument(
        "--augment", nargs="+", default=["missing,shuffled,masked"], help="the kinds of the runs with --augment"
    )
    parser.add_argument(
        "--rows", type=int, default=800, help="that are answered, a quarter of them with each other list"
    )
    parser.add_argument("--at_once", action="store_true", help="make all runs at the same time")
    args, more = parser.parse_known_args()
    folder, base = args.folder.resolve(), args.model_id
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*(FLAGS if base == str(BASE) else []), "--num_epochs", 3, *more]

    runs, names = [], {}
    for index, seed in enumerate(args.seeds):
        for held_out in (None, args.holdout_tools[index % len(args.holdout_tools)]):
            for augment in (None, *args.augment):
                name = f"{seed}{'_held_out' * bool(held_out)}{f'_{augment}' if augment else ''}"
                names[name] = (seed, held_out, augment)
                given = ["--holdout_tools", held_out] * bool(held_out) + ["--augment", augment] * bool(augment)
                places = ("--output_dir", folder / f"out_{name}", "--final_model_dir", folder / f"model_{name}")
                runs.append(start("--model_id", base, *flags, "--seed", seed, *given, *places))
                if not args.at_once:
                    finish(runs)
    finish(runs)

    other = write(folder / "other.jsonl", make_rows("scored", SCORED))
    models = {name: folder / f"model_{name}" for name in names}
    whole = [models[name] for name, (_, held_out, _) in names.items() if not held_out]
    pairs = dict.fromkeys(held_out for _, held_out, _ in names.values() if held_out)
    asked = {"scored": (whole, ["--augment", "--eval_samples", args.rows])}
    for pair in pairs:
        apart = [models[name] for name, (_, held_out, _) in names.items() if held_out == pair]
        asked[f"scored_{pair}"] = (apart, ["--holdout_tools", pair, "--eval_samples", args.rows])
    few = ["--eval_dataset_path", other, "--on_invalid", "skip", "--eval_samples", min(SCORED, args.rows)]
    asked["scored_other"] = (list(models.values()), few)
    for out, (chosen, given) in asked.items():
        runs.append(start("--eval_only", base, *chosen, "--no-load_in_4bit", "--output_dir", folder / out, *given))
        if not args.at_once:
            finish(runs)
    finish(runs)
    scores, invented = read_shares(folder / "scored"), read_shares(folder / "scored_other")
    for pair in pairs:
        found = read_shares(folder / f"scored_{pair}")
        unseen = scores[base].get("unseen", []) + [found[base]["unseen"]]
        scores = found | scores
        scores[base]["unseen"] = unseen

    own = {column: value if isinstance(value, list) else [value] for column, value in scores[base].items()}
    lines = [show("base", own | {"other": [invented[base]["plain"]]})]
    for held_out in (False, True):
        for augment in (None, *args.augment):
            chosen = [name for name, given in names.items() if (bool(given[1]), given[2]) == (held_out, augment)]
            values = {column: [] for column in COLUMNS}
            for name in chosen:
                found = scores[str(models[name])] | {"other": invented[str(models[name])]["plain"]}
                found["tokens"] = read_report(folder / f"out_{name}")["train"]["tokens_computed"]
                for column, value in found.items():
                    values[column].append(value)
            tools = "two tools held out" if held_out else "all tools"
            lines.append(show(f"{tools}, `--augment {augment}`" if augment else tools, values))
    print(write_table(folder / "table.md", ["", *COLUMNS.values()], lines), end="")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
