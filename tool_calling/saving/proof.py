"""Base, adapter and merged model scored on the same held-out rows."""

import argparse
import math
import shutil

from tool_calling.engines.answers import generate_answers
from tool_calling.engines.hub import load_tokenizer
from tool_calling.engines.loading import find_place, load_adapter, load_base, warn_if_spread
from tool_calling.engines.losses import measure_loss
from tool_calling.engines.start import free_gpu, quiet_libraries
from tool_calling.files import partial_folder
from tool_calling.prompts import Sample
from tool_calling.saving.merge import (
    MERGE_SLACK,
    is_worse,
    merge_adapter,
    quantise_folder,
    read_back,
    refuse_unchanged,
    sum_weights,
)
from tool_calling.schedule import Plan, to_small_batches
from tool_calling.terminal import UserError, say, warn


def merge_and_score(
    args: argparse.Namespace, base_id: str, adapter: str | None, samples: list[Sample], plan: Plan
) -> dict:
    """Answer the samples with base, adapter, and the model to keep read back; return {name: result} of each.

    Runs in a fresh process, because Unsloth changes Transformers' classes for good, and the proof must hold where no
    Unsloth is. The adapter stands on the base that it was trained on, in 4 bits if that was so; the others have 16.
    Without an adapter, the trained model is in its partial folder.
    """
    quiet_libraries()
    trust, place, small_place = args.trust_remote_code, find_place(args), find_place(args, four_bit=True)
    tokenizer, results = load_tokenizer(args.model_id, trust), {}
    batches = to_small_batches(samples, plan)

    def score(name, model):
        answers = generate_answers(model, tokenizer, samples, args, name)
        free_gpu()  # of what answers needed; a loss needs larger pieces
        results[name] = {"answers": answers, "loss": measure_loss(model, batches, "transformers")}

    base = load_base(base_id, False, trust, place=place)
    warn_if_spread(base)
    results["base"] = {"answers": generate_answers(base, tokenizer, samples, args, "base")}
    sums = None if adapter else sum_weights(base)
    if adapter:
        if args.load_in_4bit:
            del base
            free_gpu()
            base = load_base(args.model_id, True, trust, place=small_place)
        score("adapter", load_adapter(base, adapter))
    del base
    free_gpu()
    if args.save_method == "lora":
        return results
    folder = merge_adapter(args, base_id, adapter) if adapter else partial_folder(args.final_model_dir)
    model = read_back(folder, trust, place)
    if not adapter:  # merge_adapter has seen to that
        refuse_unchanged(sums, model)
    if args.save_method == "merged_4bit":
        del model
        free_gpu()
        quantise_folder(folder, trust, small_place)
        model = read_back(folder, trust, small_place)
    score("merged" if adapter else "trained", model)
    return results


def check_merged(args: argparse.Namespace, adapter: str, results: dict, scores: dict, exact: list[bool]) -> None:
    """Compare the merged model read back with the adapter it came from; a mismatch is a UserError.

    After 16-bit training both are the same model up to the rounding of the merge and must answer alike wherever the
    adapter's answer is `exact`; where it is not, the model is unsure, and rounding decides what wrong answer it gives.
    After 4-bit training the merged model stands on the unquantised base, a little different and as a rule better, so
    loss and score decide. A merged model in 4 bits may be worse than its adapter; the user who asked for it is told by
    how much. One answer alone proves nothing, however few there are: rounding may tip it.
    """
    expected, got = results["adapter"], results["merged"]
    slack = max(MERGE_SLACK, 1 / len(exact))
    # Rounded to whole rows: a difference of two shares can be a little more than the share that it is.
    worse = round((scores["adapter"]["exact_match"] - scores["merged"]["exact_match"]) * len(exact)) / len(exact)
    different = sum(sure and a != b for sure, a, b in zip(exact, expected["answers"], got["answers"])) / len(exact)
    wrong = is_worse(got["loss"], expected["loss"]) or worse > slack
    found = (
        f"held-out loss {got['loss']:.4f}, adapter {expected['loss']:.4f}; exact "
        f"{scores['merged']['exact_match']:.1%}, adapter {scores['adapter']['exact_match']:.1%}"
    )
    if args.save_method == "merged_4bit" and math.isfinite(got["loss"]):
        return warn(f"4 bits cost something: {found}") if wrong else None
    if wrong or not math.isfinite(got["loss"]) or (not args.load_in_4bit and different > slack):
        shutil.rmtree(partial_folder(args.final_model_dir), ignore_errors=True)
        advice = (
            "; what is learned on a base in 4 bits may be worth less on it in 16: train longer, or with "
            "--no-load_in_4bit"
        )
        raise UserError(
            f"the merged model does not do what the adapter does: {found}; {different:.1%} of the answers "
            f"are no longer its exact ones; nothing was written to {args.final_model_dir}, the adapter is "
            f"safe in {adapter}" + advice * args.load_in_4bit
        )


def check_trained(args: argparse.Namespace, loss: float, expected: float) -> None:
    """Compare the held-out loss of the trained model read back with that of the weights it was saved from."""
    if not is_worse(loss, expected):
        return
    found = f"held-out loss {loss:.4f}, before it was saved {expected:.4f}"
    if args.save_method == "merged_4bit" and math.isfinite(loss):
        return warn(f"4 bits cost something: {found}")
    raise UserError(
        f"the trained model read back does not do what it did: {found}; nothing was written to "
        f"{args.final_model_dir}, the checkpoints are safe in {args.output_dir}"
    )


def show_saved(args: argparse.Namespace, results: dict, before: float | None, seconds: float) -> None:
    """Print how the model that is kept scores beside what it was made from: the adapter, or the weights in memory."""
    name, answers = list(results)[-1], sum(len(result["answers"]) for result in results.values())
    text = f"held-out loss {results[name]['loss']:.4f}"
    if name != "adapter":
        text = f"{'4' if args.save_method == 'merged_4bit' else '16'}-bit, read back by a fresh process: {text}, "
        text += f"adapter {results['adapter']['loss']:.4f}" if name == "merged" else f"before saving {before:.4f}"
    say("merge" if name == "merged" else "save", f"{text} ({seconds:.0f} s with {answers:,} answers)")
