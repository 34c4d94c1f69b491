"""How main puts the stages together: what each of them finds must decide what the run does and leaves."""

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ALARM, WEATHER, write_jsonl
from jobs import ROWS
from small import TRAIN, make_schedule
from train_small import make_base

import train_qwen3_tool_calling as script
from tool_calling import samples
from tool_calling.arguments import pick
from tool_calling.engines import compat, graphs, tokens
from tool_calling.files import lock_folder, partial_folder
from tool_calling.samples import render_examples
from tool_calling.saving import proof
from tool_calling.saving.merge import read_back
from tool_calling.saving.proof import merge_and_score
from tool_calling.schedule import Batching, plan_schedule
from tool_calling.terminal import UserError
from tool_calling.training import loop, selfcheck, trainer


class Reached(Exception):
    """Ends a run at the stage that a test looks at."""


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A folder with base, rows and tools."""
    folder = tmp_path_factory.mktemp("stages")
    make_base(folder / "base")
    write_jsonl(folder / "rows.jsonl", ROWS)
    (folder / "tools.json").write_text(json.dumps([WEATHER, ALARM]))
    return folder


def run(job: Path, folder: Path, *more: object) -> dict:
    """Run in this process, with one step and short answers."""
    return script.main(
        [
            *("--model_id", job / "base"),
            *("--dataset_path", job / "rows.jsonl"),
            *("--tools_path", job / "tools.json"),
            *("--output_dir", folder / "out"),
            *("--final_model_dir", folder / "final"),
            *("--no-load_in_4bit", "--max_steps", 1, "--warmup_steps", 0),
            *("--train_test_split", 0.25, "--eval_samples", 4, "--max_new_tokens", 4),
            *more,
        ]
    )


def stop(*found):
    raise Reached(*found)


@pytest.mark.parametrize(
    "rank, kept, message",
    [
        (4, "adapter", "the merged model does not do what the adapter does: held-out loss 9.0000, adapter 0.1000"),
        (0, "checkpoint-1", "the trained model read back does not do what it did: held-out loss 9.0000"),
    ],
)
def test_a_saved_model_that_is_worse_takes_no_final_name(job, tmp_path, monkeypatch, rank, kept, message):
    def prove(function, trained, questions, layout):
        assert function is merge_and_score and (trained.adapter is None) == (rank == 0)
        partial_folder(trained.final).mkdir(exist_ok=True)
        answers = [row.completion for row in questions.samples]
        losses = {"base": None, "adapter": 0.1, "merged": 9.0} if trained.adapter else {"base": None, "trained": 9.0}
        return {name: {"answers": answers, "loss": loss} for name, loss in losses.items()}

    monkeypatch.setattr(script, "start_fresh", lambda module: nullcontext(prove))
    with pytest.raises(UserError, match=message):
        run(job, tmp_path, "--lora_rank", rank)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / kept).is_dir()


def test_only_an_adapter_is_saved_if_so_wished(job, tmp_path, monkeypatch, capsys):
    here = nullcontext(lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(script, "start_fresh", lambda module: here)
    report = run(job, tmp_path, "--save_method", "lora", "--lora_rank", 4)
    assert list(report["scores"]) == ["base", "adapter"] and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "--enable-lora" in capsys.readouterr().out.splitlines()[-2]  # the last one names the tools


def test_a_run_whose_check_fails_goes_on_without_sharing(job, tmp_path, monkeypatch):
    monkeypatch.setattr(selfcheck, "check_sharing", lambda *_: False)
    monkeypatch.setattr(loop, "train", lambda trainer, *_: stop(trainer.schedule.layout.share_prefix))
    with pytest.raises(Reached) as reached:
        run(job, tmp_path)
    assert reached.value.args == (False,)
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["share_prefix"] is False


@pytest.mark.parametrize(
    "check, flags",
    [
        ("tool_calling.saving.upload.check_hub", ["--push_to_hub", "me/tools"]),
        ("train_qwen3_tool_calling.find_gguf_tools", ["--save_gguf", "q8_0"]),
        ("tool_calling.engines.choices.check_report_to", []),
        ("tool_calling.engines.choices.check_optim", []),
        ("tool_calling.engines.hub.check_model", []),
        ("tool_calling.engines.hub.check_dropout", []),
        ("tool_calling.engines.hub.check_merge_base", ["--merge_model_id", "some/original"]),
    ],
)
def test_what_would_fail_in_the_end_is_looked_at_before_a_model_is_loaded(job, tmp_path, monkeypatch, check, flags):
    monkeypatch.setattr(check, lambda *_, **__: stop(check))
    monkeypatch.setattr(script, "load_model", lambda *_: pytest.fail("too late"))
    with pytest.raises(Reached, match=check):
        run(job, tmp_path, *flags)
    assert not (tmp_path / "final").exists()


def test_two_runs_cannot_write_one_final_folder(job, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "load_model", stop)
    lock = lock_folder(str(tmp_path / "final"), "--final_model_dir")
    with pytest.raises(UserError, match="--final_model_dir .*: in use by another run"):
        run(job, tmp_path)
    lock.close()
    with pytest.raises(Reached):
        run(job, tmp_path)


@pytest.mark.parametrize(
    "flags, recorded",
    [
        ([], True),
        (["--flash_attention"], True),
        (["--no-cuda_graphs"], False),
        (["--lora_dropout", "0.1"], False),
        (["--no-share_prefix"], False),
        (["--max_seq_length", "9"], True),  # a step takes several streams
    ],
)
def test_unsloth_records_streams_where_flags_allow_it(monkeypatch, flags, recorded):
    model, noted, asked, fitted, compiled = SimpleNamespace(config=None, modules=list), [], [], [], []
    unsloth = SimpleNamespace(
        from_pretrained=lambda *_, **options: asked.append(options) or (model, None),
        get_peft_model=lambda model, **options: asked.append(options) or model,
    )
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=unsloth))
    monkeypatch.setattr(compat, "compile_attention", compiled.append)
    monkeypatch.setattr(compat, "take_all_targets", lambda: None)
    monkeypatch.setattr(trainer, "build_trainer", lambda *given: SimpleNamespace(config=given[3]))
    monkeypatch.setattr(graphs, "find_recorded", lambda schedule, config, checkpointing: schedule.layout.lengths)
    monkeypatch.setattr(graphs, "read_streams", lambda model, recorded: noted.append(recorded))
    monkeypatch.setattr(tokens, "prepare_tokens", lambda *given: fitted.append(given) or {"trainable_token_indices": 7})
    args = script.parse_args(["--gradient_checkpointing", "on", *flags])
    schedule = plan_schedule(TRAIN, pick(Batching, args), engine="unsloth")
    assert script.load_model(args, "unsloth", schedule, "its tokenizer") is model
    assert fitted == [(model, "its tokenizer", TRAIN, ["auto"], [], False)] and asked[1]["trainable_token_indices"] == 7
    built = script.build_run_trainer(args, model, None, schedule, [], "unsloth")
    assert built.config.gradient_checkpointing and not built.can_recompute
    assert noted == ([] if "--no-share_prefix" in flags else [(128,) if recorded else ()])
    assert compiled == ([] if "--no-share_prefix" in flags else ["--flash_attention" in flags])
    assert asked[0]["use_safetensors"] and asked[0]["load_in_4bit"] and not asked[0]["trust_remote_code"]
    assert asked[1]["use_gradient_checkpointing"] == "unsloth" and asked[1]["target_modules"] == args.target_modules


def test_what_makes_a_checkpoint_the_best():
    def settings(*flags):
        config = script.to_sft_config(script.parse_args([*flags]), make_schedule([], 8), True)
        return config.load_best_model_at_end and (config.metric_for_best_model, config.greater_is_better)

    assert settings() is False
    assert settings("--metric_for_best", "exact_match") == ("exact_match", True)
    assert settings("--metric_for_best", "loss") == ("loss", False)
    assert settings("--early_stopping_patience", "2") == ("exact_match", True)


def test_what_is_scored_alone_and_in_how_many_bits(job, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    adapter, other = tmp_path / "adapter", write_jsonl(tmp_path / "other.jsonl", ROWS[:3])
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(job / "base")}))
    flags = ["--dataset_path", job / "rows.jsonl", "--tools_path", job / "tools.json", "--output_dir", tmp_path / "out"]
    with pytest.raises(UserError, match="the adapter holds no .*safetensors"):
        script.main([*flags, "--eval_only", adapter])
    save_file({}, adapter / "adapter_model.safetensors")
    monkeypatch.setattr(proof, "load_base", lambda base, four_bit, *_, **__: stop(base, four_bit))
    render, rendered = render_examples, []

    def note(tokenizer, examples, *more):
        rendered.append([example.source for example in examples])
        return render(tokenizer, examples, *more)

    monkeypatch.setattr(samples, "render_examples", note)
    for model, more, four_bit in (
        (adapter, [], True),
        (adapter, ["--no-load_in_4bit"], False),
        (job / "base", [], False),
        (adapter, ["--eval_dataset_path", other], True),
    ):
        with pytest.raises(Reached) as reached:
            script.main([*flags, "--eval_only", model, *more])
        assert reached.value.args == (str(job / "base"), four_bit)
    assert rendered[-1] == [f"{other}:{i}" for i in (1, 2, 3)] and len(rendered[0]) == len(ROWS)


def test_a_saved_model_with_missing_stray_or_broken_weights_is_refused(job, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    whole = load_file(job / "base" / "model.safetensors")
    name = next(name for name in whole if name.endswith("q_proj.weight"))
    shutil.copytree(job / "base", tmp_path / "model")
    for weights, message in (
        ({**whole, "of.nobody": torch.zeros(1)}, "has unknown weights: of.nobody"),
        ({key: weight for key, weight in whole.items() if key != name}, f"has no weights for {name}"),
        ({**whole, name: whole[name] * torch.nan}, f"weights that are not finite: {name}"),
    ):
        save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=message):
            read_back(tmp_path / "model")
    save_file(whole, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert torch.equal(read_back(tmp_path / "model").state_dict()[name], whole[name])
