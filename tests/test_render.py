"""Rendering: exact supervised text, the serving prompt token by token, and the round trip of every call."""

import json

import pytest
from conftest import ALARM, WEATHER

import train_qwen3_tool_calling as script
from tool_calling.data.examples import Example, to_examples
from tool_calling.data.rows import read_rows
from tool_calling.prompts import Sample, parse_calls, render_examples
from tool_calling.terminal import UserError

ASK = {"role": "user", "content": "rain in Rome and Oslo?"}
REPLY = {"role": "tool", "content": '{"rain": true}'}
EMPTY_THOUGHT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def calls(*cities: str, content: str = "", **more) -> dict:
    return {
        "role": "assistant",
        "content": content,
        **more,
        "tool_calls": [
            {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}} for city in cities
        ],
    }


def says(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


CONVERSATIONS = {
    "one call": [ASK, calls("Rome")],
    "parallel calls": [ASK, calls("Rome", "Oslo")],
    "no call": [ASK, says("I cannot know.")],
    "content beside a call": [ASK, calls("Rome", content="Let me look.")],
    "system": [{"role": "system", "content": "Be brief."}, ASK, calls("Rome")],
    "tool reply": [ASK, calls("Rome"), REPLY, says("Yes.")],
    "two replies": [ASK, calls("Rome", "Oslo"), REPLY, REPLY, says("Both.")],
    "two rounds of calls": [ASK, calls("Rome"), REPLY, calls("Oslo"), REPLY, says("Both.")],
    "several turns": [ASK, says("Where?"), ASK, calls("Rome"), REPLY, says("Yes."), ASK, calls("Oslo")],
    "thinking": [ASK, calls("Rome", reasoning_content="The user asks for Rome.")],
    "thinking after a reply": [
        ASK,
        calls("Rome", reasoning_content="Rome first."),
        REPLY,
        says("Yes.", reasoning_content="It rains."),
    ],
    "unicode": [{"role": "user", "content": "Wetter in Köln? 🌧 東京"}, calls("Köln", '"東京" \\ 🌧\n')],
}


def render(tokenizer, messages: list[dict], tools=(WEATHER, ALARM)) -> list[Sample]:
    (samples,), problems = render_examples(tokenizer, [Example("x:1", messages, list(tools))], 4096)
    assert problems == []
    return samples


def supervised(tokenizer, sample: Sample) -> str:
    return tokenizer.decode(sample.input_ids[sample.prompt_length :])


def test_the_supervised_text_is_exact(tokenizer):
    def texts(name):
        return [supervised(tokenizer, sample) for sample in render(tokenizer, CONVERSATIONS[name])]

    rome = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    oslo = rome.replace("Rome", "Oslo")
    assert texts("one call") == [f"{rome}<|im_end|>"]
    assert texts("parallel calls") == [f"{rome}\n{oslo}<|im_end|>"]
    assert texts("no call") == ["I cannot know.<|im_end|>"]
    assert texts("content beside a call") == [f"Let me look.\n{rome}<|im_end|>"]
    assert texts("two rounds of calls") == [f"{rome}<|im_end|>", f"{oslo}<|im_end|>", "Both.<|im_end|>"]
    assert texts("thinking after a reply") == [
        f"<think>\nRome first.\n</think>\n\n{rome}<|im_end|>",
        "<think>\nIt rains.\n</think>\n\nYes.<|im_end|>",
    ]


def test_a_turn_before_a_tool_reply_stands_on_the_serving_prompt(tokenizer):
    """Stock Qwen3 drops the empty think block there when it renders the whole conversation at once."""
    first, _ = render(tokenizer, CONVERSATIONS["tool reply"])
    assert tokenizer.decode(first.input_ids[: first.prompt_length]).endswith(EMPTY_THOUGHT)
    whole = tokenizer.apply_chat_template(CONVERSATIONS["tool reply"], tools=[WEATHER, ALARM], tokenize=False)
    assert "<|im_start|>assistant\n<tool_call>" in whole  # what training on whole conversations would teach


@pytest.mark.parametrize("which", ["tokenizer", "real_tokenizer"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_turn_is_trained_as_served(request, which, name):
    tokenizer = request.getfixturevalue(which)
    messages = CONVERSATIONS[name]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    samples = render(tokenizer, messages)
    assert len(samples) == len(turns)
    for turn, sample in zip(turns, samples):
        served = tokenizer.apply_chat_template(
            messages[:turn],
            tools=[WEATHER, ALARM],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            enable_thinking="reasoning_content" in messages[turn],
        )
        assert sample.input_ids[: sample.prompt_length] == served
        answer = supervised(tokenizer, sample)
        assert answer.endswith("<|im_end|>") and answer.count("<|im_end|>") == 1
        assert parse_calls(answer) == [call["function"] for call in messages[turn].get("tool_calls", [])]


def test_the_two_tokenizers_render_the_same_text(tokenizer, real_tokenizer):
    for messages in CONVERSATIONS.values():
        texts = [[t.decode(s.input_ids) for s in render(t, messages)] for t in (tokenizer, real_tokenizer)]
        assert texts[0] == texts[1]


def test_without_tools_no_tool_is_rendered(tokenizer):
    (sample,) = render(tokenizer, [{"role": "user", "content": "hi"}, says("hello")], tools=[])
    assert tokenizer.decode(sample.input_ids) == (
        "<|im_start|>user\nhi<|im_end|>\n" + EMPTY_THOUGHT + "hello<|im_end|>"
    )


def test_a_sequence_over_the_limit_is_a_problem_and_is_not_cut(tokenizer):
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


def test_a_template_that_loses_the_calls_ends_the_run(tokenizer):
    class Lossy:
        """A tokenizer whose template ignores tool calls."""

        eos_token, name_or_path = tokenizer.eos_token, "lossy"

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

        def apply_chat_template(self, messages, **kwargs):
            bare = [{**message, "tool_calls": None} for message in messages]
            return tokenizer.apply_chat_template(bare, **kwargs)

    examples = [Example("x:1", CONVERSATIONS["one call"], [WEATHER])]
    with pytest.raises(UserError) as error:
        render_examples(Lossy(), examples, 4096)
    assert str(error.value) == (
        "lossy: the chat template writes calls in a way that cannot be read back: its calls do not survive rendering "
        'and parsing: ""; expected that of a model whose calls vLLM\'s parser hermes or llama3_json reads'
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("hello", []),
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', [{"name": "f", "arguments": {}}]),
        (
            'hm <tool_call>{"name": "f", "arguments": {"a": "</b>"}}</tool_call>',
            [{"name": "f", "arguments": {"a": "</b>"}}],
        ),
        (
            '<tool_call>\n{"name": "f", "arguments": {}}',
            [{"name": "f", "arguments": {}}],
        ),  # cut off, as servers accept it
        (
            '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
            [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}],
        ),
    ],
)
def test_calls_are_parsed_as_servers_do(text, expected):
    assert parse_calls(text) == expected


def test_broken_json_in_a_call_is_an_error():
    with pytest.raises(ValueError):
        parse_calls('<tool_call>\n{"name": f}\n</tool_call>')


def test_the_bundled_data_renders_without_a_problem(tokenizer):
    from conftest import ROOT

    rows = list(read_rows([str(ROOT / "data" / "synthetic_finetune_dataset.json")]))
    checked = to_examples(rows, str(ROOT / "data" / "tools.json"))
    assert checked.problems == [] and len(checked.examples) == checked.total == 2000
    groups, problems = render_examples(tokenizer, checked.examples, script.MAX_SEQ_LENGTH)
    assert problems == []
    for (_, row), (sample,) in zip(rows, groups):
        output = row["output"]
        expected = output.get("function_calls") or [output["function_call"]] if "content" not in output else []
        assert parse_calls(supervised(tokenizer, sample)) == json.loads(json.dumps(expected))
