"""Architectures: how far the layers of each look back, and that training and answers are exact all the same."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY, native, write_jsonl
from jobs import run_forked
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import train_qwen3_tool_calling as script
from tool_calling.engines.answers import generate_tokens
from tool_calling.engines.attention import attend_in_blocks
from tool_calling.engines.hub import can_share, check_dropout, check_model, count_parameters
from tool_calling.engines.loading import load_base
from tool_calling.engines.losses import compute_gradient
from tool_calling.engines.reach import find_reach
from tool_calling.estimates import Footprint
from tool_calling.samples import Sample
from tool_calling.streams import build_padded, build_stream
from tool_calling.terminal import UserError
from tool_calling.training.selfcheck import relative_difference

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
HEAD = {"head_dim": 16}
SHORT, LONG = {"sliding_window": 8}, {"sliding_window": 64}  # shorter and longer than the samples below
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DELTA = {
    **HEAD,
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
GRANITE4 = {**MAMBA, "layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 64}
LLAMA4 = {**HEAD, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
CONVOLUTION = {"layer_types": ["conv", "full_attention"] * 2}
GEMMA3N = {
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
}
PER_LAYER = {"intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.0] * 4, "num_kv_shared_layers": 0}
GEMMA4 = {**HEAD, "global_head_dim": 16, "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16}
ROUTED = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
NEMOTRON = {
    **{"head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, **ROUTED},
    **{"layers_block_type": ["mamba", "attention", "mlp", "moe"], "moe_shared_expert_intermediate_size": 32},
}
ARCHITECTURES = {  # name: (configuration, what it has besides SHAPE, what limits its reach)
    "qwen2": ("Qwen2Config", {}, ""),
    "qwen2 windows": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 1, **SHORT}, 8),
    "qwen3": ("Qwen3Config", HEAD, ""),
    "qwen3 moe": ("Qwen3MoeConfig", {**HEAD, **EXPERTS}, ""),
    "qwen3.5": ("Qwen3_5TextConfig", DELTA, "layers of linear_attention"),
    "qwen3.5 moe": ("Qwen3_5MoeTextConfig", {**DELTA, **SHARED_EXPERT}, "layers of linear_attention"),
    "qwen3 next": ("Qwen3NextConfig", {**DELTA, **SHARED_EXPERT}, "layers of linear_attention"),
    "llama": ("LlamaConfig", {}, ""),
    "llama4": ("Llama4TextConfig", LLAMA4, "attention that is scaled by the place in a batch"),
    "llama4 chunks": ("Llama4TextConfig", {**LLAMA4, "attn_temperature_tuning": False, "attention_chunk_size": 64}, 64),
    "gemma": ("GemmaConfig", HEAD, ""),
    "gemma2": ("Gemma2Config", {**HEAD, **LONG}, "attention with sinks or capped scores"),
    "gemma3": ("Gemma3TextConfig", {**HEAD, **SHORT, "sliding_window_pattern": 2}, 8),
    "gemma3 long": ("Gemma3TextConfig", {**HEAD, **LONG, "sliding_window_pattern": 2}, 64),
    "gemma3n": ("Gemma3nTextConfig", {**HEAD, **GEMMA3N, **PER_LAYER, **LONG}, 64),
    "gemma3n shared": (
        "Gemma3nTextConfig",
        {**HEAD, **GEMMA3N, **PER_LAYER, **LONG, "num_kv_shared_layers": 2, "layer_types": ["full_attention"] * 4},
        "layers that share their keys and values",
    ),
    "gemma4": ("Gemma4TextConfig", {**GEMMA4, **SHORT}, 8),
    "gemma4 long": ("Gemma4TextConfig", {**GEMMA4, **LONG}, 64),
    "gpt-oss": ("GptOssConfig", {**HEAD, **LOCAL_EXPERTS, **LONG}, "attention with sinks or capped scores"),
    "lfm2": ("Lfm2Config", {**CONVOLUTION, "block_auto_adjust_ff_dim": False}, "layers of conv"),
    "lfm2 moe": ("Lfm2MoeConfig", {**CONVOLUTION, **EXPERTS, "num_dense_layers": 1}, "layers of conv"),
    "granite": ("GraniteConfig", {}, ""),
    "granite4": ("GraniteMoeHybridConfig", {**GRANITE4, **LOCAL_EXPERTS}, "layers of linear_attention"),
    "granite4 dense": (
        "GraniteMoeHybridConfig",
        {**GRANITE4, "num_local_experts": 0, "num_experts_per_tok": 0},
        "layers of linear_attention",
    ),
    "mistral": ("MistralConfig", {**HEAD, **SHORT}, 8),
    "mistral long": ("MistralConfig", {**HEAD, **LONG}, 64),
    "mistral whole": ("MistralConfig", {**HEAD, "sliding_window": None}, ""),
    "ministral3": ("Ministral3Config", HEAD, ""),
    "phi3": ("Phi3Config", {}, ""),
    "phi3 windows": ("Phi3Config", SHORT, 8),
    "smollm3": ("SmolLM3Config", {}, ""),
    "olmo3": ("Olmo3Config", SHORT, 8),
    "glm4": ("Glm4Config", HEAD, ""),
    "glm4 moe": ("Glm4MoeConfig", {**HEAD, **ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}, ""),
    "nemotron": ("NemotronHConfig", NEMOTRON, "layers of linear_attention, mlp, moe"),
    "falcon h1": ("FalconH1Config", {**MAMBA, "mamba_d_ssm": 128}, "layers of hybrid"),
    "cohere2": ("Cohere2Config", SHORT, 8),
    "exaone4": ("Exaone4Config", LONG, 64),
}
STOPS = [2, 9, 77]


def to_config(name: str):
    """Return the configuration of a small model of an architecture."""
    kind, more, _ = ARCHITECTURES[name]
    return getattr(transformers, kind)(**SHAPE | more)


def make_rows() -> list[Sample]:
    """Return four samples of 27 to 42 tokens that share twenty."""
    generator = torch.Generator().manual_seed(1)

    def draw(count):
        return torch.randint(3, 256, (count,), generator=generator).tolist()

    prefix = draw(20)
    return [Sample(f"x:{i}", prefix + draw(7 + 5 * i), 24 + 3 * i, row=i) for i in range(4)]


ROWS = make_rows()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request, tmp_path_factory):
    """(name, a small random model as the runs load it)."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(to_config(request.param))
    for parameter in made.parameters():  # far from uniform: greedy answers are no toss-up
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(folder)
    return request.param, load_base(str(folder), load_in_4bit=False)


def test_reach_and_attention_are_those_of_the_layers(architecture):
    name, model = architecture
    limit = ARCHITECTURES[name][2]
    windows = (limit, f"windows of {limit} tokens")
    expected = windows if isinstance(limit, int) else (0 if limit else math.inf, limit)
    assert find_reach(model.config) == find_reach(to_config(name)) == expected
    capped = limit == "attention with sinks or capped scores"
    assert model.config._attn_implementation == ("eager" if capped else "blocks")


def test_gradients_of_batches_are_those_of_rows_one_by_one(architecture):
    name, model = architecture
    model.train()
    losses, gradient = compute_gradient(model, [build_padded([row]) for row in ROWS], "transformers")
    padded = compute_gradient(model, [build_padded(ROWS)], "transformers")
    assert padded[0].numpy() == pytest.approx(losses.numpy(), rel=1e-4)
    assert relative_difference(padded[1], gradient) < 3e-5
    if len(ROWS[-1].input_ids) <= find_reach(model.config)[0]:
        stream = compute_gradient(model, [build_stream(ROWS)], "transformers")
        assert stream[0].sum().item() == pytest.approx(losses.sum().item(), rel=1e-5)
        assert relative_difference(stream[1], gradient) < 3e-5


def test_a_batch_answers_as_each_prompt_alone(architecture):
    _, model = architecture
    model.eval()
    prompts, alone = [list(row.input_ids[: row.prompt_length]) for row in ROWS], []
    with torch.inference_mode():
        for prompt in prompts:
            written = model.generate(
                torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=STOPS, pad_token_id=0
            )[0, len(prompt) :].tolist()
            alone.append([token for token in written if token not in STOPS])
        assert any(alone)
        assert generate_tokens(model, prompts, STOPS, 16) == alone


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_is_as_large_as_planned(name):
    config = to_config(name)
    planned = count_parameters(config, 4)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=script.TARGET_MODULES)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert planned["adapter"] == trained > 0
    assert sum(planned.values()) == sum(weight.numel() for weight in model.parameters())
    assert Footprint(config, planned, True, "adamw_torch").estimate(1000)["total"] > 0


def test_default_targets_are_those_that_exist_and_named_ones_must(capsys):
    count_parameters(to_config("phi3"), 4)
    count_parameters(to_config("lfm2"), 4)
    count_parameters(to_config("qwen3 moe"), 4)  # nothing is left out
    assert capsys.readouterr().out == (
        "lora     on down_proj, o_proj; --target_modules can name more: gate_up_proj, qkv_proj\n"
        "lora     on k_proj, q_proj, v_proj; --target_modules can name more: in_proj, out_proj, w1, w2, w3\n"
    )
    layers = 2 * 4 * (64 + 192) + 2 * 4 * (64 + 64)  # in_proj and out_proj of two convolutions
    layers += 2 * 4 * (64 + 64)  # out_proj of the attention, too
    assert count_parameters(to_config("lfm2"), 4, targets=["in_proj", "out_proj"])["adapter"] == layers
    assert capsys.readouterr().out == ""
    for name, targets, message in (
        (
            "lfm2",
            ["q_proj", "o_proj"],
            "o_proj: the model has no such linear layer; expected some of in_proj, k_proj, ",
        ),
        ("nemotron", ["out_proj"], "out_proj: .*is incompatible with Mamba-based models"),
    ):
        with pytest.raises(UserError, match=f"^--target_modules {message}"):
            count_parameters(to_config(name), 4, targets=targets)
    gpt2 = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1)  # no linear layers at all
    with pytest.raises(UserError, match="^--target_modules down_proj gate_proj .*: the model has no such linear layer"):
        count_parameters(gpt2, 4)
    with pytest.raises(UserError, match="--lora_dropout 0.1: some/glm is a mixture of experts"):
        check_dropout(0.1, to_config("glm4 moe"), "some/glm")


@pytest.mark.parametrize(
    "engine, name, longest, shares, line",
    [
        ("transformers", "qwen3 moe", 4096, True, ""),
        ("unsloth", "llama", 4096, True, ""),
        (
            *("unsloth", "qwen3 moe", 42, False),
            "ordinary padded batches: with Unsloth, only llama, qwen2, qwen3 share prefixes, and this is qwen3_moe; "
            "--engine transformers shares them, too",
        ),
        (
            "transformers",
            "mistral long",
            64,
            True,
            "prefixes are shared: windows of 64 tokens hold the longest sample, 64",
        ),
        (
            *("transformers", "mistral long", 65, False),
            "ordinary padded batches: this mistral has windows of 64 tokens, and samples of 65 tokens",
        ),
        (
            "unsloth",
            "qwen2 windows",
            9,
            False,
            "ordinary padded batches: this qwen2 has windows of 8 tokens, and samples",
        ),
        ("unsloth", "qwen3.5", 42, False, "ordinary padded batches: this qwen3_5_text has layers of linear_attention"),
        (
            "transformers",
            "gpt-oss",
            42,
            False,
            "ordinary padded batches: this gpt_oss has attention with sinks or capped",
        ),
    ],
)
def test_prefixes_are_shared_where_each_token_sees_all_of_its_sample(engine, name, longest, shares, line, capsys):
    assert can_share(engine, to_config(name), longest) is shares
    out = capsys.readouterr().out
    assert out.startswith(f"plan     {line}") if line else out == ""


def test_attention_that_needs_more_than_a_mask_is_not_computed_by_sdpa():
    query = torch.zeros(1, 2, 3, 4)
    for more in ({"softcap": 50.0}, {"s_aux": torch.zeros(2)}):
        with pytest.raises(RuntimeError, match="^attention with .* cannot be computed in blocks"):
            attend_in_blocks(None, query, query, query, None, **more)


def save_base(config, folder: Path, kind=AutoModelForCausalLM) -> Path:
    """Save a random model with the embedded base's tokenizer, and return its folder."""
    torch.manual_seed(0)
    kind.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def to_base_config(name: str, tokenizer, **more):
    """Return the configuration of a model of an architecture that has the tokens of a tokenizer."""
    kind, changes, _ = ARCHITECTURES[name]
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return getattr(transformers, kind)(**SHAPE | changes | ids | more)


def run_job(folder: Path, tools_path: str, *flags: object):
    """Train `folder`/base for two steps by the command line."""
    cities = ("Rome", "Oslo", "Lima", "Bonn", "Cairo", "Quito")
    rows = [native(f"rain in {city} {day}?", ("get_weather", {"city": city})) for city in cities for day in ("", "now")]
    write_jsonl(folder / "rows.jsonl", [*rows, native("thanks", content="Bye."), native("ok", content="Bye.")])
    return run_forked(
        *("--model_id", folder / "base", "--dataset_path", folder / "rows.jsonl", "--tools_path", tools_path),
        *("--output_dir", folder / "out", "--final_model_dir", folder / "final"),
        *("--max_steps", 2, "--warmup_steps", 0, "--learning_rate", 0.01),
        *("--eval_samples", 2, "--max_new_tokens", 8, *flags),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, changes, flags, line",
    [
        ("qwen3.5", {}, ["--no-load_in_4bit"], "ordinary padded batches: this qwen3_5_text has layers of linear_"),
        ("gemma3 long", {"sliding_window": 2000}, [], "prefixes are shared: windows of 2,000 tokens hold the "),
    ],
)
def test_a_run_goes_from_rows_to_a_merged_model(name, changes, flags, line, tmp_path, tools_path):
    config = to_base_config(name, AutoTokenizer.from_pretrained(TINY), **changes)
    save_base(config, tmp_path / "base")
    if not flags:  # on a base in 4 bits, which so few steps teach nothing that its merge would keep
        flags = ["--save_method", "lora"]
    result = run_job(tmp_path, tools_path, *flags)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert f"\nplan     {line}" in result.stdout
    assert ("\ncheck    sharing changes" in result.stdout) is line.startswith("prefixes")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    last = "merged" if "lora" not in flags else "adapter"
    assert [*report["scores"]] == ["base", "adapter", "merged"][: 3 if last == "merged" else 2]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    if last == "merged":
        assert check_model(str(tmp_path / "final")).architectures == [
            type(load_base(str(tmp_path / "final"), False)).__name__
        ]


def to_seeing(text) -> transformers.Qwen3_5Config:
    """Return the configuration of a Qwen3.5 as it is published: with a part that reads images."""
    sizes = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_position_embeddings": 16}
    return transformers.Qwen3_5Config(
        text_config=text.to_dict(),
        vision_config={**sizes, "out_hidden_size": text.hidden_size},
        **{"image_token_id": 4, "video_token_id": 5, "vision_start_token_id": 6, "vision_end_token_id": 7},
    )


@pytest.mark.slow
def test_of_a_model_that_sees_images_the_language_model_is_trained_and_saved_alone(tmp_path, tools_path):
    text = to_base_config("qwen3.5", AutoTokenizer.from_pretrained(TINY))
    save_base(to_seeing(text), tmp_path / "base", AutoModelForImageTextToText)
    assert json.loads((tmp_path / "base" / "config.json").read_text())["architectures"] == [
        "Qwen3_5ForConditionalGeneration"
    ]
    result = run_job(tmp_path, tools_path, "--no-load_in_4bit")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    said = f"\nmodel    the language model of {tmp_path / 'base'} alone, without what reads images\n"
    assert said in f"\n{result.stdout}"
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Qwen3_5ForCausalLM"], "qwen3_5_text")
    with safe_open(tmp_path / "final" / "model.safetensors", "pt") as file:
        names = {*file.keys()}
    assert "model.embed_tokens.weight" in names and not any("language_model" in name for name in names)


def test_a_language_model_that_is_loaded_only_with_the_rest_is_refused(tmp_path):
    config = transformers.Gemma3Config(text_config={**SHAPE, **HEAD})
    config.architectures = ["Gemma3ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as error:
        check_model(str(tmp_path))
    assert str(error.value) == (
        f"--model_id {tmp_path}: not a causal language model (Gemma3ForConditionalGeneration), and Transformers loads "
        "its language model only with the rest; expected a model of text alone"
    )
