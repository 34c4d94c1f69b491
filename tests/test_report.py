"""The report: what report.json holds, and what is printed."""

import json

import pytest
from conftest import ALARM, WEATHER
from test_page import full_report

from tool_calling import report as module
from tool_calling.report import (
    find_commit,
    find_versions,
    finish,
    measure_lengths,
    show_answers,
    to_report,
    write_answers,
    write_report,
)
from tool_calling.samples import Sample
from tool_calling.scores import Proof, to_shares

SETTINGS = {"model_id": "some/model", "dataset_path": ["a.json", "b.json"], "eval_dataset_path": None}
DATA = {"train": 8, "held_out": 2, "skipped": 1, "unit": "rows"}


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


ROME, ALARM_AT_6 = call("get_weather", city="Rome"), call("set_alarm", time="6")
SAMPLES = [
    Sample("a.json:1", [1, 2, 3], 2, ROME, [WEATHER, ALARM], "Rain in\nRome?"),
    Sample("b.json:2", [1, 2], 1, ALARM_AT_6, [WEATHER, ALARM], "Wake me"),
    Sample("b.json:3", [1, 2], 1, "Hello!", [WEATHER, ALARM], "Hi"),
    Sample("b.json:4", [1, 2], 1, "Bye!", [WEATHER, ALARM], "Good night"),
]
BASE = {"answers": ["Yes.", call("get_weather", city="6"), "Hello!", "Bye!"]}
MERGED = {"answers": [ROME, call("set_alarm", time="7"), "Hi!", "<tool_call>{"], "loss": 0.5}


def to_proof() -> Proof:
    return Proof.of(SAMPLES, {"base": BASE, "adapter": MERGED, "merged": MERGED})


def test_what_is_known_of_a_run_is_in_its_report(monkeypatch):
    monkeypatch.setattr(module, "find_versions", lambda: {"python": "3.x"})
    monkeypatch.setattr(module, "find_commit", lambda: "abc")
    monkeypatch.setattr(module.time, "strftime", lambda form: form)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    proof, facts = to_proof(), {"steps": 3}
    report = to_report(SETTINGS, "python x.py", proof, DATA, facts)
    assert list(report) == [
        "scores",
        "per_tool",
        "confusion",
        "data",
        "failures",
        "versions",
        "args",
        "git",
        "command",
        "device",
        "finished",
        "train",
    ]
    wrong, right, missed = (
        to_shares({"tool": [tool], "exact": [exact]}) for tool, exact in ((False, False), (True, True), (True, False))
    )
    sure, unsure = (to_shares({"tool": [True, hit], "exact": [True, hit]}) for hit in (True, False))
    assert report == {
        "scores": proof.scores,
        "per_tool": {
            "get_weather": {"support": 1, "base": wrong, "adapter": right, "merged": right},
            "set_alarm": {"support": 1, "base": wrong, "adapter": missed, "merged": missed},
            "(no call)": {"support": 2, "base": sure, "adapter": unsure, "merged": unsure},
        },
        "confusion": {
            "labels": ["get_weather", "set_alarm", "(no call)", "(broken)"],
            "counts": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]],
        },
        "data": {"path": "a.json b.json", "rows": 10, **DATA},
        "failures": [
            {
                "where": "b.json:2",
                "request": "Wake me",
                "expected": ALARM_AT_6,
                "got": call("set_alarm", time="7"),
                "before": call("get_weather", city="6"),
            },
            {"where": "b.json:4", "request": "Good night", "expected": "Bye!", "got": "<tool_call>{", "before": "Bye!"},
        ],
        "versions": {"python": "3.x"},
        "args": SETTINGS,
        "git": "abc",
        "command": "python x.py",
        "device": "cpu",
        "finished": "%Y-%m-%d %H:%M",
        "train": facts,
    }


@pytest.mark.parametrize(
    "held_out, train, path",
    [
        (None, {"steps": 3}, "a.json b.json"),
        (["c.json"], {"steps": 3}, "a.json b.json c.json"),
        (None, None, "a.json b.json"),
        (["c.json"], None, "c.json"),  # of a model that is only scored, the training rows are not read
    ],
)
def test_the_report_names_the_files_that_were_read(held_out, train, path):
    settings = SETTINGS | {"eval_dataset_path": held_out}
    report = to_report(settings, "x", Proof.of(SAMPLES, {"model": BASE}), DATA, train)
    assert report["data"]["path"] == path and ("train" in report) == (train is not None)


def test_a_model_that_is_only_scored_has_no_answer_before():
    failures = to_report(SETTINGS, "x", Proof.of(SAMPLES, {"model": BASE}), DATA, None)["failures"]
    assert failures == [
        {"where": "a.json:1", "request": "Rain in\nRome?", "expected": ROME, "got": "Yes."},
        {"where": "b.json:2", "request": "Wake me", "expected": ALARM_AT_6, "got": call("get_weather", city="6")},
    ]


def test_lengths_are_counted_in_bins():
    def to_samples(*lengths):
        return [Sample("x:1", [0] * length, 1) for length in lengths]

    assert measure_lengths(to_samples(7, 7)) == {
        "tokens": {"mean": 7.0, "prompt": 1.0, "max": 7},
        "lengths": {"edges": [6.5, 7.5], "counts": [2]},
    }
    assert measure_lengths(to_samples(1, 2, 2, 3)) == {
        "tokens": {"mean": 2.0, "prompt": 1.0, "max": 3},
        "lengths": {"edges": [1.0, 1.7, 2.3, 3.0], "counts": [1, 2, 1]},
    }
    lengths = measure_lengths(to_samples(*range(10, 400)))["lengths"]
    assert len(lengths["counts"]) == 30 and len(lengths["edges"]) == 31 and sum(lengths["counts"]) == 390


def test_answers_and_scores_are_printed_and_the_report_is_written(tmp_path, capsys):
    proof = to_proof()
    report = finish(tmp_path, to_report(SETTINGS, "python x.py", proof, DATA, None), proof)
    assert report == json.loads((tmp_path / "report.json").read_text()) and report["scores"] == proof.scores
    assert "<title>" in (tmp_path / "report.html").read_text()
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3 * len(SAMPLES)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "a.json:1  Rain in Rome?",
        f"  expected {' '.join(ROME.split())}",
        "  before   Yes. ✗",
        f"  after    {' '.join(ROME.split())} ✓",
        "",
        "b.json:2  Wake me",
        f"  expected {' '.join(ALARM_AT_6.split())}",
        '  before   <tool_call> {"name": "get_weather", "arguments": {"city": "6"}} </tool_call> ✗',
        '  after    <tool_call> {"name": "set_alarm", "arguments": {"time": "7"}} </tool_call> ✗',
        "",
        "b.json:3  Hi",
        "  expected Hello!",
        "  before   Hello! ✓",
        "  after    Hi! ✓",
        "",
        "score    share, 95 % interval    rows     base             adapter              merged",
        "         exact                      4   50.0 % 15.0–85.0    50.0 % 15.0–85.0    50.0 % 15.0–85.0",
        "         exact, call expected       2    0.0 % 0.0–65.8     50.0 % 9.5–90.5     50.0 % 9.5–90.5",
        "         no call, none expected     2  100.0 % 34.2–100.0   50.0 % 9.5–90.5     50.0 % 9.5–90.5",
        "         AST, BFCL-like             4   50.0 % 15.0–85.0    50.0 % 15.0–85.0    50.0 % 15.0–85.0",
        "         tool macro-F1                   0.0 %             100.0 %             100.0 %",
        "         call precision                100.0 % 20.7–100.0   66.7 % 20.8–93.9    66.7 % 20.8–93.9",
        "         call recall                2   50.0 % 9.5–90.5    100.0 % 34.2–100.0  100.0 % 34.2–100.0",
        "         broken calls                        0                   1                   1",
        f"report   {tmp_path / 'report.html'}",
    ]


def test_every_answer_is_written_for_other_checkers(tmp_path):
    thought = f"<think>\nWhy {ALARM_AT_6}?\n</think>\n\n{ROME}"
    nan = '<tool_call>\n{"name": "get_weather", "arguments": {"city": NaN}}\n</tool_call>'
    results = {"base": {"answers": ["Yes. \ud83d", thought]}, "merged": {"answers": [nan, "<tool_call>{"]}}
    samples = [SAMPLES[2], SAMPLES[0]._replace(completion=thought, source="a.json:7")]
    write_answers(tmp_path, Proof.of(samples, results))
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    hi = {"source": "b.json:3", "request": "Hi", "tools": [WEATHER, ALARM], "expected": "Hello!", "expected_calls": []}
    rome = {"source": "a.json:7", "request": "Rain in\nRome?", "tools": [WEATHER, ALARM], "expected": thought}
    rome["expected_calls"] = [{"name": "get_weather", "arguments": {"city": "Rome"}}]
    right = {"exact": True, "ast": True, "broken": False, "reward": 1.0}
    wrong = {"exact": False, "ast": False, "broken": False, "reward": -1.0}  # a call where none is expected
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        hi | {"model": "base", "answer": "Yes. \ud83d", "calls": []} | right,
        rome | {"model": "base", "answer": thought, "calls": rome["expected_calls"]} | right,
        hi
        | {"model": "merged", "answer": nan, "calls": [{"name": "get_weather", "arguments": {"city": None}}]}
        | wrong,
        rome | {"model": "merged", "answer": "<tool_call>{", "calls": None} | wrong | {"broken": True, "reward": 0.0},
    ]
    assert list(json.loads(lines[0])) == [
        *("source", "model", "request", "tools", "expected", "expected_calls", "answer", "calls", "exact", "ast"),
        *("broken", "reward"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def to_tried_proof() -> Proof:
    """Return a proof whose first and last model were also asked with other lists of tools."""
    missing = [SAMPLES[1]._replace(tools=[WEATHER], completion="No tool.", variant="missing")]
    unseen = [sample._replace(variant="unseen") for sample in SAMPLES[:2]]
    trials = {"base": (["Sorry."], [ROME, ROME]), "merged": ([""], [ROME, ALARM_AT_6])}
    results = {"base": dict(BASE), "adapter": dict(MERGED), "merged": dict(MERGED)}
    for name, (first, second) in trials.items():
        results[name]["trials"] = {"missing": first, "unseen": second}
    return Proof.of(SAMPLES, results, {"missing": missing, "unseen": unseen})


def test_answers_with_other_lists_of_tools_have_lines_of_their_own(tmp_path, capsys):
    proof = to_tried_proof()
    assert proof.scores == to_proof().scores
    shares = {
        kind: {model: score["exact_match"] for model, score in tried.scores.items()}
        for kind, tried in proof.trials.items()
    }
    assert shares == {"missing": {"base": 1.0, "merged": 0.0}, "unseen": {"base": 0.5, "merged": 1.0}}  # "" is none
    report = to_report(SETTINGS, "x", proof, DATA, None)
    assert report["trials"] == {kind: tried.scores for kind, tried in proof.trials.items()}
    report = finish(tmp_path, report, proof)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:-1] == [
        "         no call, tool missing      1  100.0 % 20.7–100.0        –               0.0 % 0.0–79.3",
        "         exact, unseen tools        2   50.0 % 9.5–90.5          –             100.0 % 34.2–100.0",
    ]
    page = (tmp_path / "report.html").read_text()
    assert page.count("exact, unseen tools") == 1 and "of requests for tools that no training row had" in page
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").open()]
    assert [line.get("list") for line in written] == [None] * 12 + ["missing"] * 2 + ["unseen"] * 4
    assert [(line["model"], line["answer"]) for line in written[12:14]] == [("base", "Sorry."), ("merged", "")]


def test_a_model_that_is_only_scored_is_shown_alone(capsys):
    show_answers(Proof.of(SAMPLES[:1], {"model": BASE}))
    assert capsys.readouterr().out.splitlines() == [
        "",
        "a.json:1  Rain in Rome?",
        f"  expected {' '.join(ROME.split())}",
        "  after    Yes. ✗",
        "",
    ]


def test_answers_are_shown_without_reasoning(capsys):
    thought = f"<think>\nRome it is.\n</think>\n\n{ROME}"
    show_answers(Proof.of([SAMPLES[0]._replace(completion=thought)], {"model": {"answers": [thought]}}))
    assert capsys.readouterr().out.splitlines()[2:4] == [
        f"  expected {' '.join(ROME.split())}",
        f"  after    {' '.join(ROME.split())} ✓",
    ]


def test_a_secret_in_a_row_is_not_shown(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    show_answers(Proof.of([SAMPLES[0]._replace(request="log in with hf_abcdefghij")], {"model": BASE}))
    assert capsys.readouterr().out.splitlines()[1] == "a.json:1  log in with $HF_TOKEN"


def test_the_version_of_what_is_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "torch-9.9.9.dist-info").mkdir()
    (tmp_path / "torch-9.9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_versions()["torch"] == "9.9.9"


def test_a_library_or_git_that_is_missing_is_none(monkeypatch):
    monkeypatch.setattr(module, "LIBRARIES", ("torch", "no_such_library"))
    versions = find_versions()
    assert list(versions) == ["python", "torch", "no_such_library"] and versions["no_such_library"] is None
    monkeypatch.setenv("PATH", "")
    assert find_commit() is None


def test_a_file_name_that_is_no_text_can_be_reported(tmp_path):
    report = full_report()
    report["args"]["dataset_path"] = ["caf\udce9.jsonl"]
    assert write_report(tmp_path, report) == json.loads((tmp_path / "report.json").read_text())
    assert "caf\\udce9.jsonl" in (tmp_path / "report.json").read_text()


def test_numbers_that_json_has_not_are_left_out(tmp_path):
    report = full_report()
    report["train"]["history"][0]["grad_norm"] = float("nan")
    returned = write_report(tmp_path, report)
    assert returned == json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    report["train"]["history"][0]["grad_norm"] = None
    assert returned == report
