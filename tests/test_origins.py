"""Going on from an adapter or a merged model: its shape, its base, and what is known of the models before it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ALARM, TINY, WEATHER, run_here, write_jsonl
from jobs import ROWS, arguments, errors
from peft import LoraConfig, get_peft_model
from small import make_qwen3
from train_small import make_base
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import train_qwen3_tool_calling as script
from tool_calling.engines.hub import check_base, find_base
from tool_calling.engines.loading import go_on_from, load_adapter, load_base, set_adapter_weights
from tool_calling.origins import check_4_bits, list_ancestors, list_trained_tokens, read_shape
from tool_calling.prompts import DEFAULT
from tool_calling.run_folder import check_models_stay, write_run
from tool_calling.saving.merge import Trained, refuse_same_adapter
from tool_calling.terminal import FlagError, UserError

SHAPE = {
    "peft_type": "LORA",
    "base_model_name_or_path": str(TINY),
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "use_rslora": True,
    "target_modules": ["v_proj", "q_proj"],
}


def write_adapter(folder: Path, **changes) -> str:
    """Write the settings of an adapter, and no weights."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(SHAPE | changes))
    return str(folder)


def make_model(folder: Path, moe: bool = False) -> str:
    """Save a small random model and return its folder."""
    torch.manual_seed(0)
    small = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(vocab_size=61, hidden_size=32, intermediate_size=32, **small, **experts)
    (AutoModelForCausalLM.from_config(config) if moe else make_qwen3(tied=True)).save_pretrained(folder)
    return str(folder)


def make_adapter(folder: Path, base: str, *targets: str) -> str:
    """Save an adapter with random weights on a model and return its folder."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=[*targets], task_type="CAUSAL_LM")
    model = get_peft_model(load_base(base, False), lora)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    return str(folder)


def shape_of(args) -> tuple:
    return args.lora_rank, args.lora_alpha, args.lora_dropout, args.use_rslora, args.target_modules


def test_a_run_has_the_shape_of_the_adapter_that_it_goes_on_from(tmp_path):
    adapter, expected = write_adapter(tmp_path / "adapter"), (4, 8, 0.1, True, ["q_proj", "v_proj"])
    assert shape_of(script.parse_args(["--model_id", adapter])) == expected
    same = ["--lora_rank", "4", "--lora_alpha", "8", "--use_rslora", "--target_modules", "q_proj v_proj"]
    assert shape_of(script.parse_args(["--model_id", adapter, *same])) == expected
    (tmp_path / "mine.yaml").write_text(f"model_id: {adapter}\nlora_dropout: 0.1\n")
    assert shape_of(script.parse_args(["--config", str(tmp_path / "mine.yaml")])) == expected
    assert shape_of(script.parse_args([])) == (16, 16, 0.0, False, sorted(script.TARGET_MODULES))


@pytest.mark.parametrize(
    "flags, given, found",
    [
        (["--lora_rank", "8"], "--lora_rank 8", "4"),
        (["--lora_rank", "0"], "--lora_rank 0", "4"),
        (["--lora_alpha", "16"], "--lora_alpha 16", "8"),
        (["--lora_dropout", "0"], "--lora_dropout 0.0", "0.1"),
        (["--no-use_rslora"], "--use_rslora False", "True"),
        (["--target_modules", "q_proj", "k_proj"], "--target_modules k_proj q_proj", "q_proj v_proj"),
    ],
)
def test_a_flag_that_asks_for_another_shape_is_refused(tmp_path, flags, given, found):
    adapter = write_adapter(tmp_path / "adapter")
    with pytest.raises(FlagError) as error:
        script.parse_args(["--model_id", adapter, *flags])
    advice = "leave the flag out, or give a merged model as --model_id, which gets an adapter of its own"
    assert str(error.value) == f"{given}: the adapter --model_id {adapter} has {found}; {advice}"


def test_experts_are_the_targets_that_the_flag_names(tmp_path):
    changes = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "down_proj"]}
    assert read_shape(write_adapter(tmp_path / "adapter", **changes), "--model_id")["target_modules"] == [
        "down_proj",
        "gate_proj",
        "q_proj",
        "up_proj",
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "is of IA3 on ['v_proj', 'q_proj']"),
        ({"target_modules": ".*_proj"}, "is of LORA on .*_proj"),
        ({"modules_to_save": ["lm_head"], "bias": "all"}, "sets modules_to_save, bias, which a run would not keep"),
    ],
)
def test_an_adapter_that_a_run_would_not_keep_is_refused(tmp_path, changes, message):
    adapter = write_adapter(tmp_path / "adapter", **changes)
    with pytest.raises(UserError) as error:
        script.parse_args(["--model_id", adapter])
    expected = "expected a LoRA adapter of linear layers, as this script saves it"
    assert str(error.value) == f"--model_id {adapter}: adapter_config.json {message}; {expected}"
    assert find_base(str(TINY)) == (str(TINY), "--model_id")


@pytest.mark.parametrize("text", ['{"r": 8', "{}", '{"base_model_name_or_path": null}', "[]"])
def test_an_adapter_that_names_no_base_is_refused_before_any_row_is_read(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError) as error:
        script.main(["--model_id", str(tmp_path), "--dataset_path", "no/such.jsonl"])
    assert str(error.value) == (f"--model_id {tmp_path}: adapter_config.json names no base; expected one saved by PEFT")


def test_the_base_of_an_adapter_is_checked_like_any_model(tmp_path):
    adapter = make_adapter(tmp_path / "adapter", make_model(tmp_path / "base"), "q_proj")
    assert find_base(adapter) == (str(tmp_path / "base"), f"--model_id {adapter}: its base")
    base, config, merged = check_base(adapter, None, True, True, False)
    assert (base, config.model_type, merged) == (str(tmp_path / "base"), "qwen3", str(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match=f"^--model_id {adapter}: its base {tmp_path / 'base'}: no such folder"):
        check_base(adapter, None, True, True, False)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=f"^--model_id {adapter}: the adapter holds no .*safetensors"):
        check_base(adapter, None, True, True, False)


@pytest.mark.parametrize("moe, targets", [(False, ["q_proj", "down_proj"]), (True, ["q_proj", "gate_proj", "up_proj"])])
def test_training_goes_on_from_exactly_these_weights(tmp_path, moe, targets):
    base = make_model(tmp_path / "base", moe)
    adapter = make_adapter(tmp_path / "adapter", base, *targets)
    model = go_on_from(load_base(base, False), adapter, {})
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    served = load_adapter(load_base(base, False), adapter)
    tokens = torch.arange(2, 12)[None]
    assert torch.equal(model.eval()(tokens).logits, served(tokens).logits)
    model.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_tokens_are_trained_on_beside_new_ones(tmp_path, tied):
    base, tables = tmp_path / "base", ["model.embed_tokens", *["lm_head"] * (not tied)]
    torch.manual_seed(0)
    make_qwen3(tied).save_pretrained(base)
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices={})
    lora.trainable_token_indices = dict.fromkeys(tables, [5, 3])
    model = get_peft_model(load_base(str(base), False), lora)
    learned = {table: torch.randn(2, 32) for table in tables}
    for table in tables:
        model.get_parameter(rows_of(table)).data.copy_(learned[table])
    model.save_pretrained(tmp_path / "adapter")
    assert list_trained_tokens(str(tmp_path / "adapter")) == [3, 5] and list_trained_tokens(str(base)) == []
    rows = {"trainable_token_indices": dict.fromkeys(tables, [3, 4, 5])}
    model = go_on_from(load_base(str(base), False), str(tmp_path / "adapter"), rows)
    for table in tables:
        found, of_base = model.get_parameter(rows_of(table)), model.get_base_model().get_submodule(table).weight
        assert torch.equal(found, torch.stack([learned[table][1], of_base[4], learned[table][0]]))
        assert found.requires_grad


def rows_of(table: str) -> str:
    return f"base_model.model.{table}.token_adapter.trainable_tokens_delta.default"


def test_an_adapter_of_another_shape_or_base_is_one_line(tmp_path):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, "q_proj", "v_proj")
    for lora, reason in (
        (LoraConfig(r=4, target_modules=["q_proj"]), "missing or unknown weights: base_model.model.model.layers.0."),
        (LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]), "missing or unknown weights: base_model."),
        (LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), "size mismatch for base_model.model.model.layers."),
    ):
        with pytest.raises(UserError) as error:
            set_adapter_weights(get_peft_model(load_base(base, False), lora), adapter)
        start = f"--model_id {adapter}: its base {base} is another model than it was trained on ("
        assert str(error.value).startswith(start + reason) and "\n" not in str(error.value)


def test_an_adapter_that_did_not_change_is_refused(tmp_path):
    base = make_model(tmp_path / "base")
    adapter, other = (make_adapter(tmp_path / name, base, "q_proj") for name in ("adapter", "other"))
    trained = Trained(base, base, None, "transformers", "final", "lora", {}, shutil.copytree(adapter, tmp_path / "new"))
    refuse_same_adapter(Trained(**vars(trained) | {"start": other}))
    with pytest.raises(UserError) as error:
        refuse_same_adapter(Trained(**vars(trained) | {"start": adapter}))
    advice = "training changed nothing; train longer or raise --learning_rate"
    assert str(error.value) == f"the trained adapter equals {adapter}: {advice}"


@pytest.mark.parametrize("name, refused", [("adapter", True), ("checkpoint-12", True), ("merged", False)])
def test_a_run_does_not_replace_the_model_that_it_trains_on(tmp_path, name, refused):
    (tmp_path / "out" / name).mkdir(parents=True)
    if not refused:
        return check_models_stay(tmp_path / "out", [str(tmp_path / "out" / name)])
    with pytest.raises(UserError) as error:
        check_models_stay(tmp_path / "out", ["some/model", str(tmp_path / "out" / name)])
    found = f"its {name} is replaced by this run and is what --model_id trains on"
    assert str(error.value) == f"--output_dir {tmp_path / 'out'}: {found}; choose another folder"


def test_ancestors_are_what_the_folders_say(tmp_path):
    assert list_ancestors("Qwen/Qwen3-0.6B") == ["Qwen/Qwen3-0.6B"]
    plain, card, merged = (tmp_path / name for name in ("plain", "card", "merged"))
    for folder in (plain, card, merged):
        folder.mkdir()
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=str(merged))
    assert list_ancestors(str(plain)) == [str(plain)]
    (card / "README.md").write_text("---\nbase_model: Qwen/Qwen3-0.6B\n---\n# me\n")
    assert list_ancestors(str(card)) == [str(card), "Qwen/Qwen3-0.6B"]
    write_run({"model_id": "unused"}, merged, ancestors=[str(card), "Qwen/Qwen3-0.6B"])
    assert list_ancestors(adapter) == [adapter, str(merged), str(card), "Qwen/Qwen3-0.6B"]
    (card / "README.md").write_text(f"---\nbase_model: {adapter}\n---\n")  # a circle ends
    assert list_ancestors(str(card)) == [str(card), adapter, str(merged), "Qwen/Qwen3-0.6B"]


@pytest.mark.parametrize(
    "text",
    ["# no head", "---\nbase_model: [a, b]\n---\n", "---\nbase_model: {\n---\n", "---\n- a\n---\n", "---\n", "\udcff"],
)
def test_a_card_that_says_nothing_invents_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text, errors="surrogateescape")
    for content in ("[]", "facts: {ancestors: 7}", "facts: x", "\t{"):
        (tmp_path / "run.yaml").write_text(content)
        assert list_ancestors(str(tmp_path)) == [str(tmp_path)]


def test_what_was_trained_on_4_bits_and_merged_is_not_put_into_4_bits_again(tmp_path):
    merged = shutil.copytree(TINY, tmp_path / "merged")
    settings = {"load_in_4bit": True, "save_method": "merged_16bit", "output_dir": "runs/first"}
    write_run(settings, merged)
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER, ALARM]))
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    for more in ([], ["--dry_run"]):
        result = run_here(*arguments(tmp_path, "--model_id", merged, *more))
        assert result.returncode == 1 and errors(result) == [
            f"error: --model_id {merged}: was trained on 4-bit weights, and in 4 bits again it may lose all that it "
            "learned; go on from its adapter, runs/first/adapter, or add --no-load_in_4bit"
        ]
    for changes in ({"load_in_4bit": False}, {"save_method": "merged_4bit"}):
        write_run(settings | changes, merged)
        check_4_bits(str(merged))
    check_4_bits(str(TINY))
    check_4_bits("Qwen/Qwen3-0.6B")


@pytest.mark.slow
def test_a_run_goes_on_from_an_adapter_and_from_a_merged_model(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER, ALARM]))
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    base = tmp_path / "tiny-qwen3"
    make_base(base)

    def run(model, name: str, *flags) -> dict:
        folders = ["--output_dir", tmp_path / name / "out", "--final_model_dir", tmp_path / name / "final"]
        more = ["--model_id", model, "--max_steps", 2, "--eval_samples", 2, "--max_new_tokens", 8, "--no-load_in_4bit"]
        result = run_here(*arguments(tmp_path, *more, *folders, *flags))
        assert result.returncode == 0, result.stderr
        return json.loads((tmp_path / name / "out" / "report.json").read_text()) | {"screen": result.stdout}

    first = run(base, "first", "--lora_rank", 4, "--target_modules", "q_proj", "v_proj", "--learning_rate", 0.01)
    adapter = tmp_path / "first" / "out" / "adapter"
    second = run(adapter, "second", "--save_steps", 1)
    assert f"adapter  {adapter} is trained on, on its base {base}: lora_rank 4, lora_alpha 16," in second["screen"]
    assert list(second["scores"]) == ["start", "adapter", "merged"]
    assert second["scores"]["start"] == first["scores"]["adapter"]
    assert second["args"]["lora_rank"] == 4 and second["args"]["target_modules"] == ["q_proj", "v_proj"]
    begun, ended = (report["train"]["history"] for report in (first, second))
    assert ended[0]["loss"] < begun[0]["loss"]  # what the first run learned is there from the first step on

    card, of_adapter = ((tmp_path / "second" / name / "README.md").read_text() for name in ("final", "out/adapter"))
    assert "\nContinued from `adapter`, which comes from `tiny-qwen3`.\n" in card
    assert (
        "--lora-modules tools=adapter" in of_adapter
        and "vllm serve tiny-qwen3 --tokenizer adapter --generation-config adapter" in of_adapter
    )
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])  # it is on no Hub
    settings = json.loads((tmp_path / "second" / "out" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base) and settings["r"] == 4

    resumed = ["--output_dir", tmp_path / "second" / "out", "--resume_from_checkpoint", "--max_steps", 3]
    third = run(adapter, "second", "--save_steps", 1, *resumed)
    assert third["train"]["steps"] == 1 and third["scores"]["start"] == first["scores"]["adapter"]

    merged = tmp_path / "second" / "final"
    fourth = run(merged, "fourth", "--lora_rank", 2, "--learning_rate", 0.001)
    assert list(fourth["scores"]) == ["base", "adapter", "merged"]
    assert fourth["scores"]["base"] == third["scores"]["merged"]
    ends = [(tmp_path / name / "final" / "chat_template.jinja").read_text() for name in ("first", "second", "fourth")]
    assert ends == [DEFAULT.format("false") + (TINY / "chat_template.jinja").read_text()] * 3
    card = (tmp_path / "fourth" / "final" / "README.md").read_text()
    assert "Continued from `final`, which comes from `adapter`, which comes from `tiny-qwen3`.\n" in card

    replaced = run_here(*arguments(tmp_path, "--model_id", adapter, "--output_dir", adapter.parent))
    assert errors(replaced) == [
        f"error: --output_dir {adapter.parent}: its adapter is replaced by this run and is what --model_id trains on; "
        "choose another folder"
    ]
