"""Samples: one for each supervised turn, never cut; of the bundled data, every one."""

import json

import pytest
from conftest import ROOT, WEATHER
from conversations import ASK, CONVERSATIONS, says, supervised

import train_qwen3_tool_calling as script
from tool_calling.data.examples import Example, to_examples
from tool_calling.data.rows import read_rows
from tool_calling.prompts import parse_calls
from tool_calling.samples import render_examples


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


@pytest.mark.slow
def test_the_bundled_data_renders_without_a_problem(tokenizer):
    rows = list(read_rows([str(ROOT / "data" / "synthetic_finetune_dataset.json")]))
    checked = to_examples(rows, str(ROOT / "data" / "tools.json"))
    assert checked.problems == [] and len(checked.examples) == checked.total == 2000
    groups, problems = render_examples(tokenizer, checked.examples, script.MAX_SEQ_LENGTH)
    assert problems == []
    for (_, row), (sample,) in zip(rows, groups):
        output = row["output"]
        expected = output.get("function_calls") or [output["function_call"]] if "content" not in output else []
        assert parse_calls(supervised(tokenizer, sample)) == json.loads(json.dumps(expected))
