"""Editions of samples: each epoch takes the next, rows stay where a variant does not fit; trials with other lists."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ALARM, TINY, WEATHER, native, run_here, write_jsonl
from conversations import ASK, calls, says, supervised
from jobs import errors, run_forked
from train_small import make_base

from tool_calling.checkpoints import list_checkpoints
from tool_calling.data.examples import Example
from tool_calling.data.tools import to_tools
from tool_calling.data.variants import REFUSAL, SHARES
from tool_calling.editions import EDITIONS, Facts, Variation, count_refusals
from tool_calling.parsers import parse_calls
from tool_calling.samples import Rendering, Sample, list_plain, render_valid, show_rows
from tool_calling.schedule import Schedule, group_samples, show_cost
from tool_calling.scores import read_reference
from tool_calling.streams import Layout

TOOLS = to_tools([WEATHER, ALARM])[0]
VARIATION = Variation(",".join(SHARES), None, 7, 2048, 40)
RENDERING = Rendering(["x"], 0.25, 2048, "error", None, None)


def alarm(time: str) -> dict:
    call = {"type": "function", "function": {"name": "set_alarm", "arguments": {"time": time}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def make_rows(count: int) -> list[Example]:
    """Return rows of two turns, which call the weather, an alarm or nothing first."""
    rows = []
    for number in range(count):
        first = (calls("Rome"), alarm("6"), says("Hello."))[number % 3]
        reply = [{"role": "tool", "content": "ok"}] if "tool_calls" in first else [ASK]
        asked = {"role": "user", "content": f"request {number}"}
        rows.append(Example(f"x:{number}", [asked, first, *reply, says("Yes.")], TOOLS))
    return rows


@pytest.fixture(scope="module")
def rendered(tokenizer) -> tuple:
    rows = make_rows(40)
    return rows, *render_valid(tokenizer, rows, [], RENDERING)


def test_each_edition_has_all_turns_in_order_and_what_is_not_a_variant_is_as_it_was(tokenizer, rendered):
    rows, plain, _ = rendered
    made, facts = VARIATION.vary(tokenizer, plain, rows)
    assert len(made) == EDITIONS * len(plain) == EDITIONS * 60
    for number, sample in enumerate(made):
        before = plain[number % len(plain)]
        assert (sample.source, sample.row, sample.turn) == (before.source, before.row, before.turn)
        assert sample.edition == number // len(plain)
        if not sample.variant:
            assert sample == before._replace(edition=sample.edition) and sample.input_ids is before.input_ids
        elif sample.variant == "missing":
            assert supervised(tokenizer, sample) == REFUSAL + "<|im_end|>" and read_reference(sample).calls == []
            (called,) = (call["name"] for call in parse_calls(before.completion))
            assert called not in tokenizer.decode(sample.input_ids) and len(sample.tools) == 1
        else:
            assert sample.request == before.request and supervised(tokenizer, sample)
            assert len(read_reference(sample).calls) == len(read_reference(before).calls)  # read by its own tools
            prompt = tokenizer.decode(sample.input_ids[: sample.prompt_length])
            assert all(json.dumps(tool) in prompt for tool in sample.tools)
    kinds = {sample.variant for sample in made}
    assert kinds == {"", *SHARES} and facts.rows == {kind: sum(s.variant == kind for s in made) for kind in kinds}
    assert facts == Facts(3, facts.rows, facts.lists, REFUSAL, False, 0) and 5 < facts.lists <= 31
    assert sum(sample.input_ids != before.input_ids for sample, before in zip(made[60:], made)) > 20
    again = VARIATION.vary(tokenizer, plain, rows)
    assert again == (made, facts)


def test_only_the_turn_that_lacks_its_tool_refuses(tokenizer, rendered):
    rows, plain, _ = rendered
    made, _ = replace(VARIATION, augment="missing").vary(tokenizer, plain, rows)
    refusing = [sample for sample in made if sample.variant]
    assert {sample.turn for sample in refusing} == {1} and len({sample.row for sample in refusing}) > 3
    assert all(len(sample.tools) == 2 for sample in made if not sample.variant)


def test_rows_whose_variant_is_too_long_stay_as_they_are_and_are_counted(tokenizer, rendered, capsys):
    rows, plain, _ = rendered
    limit = max(len(sample.input_ids) for sample in plain)
    made, facts = replace(VARIATION, augment="masked", max_seq_length=limit).vary(tokenizer, plain, rows)
    assert facts.unfit > 0 and len(made) == EDITIONS * len(plain)
    assert max(len(sample.input_ids) for sample in made) <= limit
    facts.show()
    shown = capsys.readouterr().out
    variants = "variant" if facts.unfit == 1 else "variants"
    assert f"{facts.unfit} {variants} left out: over --max_seq_length, or refused by the chat template\n" in shown


def test_shares_and_the_refusal_are_printed(capsys):
    Facts(3, {"": 50, "missing": 20, "masked": 10}, 5, "No.", True, 0).show()
    assert capsys.readouterr().out == (
        "augment  3 editions of the rows, one an epoch: 62.5% as they are, 25.0% without the right tool, 12.5% with "
        'masked names; 5 lists of tools\n         without the right tool the answer is "No.", the answer of most rows '
        "that refuse\n"
    )


def test_without_the_flags_nothing_changes(tokenizer, rendered):
    rows, plain, held_out = rendered
    nothing = replace(VARIATION, augment=None)
    assert (
        nothing.vary(tokenizer, plain, rows) == (plain, None) and nothing.make_trials(tokenizer, held_out, rows) == {}
    )
    assert 2 < count_refusals(rows, 7) < 12


# ----------------------------------------------------------------------------------------------------------------------
# Tools held out
# ----------------------------------------------------------------------------------------------------------------------
def test_rows_that_call_tools_held_out_are_apart_and_no_training_list_has_them(tokenizer):
    rows = make_rows(40)
    rows[4].messages[1]["weight"] = 0  # a call that is not trained counts, too
    rendering = replace(RENDERING, holdout_tools="set_alarm")
    train, test = render_valid(tokenizer, rows, [], rendering)
    unseen = [sample for sample in test if sample.variant == "unseen"]
    assert {sample.row for sample in unseen} == {*range(1, 40, 3)} and 4 in {sample.row for sample in unseen}
    assert not {sample.row % 3 for sample in (*train, *list_plain(test))} & {1}
    assert all(len(sample.tools) == 2 for sample in test)  # as a request brings them once they are added
    made, facts = replace(VARIATION, augment=None, holdout_tools="set_alarm").vary(tokenizer, train, rows)
    assert facts is None and [(s.row, s.turn, s.completion) for s in made] == [
        (s.row, s.turn, s.completion) for s in train
    ]
    assert {sample.variant for sample in made} == {""}
    assert not any("set_alarm" in tokenizer.decode(sample.input_ids) for sample in made)
    both, _ = replace(VARIATION, holdout_tools="set_alarm").vary(tokenizer, train, rows)
    assert len(both) == EDITIONS * len(made) and [s for s in both if not s.variant and not s.edition] == [
        plain for plain, sample in zip(made, both) if not sample.variant
    ]
    assert not any("Set an alarm" in tokenizer.decode(sample.input_ids) for sample in both)


def test_rows_with_compact_tools_have_them_in_all_editions(tokenizer):
    rows = make_rows(40)
    plain, _ = render_valid(tokenizer, rows, [], replace(RENDERING, compact_tools=0.5))
    compact = {(sample.row, sample.turn) for sample in plain if sample.compact}
    assert 10 < len(compact) < 50
    for flags in ({}, {"augment": None, "holdout_tools": "set_alarm"}):
        kept = [sample for sample in plain if not flags or sample.row % 3 != 1]
        made, _ = replace(VARIATION, **flags).vary(tokenizer, kept, rows)
        for sample in made:
            assert sample.compact == ((sample.row, sample.turn) in compact)
            text = tokenizer.decode(sample.input_ids)
            assert all((json.dumps(tool) in text) != sample.compact for tool in sample.tools)


# ----------------------------------------------------------------------------------------------------------------------
# Trials
# ----------------------------------------------------------------------------------------------------------------------
def test_trials_are_held_out_rows_with_lists_of_their_own(tokenizer, rendered):
    rows, _, held_out = rendered
    trials = VARIATION.make_trials(tokenizer, held_out, rows)
    assert [*trials] == ["shuffled", "missing", "masked"]
    plain = {(sample.row, sample.turn): sample for sample in held_out}
    for kind, samples in trials.items():
        assert 0 < len(samples) <= 10 and {sample.variant for sample in samples} == {kind}
        for sample in samples:
            before = plain[sample.row, sample.turn]
            assert (sample.source, sample.request) == (before.source, before.request)
            if kind == "missing":
                (called,) = read_reference(before).calls
                assert sample.tools == [tool for tool in TOOLS if tool["function"]["name"] != called["name"]]
                assert sample.completion == REFUSAL
            elif kind == "shuffled":
                assert sorted(map(str, sample.tools)) == sorted(map(str, TOOLS))
                assert sample.completion == before.completion
            else:
                assert len(sample.tools) == 2 and "get_weather" not in tokenizer.decode(sample.input_ids)
    assert VARIATION.make_trials(tokenizer, held_out, rows) == trials
    assert replace(VARIATION, seed=8).make_trials(tokenizer, held_out, rows) == trials  # runs of other seeds compare
    like = {"masked": trials["masked"][:2]}
    assert VARIATION.make_trials(tokenizer, held_out, rows, like=like) == like
    trained = {json.dumps(sample.tools) for sample in VARIATION.vary(tokenizer, held_out, rows)[0] if sample.variant}
    assert not trained & {json.dumps(sample.tools) for sample in trials["masked"]}


def test_unseen_tools_are_trials_with_their_own_lists(tokenizer):
    rows = make_rows(40)
    _, test = render_valid(tokenizer, rows, [], replace(RENDERING, holdout_tools="set_alarm"))
    trials = replace(VARIATION, augment=None, holdout_tools="set_alarm").make_trials(tokenizer, test, rows)
    assert [*trials] == ["unseen", "shuffled", "missing", "masked"] and len(trials["unseen"]) == 10
    assert all(sample in test for sample in trials["unseen"])
    assert not {sample.row % 3 for kind in ("shuffled", "masked") for sample in trials[kind]} & {1}


# ----------------------------------------------------------------------------------------------------------------------
# In the schedule, and on screen
# ----------------------------------------------------------------------------------------------------------------------
def test_epochs_take_the_editions_in_turn():
    samples = [
        Sample(f"x:{row}", [1, 2, edition, 9, row], 4, row=row, edition=edition)
        for edition in range(3)
        for row in range(5)
    ]
    schedule = Schedule(samples, 2, 1, Layout(2), epochs=7, seed=1)
    assert (schedule.rows, schedule.editions, schedule.steps_per_epoch, schedule.steps) == (5, 3, 3, 21)
    for epoch in range(7):
        order = schedule.order(epoch)
        assert sorted(order) == [*range(5 * (epoch % 3), 5 * (epoch % 3) + 5)]
        assert sorted(i for stream in schedule.streams(epoch) for i in stream) == sorted(order)
    assert schedule.order(0) != [i - 5 for i in schedule.order(1)] and schedule.count_samples(4) == 5 + 2
    assert len(schedule.groups) == 3
    one = Schedule(samples[:5], 2, 1, Layout(2), epochs=7, seed=1)
    assert [one.order(epoch) for epoch in (0, 3)] == [schedule.order(epoch) for epoch in (0, 3)]
    assert one.digest() != schedule.digest() and group_samples(samples[:5]) == schedule.groups[:1]


def test_the_plan_says_what_the_lists_cost(capsys):
    plain = [Sample(f"x:{row}", [1] * 10 + [2, row], 11, row=row) for row in range(4)]
    other = [sample._replace(input_ids=[3] * 10 + [2, sample.row], variant="masked") for sample in plain[:2]]
    editions = [sample._replace(edition=edition) for edition in range(2) for sample in (*other, *plain[2:])]
    show_cost(Schedule(editions, 4, 1, Layout(4)), plain)
    assert capsys.readouterr().out == "         with --augment an epoch computes 28 tokens instead of 18 (1.56 times)\n"


def test_a_row_is_shown_once_in_each_of_its_forms(tokenizer, capsys):
    ids = [tokenizer(f"question {number} answer")["input_ids"] for number in (1, 2)]
    samples = [Sample("x:1", ids[0], 2, edition=0), Sample("x:1", ids[1], 2, variant="masked", edition=1)]
    show_rows(tokenizer, [*samples, samples[0]._replace(edition=2)], 1)
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("x:1")]
    supervised = [len(tokens) - 2 for tokens in ids]
    assert heads == [
        f"x:1  (2 prompt tokens, {supervised[0]} supervised)",
        f"x:1  (masked: 2 prompt tokens, {supervised[1]} supervised)",
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The real command line, on a small random base
# ----------------------------------------------------------------------------------------------------------------------
CITIES = "Rome Oslo Paris Lima Cairo Quito Delhi Turin Kyoto Perth Accra Sofia Bern Riga Doha Lyon".split()
NATIVE = [native(f"rain in {city}?", ("get_weather", {"city": city})) for city in CITIES]
NATIVE += [native(f"wake me at {hour}", ("set_alarm", {"time": str(hour)})) for hour in range(1, 9)]
NATIVE += [native(f"timer for {minutes} minutes", ("set_timer", {"minutes": minutes})) for minutes in range(1, 9)]
NATIVE += [native(f"good evening {number}", content="Good evening!") for number in range(8)]
TIMER = {"type": "object", "properties": {"minutes": {"type": "integer", "description": "Its length"}}}
TIMER = {"type": "function", "function": {"name": "set_timer", "description": "Start a timer.", "parameters": TIMER}}


def list_flags(folder: Path, out: str, *more: object) -> list:
    """Return the flags of a run of two epochs, three steps each, on the base in `folder`, into `folder`/`out`."""
    flags = ["--model_id", folder / "base", "--tools_path", folder / "tools.json", "--no-load_in_4bit"]
    flags += ["--dataset_path", folder / "rows.jsonl", "--train_test_split", 0.25, "--num_epochs", 2]
    flags += ["--output_dir", folder / out, "--final_model_dir", folder / f"{out}_final", "--max_new_tokens", 4]
    return [*flags, "--learning_rate", 0.01, "--eval_samples", 12, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a small random base, its rows and its tools."""
    folder = tmp_path_factory.mktemp("runs")
    make_base(folder / "base")
    (folder / "tools.json").write_text(json.dumps([WEATHER, ALARM, TIMER]))
    write_jsonl(folder / "rows.jsonl", NATIVE)
    return folder


@pytest.mark.slow
def test_a_run_trains_editions_scores_the_trials_and_goes_on_with_the_same_bits(folder):
    flags = ["--augment", "--holdout_tools", "set_timer"]
    result = run_forked(*list_flags(folder, "whole", *flags))
    assert result.returncode == 0, result.stderr
    out, lines = folder / "whole", result.stdout.splitlines()
    assert re.match(r"render   (\d+) training and (\d+) held-out samples, 8 with calls of set_timer, of ", lines[1])
    assert lines[2].startswith("augment  3 editions of the rows, one an epoch: ")
    assert any(re.fullmatch(r" {9}with --augment an epoch computes .* \(\d\.\d\d times\)", line) for line in lines)
    report = json.loads((out / "report.json").read_text())
    kinds = {"unseen": 3, "shuffled": 3, "missing": 3, "masked": 3}  # a quarter of --eval_samples
    assert {
        kind: {model: score["n"] for model, score in scored.items()} for kind, scored in report["trials"].items()
    } == {kind: {"base": count, "merged": count} for kind, count in kinds.items()}
    data = report["data"]
    assert data["unseen"] == 8 and data["train"] + data["held_out"] + data["unseen"] == 40 and data["skipped"] == 0
    assert data["augment"]["editions"] == 3 and sum(data["augment"]["rows"].values()) == 3 * data["train"]
    page, card = (out / "report.html").read_text(), (folder / "whole_final" / "README.md").read_text()
    for name in ("exact, shuffled list", "no call, tool missing", "exact, masked names", "exact, unseen tools"):
        assert sum(line.startswith(f"         {name:<23}    3 ") for line in lines) == 1
        assert page.count(name) == 1 and f"| {name} | 3 |" in card
    answers = [json.loads(line) for line in (out / "answers.jsonl").open()]
    assert Counter(line["list"] for line in answers if "list" in line) == dict.fromkeys(kinds, 6)
    tools = json.loads((folder / "whole_final" / "tools.json").read_text())
    assert tools == to_tools([WEATHER, ALARM])[0]  # as they are, and as trained
    settings = yaml.safe_load((out / "run.yaml").read_text())
    assert (settings["augment"], settings["holdout_tools"]) == ("missing,shuffled,masked", "set_timer")

    shutil.copytree(out, folder / "resumed")
    (last,) = [path for path in list_checkpoints(folder / "resumed") if path.name == "checkpoint-6"]
    shutil.rmtree(last)
    again = run_forked(*list_flags(folder, "resumed", *flags, "--resume_from_checkpoint"))
    assert again.returncode == 0 and "checkpoint-3\n" in again.stdout, again.stderr
    weights = [folder / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "resumed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    refused = run_forked(*list_flags(folder, "resumed", "--augment", "masked", "--resume_from_checkpoint"))
    found = "in the run that {} is from; expected the same".format(folder / "resumed" / "checkpoint-6")
    assert errors(refused)[:2] == [
        f"error: --augment is masked, and missing,shuffled,masked {found}",
        f"error: --holdout_tools is None, and set_timer {found}",
    ]


@pytest.mark.slow
def test_models_are_scored_on_other_lists_without_training(folder):
    flags = list_flags(folder, "alone", "--augment", "--holdout_tools", "auto", "--eval_only", folder / "base", TINY)
    result = run_here(*flags)
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / "alone" / "eval_only" / "report.json").read_text())
    models = [str(folder / "base"), str(TINY)]
    assert report["args"]["holdout_tools"] in ("get_weather", "set_alarm", "set_timer")
    assert [*report["trials"]] == ["unseen", "shuffled", "missing", "masked"]
    for scored in report["trials"].values():
        assert [*scored] == models and {score["n"] for score in scored.values()} == {3}


def test_a_dry_run_says_how_many_rows_would_refuse(folder, tmp_path):
    def audit(*more: object) -> tuple[dict, str]:
        flags = ["--dry_run", "--model_id", TINY, "--output_dir", tmp_path, "--train_test_split", 0]
        result = run_here(*flags, "--tools_path", folder / "tools.json", "--dataset_path", folder / "rows.jsonl", *more)
        assert result.returncode == 0, result.stderr
        return json.loads((tmp_path / "audit.json").read_text()), result.stdout

    plain, shown = audit()
    assert plain["without_call"] == 8 and 5 < plain["would_refuse"] < 15
    assert shown.splitlines()[-2] == (
        f"advice   8 of 40 training rows have no call; with --augment, {plain['would_refuse']} more refuse in an "
        "epoch, as their tool is not in the list"
    )
    found, shown = audit("--augment", "--holdout_tools", "set_timer")
    assert "advice" not in shown and "\naugment  3 editions of the rows, one an epoch: " in shown
    assert found["rows"] | {"valid": 40, "training": 32, "unseen": 8} == found["rows"]
    assert "32 for training, 0 held out, 8 with calls of tools held out\n" in shown
    assert sum(found["augment"]["rows"].values()) == 3 * 32
    assert found["plan"]["steps_per_epoch"] == 4 and found["epoch"]["shared_prefix"] > 0
    result = run_here("--dry_run", "--tools_path", folder / "tools.json", "--dataset_path", folder / "rows.jsonl",
                      "--output_dir", tmp_path, "--holdout_tools", "set_timr")  # fmt: skip
    assert errors(result) == ["error: --holdout_tools set_timr: no row calls it; did you mean set_timer?"]
