"""Chat templates that a user gives: the bundled one, files, what is refused, and the tokens that they need."""

import json
from pathlib import Path

import pytest
from conftest import ALARM, TINY, WEATHER
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train_qwen3_tool_calling as script
from tool_calling.engines.hub import load_tokenizer
from tool_calling.prompts import find_parser
from tool_calling.templates import list_bundled, list_tokens, read_template
from tool_calling.terminal import FlagError, UserError

QWEN3_TOKENS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "</think>", "<think>"]


def make_bare_tokenizer(folder: Path) -> Path:
    """Save the embedded base's tokenizer without its added tokens but one, and without a chat template."""
    content = json.loads((TINY / "tokenizer.json").read_text())
    content["added_tokens"] = content["added_tokens"][:1]  # <|endoftext|>
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return folder


def test_a_template_is_bundled_or_a_file(tmp_path, monkeypatch):
    assert list_bundled() == ["qwen3"]
    assert read_template("qwen3") == (TINY / "chat_template.jinja").read_text()
    assert read_template(None) is None
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}")
    assert read_template(str(file)) == file.read_text()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert script.parse_args(["--chat_template=~/mine.jinja"]).chat_template == str(file)
    assert script.parse_args(["--chat_template", "qwen3"]).chat_template == "qwen3"
    assert script.parse_args([]).chat_template is None


@pytest.mark.parametrize(
    "content, problem",
    [
        (None, ": no such file; expected a file of Jinja, or a bundled one: qwen3"),
        (b"", ": is empty; expected a chat template"),
        (b" \n", ": is empty; expected a chat template"),
        (b"one\n{{ two", ":2: is not Jinja: unexpected end of template, expected 'end of print statement'."),
        (b"{% generation %}\n{% fro m in messages %}", ":2: is not Jinja: Encountered unknown tag 'fro'."),
        (
            b"\xff",
            ": cannot be read: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte; expected a text "
            "of Jinja in UTF-8",
        ),
    ],
)
def test_what_is_no_template_is_a_wrong_flag(tmp_path, content, problem):
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FlagError) as error:
        script.parse_args(["--chat_template", str(file)])
    assert str(error.value) == f"--chat_template {file}{problem}"


def test_tokens_of_a_template_are_turns_calls_and_thoughts():
    assert list_tokens(read_template("qwen3")) == QWEN3_TOKENS
    gemma = "{# <|x|>\n #}{{ '<start_of_turn>user' }}<end_of_turn><start_function_call><tool_response><b>< | > <||>"
    assert list_tokens(gemma) == ["<start_of_turn>", "<end_of_turn>", "<start_function_call>"]


def test_a_tokenizer_gets_what_the_template_needs(tmp_path, capsys):
    folder = make_bare_tokenizer(tmp_path / "bare")
    with pytest.raises(UserError) as error:
        load_tokenizer(str(folder))
    assert str(error.value) == (
        f"--model_id {folder}: has no chat template; use a chat model such as Qwen/Qwen3-0.6B, or give another "
        "template with --chat_template"
    )
    size = len(AutoTokenizer.from_pretrained(folder))
    tokenizer = load_tokenizer(str(folder), template=read_template("qwen3"))
    assert capsys.readouterr().out == f"tokens   added for the chat template: {' '.join(QWEN3_TOKENS)}\n"
    added = {str(token): (index, token.special) for index, token in tokenizer.added_tokens_decoder.items()}
    assert [added[token] for token in QWEN3_TOKENS] == [(size + i, i < 2) for i in range(6)]
    assert tokenizer.eos_token == "<|im_end|>" and find_parser(tokenizer) == "hermes"
    # What a server reads back, and the text that the embedded base's own template writes.
    tokenizer.save_pretrained(tmp_path / "saved")
    again, stock = load_tokenizer(str(tmp_path / "saved")), load_tokenizer(str(TINY))
    assert capsys.readouterr().out == ""
    messages = [{"role": "user", "content": "rain?"}]
    options = {"tools": [WEATHER, ALARM], "tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    texts = [each.apply_chat_template(messages, **options) for each in (tokenizer, again, stock)]
    assert texts[0] == texts[1] == texts[2]
    ids = [each(texts[0], add_special_tokens=False)["input_ids"] for each in (tokenizer, again)]
    assert ids[0] == ids[1] and again.decode(ids[1]) == texts[0]
    assert again.decode(again("a<tool_call>b")["input_ids"], skip_special_tokens=True) == "a<tool_call>b"
    assert again.eos_token == "<|im_end|>"


def test_a_template_takes_the_place_of_the_models_own(capsys):
    own = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = load_tokenizer(str(TINY), template=own)
    assert tokenizer.chat_template == own and len(tokenizer) == len(load_tokenizer(str(TINY)))
    assert capsys.readouterr().out == ""  # it has all
    with pytest.raises(UserError, match="does not end an answer with a token of its own, .*--chat_template$"):
        load_tokenizer(str(TINY), template="{% for m in messages %}{{ m.content }}{% endfor %}")
