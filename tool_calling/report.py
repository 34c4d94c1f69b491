"""What a person sees at the end of a run."""

import argparse
import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from tool_calling.files import write_file
from tool_calling.page import render_report
from tool_calling.prompts import Sample
from tool_calling.scores import count_classes, count_confusion, count_per_tool
from tool_calling.terminal import cut_text, hide_secrets, say

SHOWN_ROWS = 3  # held-out requests whose answers are shown before and after


def show_answers(samples: list[Sample], results: dict, verdicts: dict) -> None:
    """Print of the first samples request, expected answer, and the answer of the first and of the last model."""
    first, *_, last = results if len(results) > 1 else ["", *results]
    for index, sample in enumerate(samples[:SHOWN_ROWS]):
        print(f"\n{sample.source}  {cut_text(sample.request)}")
        print(f"  {'expected':<9}{cut_text(sample.completion)}")
        for label, name in (("before", first), ("after", last)):
            if name:
                answer = cut_text(results[name]["answers"][index])
                print(f"  {label:<9}{answer} {'✓' if verdicts[name][index].exact else '✗'}")
    print()


def show_scores(scores: dict) -> None:
    """Print one line of scores for each model."""
    say(
        "score",
        f"{'':<9}{'exact':>8}{'AST':>8}{'tool F1':>9}{'calls: precision':>18}{'recall':>8}{'broken':>8}{'rows':>7}",
    )
    for name, score in scores.items():
        say(
            "",
            f"{name:<9}{score['exact_match']:>8.1%}{score['ast_match']:>8.1%}{score['tool_macro_f1']:>9.1%}"
            f"{score['call_precision']:>18.1%}{score['call_recall']:>8.1%}{score['broken_json']:>8}{score['n']:>7}",
        )


def to_report(args, command, samples, results, scores, verdicts, data, lengths, train) -> dict:
    """Return all that is known of the run as one dict, with what report.json promises."""
    last = list(results)[-1]
    shares = {name: count_per_tool(of_model) for name, of_model in verdicts.items()}
    per_tool = {
        tool: {
            "support": row["support"],
            **{name: {key: shares[name][tool][key] for key in ("tool", "exact")} for name in shares},
        }
        for tool, row in shares[last].items()
    }
    labels, counts = count_confusion(verdicts[last])
    before, got = results[next(iter(results))]["answers"], results[last]["answers"]
    failures = [
        {
            "where": sample.source,
            "request": sample.request,
            "expected": sample.completion,
            "got": got[index],
            **({"before": before[index]} if len(results) > 1 else {}),
        }
        for index, sample in enumerate(samples)
        if not verdicts[last][index].exact
    ]
    paths = [*args.dataset_path * bool(train or not args.eval_dataset_path), *(args.eval_dataset_path or [])]
    data = {"path": " ".join(paths), "rows": data["train"] + data["held_out"], **data}
    if lengths:
        bins, edges = np.histogram(lengths, bins=min(30, max(lengths) - min(lengths) + 1))
        data |= {
            "tokens": {"mean": sum(lengths) / len(lengths), "max": max(lengths)},
            "lengths": {"edges": [round(float(edge), 1) for edge in edges], "counts": bins.tolist()},
        }
    classes = count_classes([(sample.completion, answer) for sample, answer in zip(samples, got)])
    if not any(sample.tools for sample in samples) and classes is not None:
        scores[last]["macro_f1"] = classes
    report = {
        "scores": scores,
        "per_tool": per_tool,
        "confusion": {"labels": labels, "counts": counts},
        "data": data,
        "failures": failures,
        "versions": find_versions(),
        "args": vars(args),
        "git": find_commit(),
        "command": command,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "finished": time.strftime("%Y-%m-%d %H:%M"),
    }
    return report | ({"train": train} if train else {})


def find_versions() -> dict:
    """Return {library: version or None} of what a run depends on."""
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth")
    found = {name: next(metadata.distributions(name=name), None) for name in names}  # of two, the first is imported
    return {"python": sys.version.split()[0], **{name: library and library.version for name, library in found.items()}}


def find_commit() -> str | None:
    """Return the commit of the folder that the script is in, with "(changed)" where files differ from it, or None."""
    try:
        return (
            subprocess.run(
                ["git", "describe", "--always", "--exclude=*", "--dirty= (changed)"],
                text=True,
                cwd=Path(__file__).parent,
                capture_output=True,
            ).stdout.strip()
            or None
        )
    except OSError:  # no git here
        return None


def write_report(folder: str, report: dict) -> dict:
    """Write report.json and report.html into `folder` and return what report.json holds."""
    path = Path(folder)
    text = hide_secrets(json.dumps(report, ensure_ascii=False, default=str))
    report = json.loads(text, parse_constant=lambda name: None)  # NaN is no JSON; in fp16 a norm may be one
    write_file(path / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    write_file(path / "report.html", render_report(report))
    return report


def finish(
    args: argparse.Namespace,
    command: str,
    samples: list[Sample],
    results: dict,
    scores: dict,
    verdicts: dict,
    data: dict,
    lengths: list[int],
    train: dict | None = None,
) -> dict:
    """Show the first answers and the scores; write and return the report."""
    report = to_report(args, command, samples, results, scores, verdicts, data, lengths, train)
    show_answers(samples, results, verdicts)
    show_scores(scores)
    report = write_report(args.output_dir, report)
    say("report", f"{Path(args.output_dir) / 'report.html'}")
    return report
