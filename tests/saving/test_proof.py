"""The proof: what is saved is scored, compared with what was trained, and refused if it does not do the same."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from jobs import names
from peft import LoraConfig, get_peft_model
from train_small import make_base, make_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_qwen3_tool_calling as script
from tool_calling.files import partial_folder
from tool_calling.samples import Sample
from tool_calling.saving.merge import Trained
from tool_calling.saving.proof import Questions, check_merged, check_trained, merge_and_score
from tool_calling.scores import Proof, Verdict, count_scores, read_answer
from tool_calling.streams import Layout
from tool_calling.terminal import UserError


def make_trained(base: str, final: str, adapter: str | None, *flags: str) -> Trained:
    """Return what was trained with these flags."""
    args = script.parse_args(["--final_model_dir", final, "--output_dir", "out", *flags])
    return Trained(base, base, None, "transformers", final, args.save_method, vars(args), adapter)


# ---------------------------------------------------------------------------------------------------------------
# Compared with what was trained
# ---------------------------------------------------------------------------------------------------------------
def test_a_merge_that_went_wrong_keeps_the_adapter_and_no_folder(tmp_path, capsys):
    trained = make_trained("base", str(tmp_path / "final"), "out/adapter")

    def check(merged_loss, different=0, loss=0.1, rows=100, wrong=0, lost=0, gained=0, before=""):
        partial_folder(trained.final).mkdir(exist_ok=True)
        answers = ["b"] * different + [before + "a"] * (rows - different)
        results = {
            "adapter": {"loss": loss, "answers": ["a"] * rows},
            "merged": {"loss": merged_loss, "answers": answers},
        }
        samples = [Sample("x:1", [1, 2], 1, "a")] * rows
        exact = [False] * wrong + [True] * (rows - wrong)
        kept = [True] * gained + [False] * (wrong - gained) + [True] * (rows - wrong - lost) + [False] * lost
        verdicts = {
            name: [Verdict(hit, hit, False, (), ()) for hit in hits]
            for name, hits in (("adapter", exact), ("merged", kept))
        }
        said = {name: [*map(read_answer, result["answers"], samples)] for name, result in results.items()}
        scores = {name: count_scores(rows) for name, rows in verdicts.items()}
        check_merged(trained, Proof(samples, results, said, verdicts, scores))

    check(0.119, different=50)  # 4-bit: loss and score decide
    check(8.15, loss=8.0)  # 2 % of a large loss, 0.02 of a small one
    check(0.1, lost=2)
    with pytest.raises(UserError, match="held-out loss 0.1210, adapter 0.1000; .*the adapter is safe in out/adapter"):
        check(0.121)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="exact 85.0%, adapter 90.0%"):  # by chance in 3 of 100 cases
        check(0.1, wrong=10, lost=5)
    with pytest.raises(UserError, match="safe in out/adapter; .* train longer, or with --no-load_in_4bit$"):
        check(0.1, wrong=10, lost=5)
    with pytest.raises(UserError, match="held-out loss nan"):
        check(float("nan"))
    check(0.1, rows=10, wrong=2, lost=1)
    check(0.1, rows=200, wrong=4, lost=4)
    with pytest.raises(UserError, match="exact 95.5%, adapter 98.0%"):
        check(0.1, rows=200, wrong=4, lost=5)
    assert capsys.readouterr().err == ""
    check(0.1, rows=200, wrong=4, lost=6, gained=1)  # by chance in 6 of 100
    assert capsys.readouterr().err == (
        "warning: the merged model has fewer exact answers, though chance may do as much: held-out loss 0.1000, "
        "adapter 0.1000; exact 95.5%, adapter 98.0%\n"
    )
    trained = replace(trained, method="merged_4bit")
    check(0.5, wrong=10, lost=40)
    assert capsys.readouterr().err == (
        "warning: 4 bits cost something: held-out loss 0.5000, adapter 0.1000; exact 50.0%, adapter 90.0%\n"
    )
    assert partial_folder(trained.final).is_dir()
    with pytest.raises(UserError, match="held-out loss nan"):
        check(float("nan"))
    trained = make_trained("base", str(tmp_path / "final"), "out/adapter", "--no-load_in_4bit")
    check(0.119)
    check(0.1, different=5)
    with pytest.raises(UserError, match="6.0% of the answers are no longer its exact ones; .* safe in out/adapter$"):
        check(0.1, different=6)  # 16-bit: the same model, the same answers
    check(0.1, before="<think>\nOther reasons.\n</think>\n\n")
    check(0.1, different=50, wrong=50)  # but not where it knows no answer
    with pytest.raises(UserError, match="6.0% of the answers"):
        check(0.1, different=56, wrong=50)
    check(0.1, different=1, rows=6, lost=1)
    with pytest.raises(UserError, match="33.3% of the answers"):
        check(0.1, different=2, rows=6)


@pytest.mark.parametrize(
    "lengths, completion, given, limit",
    [
        ([20, 30], "Hello!", None, 94),
        ([20, 200], "Hello!", None, 300),
        ([20, 200], "<think>\nWhy.\n</think>\n\nHello!", None, 656),
        ([20, 200], "Hello!", 7, 7),
    ],
)
def test_answers_may_be_as_long_as_the_longest_reference_needs(capsys, lengths, completion, given, limit):
    samples = [Sample(f"x:{length}", [1] * (1000 + length), 1000, completion) for length in lengths]
    assert Questions.of(samples, 64, given) == Questions(samples, 64, limit)
    expected = f"answers  at most {limit} tokens each; the longest reference has {lengths[-1]}\n"
    assert capsys.readouterr().out == expected


def test_trials_with_one_list_are_asked_together(monkeypatch):
    """A batch computes what its prompts have in common once, and answers come back in the order of the questions."""
    asked = []

    def answer(model, tokenizer, samples, batch_size, longest, name):
        asked.append([sample.source for sample in samples])
        return [f"{name} {sample.source}" for sample in samples]

    monkeypatch.setattr("tool_calling.saving.proof.generate_answers", answer)
    lists = {"a": [{"type": "a"}], "b": [{"type": "b"}], "c": [{"type": "a"}]}  # the first and the last are equal
    trials = {
        "masked": [Sample("1", [1, 2], 1, tools=lists["a"]), Sample("2", [1, 2], 1, tools=lists["b"])],
        "unseen": [Sample("3", [1, 2], 1, tools=lists["c"])],
    }
    questions = Questions.of([Sample("0", [1, 2], 1)], 64, 7, trials)
    expected = {"masked": ["x 1", "x 2"], "unseen": ["x 3"]}
    assert questions.ask_all(None, None, "x") == {"answers": ["x 0"], "trials": expected}
    assert asked == [["1", "3"], ["2"], ["0"]]
    assert Questions.of([Sample("0", [1, 2], 1)], 64, 7).ask_all(None, None, "x") == {"answers": ["x 0"]}


def test_a_trained_model_that_comes_back_different_is_refused(capsys):
    trained = make_trained("base", "final", None, "--lora_rank", "0")
    check_trained(trained, 0.119, 0.1)
    for loss in (0.121, float("nan")):
        with pytest.raises(UserError) as error:
            check_trained(trained, loss, 0.1)
        assert str(error.value) == (
            f"the trained model read back does not do what it did: held-out loss {loss:.4f}, before it was saved "
            "0.1000; nothing was written to final, the checkpoints are safe in out"
        )
    check_trained(replace(trained, method="merged_4bit"), 0.121, 0.1)
    assert (
        capsys.readouterr().err == "warning: 4 bits cost something: held-out loss 0.1210, before it was saved 0.1000\n"
    )


# ---------------------------------------------------------------------------------------------------------------
# Scored
# ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    """A small random base and an adapter of it that does something: the folder with `base` and `adapter`."""
    folder = tmp_path_factory.mktemp("adapted")
    make_base(folder / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(r=16, target_modules=script.TARGET_MODULES, init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(folder / "adapter")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "adapter")
    return folder


def score(folder: Path, method: str) -> dict:
    """Merge and score the adapter with four samples, in this process."""
    base, final, adapter = (str(folder / name) for name in ("base", "final", "adapter"))
    trained = make_trained(base, final, adapter, "--no-load_in_4bit", "--save_method", method)
    return merge_and_score(trained, Questions(make_rows(4, seed=1), 64, 4), Layout(2))


def test_a_model_merged_into_4_bits_is_loaded_by_plain_transformers(adapted):
    results = score(adapted, "merged_4bit")
    assert list(results) == ["base", "adapter", "merged"]
    loss = results["adapter"]["loss"]
    assert results["merged"]["loss"] == pytest.approx(loss, rel=0.05) and results["merged"]["loss"] != loss
    model = AutoModelForCausalLM.from_pretrained(adapted / ".final.partial")
    quantised = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(quantised) == 2 * 7 and all(module.weight.dtype == torch.uint8 for module in quantised)
    state = quantised[0].weight.quant_state
    assert state.quant_type == "nf4" and state.nested and model.config.quantization_config.bnb_4bit_use_double_quant
    assert sorted(path.name for path in (adapted / ".final.partial").glob("*.safetensors")) == ["model.safetensors"]
    config = json.loads((adapted / ".final.partial" / "config.json").read_text())
    assert (config["torch_dtype"], config["rope_theta"]) == (config["dtype"], config["rope_parameters"]["rope_theta"])


def test_only_the_adapter_is_kept_and_scored(adapted):
    shutil.rmtree(adapted / ".final.partial", ignore_errors=True)
    results = score(adapted, "lora")
    assert list(results) == ["base", "adapter"] and set(results["adapter"]) == {"answers", "loss"}
    assert names(adapted) == ["adapter", "base"]
