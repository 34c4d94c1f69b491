"""--doubt: which labels a model contradicts that was trained without them, and how they are ranked and shown."""

import json
import signal
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ALARM, ROOT, TINY, WEATHER, run_here, write_jsonl
from forks import Fork
from jobs import ROWS, errors, names, run_forked, wait, wait_for
from small import CASES, make_adapted

import train_qwen3_tool_calling as script
from tool_calling import doubts as module
from tool_calling.data.examples import Example
from tool_calling.doubts import Doubt, Doubter, contradicts, finish_doubts, rank
from tool_calling.page import LIMITS
from tool_calling.samples import Sample, render_examples
from tool_calling.scores import read_answer
from tool_calling.streams import Layout

TOOLS = [WEATHER, ALARM]


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


ROME, OSLO = call("get_weather", city="Rome"), call("get_weather", city="Oslo")
THOUGHT = "<think>\nHm.\n</think>\n\n"


def sample(number: int, completion: str = ROME, tools=TOOLS, **more) -> Sample:
    return Sample(f"x:{number}", [number, 1, 2], 1, completion, tools, f"request {number}", **more)


@pytest.mark.parametrize(
    "label, answer, expected",
    [
        (ROME, ROME, False),
        (ROME, '<tool_call>\n{"arguments": {"city": "Rome"}, "name": "get_weather"}\n</tool_call>', False),
        (ROME, OSLO, True),
        (ROME, f"{ROME}\n{OSLO}", True),
        (f"{ROME}\n{OSLO}", f"{OSLO}\n{ROME}", False),
        (ROME, "It rains.", True),
        ("It rains.", ROME, True),
        ("It rains.", "It never rains.", False),
        (ROME, "", False),
        ("It rains.", "", False),
        (ROME, '<tool_call>\n{"name": "get_weather", "argu', False),
        (THOUGHT + ROME, "<think>\nWell.\n</think>\n\n" + ROME, False),
        (THOUGHT + ROME, "<think>\nWell.\n</think>\n\n" + OSLO, True),
        (THOUGHT + ROME, "<think>\nWell, well, well", False),
    ],
)
def test_an_answer_contradicts_a_label_by_its_calls(label, answer, expected):
    assert contradicts(answer, sample(1, label)) is expected


def render(tokenizer, *rows: tuple[str, dict]) -> list[Sample]:
    """Return the samples of rows, each a request and the answer to it."""
    examples = [
        Example(f"x:{i}", [{"role": "user", "content": request}, {"role": "assistant", "content": "", **answer}], TOOLS)
        for i, (request, answer) in enumerate(rows, start=1)
    ]
    groups, problems = render_examples(tokenizer, examples, 4096)
    assert problems == []
    return [sample for group in groups for sample in group]


def calls(city: str) -> dict:
    function = {"name": "get_weather", "arguments": {"city": city}}
    return {"tool_calls": [{"type": "function", "function": function}]}


def test_label_and_answer_are_compared_after_the_reasoning_of_the_answer(tokenizer):
    doubter = Doubter(tokenizer, "transformers", None, 9)
    plain, thinking = render(
        tokenizer, ("rain?", calls("Rome")), ("rain?", {"reasoning_content": "Hm.", **calls("Rome")})
    )

    def split(sample: Sample) -> tuple[str, str]:
        tokens = sample.input_ids
        return tokenizer.decode(tokens[: sample.prompt_length]), tokenizer.decode(tokens[sample.prompt_length :])

    (prompt, label), (thought, whole) = map(split, (plain, thinking))
    assert (label, whole) == (f"{ROME}<|im_end|>", f"{THOUGHT}{ROME}<|im_end|>")
    assert [*map(split, doubter.build(plain, OSLO))] == [(prompt, label), (prompt, f"{OSLO}<|im_end|>")]
    assert doubter.build(plain, OSLO)[0].input_ids == plain.input_ids
    own = "<think>\nLet me see.\n</think>\n\n"
    assert [*map(split, doubter.build(thinking, own + OSLO))] == [
        (thought + own, f"{ROME}<|im_end|>"),
        (thought + own, f"{OSLO}<|im_end|>"),
    ]


def test_a_call_and_a_text_are_compared_where_they_part(tokenizer):
    doubter = Doubter(tokenizer, "transformers", None, 9)
    asked, greeted = render(
        tokenizer, ("rain?", {"content": "See. It rains.", **calls("Rome")}), ("hi", {"content": "Hi!"})
    )
    for sample, answer, expected in (
        (asked, "See. No idea.", ["See. It", "See. No"]),
        (greeted, ROME, ["H", "<tool_call>"]),
        (greeted, "Hi! " + ROME, ["Hi!<|im_end|>", "Hi! "]),
    ):
        sides = doubter.build(sample, answer)
        assert [side.prompt_length for side in sides] == [sample.prompt_length] * 2
        assert [tokenizer.decode(side.input_ids[side.prompt_length :]) for side in sides] == expected


def test_a_model_is_asked_for_answers_where_it_finds_the_label_unlikely(monkeypatch):
    """Labels cost 0.9, 5, 6 and 7 nats, and all but the first three are not what the model would write."""
    samples = [sample(1), sample(2), sample(3, tools=[]), sample(4), sample(5), sample(6)]
    costs = {1: (0.9, False), 2: (5.0, True), 3: (9.0, False), 4: (5.0, False), 5: (6.0, False), 6: (7.0, False)}
    answers, asked, measured = {4: (OSLO, 0.5), 5: ("Rain.", 0.5), 6: (OSLO, 6.5)}, [], []

    def measure(self, model, given, layout, name):
        measured.append(len(given))
        return [costs[row.input_ids[0]] if isinstance(row.input_ids, list) else row.input_ids for row in given]

    def answer(model, tokenizer, given, rows, longest, name):
        asked.append(([row.source for row in given], rows, longest, name))
        return [answers[row.input_ids[0]][0] for row in given]

    def build(self, row, text):
        number = row.input_ids[0]
        assert text == answers[number][0]
        return row._replace(input_ids=(costs[number][0], False)), row._replace(input_ids=(answers[number][1], True))

    monkeypatch.setattr(Doubter, "measure", measure)
    monkeypatch.setattr(Doubter, "build", build)
    monkeypatch.setattr(module, "generate_answers", answer)
    model = torch.nn.Linear(1, 1)
    found = Doubter(None, "transformers", 64, 9).find(model, samples, Layout(4), 2)
    assert asked == [(["x:4", "x:5", "x:6"], 64, 9, "fold 2")] and measured == [5, 6] and not model.training
    assert [(doubt.sample.source, doubt.margin, doubt.answer.text, doubt.fold) for doubt in found] == [
        ("x:4", 4.5, OSLO, 2),
        ("x:5", 5.5, "Rain.", 2),  # the model prefers its answer to row 6 by half a nat only
    ]


def test_nothing_to_doubt_asks_for_nothing(monkeypatch):
    monkeypatch.setattr(module, "generate_answers", lambda *_: pytest.fail("nothing to answer"))
    doubter, model = Doubter(None, "transformers", 64, 9), torch.nn.Linear(1, 1)
    assert doubter.find(model, [sample(1, tools=[])], Layout(4), 1) == []


def test_losses_are_those_of_each_sample_alone():
    model, doubter = make_adapted().eval(), Doubter(None, "transformers", None, 9)
    rows = [*CASES["several tool sets"], *CASES["one tool set"], *CASES["the same row twice"]]
    alone = [doubter.measure(model, [row], Layout(1), "x")[0] for row in rows]
    for layout in (Layout(3), Layout(2, share_prefix=False), Layout(9, limit=40)):
        found = doubter.measure(model, rows, layout, "x")
        assert [same for _, same in found] == [same for _, same in alone]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in alone], rel=1e-5)
    tokens = torch.tensor([rows[0].input_ids])
    log_probs = model(tokens).logits[0, :-1].log_softmax(dim=-1)[range(tokens.shape[1] - 1), tokens[0, 1:]]
    assert alone[0][0] == pytest.approx(-log_probs[rows[0].prompt_length - 1 :].sum().item(), rel=1e-5)


def doubt(number: int, margin: float, turn: int = 1, label: str = ROME, answer: str = OSLO) -> Doubt:
    row = sample(number, label, turn=turn)
    return Doubt(row, read_answer(answer, row), margin + 0.25, 0.25, 1)


def test_the_surest_doubts_come_first_and_each_turn_once():
    found = rank([doubt(1, 2.0), doubt(2, 9.0), doubt(1, 3.0), doubt(1, 4.0, turn=3), doubt(3, 9.0)])
    assert [(each.sample.source, each.sample.turn, each.margin) for each in found] == [
        ("x:2", 1, 9.0),
        ("x:3", 1, 9.0),
        ("x:1", 3, 4.0),
        ("x:1", 1, 3.0),
    ]


def test_doubts_are_printed_and_written_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "SHOWN_ROWS", 1)
    doubts = [doubt(7, 12.34), doubt(8, 1.5, label="Hi.", answer=THOUGHT + ROME)]
    data = {"path": "x.jsonl", "rows": 40, "skipped": 0, "unit": "rows"}
    report = finish_doubts(tmp_path, doubts, {"data": data, "args": {"model_id": "me/<b>"}, "command": "python x.py"})
    assert capsys.readouterr().out.splitlines() == [
        "",
        "x:7  request 7",
        f"  label    {' '.join(ROME.split(chr(10)))}",
        f"  model    {' '.join(OSLO.split(chr(10)))}  12.3 nats",
        "",
        f"doubt    2 labels of 40 rows in {tmp_path / 'doubt.jsonl'}, side by side in {tmp_path / 'doubt.html'}",
    ]
    lines = [json.loads(line) for line in (tmp_path / "doubt.jsonl").open()]
    assert lines == report["doubts"] and lines[0] == {
        "source": "x:7",
        "turn": 1,
        "request": "request 7",
        "label": ROME,
        "answer": OSLO,
        "margin": 12.34,
        "label_calls": [{"name": "get_weather", "arguments": {"city": "Rome"}}],
        "answer_calls": [{"name": "get_weather", "arguments": {"city": "Oslo"}}],
        "label_log_prob": -12.59,
        "answer_log_prob": -0.25,
        "fold": 1,
    }
    assert (lines[1]["label_calls"], lines[1]["answer"]) == ([], ROME)
    page = (tmp_path / "doubt.html").read_text()
    assert "<span>of 40 labels in doubt</span>" in page and "me/&lt;b&gt;" in page and "Trained, not" not in page
    assert (
        '<span class="note">x:7, 12.3 nats</span>' in page and "<ins>Rome</ins>" in page and "<del>Oslo</del>" in page
    )
    monkeypatch.setitem(LIMITS, "SHOWN_DOUBTS", 1)
    finish_doubts(tmp_path, doubts, {"data": data})
    page = (tmp_path / "doubt.html").read_text()
    assert "x:8" not in page and "1 more label in doubt.jsonl." in page


def test_without_a_doubt_the_page_says_so(tmp_path, capsys):
    finish_doubts(tmp_path, [], {"data": {"path": "x", "rows": 1, "skipped": 0, "unit": "rows"}})
    assert (tmp_path / "doubt.jsonl").read_text() == ""
    assert "0</span> <span>of 1 label in doubt" in (tmp_path / "doubt.html").read_text()


def test_models_that_are_asked_are_those_of_transformers():
    for flags, expected in (
        (["--doubt"], (2, "transformers")),
        (["--doubt", "5"], (5, "transformers")),
        ([], (None, "auto")),
    ):
        args = script.parse_args(flags)
        assert (args.doubt, args.engine) == expected


LEAVE = "--doubt only ranks labels, and keeps no model: leave out "


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dry_run", "--save_gguf", "q8_0"], f"{LEAVE}--dry_run and --save_gguf"),
        (["--eval_only", "x"], f"{LEAVE}--eval_only"),
        (["--show_row", "3"], f"{LEAVE}--show_row"),
        (["--augment", "--holdout_tools", "auto"], f"{LEAVE}--augment and --holdout_tools"),
        (["--convert_to", "x.jsonl"], f"{LEAVE}--convert_to"),
        (["--resume_from_checkpoint"], f"{LEAVE}--resume_from_checkpoint"),
        (["--metric_for_best", "loss"], f"{LEAVE}--metric_for_best"),
        (["--early_stopping_patience", "2"], f"{LEAVE}--early_stopping_patience"),
        (["--serve_check", "--push_to_hub", "me/x"], f"{LEAVE}--serve_check and --push_to_hub"),
        (["--report_to", "wandb"], f"{LEAVE}--report_to"),
        (["--method", "grpo"], "--doubt trains on labels, with Transformers: leave out --method grpo and --engine"),
        (["--engine", "unsloth"], "--doubt trains on labels, with Transformers: leave out --method grpo and --engine"),
    ],
)
def test_what_a_doubt_does_not_do_is_refused(flags, message):
    result = run_here("--doubt", *flags)
    assert result.returncode == 2 and errors(result)[0].startswith(f"error: {message}")
    assert len(errors(result)) == 1


def test_several_processes_have_nothing_to_share(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run_here("--doubt")
    assert errors(result) == ["error: --doubt computes on one GPU: start it with python, not with torchrun"]


def write_rows(folder: Path) -> list:
    """Write 24 rows, of which the second asks for another city and the fifth for another tool; return flags."""
    rows = deepcopy(ROWS)
    rows[1]["output"]["function_call"]["arguments"]["city"] = "Lima"
    rows[4]["output"]["function_call"] = {"name": "set_alarm", "arguments": {"time": "6"}}
    (folder / "tools.json").write_text(json.dumps(TOOLS))
    flags = ["--model_id", TINY, "--no-load_in_4bit", "--dataset_path", write_jsonl(folder / "rows.jsonl", rows)]
    flags += ["--tools_path", folder / "tools.json", "--output_dir", folder / "out", "--learning_rate", 0.005]
    return [*flags, "--batch_size", 4, "--gradient_accumulation_steps", 1, "--warmup_steps", 0, "--doubt", 2]


@pytest.mark.slow
def test_wrong_labels_come_first_in_a_run(tmp_path):
    flags = write_rows(tmp_path)
    result = run_forked(*flags, "--num_epochs", 4)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in (tmp_path / "out" / "doubt.jsonl").open()]
    assert {row["source"].rpartition(":")[2] for row in found[:2]} == {"2", "5"}
    assert [row["margin"] for row in found] == sorted((row["margin"] for row in found), reverse=True)
    assert names(tmp_path / "out") == [".lock", "doubt.html", "doubt.jsonl", "run.yaml"]
    assert names(tmp_path) == ["out", "rows.jsonl", "tools.json"]  # no model
    settings = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert (settings["doubt"], settings["num_epochs"]) == (2, 4)
    lines = result.stdout.splitlines()
    assert "render   24 samples in 2 folds of 12 and more" in lines
    assert [line[:42] for line in lines if line.startswith("fold ")] == [
        "fold     1 of 2: trained on 12 in 12 steps",
        "fold     2 of 2: trained on 12 in 12 steps",
    ]


@pytest.mark.slow
def test_an_interrupt_leaves_nothing_half_written(tmp_path):
    run = Fork(ROOT / "train_qwen3_tool_calling.py", *write_rows(tmp_path), "--num_epochs", 500)
    wait_for((tmp_path / "out" / "run.yaml").exists)
    time.sleep(3)
    run.send_signal(signal.SIGINT)
    result = wait(run)
    assert result.returncode == 130 and result.stderr.splitlines()[-1] == "interrupted by SIGINT"
    assert "Traceback" not in result.stderr and names(tmp_path / "out") == [".lock", "run.yaml"]


@pytest.mark.slow
def test_folds_need_as_many_requests(tmp_path):
    result = run_forked(*write_rows(tmp_path), "--max_samples", 1)
    assert errors(result) == ["error: --doubt 2: expected at least 2 different requests; add rows"]
    assert not (tmp_path / "out").exists()
