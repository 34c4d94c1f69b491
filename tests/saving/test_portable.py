"""What is saved is read by Transformers 4 as by 5: exact keys of the files, and both versions on the same folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALARM, REAL_TOKENIZER, TINY, WEATHER
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import train_qwen3_tool_calling as script
from tool_calling.engines.hub import load_tokenizer
from tool_calling.prompts import PROBE, render_text, set_default
from tool_calling.saving.merge import Trained, save_whole
from tool_calling.saving.portable import add_old_keys, save_tokenizer
from tool_calling.templates import read_template

MESSAGES = [*PROBE, {"role": "user", "content": "Weather in 北京, then  wake me at 6:45\n"}]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def list_new(config: dict) -> dict:
    """Return what a config, a part of one included, has more than Transformers 5 writes."""
    return {key: value for key, value in add_old_keys(config).items() if key not in config}


def save_tiny(folder: Path, **rope) -> Path:
    """Save the embedded base, with other numbers of its rotary embeddings, as a trained model is saved."""
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.config.rope_parameters |= rope
    settings = vars(script.parse_args([]))
    trained = Trained(str(TINY), str(TINY), model.dtype, "transformers", str(folder), "merged_16bit", settings)
    tokenizer = load_tokenizer(str(TINY))
    set_default(tokenizer, thinks=False)
    return save_whole(trained, model, tokenizer)


def test_a_saved_model_has_the_keys_of_both_generations(tmp_path):
    config = read(save_tiny(tmp_path / "final", rope_theta=1e6) / "config.json")
    base = read(TINY / "config.json")
    changed = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    assert config == base | changed | {"rope_theta": 1e6, "torch_dtype": "bfloat16"}


def test_the_parts_of_a_config_have_them_too():
    rope = {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 0.25}
    text = {"dtype": "bfloat16", "hidden_size": 8, "rope_parameters": rope}
    added = {"rope_theta": 5e5, "partial_rotary_factor": 0.25, "torch_dtype": "bfloat16"}
    whole = {"dtype": "float16", "text_config": text, "vision_config": {"depth": 2}}
    expected = whole | {"torch_dtype": "float16", "text_config": text | added}
    assert add_old_keys(whole) == expected
    assert "torch_dtype" not in whole and text.keys() == {"dtype", "hidden_size", "rope_parameters"}


LLAMA = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]}
GEMMA = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    "config, added",
    [
        ({"rope_parameters": LLAMA | {"rope_theta": 5e5}}, {"rope_theta": 5e5, "rope_scaling": LLAMA}),
        (
            {"rope_parameters": GEMMA},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, {"rope_theta": 5e5}),
        (  # Phi 3, which takes these three keys alone
            {
                "original_max_position_embeddings": 4096,
                "rope_parameters": {
                    **LONG,
                    "type": "longrope",
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.75,
                    "original_max_position_embeddings": 4096,
                },
            },
            {"rope_theta": 1e4, "partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope", **LONG}},
        ),
        (  # Gemma 4: a type that 4 does not have
            {"rope_parameters": {"full_attention": {"rope_type": "proportional", "rope_theta": 1e6}}},
            {"rope_theta": 1e6},
        ),
        ({"rope_parameters": None, "dtype": None}, {}),
        ({"hidden_size": 8}, {}),
    ],
    ids=["llama3", "gemma3", "one kind of layers", "phi3", "unknown type", "nothing", "no positions"],
)
def test_positions_are_said_as_before(config, added):
    assert list_new(config) == added


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gemma4_text", "olmo3", "phi3"])
def test_old_keys_change_nothing_for_the_running_version(name):
    kind = CONFIG_MAPPING[name]
    config = json.loads(kind().to_json_string())
    assert list_new(config) != {}
    read_back = kind.from_dict(add_old_keys(config))
    assert read_back.rope_parameters == kind().rope_parameters


def test_scaled_positions_are_read_back():
    config = LlamaConfig(rope_parameters=LLAMA | {"rope_theta": 5e5})
    again = LlamaConfig.from_dict(add_old_keys(json.loads(config.to_json_string())))
    assert again.rope_parameters == LLAMA | {"rope_theta": 5e5}


def test_the_tokenizer_of_the_embedded_base_gets_a_class_of_both_generations(tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    assert read(tmp_path / "tokenizer_config.json") == read(TINY / "tokenizer_config.json") | names
    assert (tmp_path / "chat_template.jinja").read_text() == tokenizer.chat_template
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    text = "<tool_call>{'a':  1234}\n schön</tool_call><|im_end|>"
    assert again(text) == tokenizer(text)


def test_the_tokenizer_of_a_base_keeps_its_own_settings(tmp_path, real_tokenizer):
    save_tokenizer(real_tokenizer, tmp_path)
    assert read(tmp_path / "tokenizer_config.json") == read(REAL_TOKENIZER / "tokenizer_config.json")


def test_of_the_settings_only_what_must_be_is_changed(tmp_path):
    base = tmp_path / "base"
    load_tokenizer(str(TINY)).save_pretrained(base)
    own = {
        "tokenizer_class": "Qwen2TokenizerFast",
        "eos_token": "<|endoftext|>",
        "chat_template": "an older one",
        "added_tokens_decoder": {"4070": {"content": "<|endoftext|>", "special": True}},
        "extra_special_tokens": ["<|im_start|>"],
        "is_local": True,
        "local_files_only": False,
        "padding_side": "left",
    }
    (base / "tokenizer_config.json").write_text(json.dumps(own))
    named = {"pad_token": {"content": "<|im_end|>", "lstrip": False}, "eos_token": "not this"}
    (base / "special_tokens_map.json").write_text(json.dumps(named))
    tokenizer = load_tokenizer(str(base), template=read_template("qwen3").replace("<tools>", "<|tools|>"))
    save_tokenizer(tokenizer, tmp_path / "saved")
    settings = read(tmp_path / "saved" / "tokenizer_config.json")
    added = settings.pop("added_tokens_decoder")
    assert settings == {
        "tokenizer_class": "Qwen2TokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "additional_special_tokens": ["<|im_start|>"],
        "padding_side": "left",
    }
    assert added["4070"] == own["added_tokens_decoder"]["4070"]
    assert added[str(tokenizer.convert_tokens_to_ids("<|tools|>"))]["content"] == "<|tools|>"


def test_a_tokenizer_without_settings_gets_those_of_the_running_version(tmp_path):
    (tmp_path / "base").mkdir()
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / "base" / name).write_bytes((TINY / name).read_bytes())
    tokenizer = load_tokenizer(str(tmp_path / "base"), template=read_template("qwen3"))
    save_tokenizer(tokenizer, tmp_path / "saved")
    settings = read(tmp_path / "saved" / "tokenizer_config.json")
    assert settings["eos_token"] == "<|im_end|>" and not settings.keys() & {"is_local", "local_files_only"}
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("a  b").input_ids == tokenizer("a  b").input_ids


READER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, transformers
folder, request = sys.argv[2], json.loads(sys.argv[3])
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
prompt = tokenizer.apply_chat_template(**request, add_generation_prompt=True, tokenize=False)
tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
with torch.no_grad():
    logits = model(**tokens).logits[0]
    answer = model.generate(**tokens, max_new_tokens=24)[0, tokens["input_ids"].shape[1]:]
json.dump({"version": transformers.__version__, "prompt": prompt, "ids": tokens["input_ids"][0].tolist(),
           "logits": logits.tolist(), "base": model.config.rope_theta, "names": [*tokens],
           "answer": tokenizer.decode(answer)}, sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.serve
@pytest.mark.parametrize(
    "version, tokenizers", [("4.51.3", "tokenizers>=0.21,<0.22"), ("4.57.6", "tokenizers<=0.23.0")]
)
def test_transformers_4_reads_what_is_saved(tmp_path, capsys, version, tokenizers):
    """Installed into a folder, it stands before the running version, whose other libraries it shares."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "old")]
    subprocess.run([*install, f"transformers=={version}", tokenizers, "huggingface_hub<1.0"], check=True, timeout=600)
    folder, request = (
        save_tiny(tmp_path / "final", rope_theta=1e6),
        {"conversation": MESSAGES, "tools": [WEATHER, ALARM]},
    )
    command = [sys.executable, "-W", "ignore", "-c", READER, str(tmp_path / "old"), str(folder), json.dumps(request)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"tools": request["tools"], "add_generation_prompt": True, "enable_thinking": False}
    prompt = render_text(tokenizer, MESSAGES, **options)
    tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(**tokens).logits[0]
        greedy = model.generate(**tokens, max_new_tokens=24, do_sample=False, top_k=None)
    assert (found["version"], found["prompt"], found["base"]) == (version, prompt, 1e6)
    assert (found["ids"], found["names"]) == (tokens["input_ids"][0].tolist(), ["input_ids", "attention_mask"])
    answer = tokenizer.decode(greedy[0, len(found["ids"]) :])
    assert answer.startswith("<tool_call>\n") and answer == found["answer"]
    difference = (torch.tensor(found["logits"]) - expected).abs().max().item()
    with capsys.disabled():
        print(f"\ntransformers {version}: {len(found['ids'])} tokens, logits differ by at most {difference:.2g}")
    assert difference < 1e-3
