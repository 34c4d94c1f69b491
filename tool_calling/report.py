"""The report of a run: on screen, as report.json and as report.html, and every answer in answers.jsonl."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from tool_calling.agreement import compare_served
from tool_calling.files import write_file
from tool_calling.page import list_scores, render_report
from tool_calling.rewards import rate
from tool_calling.samples import Sample
from tool_calling.scores import Proof, count_confusion, count_per_tool, read_reference
from tool_calling.terminal import cut_text, hide_secrets, print_safely, say

SHOWN_ROWS = 3  # requests whose answers before and after training are printed
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth")


def finish(folder: str | Path, report: dict, proof: Proof) -> dict:
    """Print the first answers and all scores; write report and answers into `folder`; return what report.json holds."""
    show_answers(proof)
    show_scores(proof.scores, report.get("trials"))
    for server, agreement in report.get("served", {}).items():
        show_agreement(server, agreement)
    write_answers(folder, proof)
    report = write_report(folder, report)
    say("report", f"{Path(folder) / 'report.html'}")
    return report


def show_answers(proof: Proof) -> None:
    """Print request, reference and answers for the first samples, without reasoning.

    Of a training run, the first and the last model are shown; of models side by side, all.
    """
    labels = {proof.first: "before", proof.last: "after"}  # a model alone is only the last
    if len(proof.results) > 1 and "samples" in proof.results[proof.last]:
        labels = {model: model for model in proof.results}
    for index, sample in enumerate(proof.samples[:SHOWN_ROWS]):
        print_safely(f"\n{sample.source}  {cut_text(sample.request)}")
        print_safely(f"  {'expected':<8} {cut_text(read_reference(sample).text)}")
        for model, label in labels.items():
            answer = cut_text(proof.said[model][index].text)
            print_safely(f"  {label:<8} {answer} {'✓' if proof.verdicts[model][index].exact else '✗'}")
    print_safely("")


def show_scores(scores: dict[str, dict], trials: dict[str, dict] | None = None) -> None:
    """Print the scores of the models side by side, each share with its 95 % interval; see list_scores."""
    head = ("share, 95 % interval", "rows", [(model, "") for model in scores])
    widths = [max(9, len(model) + 1) for model in scores]  # names of models side by side may be long
    for stage, (name, rows, cells) in zip_longest(["score"], [head, *list_scores(scores, trials)], fillvalue=""):
        line = f"{name:<23}{rows:>5}" + "".join(
            f"{value:>{width}} {interval:<10}" for width, (value, interval) in zip(widths, cells)
        )
        say(stage, line.rstrip())


def show_agreement(server: str, agreement: dict) -> None:
    """Print how the answers of a server agree with those of the model here, and the first row that differs."""
    if "against" not in agreement:
        return
    here, rows, equal = agreement["against"], agreement["rows"], agreement["equal"]
    counts = (f"{count:,} of {rows:,} {name.replace('_', ' ')}" for name, count in equal.items())
    say("served", f"{server} against {here}: equal are {', '.join(counts)}")
    for row in agreement["different"][:1]:
        say("", f"the first that differs: {row['where']}  {cut_text(row['request'])}")
        texts = {"expected": row["expected"], here: row["here"], server: row["served"]}
        for (name, text), mark in zip(texts.items(), ["", *(" ✓" if exact else " ✗" for exact in row["exact"])]):
            say("", f"  {name}: {cut_text(text)}{mark}")
        say("", f"  why: {row['why']}")


def to_report(settings: dict, command: str, proof: Proof, data: dict, train: dict | None) -> dict:
    """Return what report.json holds of a run.

    `data` counts the rows ("train", "held_out", "skipped") and names their "unit"; after training it also has
    measure_lengths of the training samples, and `train` holds the facts.
    """
    held_out = settings["eval_dataset_path"] or []
    paths = [*settings["dataset_path"], *held_out] if train or not held_out else held_out
    report = {
        "scores": proof.scores,
        "per_tool": count_per_tool(proof.verdicts),
        "confusion": count_confusion(proof.verdicts[proof.last]),
        "data": {"path": " ".join(paths), "rows": data["train"] + data["held_out"], **data},
        "failures": list_failures(proof),
        **describe_run(settings, command),
    }
    served = compare_served(proof)
    trials = {kind: answered.scores for kind, answered in proof.trials.items()}
    more = {"served": served, "trials": trials, "train": train}
    return report | {key: value for key, value in more.items() if value}


def describe_run(settings: dict, command: str) -> dict:
    """Return with what, where and when a run was made."""
    return {
        "versions": find_versions(),
        "args": settings,
        "git": find_commit(),
        "command": command,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "finished": time.strftime("%Y-%m-%d %H:%M"),
    }


def measure_lengths(samples: list[Sample]) -> dict:
    """Return mean, that of prompts alone, maximum and histogram of the lengths of samples in tokens."""
    lengths, prompts = [len(sample.input_ids) for sample in samples], sum(sample.prompt_length for sample in samples)
    counts, edges = np.histogram(lengths, bins=min(30, max(lengths) - min(lengths) + 1))
    return {
        "tokens": {"mean": sum(lengths) / len(lengths), "prompt": prompts / len(lengths), "max": max(lengths)},
        "lengths": {"edges": edges.round(1).tolist(), "counts": counts.tolist()},
    }


def list_failures(proof: Proof) -> list[dict]:
    """Return the samples that the last model does not answer exactly, with the answers to them."""
    models = {"got": proof.last} | ({"before": proof.first} if proof.first != proof.last else {})
    return [
        {"where": sample.source, "request": sample.request, "expected": sample.completion}
        | {key: proof.results[model]["answers"][index] for key, model in models.items()}
        for index, sample in enumerate(proof.asked(proof.last))
        if not proof.verdicts[proof.last][index].exact
    ]


def find_versions() -> dict[str, str | None]:
    """Return {library: version, None if it is missing} of what a run depends on."""
    found = {name: next(metadata.distributions(name=name), None) for name in LIBRARIES}  # of two, the imported one
    return {"python": sys.version.split()[0], **{name: library and library.version for name, library in found.items()}}


def find_commit() -> str | None:
    """Return the commit of this program, with "(changed)" if files differ from it; None without git."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty= (changed)"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    return result.stdout.strip() or None


def list_answers(proof: Proof) -> Iterator[dict]:
    """Yield every answer of every model with all that another checker needs; broken calls are None.

    Those to trials say of which kind they are.
    """
    for model, result in proof.results.items():
        rows = zip(proof.asked(model), result["answers"], proof.said[model], proof.verdicts[model])
        for sample, answer, said, verdict in rows:
            yield {
                "source": sample.source,
                "model": model,
                "request": sample.request,
                "tools": sample.tools,
                "expected": sample.completion,
                "expected_calls": read_reference(sample).calls,
                "answer": answer,
                "calls": said.calls,
                "exact": verdict.exact,
                "ast": verdict.ast,
                "broken": verdict.broken,
                "reward": rate(said, read_reference(sample), sample.tools).reward,
            } | ({"list": sample.variant} if sample.variant else {})
    for answered in proof.trials.values():
        yield from list_answers(answered)


def write_answers(folder: str | Path, proof: Proof) -> None:
    """Write what list_answers yields to answers.jsonl in `folder`, one JSON object a line."""
    lines = [json.dumps(to_plain(answer), ensure_ascii=False) + "\n" for answer in list_answers(proof)]
    write_file(Path(folder) / "answers.jsonl", "".join(lines))


def to_plain(value: object) -> object:
    """Return a value as JSON has it, without secrets; NaN, which a norm in fp16 or an answer may hold, is null."""
    text = hide_secrets(json.dumps(value, ensure_ascii=False, default=str))
    return json.loads(text, parse_constant=lambda name: None)


def write_report(folder: str | Path, report: dict) -> dict:
    """Write report.json and report.html into `folder` and return what report.json holds."""
    report = to_plain(report)
    write_file(Path(folder) / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    write_file(Path(folder) / "report.html", render_report(report))
    return report
