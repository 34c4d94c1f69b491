"""On-policy GRPO: a StreamTrainer whose micro-batches are answers that the model has just drawn itself.

With one update for each batch of answers, the gradient of GRPO is that of supervised training on these answers, each
token weighted by the advantage A of its answer over the others to the same prompt. So streams, losses and checkpoints
are those of supervised training, and prompts stand once in a stream. The formulas are those of TRL's GRPOTrainer with
loss_type="dapo" and mask_truncated_completions=True. Its penalty for leaving the start, of a token that is r times as
likely as when it was drawn and d nats less likely than at the start, is beta r (e^d - d - 1). The gradient of that is
the loss's, weighted by beta d; so the weight of a token is A + beta d.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from tool_calling.engines.answers import Sampling, find_stop_tokens, generate_answers, limit_answers, sample_answers
from tool_calling.engines.losses import compute_token_losses
from tool_calling.reward_file import RewardFile
from tool_calling.rewards import Rating, rate_answer
from tool_calling.samples import Sample
from tool_calling.training.trainer import StreamTrainer

EPSILON = 1e-4  # added to the deviation of rewards, as TRL does


class Group(NamedTuple):
    """The answers to one prompt as tokens, each with the stop token that ended it, if one did, and their ratings."""

    sample: Sample
    answers: list[list[int]]
    ratings: list[Rating]

    @property
    def rewards(self) -> list[float]:
        return [rating.reward for rating in self.ratings]


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn and valued: the flags of the same names, and the function of --reward."""

    temperature: float
    max_new_tokens: int | None
    beta: float = 0.0
    own_reward: RewardFile | None = None


class PolicyTrainer(StreamTrainer):
    """A StreamTrainer that trains on drawn answers, as many to each prompt as the schedule says, by their rewards."""

    def __init__(self, *arguments, drawing: Drawing, **settings):
        super().__init__(*arguments, **settings)
        self.drawing = drawing
        self.max_new_tokens = drawing.max_new_tokens or limit_answers(self.schedule.samples)
        self.stops = find_stop_tokens(self.model, self.processing_class)
        self.told = {}  # what is known of the answers of each step that is not yet logged
        self.start = []  # the trained weights at the start of the run, if a penalty needs them

    def train(self, *arguments, **more):
        """Train; what a resumed run has trained is not loaded yet."""
        self.remember_start()
        return super().train(*arguments, **more)

    def remember_start(self) -> None:
        """Keep the weights of the start of the run, if there is a penalty for leaving it."""
        self.start = [weight.detach().clone() for weight in self.trained] if self.drawing.beta else []

    def find_rows(self, rows) -> list[Sample]:
        return rows

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step, of answers to its prompts, and how many tokens all devices have in it."""
        began, real = time.perf_counter(), len(self.schedule.samples)
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = [[self.arrays[index] for index in batch["rows"] if index < real] for batch in batches]
        groups = self.draw([row for part in rows for row in part])
        facts = torch.tensor(count_facts(groups, self.stops), dtype=torch.float64, device=device)
        facts = dict(zip(Facts._fields, self.accelerator.reduce(facts, "sum").tolist()))
        self.told[self.state.global_step + 1] = facts | {"seconds": time.perf_counter() - began, "kl": 0.0}
        waiting, every = iter(groups), bool(self.drawing.beta)
        parts = [[sample for _ in part for sample in weigh(next(waiting), self.stops, every)] for part in rows]
        parts = [part or self.arrays[-1:] for part in parts]  # where all are equally good, nothing is trained
        built = [{**self.schedule.layout.build(part), "rows": part} for part in parts]
        return built, torch.tensor(max(facts["trained_tokens"], 1.0), device=device)

    def compute_loss(self, model, inputs, *arguments, **more):
        """Return the loss by the probabilities with which the answers were drawn."""
        return super().compute_loss(model, inputs | {"temperature": self.drawing.temperature}, *arguments, **more)

    def weigh_tokens(self, model, inputs, losses):
        """Return the advantages, less the penalty for leaving the start; its value is noted."""
        if not self.start:
            return inputs["weights"]
        with torch.no_grad(), self.at_start():
            less = losses - compute_token_losses(model, inputs, self.engine)[0]  # likely than at the start, in nats
        self.told[self.state.global_step + 1]["kl"] += (less.exp() - less - 1).sum(dtype=torch.float64)
        return inputs["weights"] + self.drawing.beta * less

    @contextlib.contextmanager
    def at_start(self):
        """Lend the model the weights of the start of the run."""

        def swap():
            for weight, start in zip(self.trained, self.start):
                weight.data, start.data = start.data, weight.data
            torch.clear_autocast_cache()  # of copies in 16 bits

        swap()
        try:
            yield
        finally:
            swap()

    def divide_streams(self, rows: list[Sample], tokens: int) -> None:
        """Make room; all rows of the step are computed anew, and so is what was noted of them."""
        super().divide_streams(rows, tokens)
        self.told[self.state.global_step + 1]["kl"] = 0.0

    def draw(self, samples: list[Sample]) -> list[Group]:
        """Return groups of answers to samples, drawn by the model as it is; the same again in a resumed run."""
        if not samples:
            return []
        processes = self.accelerator.num_processes
        number = self.state.global_step * processes + self.accelerator.process_index
        generator = torch.Generator(self.model.device).manual_seed((self.args.seed << 31) + number)
        sampling, count = Sampling(self.drawing.temperature, generator), self.schedule.answers
        found = sample_answers(self.model, self.stops, samples, count, self.max_new_tokens, sampling)
        self.model.train()
        asked, drawn = [sample for sample in samples for _ in range(count)], [*chain(*found)]
        ends = (len(answer) - is_whole(answer, self.stops) for answer in drawn)
        ratings = self.rate(asked, drawn, [self.processing_class.decode(a[:end]) for a, end in zip(drawn, ends)])
        parts = (ratings[start : start + count] for start in range(0, len(ratings), count))
        return [*map(Group, samples, found, parts)]

    def rate(self, samples: list[Sample], answers: list[list[int]], texts: list[str]) -> list[Rating]:
        """Return the ratings of answers to samples, one to each, given as tokens and as texts."""
        ratings = [*map(rate_answer, texts, samples)]
        if not self.drawing.own_reward or not samples:
            return ratings
        prompts = [self.processing_class.decode(sample.input_ids[: sample.prompt_length]) for sample in samples]
        given = {"prompts": prompts, "completions": texts, "completion_ids": answers, "trainer_state": self.state}
        return [rating._replace(reward=own) for rating, own in zip(ratings, self.drawing.own_reward(samples, **given))]

    def log(self, logs, *arguments, **more):
        """Log the mean reward beside the loss, which says little of answers that are weighted both ways."""
        if "loss" in logs:
            steps = [self.told.pop(step) for step in list(self.told) if step <= self.state.global_step]
            logs = logs | summarise(steps)
            if self.start and steps:
                kl = torch.as_tensor(sum(step["kl"] for step in steps), device=self.model.device)
                tokens = sum(step["trained_tokens"] for step in steps)
                logs["kl"] = self.accelerator.reduce(kl, "sum").item() / max(tokens, 1.0)
        super().log(logs, *arguments, **more)

    def evaluation_loop(self, *arguments, metric_key_prefix="eval", **more):
        """Return, beside the metrics of supervised training, the mean reward of greedy answers to the held-out rows."""
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **more)
        share = self.held_out[self.accelerator.process_index :: self.accelerator.num_processes]
        texts = generate_answers(self.model, self.processing_class, share, None, self.max_new_tokens) if share else []
        self.model.train()
        tokens = self.processing_class(texts, add_special_tokens=False)["input_ids"] if texts else []
        rewards = find_rated(rating.reward for rating in self.rate(share, tokens, texts))
        sums = torch.tensor([math.fsum(rewards), len(rewards)], dtype=torch.float64, device=self.model.device)
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        output.metrics[f"{metric_key_prefix}_reward"] = total / count if count else math.nan
        return output

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        """Evaluate; the score at the start is the first to beat, and a resumed run has it already."""
        if self.state.global_step and skip_scheduler:
            return None
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if not self.state.global_step:
            self._determine_best_metric(metrics, trial)
        return metrics


class Facts(NamedTuple):
    """What is counted of the answers of a step."""

    answers: int
    rated: int  # those that have a reward
    reward: float  # of all answers together, and so each of its parts
    parses: float
    tools: float
    names: float
    values: float
    exact: float
    tokens: int
    truncated: int
    trained_tokens: int  # those of answers that came to their end
    groups: int
    equal: int  # groups whose rewards are all equal: they have no gradient


def count_facts(groups: list[Group], stops: list[int]) -> Facts:
    """Return what is counted of groups of answers."""
    answers = [answer for group in groups for answer in group.answers]
    ratings = [rating for group in groups for rating in group.ratings]
    whole = [answer for answer in answers if is_whole(answer, stops)]
    return Facts(
        answers=len(answers),
        rated=len(find_rated(rating.reward for rating in ratings)),
        **{name: math.fsum(find_rated(getattr(rating, name) for rating in ratings)) for name in Rating._fields},
        tokens=sum(map(len, answers)),
        truncated=len(answers) - len(whole),
        trained_tokens=sum(map(len, whole)),
        groups=len(groups),
        equal=sum(not any(compute_advantages(group.rewards)) for group in groups),
    )


def summarise(steps: list[dict]) -> dict:
    """Return what is logged of the answers of steps."""
    if not steps:
        return {}
    total = {name: math.fsum(step[name] for step in steps) for name in steps[0]}
    answers = total["answers"]
    return {
        "reward": total["reward"] / total["rated"] if total["rated"] else math.nan,
        **{f"reward_{part}": total[part] / answers for part in Rating._fields[1:]},
        "groups_without_gradient": total["equal"] / total["groups"],
        "answer_tokens": total["tokens"] / answers,
        "answers_cut": total["truncated"] / answers,
        "seconds_of_answers": total["seconds"] / len(steps),
    }


def is_whole(answer: list[int], stops: list[int]) -> bool:
    """Return whether an answer came to its end before the limit."""
    return answer[-1] in stops


def weigh(group: Group, stops: list[int], every: bool = False) -> list[Sample]:
    """Return the answers of a group as samples with their weights, `every` one or those with a weight.

    An answer that was cut counts in the mean of its group, and is not trained.
    """
    sample, prompt = group.sample, group.sample.input_ids[: group.sample.prompt_length]
    return [
        sample._replace(input_ids=np.concatenate([prompt, answer]), weight=weight)
        for answer, weight in zip(group.answers, compute_advantages(group.rewards))
        if (weight or every) and is_whole(answer, stops)
    ]


def compute_advantages(rewards: list[float]) -> list[float]:
    """Return by how many deviations each reward is above the mean of its group; 0 for an answer without a reward."""
    rated = find_rated(rewards)
    if len({*rated}) < 2:
        return [0.0] * len(rewards)
    mean, deviation = statistics.fmean(rated), statistics.stdev(rated)
    return [0.0 if math.isnan(reward) else (reward - mean) / (deviation + EPSILON) for reward in rewards]


def find_rated(rewards: Iterable[float]) -> list[float]:
    """Return the rewards that are numbers: those of answers that the user's own function leaves open are NaN."""
    return [reward for reward in rewards if not math.isnan(reward)]
