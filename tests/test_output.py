"""What a run leaves to be used: full fine-tuning, ways to save, and a whole run with GGUF files and an upload."""

import json
import re
import shutil
import types
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ALARM, ROOT, TINY, WEATHER, patch, run_script, write_jsonl
from doubles import TOKEN, Hub, make_tools, on_hub
from test_command_line import FINAL_FILES, ROWS, arguments, names
from test_robust import TRAIN, limit_memory, weights
from train_small import make_base, make_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import train_qwen3_tool_calling as script
from tool_calling.audit import list_writes
from tool_calling.engines.hub import check_merge_base, check_model, count_parameters
from tool_calling.engines.loading import load_base
from tool_calling.engines.losses import compute_gradient
from tool_calling.engines.start import to_dtype
from tool_calling.estimates import check_disk, count_final_bytes, estimate_disk, estimate_memory
from tool_calling.files import find_damage
from tool_calling.saving import upload
from tool_calling.saving.merge import (
    merge_adapter,
    refuse_unchanged,
    round_at_random,
    round_trained,
    save_whole,
    sum_weights,
)
from tool_calling.saving.proof import check_trained, merge_and_score
from tool_calling.schedule import Plan, group_rows
from tool_calling.streams import build_padded
from tool_calling.terminal import FlagError, UserError
from tool_calling.training.trainer import build_trainer, load_trained


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """One finished run of full fine-tuning with GGUF files and an upload: (folder, result, hub)."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "tools.json").write_text(json.dumps([WEATHER, ALARM]))
    write_jsonl(folder / "rows.jsonl", ROWS)
    path = make_tools(folder / "bin")
    with Hub() as hub:
        result = run_script(
            *arguments(
                folder,
                "--lora_rank",
                0,
                "--learning_rate",
                1e-3,
                "--save_gguf",
                "Q8_0,q4_k_m",
                "--push_to_hub",
                "me/tools",
            ),
            PATH=path,
            **on_hub(hub),
        )
    return folder, result, hub


def test_full_fine_tuning_writes_the_model_in_the_bases_type_and_no_adapter(full):
    from safetensors.torch import load_file

    folder, result, _ = full
    assert result.returncode == 0, result.stderr
    assert names(folder / "final") == sorted([*FINAL_FILES, "gguf"])
    assert names(folder / "out") == [".lock", "checkpoint-3", "checkpoint-6", "report.html", "report.json", "run.yaml"]
    base, trained = load_file(TINY / "model.safetensors"), load_file(folder / "final" / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in trained.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    kept = [name for name in base if torch.equal(base[name], trained[name])]
    assert all("norm" in name for name in kept)  # a norm's weights of 1 can be too coarse for so few steps
    assert (
        folder / "out" / "checkpoint-6" / "model.safetensors"
    ).stat().st_size > 4 * 11_475_264  # fp32, to go on from
    settings = yaml.safe_load((folder / "final" / "run.yaml").read_text())
    assert (settings["lora_rank"], settings["load_in_4bit"], settings["engine"]) == (0, False, "transformers")
    again = script.parse_args(["--config", str(folder / "final" / "run.yaml")])
    assert (again.save_gguf, again.push_to_hub, again.learning_rate) == ("q8_0,q4_k_m", "me/tools", 1e-3)


def test_full_fine_tuning_is_checked_and_proven(full):
    folder, result, _ = full
    lines = result.stdout.splitlines()
    assert any(line.startswith("check    sharing changes the loss of 8 rows by ") for line in lines)
    saved = next(line for line in lines if line.startswith("save     16-bit, read back by a fresh process: "))
    loss, before = map(float, re.findall(r"(?:loss|saving) ([\d.]+)", saved))
    assert loss == pytest.approx(before, abs=1e-3)
    report = json.loads((folder / "out" / "report.json").read_text())
    assert list(report["scores"]) == ["base", "trained"]
    assert report["scores"]["trained"]["exact_match"] > report["scores"]["base"]["exact_match"]
    assert lines[-2:] == [
        f"done     trained model: {folder / 'final'}",
        f"serve    vllm serve {folder / 'final'} --enable-auto-tool-choice --tool-call-parser hermes "
        """--default-chat-template-kwargs '{"enable_thinking": false}'""",
    ]
    assert result.stderr == "warning: no row without a call: the model will forget to refuse\n"


def test_the_model_card_says_what_it_is_and_names_no_folder_of_this_machine(full):
    folder, _, _ = full
    card = (folder / "final" / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": "tiny-qwen3",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tool-calling", "function-calling"],
    }
    assert "`tiny-qwen3` taught to call tools by full fine-tuning: 16-bit weights." in text
    scores = json.loads((folder / "out" / "report.json").read_text())["scores"]
    for name in ("base", "trained"):
        assert f"| {name} | {100 * scores[name]['exact_match']:.1f} % |" in text
    assert "18 samples of `rows.jsonl`, 6 held out; 6 steps," in text and "| `learning_rate` | 0.001 |" in text
    assert "\nvllm serve me/tools --enable-auto-tool-choice" in text
    assert "--model_id tiny-qwen3 --dataset_path rows.jsonl" in text
    assert str(folder) not in card and str(ROOT) not in card and TOKEN not in card


def test_gguf_files_are_made_of_the_final_folder(full):
    folder, result, _ = full
    final, inside = folder / "final", folder / "final" / ".gguf.partial"
    calls = [json.loads(line) for line in (folder / "bin" / "log").read_text().splitlines()]
    check = calls.pop(0)  # of the tokenizer alone, before anything is trained
    assert check[2] == "--vocab-only"
    assert calls == [
        ["convert", str(final), "--outfile", str(inside / "whole.gguf"), "--outtype", "bf16"],
        ["convert", str(final), "--outfile", str(inside / "final-q8_0.gguf"), "--outtype", "q8_0"],
        ["quantize", str(inside / "whole.gguf"), str(inside / "final-q4_k_m.gguf"), "Q4_K_M"],
    ]
    assert names(final / "gguf") == ["Modelfile", "final-q4_k_m.gguf", "final-q8_0.gguf"]
    assert (
        (final / "gguf" / "Modelfile")
        .read_text()
        .startswith("FROM ./final-q8_0.gguf\nPARAMETER temperature 0\nPARAMETER num_ctx 4096\n")
    )
    assert f"gguf     {final / 'gguf'}: q8_0,q4_k_m; for Ollama: ollama create NAME -f " in result.stdout


def test_the_upload_is_private_whole_and_without_what_is_of_this_machine(full):
    folder, result, hub = full
    assert hub.private is True
    assert sorted(hub.files) == sorted(
        [*(set(FINAL_FILES) - {"run.yaml"}), "gguf/Modelfile", "gguf/final-q4_k_m.gguf", "gguf/final-q8_0.gguf"]
    )
    assert hub.requests[0] == "GET /api/whoami-v2"  # before training
    assert {request.split("?")[0] for request in hub.requests[1:]} <= {
        "POST /api/repos/create",
        "POST /api/validate-yaml",
        "POST /api/models/me/tools/preupload/main",
        "GET /api/models/me/tools/revision/main",
        "GET /api/models/me/tools",
        "POST /api/models/me/tools/commit/main",
    }
    assert f"push     {hub.url}/me/tools" in result.stdout
    written = [
        path for path in folder.rglob("*") if path.suffix in (".json", ".yaml", ".html", ".md") or path.name == "log"
    ]
    assert len(written) > 10 and not [path for path in written if TOKEN in path.read_text()]
    assert TOKEN not in result.stdout + result.stderr


def make_trainer(folder: Path, *flags: str):
    """A trainer of all weights of a small random Qwen3 over TRAIN, three steps, the same each time."""
    args = script.parse_args(
        [
            "--lora_rank",
            "0",
            "--num_epochs",
            "1",
            "--warmup_steps",
            "0",
            "--learning_rate",
            "0.01",
            "--save_steps",
            "1",
            "--output_dir",
            str(folder),
            *flags,
        ]
    )
    plan = Plan(args.batch_size, args.gradient_accumulation_steps, group_rows(TRAIN), (), True)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )
    return build_trainer(
        args,
        script.to_sft_config(args, plan, False),
        "transformers",
        model,
        AutoTokenizer.from_pretrained(TINY),
        TRAIN,
        [],
        plan,
    )


def test_full_fine_tuning_goes_on_with_the_same_bits(tmp_path):
    whole = make_trainer(tmp_path)
    start = weights(whole)
    whole.train()
    ends = weights(whole)
    assert not torch.equal(start, ends) and find_damage(tmp_path / "checkpoint-3") is None
    trainer = make_trainer(tmp_path / "again")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(weights(trainer), ends)
    trainer = make_trainer(tmp_path / "last")
    load_trained(trainer, str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(trainer), ends)


def test_full_fine_tuning_that_does_not_fit_goes_on_in_smaller_streams(tmp_path, monkeypatch, capsys):
    flags = ["--batch_size", "8", "--gradient_accumulation_steps", "1"]
    expected = make_trainer(tmp_path / "whole", *flags)
    start = weights(expected)
    expected.train()
    limit_memory(monkeypatch, 24)
    trainer = make_trainer(tmp_path / "parts", *flags)
    trainer.train()
    assert "in 2 streams of at most 4 rows; the result is the same" in capsys.readouterr().err
    # Adam moves a weight whose gradient is nearly zero by its sign alone, so single weights may differ.
    assert (weights(trainer) - weights(expected)).norm() < 1e-2 * (weights(expected) - start).norm()


def test_of_a_large_gradient_every_nth_number_is_compared(tmp_path, monkeypatch):
    model, batch = make_trainer(tmp_path).model, [build_padded(TRAIN[:2])]
    loss, whole = compute_gradient(model, batch, "transformers")
    sizes = [parameter.numel() for parameter in model.parameters()]
    patch(monkeypatch, "COMPARED_NUMBERS", sum(sizes) // 2)  # of an odd sum, so every third
    again, part = compute_gradient(model, batch, "transformers")
    step = 3 if sum(sizes) % 2 else 2
    assert again == loss and torch.equal(part, torch.cat([piece[::step] for piece in whole.split(sizes)]))


def test_rounding_at_random_keeps_sums(monkeypatch):
    patch(monkeypatch, "ROUNDED_WEIGHTS", 1000)
    torch.manual_seed(0)
    held = (
        torch.tensor([0.0, -0.0, 1.0, -1.0078125, 3.3895314e38, float("inf"), -float("inf"), 1e-40]).bfloat16().float()
    )
    same = held.clone()
    round_at_random(same)
    assert torch.equal(same, held)  # what bf16 has
    wrong = torch.full((100,), 2**31 - 1, dtype=torch.int32).view(torch.float32)  # CUDA's NaN
    round_at_random(wrong)
    assert wrong.isnan().all()
    weights = torch.full((2**18,), 1 + 2**-10)  # an eighth of the way from 1 to the next
    round_at_random(weights)
    assert {*weights.unique().tolist()} == {1.0, 1.0078125} and torch.equal(weights, weights.bfloat16().float())
    assert (weights > 1).float().mean().item() == pytest.approx(1 / 8, abs=4 * (7 / 64 / 2**18) ** 0.5)
    downwards = torch.full((2**18,), -1 - 2**-10).view(512, 512)
    round_at_random(downwards)
    assert downwards.double().mean().item() == pytest.approx(-1 - 2**-10, abs=4 * 2**-7 * (7 / 64 / 2**18) ** 0.5)


def test_a_merge_keeps_what_is_less_than_a_step_of_bf16(tmp_path, monkeypatch):
    """To the nearest number of bf16, most of this adapter would be lost."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    before = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    args = script.parse_args(["--model_id", str(TINY), "--final_model_dir", str(tmp_path / "final")])
    saved, again = (
        AutoModelForCausalLM.from_pretrained(merge_adapter(args, str(TINY), str(tmp_path / "adapter")))
        for _ in range(2)
    )
    exact = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), tmp_path / "adapter"
    ).merge_and_unload()
    kept = nearest = wanted = 0.0
    for (name, weight), other, whole in zip(saved.named_parameters(), again.parameters(), exact.parameters()):
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, other)  # the seed decides
        delta, old = (whole - before[name].float()).detach(), before[name].float()
        assert delta.any() == name.endswith(("q_proj.weight", "down_proj.weight"))
        assert delta.any() or torch.equal(weight, before[name])
        kept += ((weight.float() - old) * delta).sum().item()
        nearest += ((whole.bfloat16().float() - old) * delta).sum().item()
        wanted += (delta * delta).sum().item()
    assert kept / wanted == pytest.approx(1, abs=0.1) and nearest / wanted < 0.5
    layers = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(saved.config.num_hidden_layers)}
    places = layers | dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    patch(monkeypatch, "find_place", lambda args: places)  # what "auto" says if the GPUs cannot hold all
    folder = merge_adapter(args, str(TINY), str(tmp_path / "adapter"))
    assert all(
        torch.equal(*pair)
        for pair in zip(saved.parameters(), AutoModelForCausalLM.from_pretrained(folder).parameters())
    )


def test_a_merge_that_changes_nothing_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")  # as it begins: its second factor is zero
    args = script.parse_args(["--model_id", str(TINY), "--final_model_dir", str(tmp_path / "final")])
    with pytest.raises(UserError, match="the trained model equals the base"):
        merge_adapter(args, str(TINY), str(tmp_path / "adapter"))
    assert names(tmp_path) == ["adapter"]


def test_training_that_16_bits_do_not_hold_is_warned_of(tmp_path, monkeypatch, capsys):
    losses = iter([1.0, 2.0])  # of ten tokens
    patch(monkeypatch, "score_batches", lambda *arguments: torch.tensor([next(losses), 10, 0, 1]))
    model = make_trainer(tmp_path).model
    args = script.parse_args(
        ["--model_id", str(TINY), "--lora_rank", "0", "--final_model_dir", str(tmp_path / "final")]
    )
    trained, loss = round_trained(args, model, torch.bfloat16, [], "transformers")
    save_whole(args, trained)
    assert loss == pytest.approx(0.2)
    assert capsys.readouterr().err.startswith(
        "warning: torch.bfloat16 holds less than training changed: held-out loss 0.2000, in 32 bits 0.1000; train longer "
        "or raise --learning_rate\n"
    )
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / ".final.partial")
    assert saved.dtype == torch.bfloat16 and saved.config.use_cache
    with pytest.raises(UserError, match="the trained model equals the base"):
        refuse_unchanged(sum_weights(saved), saved)


def test_a_trained_model_that_comes_back_different_is_refused(capsys):
    args = script.parse_args(["--lora_rank", "0", "--final_model_dir", "final", "--output_dir", "out"])
    check_trained(args, 0.119, 0.1)
    for loss in (0.121, float("nan")):
        with pytest.raises(UserError) as error:
            check_trained(args, loss, 0.1)
        assert str(error.value) == (
            f"the trained model read back does not do what it did: held-out loss {loss:.4f}, before it was saved 0.1000; "
            "nothing was written to final, the checkpoints are safe in out"
        )
    args.save_method = "merged_4bit"
    check_trained(args, 0.121, 0.1)
    assert (
        capsys.readouterr().err == "warning: 4 bits cost something: held-out loss 0.1210, before it was saved 0.1000\n"
    )


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A small random base and an adapter of it that does something: the folder with `base` and `adapter`."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapted")
    make_base(folder / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(r=16, target_modules=script.TARGET_MODULES, init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(folder / "adapter")
    return folder


def score(folder: Path, *flags: str) -> dict:
    args = script.parse_args(
        [
            "--model_id",
            str(folder / "base"),
            "--no-load_in_4bit",
            "--max_new_tokens",
            "4",
            "--final_model_dir",
            str(folder / "final"),
            *flags,
        ]
    )
    rows = make_rows(4, seed=1)
    plan = Plan(2, 1, group_rows(rows), (), True)
    return merge_and_score(args, str(folder / "base"), str(folder / "adapter"), rows, plan)


def test_a_model_merged_into_4_bits_is_loaded_by_plain_transformers(adapted):
    from bitsandbytes.nn import Linear4bit

    results = score(adapted, "--save_method", "merged_4bit")
    assert list(results) == ["base", "adapter", "merged"]
    loss = results["adapter"]["loss"]
    assert results["merged"]["loss"] == pytest.approx(loss, rel=0.05) and results["merged"]["loss"] != loss
    model = AutoModelForCausalLM.from_pretrained(adapted / ".final.partial")
    quantised = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(quantised) == 2 * 7 and all(module.weight.dtype == torch.uint8 for module in quantised)
    state = quantised[0].weight.quant_state
    assert state.quant_type == "nf4" and state.nested and model.config.quantization_config.bnb_4bit_use_double_quant
    assert sorted(path.name for path in (adapted / ".final.partial").glob("*.safetensors")) == ["model.safetensors"]


def test_only_the_adapter_is_kept_and_scored(adapted):
    shutil.rmtree(adapted / ".final.partial", ignore_errors=True)
    results = score(adapted, "--save_method", "lora")
    assert list(results) == ["base", "adapter"] and set(results["adapter"]) == {"answers", "loss"}
    assert names(adapted) == ["adapter", "base"]


def test_only_the_adapter_is_handed_over(tmp_path, monkeypatch, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    args = script.parse_args(["--save_method", "lora", "--lora_rank", "24", "--push_to_hub", "me/tools"])
    row = {"exact_match": 0.5, "ast_match": 0.5, "tool_macro_f1": 0.5, "broken_json": 0, "n": 2}
    report = {
        "args": vars(args),
        "scores": {"base": row, "adapter": row},
        "data": {"train": 8, "held_out": 2},
        "train": {"last_step": 3, "kept_step": 3, "history": []},
        "command": "python x.py --output_dir=/home/me/out ~/a/b hf_abcdefghij",
        "device": "cpu",
        "finished": "2026-01-01 00:00",
    }
    pushed = []
    monkeypatch.setattr(upload, "push_folder", lambda repo, folder: pushed.append((repo, folder)) or "address")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    trained = types.SimpleNamespace(adapter=str(adapter))
    script.hand_over(args, report, trained, None, ([], []), ("qwen3", "hermes", True))
    assert pushed == [("me/tools", str(adapter))] and names(adapter) == ["README.md", "adapter_config.json"]
    card = (adapter / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"
    assert "`Qwen/Qwen3-0.6B` taught to call tools by LoRA of rank 24: the adapter alone." in card
    assert "\npython x.py --output_dir=out b $HF_TOKEN\n" in card
    assert "8 samples of `data/synthetic_finetune_dataset.json`, 2 held out; 3 steps;\ncpu, 2026-01-01 00:00." in card
    served = (
        "vllm serve Qwen/Qwen3-0.6B --enable-lora --max-lora-rank 32 --lora-modules tools={} "
        "--enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3"
    )
    assert served.format("me/tools") in card
    assert capsys.readouterr().out.splitlines() == [
        "push     address",
        f"done     adapter: {adapter}",
        "serve    " + served.format(adapter),
    ]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora_rank", "0", "--load_in_4bit"], "--lora_rank 0 trains the 16-bit weights themselves"),
        (
            ["--lora_rank", "0", "--engine", "unsloth"],
            "leave out --load_in_4bit, --engine unsloth and --save_method lora",
        ),
        (["--lora_rank", "0", "--save_method", "lora"], "--lora_rank 0 trains the 16-bit weights themselves"),
        (["--lora_rank", "-1"], "argument --lora_rank: must be at least 0, got -1"),
        (["--save_method", "gguf"], "argument --save_method: invalid choice: 'gguf'"),
        (["--save_gguf", "q8_0,q9_0"], "argument --save_gguf: must be one of f32, f16, bf16, q8_0, q6_k"),
        (
            ["--save_gguf", "q8_0", "--save_method", "merged_4bit"],
            "--save_gguf is made from the 16-bit model: leave out --save_method merged_4bit",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(FlagError) as error:  # exit code 2
        script.parse_args(flags)
    assert message in str(error.value)


def test_what_a_flag_leaves_open_depends_on_what_is_trained():
    args = script.parse_args(["--lora_rank", "0"])
    assert (args.load_in_4bit, args.learning_rate, args.engine) == (False, 2e-5, "transformers")
    args = script.parse_args(["--lora_rank", "0", "--no-load_in_4bit", "--learning_rate", "1e-4"])
    assert (args.load_in_4bit, args.learning_rate) == (False, 1e-4)
    args = script.parse_args([])
    assert (args.load_in_4bit, args.learning_rate, args.engine, args.save_method) == (
        True,
        2e-4,
        "auto",
        "merged_16bit",
    )


def test_full_fine_tuning_needs_the_16_bit_model():
    args = script.parse_args(["--lora_rank", "0", "--model_id", "some/bnb-4bit"])
    with pytest.raises(UserError, match="--model_id some/bnb-4bit: is quantised, and --lora_rank 0 trains 16-bit"):
        check_merge_base(args, types.SimpleNamespace(quantization_config={"load_in_4bit": True}))


def test_a_base_that_is_quantised_otherwise_is_refused_before_training():
    for flags in ([], ["--save_method", "lora"], ["--merge_model_id", "some/model"]):
        args = script.parse_args(["--model_id", "some/fp8", *flags])
        with pytest.raises(UserError, match="--model_id some/fp8: is quantised by fp8, .*; expected the original"):
            check_merge_base(args, types.SimpleNamespace(quantization_config={"quant_method": "fp8"}))


def test_weights_are_summed_in_pieces(monkeypatch):
    model = torch.nn.Linear(7, 5)
    whole = sum_weights(model)
    patch(monkeypatch, "ROUNDED_WEIGHTS", 4)
    assert sum_weights(model) == pytest.approx(whole) and whole["weight"] == pytest.approx(
        model.weight.double().sum().item()
    )


def test_disk_and_memory_are_reckoned_for_what_is_trained_and_saved(tmp_path):
    config = check_model(str(TINY))
    parameters = count_parameters(config, 0)
    linear, whole = parameters["linear"], parameters["linear"] + parameters["other"]
    assert parameters["adapter"] == 0 and whole == 11_475_264

    def count(*flags):
        return count_final_bytes(script.parse_args([*flags]), parameters)

    assert count() == 2 * whole and count("--save_method", "lora") == 0
    assert count("--save_method", "merged_4bit") == pytest.approx(
        2 * whole + 0.53 * linear + 2 * parameters["other"], abs=1
    )
    assert count("--save_gguf", "q8_0") == pytest.approx(3.1 * whole, abs=1)
    assert count("--save_gguf", "f16,q4_k_m") == pytest.approx((2 + 2 + 2 + 1.1) * whole, abs=1)
    args = script.parse_args(["--lora_rank", "0", "--optim", "adamw_torch", "--final_model_dir", str(tmp_path)])
    plan = Plan(8, 1, [], (), True)
    memory = estimate_memory(args, config, parameters, 1000, plan)  # weights, gradients and moments in fp32
    assert (memory["base"], memory["adapter"]) == (round(2 * whole / 2**30, 2), round(16 * whole / 2**30, 2))
    assert estimate_disk(args, parameters, "adamw_torch", 3)["checkpoints"] == 3 * 12 * whole
    with pytest.raises(UserError, match="for 3,000 checkpoints and the trained model 4"):
        check_disk(args, config, 3000)
    written = list_writes(args, [3])["written"]
    assert not [path for path in written if path.endswith("adapter")] and written[-1] == str(tmp_path)
    written = list_writes(script.parse_args(["--save_method", "lora"]), [3])["written"]
    assert written[-1].endswith("report.html") and [path for path in written if path.endswith("adapter")]


def test_bf16_is_for_gpus_that_compute_it(monkeypatch):
    for computes, dtype in ((True, torch.bfloat16), (False, torch.float16)):  # older ones emulate it
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or computes
        )
        assert to_dtype("cuda") == dtype


def test_a_quantised_model_is_not_spread(monkeypatch):
    places = []

    def load(model_id, device_map, **options):
        places.append((device_map, "max_memory" in options))
        raise OSError("enough")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    for quantised in ({"quant_method": "bitsandbytes"}, None):
        patch(monkeypatch, "load_config", lambda *_, **__: types.SimpleNamespace(quantization_config=quantised))
        with pytest.raises(UserError, match="enough"):
            load_base("some/model", False, place="auto")
    assert places == [("cpu", False), ("auto", True)]
