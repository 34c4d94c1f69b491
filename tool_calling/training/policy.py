"""On-policy GRPO: a StreamTrainer whose micro-batches are answers that the model has just drawn itself.

With one update for each batch of answers and no penalty for leaving the start, the gradient of GRPO is that of
supervised training on these answers, each token weighted by the advantage of its answer over the others to the same
prompt. So streams, losses and checkpoints are those of supervised training, and prompts stand once in a stream. The
formulas are those of TRL's GRPOTrainer with loss_type="dapo", beta=0 and mask_truncated_completions=True.
"""

import math
import statistics
import time
from typing import NamedTuple

import numpy as np
import torch

from tool_calling.engines.answers import Sampling, find_stop_tokens, generate_answers, limit_answers, sample_answers
from tool_calling.rewards import reward_answer
from tool_calling.samples import Sample
from tool_calling.training.trainer import StreamTrainer

EPSILON = 1e-4  # added to the deviation of rewards, as TRL does


class Group(NamedTuple):
    """The answers to one prompt as tokens, each with the stop token that ended it, if one did, and their rewards."""

    sample: Sample
    answers: list[list[int]]
    rewards: list[float]


class PolicyTrainer(StreamTrainer):
    """A StreamTrainer that trains on drawn answers, as many to each prompt as the schedule says, by their rewards."""

    def __init__(self, *arguments, temperature: float, max_new_tokens: int | None, **settings):
        super().__init__(*arguments, **settings)
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens or limit_answers(self.schedule.samples)
        self.stops = find_stop_tokens(self.model, self.processing_class)
        self.told = {}  # what is known of the answers of each step that is not yet logged

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
        self.told[self.state.global_step + 1] = facts | {"seconds": time.perf_counter() - began}
        waiting = iter(groups)
        parts = [[sample for _ in part for sample in weigh(next(waiting), self.stops)] for part in rows]
        parts = [part or self.arrays[-1:] for part in parts]  # where all are equally good, nothing is trained
        built = [{**self.schedule.layout.build(part), "rows": part} for part in parts]
        return built, torch.tensor(max(facts["trained_tokens"], 1.0), device=device)

    def compute_loss(self, model, inputs, *arguments, **more):
        """Return the loss by the probabilities with which the answers were drawn."""
        return super().compute_loss(model, inputs | {"temperature": self.temperature}, *arguments, **more)

    def draw(self, samples: list[Sample]) -> list[Group]:
        """Return groups of answers to samples, drawn by the model as it is; the same again in a resumed run."""
        if not samples:
            return []
        processes = self.accelerator.num_processes
        number = self.state.global_step * processes + self.accelerator.process_index
        generator = torch.Generator(self.model.device).manual_seed((self.args.seed << 31) + number)
        sampling = Sampling(self.schedule.answers, self.temperature, generator)
        found = sample_answers(self.model, self.stops, samples, self.max_new_tokens, sampling)
        self.model.train()
        return [Group(sample, found[i], self.reward(sample, found[i])) for i, sample in enumerate(samples)]

    def reward(self, sample: Sample, answers: list[list[int]]) -> list[float]:
        """Return the rewards of answers to a sample, given as tokens."""
        ends = (len(answer) - is_whole(answer, self.stops) for answer in answers)
        texts = (self.processing_class.decode(answer[:end]) for answer, end in zip(answers, ends))
        return [reward_answer(text, sample) for text in texts]

    def log(self, logs, *arguments, **more):
        """Log the mean reward beside the loss, which says little of answers that are weighted both ways."""
        if "loss" in logs:
            steps = [self.told.pop(step) for step in list(self.told) if step <= self.state.global_step]
            logs = logs | summarise(steps)
        super().log(logs, *arguments, **more)

    def evaluation_loop(self, *arguments, metric_key_prefix="eval", **more):
        """Return, beside the metrics of supervised training, the mean reward of greedy answers to the held-out rows."""
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **more)
        share = self.held_out[self.accelerator.process_index :: self.accelerator.num_processes]
        answers = generate_answers(self.model, self.processing_class, share, None, self.max_new_tokens) if share else []
        self.model.train()
        rewards = [reward_answer(answer, sample) for answer, sample in zip(answers, share)]
        sums = torch.tensor([math.fsum(rewards), len(rewards)], dtype=torch.float64, device=self.model.device)
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        output.metrics[f"{metric_key_prefix}_reward"] = total / count
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

    reward: float  # of all answers together
    answers: int
    exact: int
    tokens: int
    truncated: int
    trained_tokens: int  # those of answers that came to their end
    groups: int
    equal: int  # groups whose rewards are all equal: they have no gradient


def count_facts(groups: list[Group], stops: list[int]) -> Facts:
    """Return what is counted of groups of answers."""
    answers = [answer for group in groups for answer in group.answers]
    rewards = [reward for group in groups for reward in group.rewards]
    whole = [answer for answer in answers if is_whole(answer, stops)]
    return Facts(
        reward=math.fsum(rewards),
        answers=len(answers),
        exact=sum(reward == 1 for reward in rewards),
        tokens=sum(map(len, answers)),
        truncated=len(answers) - len(whole),
        trained_tokens=sum(map(len, whole)),
        groups=len(groups),
        equal=sum(len(set(group.rewards)) == 1 for group in groups),
    )


def summarise(steps: list[dict]) -> dict:
    """Return what is logged of the answers of steps."""
    if not steps:
        return {}
    total = {name: math.fsum(step[name] for step in steps) for name in steps[0]}
    answers = total["answers"]
    return {
        "reward": total["reward"] / answers,
        "reward_exact": total["exact"] / answers,
        "groups_without_gradient": total["equal"] / total["groups"],
        "answer_tokens": total["tokens"] / answers,
        "answers_cut": total["truncated"] / answers,
        "seconds_of_answers": total["seconds"] / len(steps),
    }


def is_whole(answer: list[int], stops: list[int]) -> bool:
    """Return whether an answer came to its end before the limit."""
    return answer[-1] in stops


def weigh(group: Group, stops: list[int]) -> list[Sample]:
    """Return the answers of a group as samples with their weights, without those that have no gradient.

    An answer that was cut counts in the mean of its group, and is not trained.
    """
    sample, prompt = group.sample, group.sample.input_ids[: group.sample.prompt_length]
    return [
        sample._replace(input_ids=np.concatenate([prompt, answer]), weight=weight)
        for answer, weight in zip(group.answers, compute_advantages(group.rewards))
        if weight and is_whole(answer, stops)
    ]


def compute_advantages(rewards: list[float]) -> list[float]:
    """Return by how many deviations each reward is above the mean of its group."""
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (deviation + EPSILON) if deviation else 0.0 for reward in rewards]
