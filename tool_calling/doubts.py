"""Doubts: labels that a model contradicts which was trained without them, the surest first."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from rich.progress import track

from tool_calling.engines.answers import generate_answers
from tool_calling.engines.device import free_gpu
from tool_calling.engines.loading import copy_trained, set_trained
from tool_calling.engines.losses import score_batch
from tool_calling.files import write_file
from tool_calling.page import render_report
from tool_calling.prompts import find_call_end
from tool_calling.report import to_plain
from tool_calling.samples import Sample
from tool_calling.scores import Said, judge, read_answer, read_reference
from tool_calling.streams import Layout
from tool_calling.terminal import cut_text, plural, print_safely, say
from tool_calling.training.loop import train_at_once

CLEAR = 1.0  # nats by which a model must prefer its own answer: then it finds the label less than half as likely
SHOWN_ROWS = 5  # printed; the page has more, and doubt.jsonl all


class Doubt(NamedTuple):
    """A label and the answer of a model that contradicts it, each with its loss in nats under that model, see build."""

    sample: Sample
    answer: Said
    label_loss: float
    answer_loss: float
    fold: int

    @property
    def margin(self) -> float:
        """The log-probability that the model gives its own answer over the label."""
        return self.label_loss - self.answer_loss


@dataclass(frozen=True)
class Doubter:
    """How models are asked: the tokenizer, how many answers at once (None: as many as fit), and how long each."""

    tokenizer: object
    engine: str
    batch_size: int | None
    max_new_tokens: int

    def ask_folds(self, model, sides: list[list[Sample]], make_trainer: Callable) -> list[Doubt]:
        """Return the doubts about the samples of each side, by the model as it is after training on all others.

        Args:
            make_trainer: returns the trainer of the model on samples.
        """
        start, doubts = copy_trained(model), []
        for fold, side in enumerate(sides, start=1):
            began = time.perf_counter()
            others = [sample for other in sides if other is not side for sample in other]
            trainer = make_trainer(others)
            set_trained(model, start)
            loss = train_at_once(trainer)
            found = self.find(model, side, trainer.layout, fold)
            doubts += found
            done = f"trained on {len(others):,} in {trainer.state.global_step:,} steps, loss {loss:.4f}"
            told = f"{len(found):,} of the other {len(side):,} are in doubt ({time.perf_counter() - began:.0f} s)"
            say("fold", f"{fold} of {len(sides)}: {done}; {told}")
            del trainer
            free_gpu()
        return doubts

    def find(self, model, samples: list[Sample], layout: Layout, fold: int) -> list[Doubt]:
        """Return the doubts of a model about samples that it was not trained on.

        A label that it would write itself, or finds likely, is not in doubt: only the other samples are answered.
        """
        name = f"fold {fold}"
        model.eval()
        samples = [sample for sample in samples if sample.tools]  # others have no calls to contradict
        scores = self.measure(model, samples, layout, name)
        unsure = [sample for sample, (loss, same) in zip(samples, scores) if not same and loss >= CLEAR]
        settings = (self.batch_size, self.max_new_tokens, name)
        answers = generate_answers(model, self.tokenizer, unsure, *settings) if unsure else []
        pairs = [(sample, answer) for sample, answer in zip(unsure, answers) if contradicts(answer, sample)]
        both = [side for sample, answer in pairs for side in self.build(sample, answer)]
        losses = [loss for loss, _ in self.measure(model, both, layout, name)]
        found = [
            Doubt(sample, read_answer(answer, sample), label, own, fold)
            for (sample, answer), label, own in zip(pairs, losses[::2], losses[1::2])
        ]
        return [doubt for doubt in found if doubt.margin >= CLEAR]

    def measure(self, model, samples: list[Sample], layout: Layout, name: str) -> list[tuple[float, bool]]:
        """Return (loss in nats, whether greedy decoding reproduces it) of each sample's completion."""
        found, parts = {}, layout.split(samples) if samples else []
        for part in track(parts, f"labels of {name}", transient=True, disable=not sys.stdout.isatty()):
            scores = (values.tolist() for values in score_batch(model, layout.build(part), self.engine))
            found |= {id(sample): pair for sample, *pair in zip(part, *scores)}
        return [found[id(sample)] for sample in samples]

    @cached_property
    def call_end(self) -> int:
        """The token that ends an answer with calls."""
        return self.tokenizer.convert_tokens_to_ids(find_call_end(self.tokenizer))

    def build(self, sample: Sample, answer: str) -> tuple[Sample, Sample]:
        """Return (label, answer) as samples whose completions are compared: both after the reasoning of the answer.

        Reasoning is free text, in which a model never agrees with a label; what counts is what it leads to. Where one
        of the two has no call they end with the first token that differs, as what a text says in other words is no
        less likely.
        """
        got, label = read_answer(answer, sample), read_reference(sample)
        texts = [answer.removesuffix(got.text), label.text, got.text]
        thought, *sides = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        prompt = [*sample.input_ids[: sample.prompt_length], *thought]
        ends = (sample.input_ids[-1], self.call_end if got.calls else self.tokenizer.eos_token_id)
        sides = [[*side, end] for side, end in zip(sides, ends)]
        if not (got.calls and label.calls):
            equal = len([*takewhile(lambda pair: pair[0] == pair[1], zip(*sides))])
            sides = [side[: equal + 1] for side in sides]
        return tuple(sample._replace(input_ids=prompt + side, prompt_length=len(prompt)) for side in sides)


def contradicts(answer: str, sample: Sample) -> bool:
    """Say whether an answer makes other calls than the label, calls where it has none, or none where it has some.

    Two texts without calls are no contradiction. An empty answer, or one that no server could run, is no better label.
    """
    got, expected = read_answer(answer, sample), read_reference(sample)
    if got.calls is None or not got.text.strip() or not (got.calls or expected.calls):
        return False
    return not judge(got, expected, sample.tools).exact


def rank(doubts: list[Doubt]) -> list[Doubt]:
    """Return the doubts, the surest first; a turn that was taken several times is there once."""
    found: dict[tuple, Doubt] = {}
    for doubt in sorted(doubts, key=lambda doubt: -doubt.margin):
        found.setdefault((doubt.sample.source, doubt.sample.turn), doubt)
    return [*found.values()]


def list_doubts(doubts: list[Doubt]) -> Iterator[dict]:
    """Yield what doubt.jsonl says of each doubt."""
    for doubt in doubts:
        label = read_reference(doubt.sample)
        yield {
            "source": doubt.sample.source,
            "turn": doubt.sample.turn,
            "request": doubt.sample.request,
            "label": label.text,
            "answer": doubt.answer.text,
            "margin": round(doubt.margin, 4),
            "label_calls": label.calls,
            "answer_calls": doubt.answer.calls,
            "label_log_prob": round(-doubt.label_loss, 4),
            "answer_log_prob": round(-doubt.answer_loss, 4),
            "fold": doubt.fold,
        }


def finish_doubts(folder: str | Path, doubts: list[Doubt], report: dict) -> dict:
    """Print the first doubts; write all to doubt.jsonl, and side by side to doubt.html; return what the page shows.

    Args:
        report: what the page says beside the doubts, as report.json has it.
    """
    listed, folder = to_plain([*list_doubts(doubts)]), Path(folder)
    for doubt in listed[:SHOWN_ROWS]:
        print_safely(f"\n{doubt['source']}  {cut_text(doubt['request'])}")
        print_safely(f"  label    {cut_text(doubt['label'])}")
        print_safely(f"  model    {cut_text(doubt['answer'])}  {doubt['margin']:.1f} nats")
    print_safely("")
    report = to_plain(report) | {"doubts": listed}
    write_file(folder / "doubt.jsonl", "".join(json.dumps(doubt, ensure_ascii=False) + "\n" for doubt in listed))
    write_file(folder / "doubt.html", render_report(report))
    count, checked = plural(len(listed), "label"), f"{report['data']['rows']:,} {report['data']['unit']}"
    say("doubt", f"{count} of {checked} in {folder / 'doubt.jsonl'}, side by side in {folder / 'doubt.html'}")
    return report
