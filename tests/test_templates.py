"""Chat templates that a user gives: the bundled one, files, what is refused, and the tokens that they need."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ALARM, TINY, WEATHER, run_here, write_jsonl
from doubles import make_tools
from jobs import FINAL_FILES, ROWS, errors, names, run_forked
from peft import PeftModel
from safetensors import safe_open
from small import make_qwen3
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

import train_qwen3_tool_calling as script
from tool_calling.engines.hub import load_tokenizer
from tool_calling.engines.tokens import fit_config
from tool_calling.prompts import DEFAULT, find_parser
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
    assert [fit_config(Qwen3Config(vocab_size=rows), tokenizer).vocab_size for rows in (size, 5000)] == [size + 6, 5000]
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


# ---------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------
def make_bare_base(folder: Path) -> int:
    """Save a random Qwen3 of two small layers that knows no turns, calls and thoughts; return its number of tokens."""
    size = len(AutoTokenizer.from_pretrained(make_bare_tokenizer(folder)))
    make_qwen3(size=size).save_pretrained(folder)
    return size


def to_flags(folder: Path, *more: object) -> list:
    """Return the flags of a run of two steps from `folder`/base."""
    return [
        *("--model_id", folder / "base"),
        *("--dataset_path", folder / "rows.jsonl"),
        *("--tools_path", folder / "tools.json"),
        *("--output_dir", folder / "out"),
        *("--final_model_dir", folder / "final"),
        *("--no-load_in_4bit", "--max_steps", 2, "--warmup_steps", 0, "--learning_rate", 0.02),
        *("--train_test_split", 0.25, "--eval_samples", 4, "--max_new_tokens", 4),
        *more,
    ]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A folder with a bare base, rows, tools and a template in a file."""
    folder = tmp_path_factory.mktemp("templates")
    make_bare_base(folder / "base")
    write_jsonl(folder / "rows.jsonl", ROWS)
    (folder / "tools.json").write_text(json.dumps([WEATHER, ALARM]))
    (folder / "mine.jinja").write_text(read_template("qwen3").replace("# Tools\\n", "# My tools\\n"))
    return folder


@pytest.fixture(scope="module")
def result(job):
    """What a run with the template of the file ended with."""
    flags = to_flags(job, "--chat_template", job / "mine.jinja", "--save_gguf", "q8_0")
    return run_forked(*flags, PATH=make_tools(job / "bin"))


def test_a_dry_run_reads_the_rows_as_the_template_writes_them(job, tmp_path):
    def audit(*more):
        result = run_here(*to_flags(job, "--dry_run", "--output_dir", tmp_path / "out", *more))
        assert result.returncode == 0, result.stderr
        return json.loads((tmp_path / "out" / "audit.json").read_text()), result.stdout

    found, printed = audit()
    assert found["unit"] == "characters" and "has no chat template; " in found["tokenizer_missing"]
    found, printed = audit("--chat_template", "qwen3")
    assert found["unit"] == "tokens" and found["tokenizer_missing"] == "" and found["rows"]["valid"] == len(ROWS)
    assert printed.count("added for the chat template") == 1


@pytest.mark.slow
def test_a_base_without_a_template_is_taught_and_served_with_a_file(job, result):
    size, template = len(AutoTokenizer.from_pretrained(job / "base")), (job / "mine.jinja").read_text()
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"tokens   added for the chat template: {' '.join(QWEN3_TOKENS)}\n") == 1
    final, adapter = job / "final", job / "out" / "adapter"
    assert names(final) == sorted([*FINAL_FILES, "gguf"])
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (final / file).read_bytes() == (adapter / file).read_bytes()
    assert (final / "chat_template.jinja").read_text() == DEFAULT.format("false") + template
    assert yaml.safe_load((job / "out" / "run.yaml").read_text())["chat_template"] == str(job / "mine.jinja")
    assert "| `chat_template` | mine.jinja |" in (final / "README.md").read_text()
    assert "# My tools" in (final / "gguf" / "Modelfile").read_text()
    # Model and tokenizer as any server loads them.
    tokenizer, model = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final)
    assert len(tokenizer) == model.config.vocab_size == size + 6
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (size + 6, 32)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id in model.generation_config.eos_token_id
    ids = tokenizer("<tool_call>\n{}\n</tool_call><|im_end|>", add_special_tokens=False)["input_ids"]
    assert [ids[0], *ids[-2:]] == [size + 2, size + 3, size + 1]
    messages = [{"role": "user", "content": "rain?"}]
    served = tokenizer.apply_chat_template(messages, tools=[WEATHER], tokenize=False, add_generation_prompt=True)
    assert served.startswith("<|im_start|>system\n# My tools\n") and served.endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    # The adapter brings the new rows and no whole table: with plain PEFT it is the same model.
    base = AutoModelForCausalLM.from_pretrained(job / "base")
    base.resize_token_embeddings(size + 6)
    adapted = PeftModel.from_pretrained(base, adapter)
    assert not any("base_layer" in name for name in safe_open(adapter / "adapter_model.safetensors", "pt").keys())
    ids = torch.tensor([tokenizer(served, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    # What the base knew has its rows still.
    old, new = (safe_open(folder / "model.safetensors", "pt") for folder in (job / "base", final))
    rows = [file.get_tensor("model.embed_tokens.weight") for file in (old, new)]
    assert torch.equal(rows[0], rows[1][:size])


@pytest.mark.slow
def test_what_was_trained_with_a_template_is_scored_and_resumed_with_it(job, result):
    report = json.loads((job / "out" / "report.json").read_text())
    rows = ("--dataset_path", job / "rows.jsonl", "--tools_path", job / "tools.json", "--train_test_split", 0.25)
    rows += ("--eval_samples", 4, "--max_new_tokens", 4, "--no-load_in_4bit", "--output_dir", job / "scored")
    for model, name, more in (
        (job / "final", "merged", ()),
        (job / "out" / "adapter", "adapter", ()),
        (job / "base", "base", ("--chat_template", job / "mine.jinja")),
    ):
        alone = run_here(*rows, "--eval_only", model, *more)
        assert alone.returncode == 0, alone.stderr
        scored = json.loads((job / "scored" / "eval_only" / "report.json").read_text())
        assert scored["scores"]["model"] == report["scores"][name]
        assert ("added for the chat template" in alone.stdout) == (name == "base")
    resumed = run_here(*to_flags(job, "--chat_template", "qwen3", "--resume_from_checkpoint"))
    source = f"in the run that {job / 'out' / 'checkpoint-2'} is from"
    assert resumed.returncode == 1 and errors(resumed) == [
        f"error: --chat_template is qwen3, and {job / 'mine.jinja'} {source}; expected the same",
        f"error: the training rows are not those {source}; expected the same rows in the same order",
    ]
