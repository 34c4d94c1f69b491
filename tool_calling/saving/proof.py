"""The proof of a run: base, adapter and merged model answer the same held-out rows, in a fresh process."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain

from tool_calling.engines.answers import generate_answers, limit_answers
from tool_calling.engines.device import free_gpu
from tool_calling.engines.hub import load_tokenizer
from tool_calling.engines.loading import find_place, load_adapter, load_base, refuse_other_base, warn_if_spread
from tool_calling.engines.losses import measure_loss
from tool_calling.engines.start import quiet_libraries
from tool_calling.engines.tokens import fit_vocabulary
from tool_calling.files import partial_folder, put_in_place
from tool_calling.samples import Sample
from tool_calling.saving.merge import (
    MERGE_SLACK,
    ROUNDED_ANSWERS,
    Trained,
    is_worse,
    quantise_folder,
    read_back,
    refuse_same_adapter,
    refuse_unchanged,
    save_merged,
    sum_weights,
)
from tool_calling.schedule import build_small_batches
from tool_calling.scores import Proof
from tool_calling.streams import Layout
from tool_calling.terminal import UserError, say, warn


@dataclass(frozen=True)
class Questions:
    """What the models answer: samples, how many at once, and how long an answer may be."""

    samples: list[Sample]
    batch_size: int | None  # None: as many as fit
    max_new_tokens: int
    trials: dict[str, list[Sample]] = field(default_factory=dict)  # samples with other lists, by kind: see editions.py

    @classmethod
    def of(
        cls, samples: list[Sample], batch_size: int | None, max_new_tokens: int | None, trials: dict | None = None
    ) -> "Questions":
        """Return questions whose answers may be as long as the longest reference needs, unless a length is given."""
        asked = [*samples, *chain.from_iterable((trials or {}).values())]
        longest = max(len(sample.input_ids) - sample.prompt_length for sample in asked)
        limit = max_new_tokens or limit_answers(asked)
        say("answers", f"at most {limit:,} tokens each; the longest reference has {longest:,}")
        return cls(samples, batch_size, limit, trials or {})

    def ask(self, model, tokenizer, name: str) -> list[str]:
        """Return the greedy answers of a model; `name` is on the progress bar."""
        return generate_answers(model, tokenizer, self.samples, self.batch_size, self.max_new_tokens, name)

    def ask_all(self, model, tokenizer, name: str) -> dict:
        """Return {"answers": those of ask, "trials": {kind: answers to trials}}; without trials, answers alone.

        Trials with the same list are asked together: a batch computes what its prompts have in common once.
        """
        lists, said = {}, {}
        for sample in chain.from_iterable(self.trials.values()):
            lists.setdefault(json.dumps(sample.tools), []).append(sample)
        for samples in lists.values():
            found = replace(self, samples=samples).ask(model, tokenizer, name)
            said |= {id(sample): answer for sample, answer in zip(samples, found)}
        trials = {kind: [said[id(sample)] for sample in samples] for kind, samples in self.trials.items()}
        return {"answers": self.ask(model, tokenizer, name)} | ({"trials": trials} if trials else {})


def prove(trained: Trained, questions: Questions, layout: Layout, before: float | None, compute: Callable) -> Proof:
    """Return the answers of base, adapter and merged model with their scores, and put the merged model in place.

    UserError if what was saved does not do what was trained.

    Args:
        layout: in which losses are compared.
        before: the held-out loss of fully trained weights before they were saved.
        compute: that of start_fresh.
    """
    start = time.perf_counter()
    proof = Proof.of(questions.samples, compute(merge_and_score, trained, questions, layout), questions.trials)
    if not trained.adapter:
        check_trained(trained, proof.results["trained"]["loss"], before)
    elif "merged" in proof.results:
        check_merged(trained, proof)
    if trained.method != "lora":
        put_in_place(trained.final)
    show_saved(trained.method, proof.results, before, time.perf_counter() - start)
    return proof


def load_scored(model_id: str, base: str, load_in_4bit: bool, trust: bool, tokenizer):
    """Return the model that --eval_only names, or its adapter on `base` (see find_base), to be scored."""
    if base == model_id:
        return fit_vocabulary(load_base(base, False, trust, place=find_place()), tokenizer)
    model = fit_vocabulary(load_base(base, load_in_4bit, trust, place=find_place(load_in_4bit)), tokenizer)
    with refuse_other_base(f"--eval_only {model_id}", base):
        model = load_adapter(model, model_id)
    say("load", f"adapter on its base {base} in {4 if load_in_4bit else 16} bits")
    return model


def merge_and_score(trained: Trained, questions: Questions, layout: Layout) -> dict:
    """Answer the questions with base, adapter, and the model to keep read back; return {model: result}.

    A result is {"answers": [...], "loss": held-out loss}; that of the base has no loss, and neither has "start", the
    adapter that training went on from, in the place of the base. The first and the last have answers to "trials", if
    there are any. This runs in a fresh process, because Unsloth changes Transformers' classes for good, and the
    proof must hold where no Unsloth is. Adapters stand on the base that they were trained on, in 4 bits if that was
    so; the others have 16. Without an adapter, the trained model is already in its partial folder.
    """
    quiet_libraries()
    trust, place, small_place = trained.trust, trained.find_place(), trained.find_place(four_bit=True)
    tokenizer, results = load_tokenizer(trained.adapter or str(partial_folder(trained.final)), trust), {}
    batches = build_small_batches(questions.samples, layout, len(tokenizer))
    if trained.start:
        refuse_same_adapter(trained)

    def score(name, model):
        asked = questions if name != "adapter" or trained.method == "lora" else replace(questions, trials={})
        answers = asked.ask_all(model, tokenizer, name)
        free_gpu()  # of what answers needed; a loss needs larger pieces
        results[name] = {**answers, "loss": measure_loss(model, batches, "transformers")}

    def load(model_id: str, four_bit: bool):
        place = trained.find_place(four_bit)
        return fit_vocabulary(load_base(model_id, four_bit, trust, place=place), tokenizer)

    def load_trained_on():
        return load(trained.model_id, True) if trained.four_bit else load(trained.base_id, False)

    if trained.start:  # it stands on the base that both were trained on
        base = load_adapter(load_trained_on(), trained.start)
    else:
        base = load(trained.base_id, False)
    warn_if_spread(base)
    name = "start" if trained.start else "base"
    results[name] = questions.ask_all(base, tokenizer, name)
    sums = None if trained.adapter else sum_weights(base)
    if trained.adapter:
        if trained.four_bit or trained.start:
            del base
            free_gpu()
            base = load_trained_on()
        score("adapter", load_adapter(base, trained.adapter))
    del base
    free_gpu()
    if trained.method == "lora":
        return results
    folder = save_merged(trained, tokenizer, batches) if trained.adapter else partial_folder(trained.final)
    model = read_back(folder, trust, place)
    if not trained.adapter:  # save_merged has done so
        refuse_unchanged(sums, model)
    if trained.method == "merged_4bit":
        del model
        free_gpu()
        quantise_folder(folder, trust, small_place)
        model = read_back(folder, trust, small_place)
    score("merged" if trained.adapter else "trained", model)
    return results


def check_merged(trained: Trained, proof: Proof) -> None:
    """Compare the merged model read back with the adapter it came from; UserError if they do not do the same.

    After 16-bit training both are the same model up to the rounding of the merge, and must answer alike wherever the
    adapter is exact; elsewhere rounding decides which wrong answer an unsure model gives. After 4-bit training the
    merged model stands on the unquantised base, a little different and usually better, so loss and score decide; where
    its exact answers are fewer, but chance may do as much, a warning says so. A merged model in 4 bits may be worse
    than its adapter: a warning says by how much. One answer alone, which rounding may tip, proves nothing.
    """
    expected, got = proof.results["adapter"], proof.results["merged"]
    exact, kept = ([verdict.exact for verdict in proof.verdicts[name]] for name in ("adapter", "merged"))
    lost, gained = (sum(one and not other for one, other in zip(*pair)) for pair in ((exact, kept), (kept, exact)))
    fewer = lost - gained > max(MERGE_SLACK * len(exact), 1)
    said = (proof.said[name] for name in ("adapter", "merged"))
    different = sum(sure and a.text != b.text for sure, a, b in zip(exact, *said)) / len(exact)
    tipped = max(ROUNDED_ANSWERS, 1 / len(exact))
    wrong = is_worse(got["loss"], expected["loss"]) or (fewer and not may_be_chance(lost, gained))
    before, after = (proof.scores[name]["exact_match"] for name in ("adapter", "merged"))
    found = f"held-out loss {got['loss']:.4f}, adapter {expected['loss']:.4f}; exact {after:.1%}, adapter {before:.1%}"
    if trained.method == "merged_4bit" and math.isfinite(got["loss"]):
        if wrong:
            warn(f"4 bits cost something: {found}")
    elif wrong or not math.isfinite(got["loss"]) or (not trained.four_bit and different > tipped):
        shutil.rmtree(partial_folder(trained.final), ignore_errors=True)
        advice = "what is learned on a base in 4 bits may be worth less on it in 16: train longer, or with "
        raise UserError(
            f"the merged model does not do what the adapter does: {found}; {different:.1%} of the answers are no "
            f"longer its exact ones; nothing was written to {trained.final}, the adapter is safe in {trained.adapter}"
            + (f"; {advice}--no-load_in_4bit" if trained.four_bit else "")
        )
    elif fewer:
        warn(f"the merged model has fewer exact answers, though chance may do as much: {found}")


def may_be_chance(lost: int, gained: int) -> bool:
    """Return whether two equal models differ as much by chance: in more than 5 of 100 cases (sign test, one side)."""
    rows = lost + gained
    return sum(math.comb(rows, heads) for heads in range(lost, rows + 1)) / 2**rows > 0.05


def check_trained(trained: Trained, loss: float, expected: float) -> None:
    """Compare the held-out loss of a trained model read back with that of the weights it was saved from."""
    if not is_worse(loss, expected):
        return
    found = f"held-out loss {loss:.4f}, before it was saved {expected:.4f}"
    if trained.method == "merged_4bit" and math.isfinite(loss):
        return warn(f"4 bits cost something: {found}")
    safe = f"nothing was written to {trained.final}, the checkpoints are safe in {trained.settings['output_dir']}"
    raise UserError(f"the trained model read back does not do what it did: {found}; {safe}")


def show_saved(method: str, results: dict, before: float | None, seconds: float) -> None:
    """Print the loss of the model that is kept beside that of its origin: the adapter, or the weights in memory."""
    lists = [asked for result in results.values() for asked in (result["answers"], *result.get("trials", {}).values())]
    name, answers = list(results)[-1], sum(map(len, lists))
    text = f"held-out loss {results[name]['loss']:.4f}"
    if name != "adapter":
        text = f"{'4' if method == 'merged_4bit' else '16'}-bit, read back by a fresh process: {text}, "
        text += f"adapter {results['adapter']['loss']:.4f}" if name == "merged" else f"before saving {before:.4f}"
    say("merge" if name == "merged" else "save", f"{text} ({seconds:.0f} s with {answers:,} answers)")
