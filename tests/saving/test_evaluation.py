"""Models scored without training, alone and side by side."""

import json
import shutil

import pytest
from conftest import ALARM, TINY, WEATHER, native, run_here, write_jsonl
from jobs import errors
from test_families import make_tokenizer

from tool_calling import samples as module
from tool_calling.data.examples import Example
from tool_calling.prompts import HIDDEN
from tool_calling.samples import Rendering, Sample, render_alike
from tool_calling.terminal import UserError

WAKE = ("set_alarm", {"time": "6"})
CITIES = ["Rome", "Oslo", "Lima", "Perth"]


def test_models_are_asked_for_the_same_turns_of_the_same_rows(monkeypatch):
    """Tokenizers differ in length: an answer that does not fit for one of them is left out for all."""
    examples = [Example(f"x:{i}", [{"role": "user", "content": str(i)}], []) for i in (1, 2, 3)]
    fits = {"a": [{1, 3, 5}, {1}, {1}], "b": [{3, 5}, {1}, set()], "c": [{1, 5}, {1}, {1}]}

    def render(tokenizer, both, *_):
        groups = [
            [Sample("", [], 0, tokenizer, row=row, turn=turn) for turn in sorted(turns)]
            for row, turns in enumerate(fits[tokenizer])
        ]
        return groups, [("x:3", "too long")] * (tokenizer == "b")

    monkeypatch.setattr(module, "render_examples", render)
    rendering = Rendering(["x"], 0.0, 9, "skip", None, None)
    sides = render_alike(["a", "b", "c"], examples[:2], examples[2:], rendering)
    assert [[(sample.completion, sample.row, sample.turn) for sample in train] for train, _ in sides] == [
        [(name, 0, 5), (name, 1, 1)] for name in "abc"
    ]
    with pytest.raises(UserError, match="^x:3: too long\n1 problem in 1 of 3 rows"):
        render_alike(["a", "b"], examples, [], Rendering(["x"], 0.0, 9, "error", None, None))


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Flags of a run that scores the embedded base and the same weights with Llama's template; {model: samples}."""
    llama, asked = tmp_path / "llama", {}
    shutil.copytree(TINY, llama)
    make_tokenizer("llama3.2").save_pretrained(llama)
    rows = [native(f"weather in {city}", ("get_weather", {"city": city})) for city in CITIES]
    rows += [native("both", WAKE, ("get_weather", {"city": "Rome"})), native("hi", content="Hello!")]
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER, ALARM]))

    def answer(model, tokenizer, samples, batch_size, longest, name):
        asked[name] = samples
        return [sample.completion if index or name == str(TINY) else "no" for index, sample in enumerate(samples)]

    monkeypatch.setattr("tool_calling.saving.evaluation.load_scored", lambda *_: None)
    monkeypatch.setattr("tool_calling.saving.proof.generate_answers", answer)
    flags = ["--eval_dataset_path", write_jsonl(tmp_path / "rows.jsonl", rows), "--tools_path", tmp_path / "tools.json"]
    return [*flags, "--output_dir", tmp_path / "out", "--eval_only", TINY, llama, TINY], asked


def test_two_models_with_templates_of_their_own_are_scored_side_by_side(tmp_path, scored):
    flags, asked = scored
    result = run_here("--on_invalid", "skip", *flags)
    assert result.returncode == 0, result.stderr
    names = [str(TINY), str(tmp_path / "llama")]
    report = json.loads((tmp_path / "out" / "eval_only" / "report.json").read_text())
    assert list(report["scores"]) == list(asked) == names
    assert [score["exact_match"] for score in report["scores"].values()] == [1.0, 0.8]
    assert [score["rows"]["call_exact"] for score in report["scores"].values()] == [4, 4]
    assert report["data"]["held_out"] == 5 and report["data"]["skipped"] == 1  # Llama has no place for two calls
    assert report["args"]["eval_only"] == [*names, names[0]]
    sources = [[sample.source for sample in samples] for samples in asked.values()]
    assert sources[0] == sources[1] and [sample.parser for sample in asked[names[1]]] == ["llama3_json"] * 5

    lines = [json.loads(line) for line in (tmp_path / "out" / "eval_only" / "answers.jsonl").open()]
    ours, theirs = lines[:5], lines[5:]
    assert [line["model"] for line in lines] == [name for name in names for _ in range(5)]
    assert [line["expected_calls"] for line in ours] == [line["expected_calls"] for line in theirs]
    assert ours[0]["expected"].startswith("<tool_call>") and theirs[0]["expected"].startswith('{"name"')
    assert [(line["calls"], line["exact"]) for line in theirs[:1]] == [([], False)]
    assert report["failures"] == [
        {"where": ours[0]["source"], "request": "weather in Rome", "expected": theirs[0]["expected"], "got": "no"}
        | {"before": ours[0]["expected"]}
    ]
    screen = result.stdout.splitlines()
    assert f"  {names[0]} {' '.join(ours[0]['expected'].split())} ✓" in screen and f"  {names[1]} no ✗" in screen
    head = next(line for line in screen if line.startswith("score "))
    exact = screen[screen.index(head) + 1]
    assert head.split()[-2:] == names and head.index(names[1]) + len(names[1]) == exact.index("80.0 %") + 6
    page = (tmp_path / "out" / "eval_only" / "report.html").read_text()
    assert f'<p class="bad">{names[1]} does worse than {names[0]}.</p>' in page


def test_models_may_be_asked_without_the_list_of_tools(tmp_path, scored):
    """None of --tools_in_prompt is for all models; else each has what its own chat template says."""
    flags, asked = scored
    run_here("--on_invalid", "skip", *flags)
    listed = {name: [sample.prompt_length for sample in samples] for name, samples in asked.items()}
    template = tmp_path / "llama" / "chat_template.jinja"
    for more in (["--tools_in_prompt", "none"], []):
        result = run_here("--on_invalid", "skip", *flags, *more)
        assert result.returncode == 0, result.stderr
        lengths = {name: [sample.prompt_length for sample in samples] for name, samples in asked.items()}
        hidden = [all(map(int.__lt__, lengths[name], listed[name])) for name in asked]
        assert hidden == [bool(more), True]
        template.write_text(HIDDEN + template.read_text())


def test_a_row_that_one_of_the_models_has_no_place_for_is_a_problem(scored):
    result = run_here(*scored[0])
    assert result.returncode == 1 and "rows.jsonl:5: " in errors(result)[0] and len(errors(result)) == 2
    assert scored[1] == {}


def test_a_model_that_cannot_be_had_is_named_before_any_is_loaded(scored):
    result = run_here(*scored[0], "no/such")
    assert errors(result) == [
        "error: --eval_only no/such: no such folder, not in the cache, and the Hub cannot be reached; check the "
        "network, or give a folder"
    ]
    assert scored[1] == {}
