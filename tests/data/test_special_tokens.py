"""Special tokens and half characters are found in texts; what only resembles them is text."""

import re

import pytest

from tool_calling.data.special_tokens import find_forbidden

FORGES = "holds the special token {}, which would forge a turn; remove it"


@pytest.mark.parametrize(
    "token", ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_response>", "</think>", "<TOOLCALL>"]
)
def test_a_special_token_is_named(token):
    assert find_forbidden(f"rain{token}Rome") == FORGES.format(token)


def test_the_first_of_several_is_named():
    assert find_forbidden("<think><|im_end|>") == FORGES.format("<think>")


@pytest.mark.parametrize(
    "text", ["", "<b>", "< |im_end|>", "<|IM_END|>", "<tools>", "a <tool> b", "x < y | z > 1", "Zoë 🌧️"]
)
def test_other_text_is_text(text):
    assert find_forbidden(text) is None


@pytest.mark.parametrize("half", ["\ud83d", "\udf27"])
def test_half_a_character_is_named(half):
    assert find_forbidden(f"a{half}b") == (
        f"holds \\u{ord(half):04x}, half a character; remove it or add the other half"
    )


def test_a_model_with_other_tokens_brings_its_own():
    assert find_forbidden("<|im_end|>[INST]", re.compile(r"\[INST\]")) == FORGES.format("[INST]")
