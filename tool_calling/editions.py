"""Editions of the training samples, in which chosen rows have another list of tools; and held-out ones with such lists.

With --augment an epoch trains on the next edition. With --holdout_tools the lists of training rows lack these tools.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from tool_calling.data.examples import Example
from tool_calling.data.variants import (
    MASKED,
    MISSING,
    SHARES,
    SHUFFLED,
    UNSEEN,
    Listing,
    Variants,
    can_lack,
    find_refusal,
    is_valid,
    leave_out,
    list_called,
    make_names,
    refuse,
    says_name,
)
from tool_calling.files import digest
from tool_calling.samples import (
    Rendering,
    Sample,
    choose,
    count_origins,
    list_plain,
    make_compact,
    name_unit,
    render_examples,
    render_sides,
)
from tool_calling.terminal import plural, say, shorten

EDITIONS = 3  # of the rows; an epoch takes the next one, and the fourth epoch begins anew
SCORED_SHARE = 4  # of --eval_samples, one in so many is answered with each other list, too
SCORED_LISTS = 2  # shuffled ones, and masked ones, for each list of held-out rows: answers to rows alike take less time
KIND_NAMES = {
    "": "as they are",
    MISSING: "without the right tool",
    SHUFFLED: "with shuffled or thinned lists",
    MASKED: "with masked names",
}


class Facts(NamedTuple):
    """What is counted of the editions; report.json holds it."""

    editions: int
    rows: dict[str, int]  # of all editions, by kind of variant; "" counts those as they are
    lists: int  # of tools in all training rows
    refusal: str  # the answer of rows without the right tool
    own_refusal: bool  # whether it is one of the rows' own
    unfit: int  # variants left out because they are too long, or the chat template has no place for them

    def show(self) -> None:
        """Print how many rows of all editions are of which kind, and how the others refuse."""
        total = sum(self.rows.values())
        shares = (f"{self.rows[kind] / total:.1%} {name}" for kind, name in KIND_NAMES.items() if kind in self.rows)
        found = f"{', '.join(shares)}; {plural(self.lists, 'list')} of tools"
        say("augment", f"{self.editions} editions of the rows, one an epoch: {found}")
        if self.rows.get(MISSING):
            origin = "the answer of most rows that refuse" if self.own_refusal else "as rows have no one refusal"
            say("", f"without the right tool the answer is {shorten(self.refusal)}, {origin}")
        if self.unfit:
            say("", f"{plural(self.unfit, 'variant')} left out: over --max_seq_length, or refused by the chat template")


class Rows(NamedTuple):
    """The samples of a run."""

    plain: list[Sample]  # for training, one edition, as the rows are
    train: list[Sample]  # all editions
    held_out: list[Sample]
    unseen: list[Sample]  # of rows that call tools held out
    trials: dict[str, list[Sample]]  # held-out samples with other lists of tools, see make_trials
    facts: Facts | None

    def find_longest(self) -> int:
        """Return how many tokens the longest sample has."""
        return max(len(sample.input_ids) for sample in (*self.train, *self.held_out, *self.unseen))

    def count(self, total: int) -> dict:
        """Return how many samples there are on either side, and what else to_report tells of `total` rows."""
        used = sum(map(count_origins, (self.plain, self.held_out, self.unseen)))
        counts = {"train": len(self.plain), "held_out": len(self.held_out), "skipped": total - used}
        counts["unit"] = name_unit(self.plain, self.held_out, self.unseen)
        counts |= {"unseen": len(self.unseen)} if self.unseen else {}
        return counts | ({"augment": self.facts._asdict()} if self.facts else {})


@dataclass(frozen=True)
class Variation:
    """How the lists of tools vary: the flags of the same names."""

    augment: str | None
    holdout_tools: str | None
    seed: int
    max_seq_length: int
    eval_samples: int

    def prepare(
        self, tokenizer, examples: list[Example], held_out: list[Example], rendering: Rendering, date: str | None
    ) -> Rows:
        """Render the samples of a run, as they suffice for it, and print what they are."""
        both = [*examples, *held_out]
        plain, test = render_sides(tokenizer, examples, held_out, rendering, date)
        train, facts = self.vary(tokenizer, plain, both, date)
        if facts:
            facts.show()
        unseen = [sample for sample in test if sample.variant == UNSEEN]
        trials = self.make_trials(tokenizer, test, both, date)
        return Rows(plain, train, list_plain(test), unseen, trials, facts)

    def vary(
        self, tokenizer, samples: list[Sample], examples: list[Example], date: str | None = None
    ) -> tuple[list[Sample], Facts | None]:
        """Return the training samples in all editions, one after the other, and with --augment what they are."""
        if self.holdout_tools:
            samples, examples = self.leave_out(tokenizer, samples, examples, date)
        if not self.augment:
            return samples, None
        rows = {sample.row: examples[sample.row] for sample in samples}
        variants, made, counts, unfit = Variants([*rows.values()], self.augment, self.seed), [], Counter(), 0
        compact = list_compact(samples)
        for edition in range(EDITIONS):
            found = {row: variants.vary(example, edition) for row, example in rows.items()}
            found = {row: changed for row, changed in found.items() if changed}
            rendered = self.render(tokenizer, {row: made.example for row, made in found.items()}, compact, date)
            for sample in samples:
                changed = found.get(sample.row)
                if changed and changed.turn in (None, sample.turn):
                    new = rendered.get((sample.row, sample.turn))
                    unfit += new is None
                    sample = new._replace(variant=changed.kind) if new else sample
                counts[sample.variant] += 1
                made.append(sample._replace(edition=edition))
        lists = {json.dumps(tools) for tools in {id(sample.tools): sample.tools for sample in made}.values()}
        return made, Facts(EDITIONS, dict(counts), len(lists), variants.refusal, variants.is_own, unfit)

    def leave_out(
        self, tokenizer, samples: list[Sample], examples: list[Example], date: str | None
    ) -> tuple[list[Sample], list[Example]]:
        """Return samples and examples with lists that lack the tools held out: a tool added later is in none either."""
        changed = leave_out(examples, self.holdout_tools.split(","))
        rows = {sample.row: changed[sample.row] for sample in samples}
        made = self.render(tokenizer, rows, list_compact(samples), date)
        return [made[sample.row, sample.turn] for sample in samples], changed

    def render(self, tokenizer, rows: dict[int, Example], compact: set, date: str | None) -> dict:
        """Return {(row, turn): sample} of all turns that a model can be trained on, given {row: example}.

        Args:
            compact: (row, turn) of those that get compact tools.
        """
        groups, _ = render_examples(tokenizer, [*rows.values()], self.max_seq_length, date)
        made = {(row, turn.turn): turn._replace(row=row) for row, group in zip(rows, groups) for turn in group}
        chosen = [sample for turn, sample in made.items() if turn in compact]
        again = make_compact(tokenizer, chosen, rows, 1, self.max_seq_length, date)
        return made | {(sample.row, sample.turn): sample for sample in again}

    def make_trials(
        self,
        tokenizer,
        held_out: list[Sample],
        examples: list[Example],
        date: str | None = None,
        like: dict[str, list[Sample]] | None = None,
    ) -> dict[str, list[Sample]]:
        """Return {kind: held-out samples}, one in SCORED_SHARE of --eval_samples, with lists that no training row has.

        UNSEEN are those that call tools held out, with their own lists. Without either flag there are none.

        Args:
            like: the trials of another tokenizer, whose turns are to be asked.
        """

        def choose_some(kind: str, samples: list[Sample]) -> list[Sample]:
            if like is None:
                return choose(samples, max(1, self.eval_samples // SCORED_SHARE))
            wanted = {(sample.row, sample.turn) for sample in like.get(kind, [])}
            return [sample for sample in samples if (sample.row, sample.turn) in wanted]

        trials = {}
        if self.holdout_tools:
            trials[UNSEEN] = choose_some(UNSEEN, [sample for sample in held_out if sample.variant == UNSEEN])
        refusal = find_refusal(examples)[0]
        for kind in (SHUFFLED, MISSING, MASKED) if self.augment or self.holdout_tools else ():
            asked = [(sample, ask_otherwise(kind, sample, examples, refusal)) for sample in list_plain(held_out)]
            asked = {id(sample): (sample, example) for sample, example in asked if example}
            chosen = choose_some(kind, [sample for sample, _ in asked.values()])
            groups, _ = render_examples(
                tokenizer, [asked[id(sample)][1] for sample in chosen], self.max_seq_length, date
            )
            trials[kind] = [
                new._replace(row=sample.row, variant=kind)
                for sample, group in zip(chosen, groups)
                for new in group
                if new.turn == sample.turn
            ]
        return {kind: samples for kind, samples in trials.items() if samples}


def ask_otherwise(kind: str, sample: Sample, examples: list[Example], refusal: str) -> Example | None:
    """Return the example of a sample up to its turn with another list of tools, None if that makes no sense.

    The list is in another order, lacks just the tools that are called, or has other names.
    """
    example, turn = examples[sample.row], sample.turn
    example = example._replace(messages=example.messages[: turn + 1])
    called, tools = frozenset(list_called(example.messages[turn:])), example.tools
    number = int(digest([kind, example.messages])[:12], 16) % SCORED_LISTS
    rng = random.Random(f"scored {kind} {number} {digest(tools)}")
    if kind == SHUFFLED:
        return Listing(rng.sample(tools, len(tools))).apply(example) if len(tools) > 1 else None
    if kind == MISSING:
        kept = [tool for tool in tools if tool["function"]["name"] not in called]
        return refuse(example, kept, turn, refusal) if can_lack(example, turn, called, kept) else None
    names = make_names(tools, rng)
    changed = Listing([*map(names.rename_tool, tools)], names).apply(example)
    return changed if any(names) and not says_name(example, called) and is_valid(changed) else None


def list_compact(samples: list[Sample]) -> set[tuple[int, int]]:
    """Return (row, turn) of the samples with compact tools."""
    return {(sample.row, sample.turn) for sample in samples if sample.compact}


def count_refusals(examples: list[Example], seed: int) -> int:
    """Return how many examples would refuse in an epoch with --augment."""
    variants = Variants(examples, ",".join(SHARES), seed)
    found = (variants.vary(example, 0) for example in examples)
    return sum(changed is not None and changed.kind == MISSING for changed in found)
