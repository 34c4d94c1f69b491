"""Samples: one for each supervised turn, never cut; of the bundled data, every one."""

import json
from dataclasses import replace

import pytest
from conftest import ROOT, WEATHER
from conversations import ASK, CONVERSATIONS, REPLY, calls, says, supervised

import train_qwen3_tool_calling as script
from tool_calling.data.examples import Example, Reading, to_examples
from tool_calling.data.rows import read_rows
from tool_calling.parsers import parse_calls
from tool_calling.prompts import write_as_ollama
from tool_calling.samples import (
    Rendering,
    Sample,
    check_sides,
    choose,
    count_origins,
    make_compact,
    name_unit,
    render_examples,
    render_valid,
    to_sides,
)
from tool_calling.schedule import group_samples
from tool_calling.streams import count_tokens
from tool_calling.terminal import UserError


def test_a_sample_over_the_limit_is_a_problem_and_is_not_cut(tokenizer):
    examples = [
        Example("x:1", CONVERSATIONS["one call"], [WEATHER]),
        Example("x:2", [ASK, says("long " * 300)], [WEATHER]),
    ]
    length = len(render_examples(tokenizer, examples, 4096)[0][1][0].input_ids)
    groups, problems = render_examples(tokenizer, examples, length)
    assert problems == [] and len(groups[1][0].input_ids) == length
    groups, problems = render_examples(tokenizer, examples, length - 1)
    assert problems == [("x:2", f"{length:,} tokens; --max_seq_length is {length - 1:,} and no answer is ever cut")]
    assert len(groups[0]) == 1 and groups[1] == []


def test_of_a_conversation_only_the_answers_over_the_limit_are_left_out(tokenizer):
    trace = [ASK, *[turn for i in range(4) for turn in (calls(f"Town {i}"), REPLY)], says("Done.")]
    whole = render_examples(tokenizer, [Example("x:1", trace, [WEATHER])], 4096)[0][0]
    sizes = [len(sample.input_ids) for sample in whole]
    assert len(sizes) == 5 and sizes == sorted(sizes)
    (kept,), problems = render_examples(tokenizer, [Example("x:1", trace, [WEATHER])], sizes[2])
    assert kept == whole[:3]
    assert problems == [
        ("x:1", f"answer {n} of 5: {sizes[n - 1]:,} tokens; --max_seq_length is {sizes[2]:,} and no answer is ever cut")
        for n in (4, 5)
    ]
    (kept,), problems = render_examples(tokenizer, [Example("x:1", trace, [WEATHER])], 9)
    assert kept == [] and len(problems) == 5


@pytest.mark.slow
def test_the_bundled_data_renders_without_a_problem(tokenizer):
    rows = list(read_rows([str(ROOT / "data" / "synthetic_finetune_dataset.json")]))
    checked = to_examples(rows, Reading(str(ROOT / "data" / "tools.json")))
    assert checked.problems == [] and len(checked.examples) == checked.total == 2000
    groups, problems = render_examples(tokenizer, checked.examples, script.MAX_SEQ_LENGTH)
    assert problems == []
    for (_, row), (sample,) in zip(rows, groups):
        output = row["output"]
        expected = output.get("function_calls") or [output["function_call"]] if "content" not in output else []
        assert parse_calls(supervised(tokenizer, sample)) == json.loads(json.dumps(expected))


EXAMPLES = [Example(f"x:{i}", [{"role": "user", "content": f"ask {i}"}, says("yes")], []) for i in range(4)]
GROUPS = [
    [Sample("x:0", [1], 1, row=0), Sample("x:0", [2], 1, row=0)],
    [],
    [Sample("x:2", [3], 1, row=2)],
    [Sample("x:3", [4], 1, row=3)],
]


def test_turns_of_a_row_stay_on_one_side_and_rows_with_problems_are_on_none():
    train, held_out = to_sides(EXAMPLES[:3], EXAMPLES[3:], GROUPS, 0.5)
    assert train == [*GROUPS[0], *GROUPS[2]] and held_out == GROUPS[3]
    sides = to_sides(EXAMPLES, [], GROUPS, 0.4)
    assert sorted(sum(sides, [])) == [*GROUPS[0], *GROUPS[2], *GROUPS[3]] and all(sides)
    assert not {sample.source for sample in sides[0]} & {sample.source for sample in sides[1]}
    assert to_sides(EXAMPLES, [], GROUPS, 0) == ([*GROUPS[0], *GROUPS[2], *GROUPS[3]], [])


def make_rows(count: int) -> list[Example]:
    asks = [{"role": "user", "content": f"rain in town {i}?"} for i in range(count)]
    return [Example(f"x:{i}", [ask, calls("Rome"), REPLY, says("Yes.")], [WEATHER]) for i, ask in enumerate(asks)]


def test_a_hash_chooses_the_rows_with_compact_tools_and_held_out_rows_are_served_ones(tokenizer):
    rows, bare = make_rows(60), Example("x:bare", [ASK, says("Yes.")], [])
    rendering = Rendering(["x"], 0.25, 2048, "error", None, None)

    def render(examples, share):
        return render_valid(tokenizer, examples, [], replace(rendering, compact_tools=share))

    def list_compact(samples):
        return [(sample.source, sample.turn) for sample in samples if sample.compact]

    (plain, held_out), (train, same) = (render([*rows, bare], share) for share in (0, 0.3))
    assert same == held_out and not list_compact(plain)
    chosen = list_compact(train)
    assert [turn for _, turn in chosen] == [1, 3] * 12  # of 45 rows; both turns of each
    assert [row for row, compact in zip(plain, train) if not compact.compact] == [
        sample for sample in train if not sample.compact
    ]
    turned = render([bare, *reversed(rows)], 0.3)
    assert sorted(list_compact(turned[0])) == sorted(chosen) and {*chosen} < {*list_compact(render(rows, 0.6)[0])}
    for before, sample in zip(plain, train):
        if sample.compact:
            texts = [tokenizer.decode(row.input_ids) for row in (before, sample)]
            assert write_as_ollama(texts[0], [WEATHER]) == texts[1] != texts[0]
            assert supervised(tokenizer, sample) == supervised(tokenizer, before)
            assert sample[3:-2] == before[3:-2]  # the tools of the row, too


def test_a_row_stays_as_it_is_where_compact_tools_would_not_fit(tokenizer):
    (rows,), _ = render_examples(tokenizer, make_rows(1), 2048)
    longest = max(len(sample.input_ids) for sample in make_compact(tokenizer, rows, make_rows(1), 1, 2048))
    sizes = [make_compact(tokenizer, rows, make_rows(1), 1, longest - less) for less in (0, 1)]
    assert [[sample.compact for sample in group] for group in sizes] == [[True, True], [True, False]]
    assert sizes[1][1] == rows[1]


def test_compact_tools_need_a_template_that_writes_tools_as_json(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template.replace("tojson", "tojson(indent=4)"))
    (rows,), _ = render_examples(tokenizer, make_rows(1), 2048)
    with pytest.raises(UserError) as error:
        make_compact(tokenizer, rows, make_rows(1), 1, 2048)
    assert str(error.value) == (
        f"--compact_tools: {tokenizer.name_or_path}: the chat template does not write each tool as JSON on a line of "
        "its own"
    )


def test_compact_rows_share_a_prefix_of_their_own(tokenizer):
    """The tree of a stream has the plain list of tools once, and the compact one."""
    groups, _ = render_examples(tokenizer, rows := make_rows(12), 2048)
    plain = [group[0] for group in groups]
    train = make_compact(tokenizer, plain, rows, 0.5, 2048)
    compact = [sample for sample in train if sample.compact]
    assert 3 < len(compact) < 9
    assert sorted(map(len, group_samples(train))) == sorted([len(compact), 12 - len(compact)])
    both = count_tokens(train)
    one = compact[0].prompt_length
    assert count_tokens(plain) + one / 2 < both < count_tokens(plain) + one


def test_scored_samples_are_chosen_by_hash_whatever_their_order():
    """Two tools in blocks: the first two hundred would all be of one."""
    blocks = [Sample("x", [i, 1], 1, f"call {tool}", [], f"ask {i}") for tool in "ab" for i in range(1000)]
    chosen = choose(blocks, 200)
    assert len(chosen) == 200 and chosen == [sample for sample in blocks if sample in chosen]
    assert sum(sample.completion == "call a" for sample in chosen) == 101
    other = choose([sample._replace(source="y") for sample in reversed(blocks)], 200)
    assert [sample._replace(source="x") for sample in reversed(other)] == chosen
    assert [sample for sample in choose(blocks, 100) if sample not in chosen] == []
    assert choose(blocks[:3], 200) == blocks[:3] and choose([], 1) == []


def test_a_repeated_sample_is_scored_once_and_turns_of_other_rows_are_not_it():
    turns = [
        Sample("x:1", [1, 2], 1, "yes", [], "ask"),
        Sample("x:2", [1, 3], 1, "no", [], "ask"),
        Sample("x:1", [1, 2], 1, "yes", [], "ask"),  # its row once more
        Sample("x:3", [4, 2], 1, "yes", [], "ask"),  # after another beginning
    ]
    assert choose(turns, 9) == [turns[0], turns[1], turns[3]]
    assert [choose(turns, 1), choose(turns, 2)] == [[turns[0]], [turns[0], turns[3]]]


def test_samples_are_counted_by_the_rows_that_they_are_of():
    assert (count_origins(GROUPS[0]), count_origins([*GROUPS[0], *GROUPS[2]]), count_origins([])) == (1, 2, 0)
    again = [sample._replace(row=1) for sample in GROUPS[3]]  # the same row of the file once more
    assert count_origins([*GROUPS[3], *again]) == 2 and name_unit([*GROUPS[3], *again]) == "rows"
    assert (name_unit(GROUPS[2], GROUPS[3]), name_unit(GROUPS[2], GROUPS[0]), name_unit([])) == (
        "rows",
        "turns",
        "rows",
    )


@pytest.mark.parametrize(
    "sides, choosing, message",
    [
        (([], GROUPS[3]), None, "a b: no row is left to train on; lower --train_test_split or add rows"),
        (
            (GROUPS[3], []),
            "--metric_for_best",
            "--metric_for_best: no row is held out to choose a checkpoint by; raise --train_test_split or give "
            "--eval_dataset_path",
        ),
        ((GROUPS[3], []), None, None),
        ((GROUPS[2], GROUPS[3]), "--metric_for_best", None),
    ],
)
def test_a_run_needs_rows_to_train_on_and_to_choose_by(sides, choosing, message):
    rendering = Rendering(
        ["a", "b"], 0.1, 2048, "error", metric_for_best=choosing and "loss", early_stopping_patience=None
    )
    assert rendering.choosing == choosing
    if message is None:
        return check_sides(*sides, rendering)
    with pytest.raises(UserError) as error:
        check_sides(*sides, rendering)
    assert str(error.value) == message
