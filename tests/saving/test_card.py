"""Model cards, and the commands that serve a model."""

import json
from pathlib import Path

import pytest
import trl
import yaml

from tool_calling.saving.card import Serving, hide_folders, list_notes, to_card, to_lora_words, write_card

SCORES = {
    "exact_match": 0.5,
    "call_exact": 0.4,
    "no_call": 0.6,
    "ast_match": 0.25,
    "tool_macro_f1": 1 / 3,
    "call_precision": 0.75,
    "call_recall": None,
    "broken_json": 3,
    "n": 1234,
    "rows": {"exact_match": 1234, "call_exact": 1000, "no_call": 234, "ast_match": 1234, "call_recall": 0},
    "interval": {"exact_match": [0.4567, 0.52345], "call_exact": [0.3, 0.5], "no_call": [0.5, 0.75]},
}
SETTINGS = {
    "model_id": "/home/me/Qwen/Qwen3-0.6B/",
    "dataset_path": ["/home/me/a b.jsonl", "data/b.json"],
    "save_method": "merged_16bit",
    "push_to_hub": None,
    "num_epochs": 3,
    "max_steps": None,
    "batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_seq_length": 2048,
    "chat_template": None,
    "load_in_4bit": False,
    "lora_rank": 24,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "target_modules": ["q_proj"],
    "train_tokens": ["auto"],
    "thinking": "auto",
    "compact_tools": 0.0,
    "augment": None,
    "holdout_tools": None,
    "tools_in_prompt": "all",
    "method": "sft",
    "num_generations": None,
    "temperature": 1.0,
    "hard_rows": None,
    "reward": None,
    "beta": 0.0,
    "share_prefix": True,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "warmup_ratio": None,
    "weight_decay": 0.01,
    "optim": None,
    "seed": 3407,
    "metric_for_best": None,
    "early_stopping_patience": None,
}
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- tool-calling
- function-calling
---
# me/tools

`Qwen3-0.6B` taught to call tools by LoRA of rank 24: 16-bit weights.

| | held-out requests | base | merged |
|---|---|---|---|
| exact | 1,234 | 0.0 % (45.7–52.3) | 50.0 % (45.7–52.3) |
| exact, call expected | 1,000 | 40.0 % (30.0–50.0) | 40.0 % (30.0–50.0) |
| no call, none expected | 234 | 60.0 % (50.0–75.0) | 60.0 % (50.0–75.0) |
| AST, BFCL-like | 1,234 | 25.0 % | 25.0 % |
| tool macro-F1 |  | 33.3 % | 33.3 % |
| call precision |  | 75.0 % | 75.0 % |
| call recall | 0 | – | – |
| broken calls |  | 3 | 3 |

Each model wrote its answers greedily; in brackets is the 95 % interval of a share. *Exact* compares calls as JSON
values, in any order; a request that needs no call is right when an answer makes none, and one without tools when the
text is the same. *AST* is BFCL-like: strings may differ in case and punctuation, and defaults may be left out.

## Use

```bash
vllm serve <me/tools>
```

## Training

8,000 samples of `a b.jsonl`, `data/b.json`, 1,200 held out; 2,000 steps of 3,000, the best on held-out rows, mean loss 1.5000;
NVIDIA H200, 2026-01-01 00:00.

```bash
python x.py --output_dir=out b 'a b.jsonl' $HF_TOKEN
```

| setting | value |
|---|---|
| `num_epochs` | 3 |
| `batch_size` | 2 |
| `gradient_accumulation_steps` | 4 |
| `max_seq_length` | 2048 |
| `load_in_4bit` | False |
| `lora_rank` | 24 |
| `lora_alpha` | 16 |
| `lora_dropout` | 0.0 |
| `use_rslora` | False |
| `target_modules` | ['q_proj'] |
| `train_tokens` | ['auto'] |
| `thinking` | auto |
| `compact_tools` | 0.0 |
| `tools_in_prompt` | all |
| `method` | sft |
| `temperature` | 1.0 |
| `beta` | 0.0 |
| `share_prefix` | True |
| `learning_rate` | 2e-05 |
| `lr_scheduler_type` | linear |
| `warmup_steps` | 10 |
| `weight_decay` | 0.01 |
| `seed` | 3407 |
"""  # noqa: E501


def make_report(**settings) -> dict:
    """Return the report of a run with these settings."""
    history = [{"loss": 2.0}, {"loss": 1.0}, {"eval_loss": 3.0}]
    return {
        "args": SETTINGS | settings,
        "scores": {"base": SCORES | {"exact_match": 0.0}, "merged": SCORES},
        "data": {"train": 8000, "held_out": 1200},
        "train": {"last_step": 3000, "kept_step": 2000, "history": history},
        "command": "python x.py --output_dir=/home/me/out ~/a/b '/home/me/a b.jsonl' hf_abcdefghij",
        "device": "NVIDIA H200",
        "finished": "2026-01-01 00:00",
    }


def test_a_card_says_what_it_is_how_good_and_how_it_was_made(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    assert to_card(make_report(), False, "me/tools", "vllm serve <me/tools>") == CARD


@pytest.mark.parametrize(
    "model_id, base",
    [("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("gpt2", "gpt2"), ("../Qwen/Qwen3-0.6B", None), ("models/a/b", None)],
)
def test_a_card_names_a_base_on_the_hub_alone(model_id, base):
    head = yaml.safe_load(to_card(make_report(model_id=model_id), False, "x", "vllm").split("---\n")[1])
    assert head.get("base_model") == base


@pytest.mark.parametrize(
    "settings, adapter, what",
    [
        ({}, False, "LoRA of rank 24: 16-bit weights."),
        ({}, True, "LoRA of rank 24: the adapter alone."),
        ({"save_method": "lora"}, True, "LoRA of rank 24: the adapter alone."),
        ({"save_method": "merged_4bit"}, False, "LoRA of rank 24: 4-bit weights (bitsandbytes, nf4)."),
        ({"lora_rank": 0}, False, "full fine-tuning: 16-bit weights."),
    ],
)
def test_a_card_names_how_the_model_was_trained_and_saved(settings, adapter, what):
    _, head, text = to_card(make_report(**settings), adapter, "x", "vllm").split("---\n", 2)
    assert f"`Qwen3-0.6B` taught to call tools by {what}\n" in text
    assert yaml.safe_load(head) == {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tool-calling", "function-calling"],
    }


def test_a_card_names_the_template_without_its_folder():
    text = to_card(make_report(chat_template="/home/me/mine.jinja"), False, "x", "vllm")
    assert "\n| `chat_template` | mine.jinja |\n" in text


def test_a_card_says_what_was_measured_and_trained():
    report = make_report(max_steps=7)
    report["data"]["held_out"] = 0
    report["train"] = {"last_step": 7, "kept_step": 7, "history": []}
    card = to_card(report, False, "x", "vllm")
    assert "| | training requests | base | merged |\n" in card
    assert " 0 held out; 7 steps;\nNVIDIA H200, " in card
    assert "|---|---|\n| `max_steps` | 7 |\n| `batch_size` | 2 |\n" in card and "num_epochs" not in card


@pytest.mark.parametrize(
    "folder, settings, served",
    [
        ("final", {}, "final"),
        ("final", {"push_to_hub": "me/tools"}, "me/tools"),
        (
            "adapter",
            {"push_to_hub": "me/tools"},
            "Qwen3-0.6B --tokenizer adapter --generation-config adapter --enable-lora --max-lora-rank 32 "
            "--lora-modules tools=adapter",
        ),
        (
            "adapter",
            {"push_to_hub": "me/tools", "save_method": "lora", "model_id": "Qwen/Qwen3-0.6B"},
            "Qwen/Qwen3-0.6B --tokenizer me/tools --generation-config me/tools --enable-lora --max-lora-rank 32 "
            "--lora-modules tools=me/tools",
        ),
        ("my model", {}, "'my model'"),
    ],
)
def test_a_card_is_written_with_the_command_that_serves_its_folder(tmp_path, folder, settings, served):
    (tmp_path / folder).mkdir()
    if folder == "adapter":
        (tmp_path / folder / "adapter_config.json").write_text("{}")
    write_card(tmp_path / folder, make_report(**settings), Serving("hermes", True, "qwen3").to_command)
    card = (tmp_path / folder / "README.md").read_text()
    command = f"vllm serve {served} --enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3"
    assert f"```bash\n{command}\n```\n" in card and str(tmp_path) not in card
    assert f"library_name: {'peft' if folder == 'adapter' else 'transformers'}\n" in card


def test_what_a_server_cannot_load_stands_below_its_command(tmp_path):
    why = 'vLLM loads no adapter with trained rows of tokens ("unsupported LoRA weight"): serve the merged model'
    for rows, expected in ((None, []), ({"model.embed_tokens": [7]}, [f"# {why}"])):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"trainable_token_indices": rows}))
        assert list_notes(tmp_path) == expected


SENT = "\n# requests send the tools in tools.json, as client.py beside it does"


def test_a_card_has_all_commands_that_serve_its_folder(tmp_path):
    write_card(tmp_path, make_report(), lambda words: f"serve {words}", ("llama-server x", "y"))
    assert f"```bash\nserve {tmp_path.name}\nllama-server x\ny\n```\n" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("thinks, more", [(False, " --reasoning off"), (True, "")])
def test_llama_cpp_is_told_that_a_model_does_not_think(thinks, more):
    command = Serving("hermes", thinks).to_llama_command(Path("a b/x.gguf"))
    assert command == f"llama-server -m 'a b/x.gguf' --port 8000 --jinja --temp 0{more}"


@pytest.mark.parametrize("there, shown", [(True, SENT), (False, "")])
def test_a_card_names_the_file_of_the_tools(tmp_path, there, shown):
    if there:
        (tmp_path / "tools.json").write_text("[]")
    write_card(tmp_path, make_report(), lambda words: f"serve {words}")
    assert f"```bash\nserve {tmp_path.name}{shown}\n```\n" in (tmp_path / "README.md").read_text()


OFF, ON = (f" --default-chat-template-kwargs '{{\"enable_thinking\": {value}}}'" for value in ("false", "true"))


@pytest.mark.parametrize(
    "template, family, parser, thinks, expected",
    [
        ("qwen3", "qwen3", "hermes", False, OFF),
        ("qwen3", "qwen3_moe", "hermes", True, " --reasoning-parser qwen3"),
        ("qwen3", "llama", "hermes", True, " --reasoning-parser qwen3"),  # a base that was given this template
        ("qwen3_instruct_2507", "qwen3", "hermes", False, ""),
        ("qwen3_5_nothink", "qwen3_5_text", "qwen3_coder", False, ""),
        ("qwen3_5_nothink", "qwen3_5_text", "qwen3_coder", True, f" --reasoning-parser qwen3{ON}"),
        ("qwen3_5_think", "qwen3_5_text", "qwen3_coder", False, OFF),
        ("nemotron_3_nano", "nemotron_h", "qwen3_coder", True, " --reasoning-parser nemotron_v3"),
        ("gemma4_v5", "gemma4_text", "gemma4", False, ""),
        ("gemma4_v5", "gemma4_text", "gemma4", True, f" --reasoning-parser gemma4{ON}"),
        ("qwen2_5", "qwen2", "hermes", False, ""),
        ("llama3_2", "llama", "llama3_json", False, ""),
    ],
)
def test_vllm_is_told_how_calls_and_thoughts_look(tokenizer, monkeypatch, template, family, parser, thinks, expected):
    file = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    if not file.is_file():
        pytest.skip("this TRL has no such template")
    monkeypatch.setattr(tokenizer, "chat_template", file.read_text())
    assert Serving.of(tokenizer, family, parser, thinks).to_command("a/b") == (
        f"vllm serve a/b --enable-auto-tool-choice --tool-call-parser {parser}{expected}"
    )


@pytest.mark.parametrize("rank, highest", [(1, 16), (16, 16), (17, 32), (32, 32), (100, 128)])
def test_vllm_is_told_how_high_an_adapters_rank_is_and_where_its_template_is(rank, highest):
    assert to_lora_words("my base", "out/a b", rank) == (
        f"'my base' --tokenizer 'out/a b' --generation-config 'out/a b' --enable-lora --max-lora-rank {highest} "
        "--lora-modules tools='out/a b'"
    )


def test_folders_of_this_machine_are_hidden_with_spaces_too():
    for word, shown in [
        ("/home/me/Secret Project X/rows.json", "rows.json"),
        ("--output_dir=~/a b/c", "--output_dir=c"),
        ("data/rows.json", "data/rows.json"),
        ("/", "/"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
    ]:
        assert hide_folders(word) == shown
