"""A base that cannot write a call, because no text has ever trained the rows of its tags, learns to."""

import json
from pathlib import Path

import pytest
import torch
from conftest import WEATHER, native, write_jsonl
from jobs import TAGS, make_blank_base, run_forked
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
CITIES = "Rome Oslo Bern Riga Lima Cairo Kyoto Paris".split()


def run(base: Path, folder: Path, *more: object):
    """Train on a few calls with a few steps; return the finished process."""
    rows = [native(f"weather in {city}", ("get_weather", {"city": city})) for city in CITIES]
    dataset = write_jsonl(folder / "rows.jsonl", rows)
    tools = folder / "tools.json"
    tools.write_text(json.dumps([WEATHER]))
    flags = ["--batch_size", 4, "--gradient_accumulation_steps", 1, "--learning_rate", 0.01, "--max_steps", 4]
    flags += [
        "--save_steps",
        2,
        "--warmup_steps",
        0,
        "--train_test_split",
        0.25,
        "--max_new_tokens",
        2,
        "--eval_samples",
        1,
    ]
    flags += ["--model_id", base, "--dataset_path", dataset, "--tools_path", tools, "--output_dir", folder / "out"]
    return run_forked(*flags, "--final_model_dir", folder / "final", *more)


def test_rows_of_tags_are_trained_saved_merged_and_resumed(tmp_path):
    blank_base = make_blank_base(tmp_path / "base")
    result = run(blank_base, tmp_path, "--no-load_in_4bit")
    assert result.returncode == 0, result.stderr
    found = "2 in answers have embedding rows that were never trained: <tool_call>, </tool_call>"
    assert f"tokens   {found}; they start apart from each other and are trained" in result.stdout
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": TAGS}
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    (name,) = (name for name in adapter if "lora" not in name)
    halfway = load_file(tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors")[name]
    assert (adapter[name] != halfway).all()  # trained
    rows, base = adapter[name], load_file(blank_base / "model.safetensors")["model.embed_tokens.weight"]
    merged = load_file(tmp_path / "final" / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(merged[TAGS].float(), rows.float(), rtol=2**-7, atol=0)  # a step of bf16
    others = [index for index in range(len(base)) if index not in TAGS]
    assert torch.equal(merged[others], base[others])

    flags = ["--save_method", "lora", "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2"]
    resumed = run(blank_base, tmp_path, "--no-load_in_4bit", *flags)
    assert resumed.returncode == 0, resumed.stderr
    again = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)
    why = 'vLLM loads no adapter with trained rows of tokens ("unsupported LoRA weight"): serve the merged model'
    assert f"warning: {why}, of --save_method merged_16bit" in resumed.stderr
    assert f"         # {why}\n" in resumed.stdout
