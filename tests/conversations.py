"""Conversations of every kind, their samples as text, and the score of a text."""

from tool_calling.samples import Sample
from tool_calling.scores import Verdict, judge, read_answer, read_reference

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


def supervised(tokenizer, sample: Sample) -> str:
    return tokenizer.decode(sample.input_ids[sample.prompt_length :])


GREETING = [  # some templates refuse it
    {"role": "system", "content": "You are a weather line."},
    says("Hi! How can I help?"),
    {"role": "user", "content": "rain in Rome?"},
    calls("Rome"),
]


def score_answer(got: str, expected: str, tools: list[dict], parser: str = "hermes") -> Verdict:
    """Compare the text of an answer with its reference, see judge; a call drafted inside of reasoning is none."""
    sample = Sample("", [], 0, expected, tools, parser=parser)
    return judge(read_answer(got, sample), read_reference(sample), tools)
