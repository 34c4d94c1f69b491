"""GRPO: its gradient is TRL's, what is rewarded becomes likelier, and a run that improves nothing keeps nothing."""

import copy
import math

import pytest
import torch
from conftest import patch
from datasets import Dataset
from small import TRAIN, limit_memory, make_trainer, weights
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils as trl_utils

from tool_calling.rewards import Rating
from tool_calling.run_folder import Run
from tool_calling.terminal import UserError
from tool_calling.training.loop import describe_rewards, train
from tool_calling.training.policy import Group, compute_advantages, count_facts, summarise, weigh

FLAGS = ("--method", "grpo", "--num_generations", "4", "--batch_size", "2", "--gradient_accumulation_steps", "1")
STOP = 9
# The last answer to the second prompt was cut: it counts in the mean of its group, and is not trained.
ANSWERS = [[[5, 6, STOP], [7, STOP], [5, STOP], [8, 8, 8, STOP]], [[6, STOP], [STOP], [5, 5, STOP], [5, 6, 7, 8, 5]]]
REWARDS = [[1.0, 0.0, 0.5, 0.25], [1.0, -1.0, 0.0, 0.05]]
ROUND = {"rel": 1e-5, "abs": 1e-7}


def to_ratings(rewards: list[float]) -> list[Rating]:
    """Return ratings with these rewards, of which 1 is exact and nothing else has a part that is right."""
    return [Rating(reward, *[float(reward == 1)] * 5) for reward in rewards]


def make_policy(folder, tokenizer, monkeypatch, *flags: str, **more):
    """Return a trainer of drawn answers of a small Qwen3 whose answers end with STOP."""
    patch(monkeypatch, "find_stop_tokens", lambda model, tokenizer: [STOP])
    trainer = make_trainer(folder, tokenizer, *FLAGS, "--max_steps", "4", *flags, **more)
    torch.manual_seed(1)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return trainer


def compute_gradient(model) -> torch.Tensor:
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])


class StockHead:
    """What TRL's fused head computes, without its kernel, which needs a GPU; tests/fused_head.py compares both."""

    @staticmethod
    def apply(hidden, weight, bias, labels, temperature, *others):
        log_probs = (hidden @ weight.T / temperature).float().log_softmax(dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        return log_probs.gather(1, labels[:, None])[:, 0], entropy, None, None, None


def move(model) -> None:
    """Move an adapter away from where it is, as steps would."""
    generator = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)


def compute_trl_gradient(folder, tokenizer, model, temperature: float, beta: float) -> tuple:
    """Return the gradient and the KL that TRL's GRPOTrainer computes from ANSWERS and REWARDS after a move."""
    rewards = {tuple(answer): reward for pair in zip(ANSWERS, REWARDS) for answer, reward in zip(*pair)}
    prompts = [sample.input_ids[: sample.prompt_length] for sample in TRAIN[:2]]

    def roll_out(texts, trainer):
        ids = [prompts[int(text)] for text in texts]
        return {"prompt_ids": ids, "completion_ids": [a for group in ANSWERS for a in group], "logprobs": None}

    config = GRPOConfig(
        output_dir=str(folder),
        loss_type="dapo",
        beta=beta,
        num_generations=4,
        temperature=temperature,
        mask_truncated_completions=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        max_completion_length=5,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
    )
    model.generation_config.eos_token_id = STOP
    small = copy.deepcopy(tokenizer)
    small.pad_token = small.convert_ids_to_tokens(0)  # one that the small model has
    trainer = GRPOTrainer(
        model,
        lambda completion_ids, **more: [rewards[tuple(ids)] for ids in completion_ids],
        config,
        train_dataset=Dataset.from_dict({"prompt": ["0", "1"]}),
        processing_class=small,
        rollout_func=roll_out,
    )
    trainer.model.train()
    move(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions([{"prompt": text} for text in "00001111"])
    trainer.compute_loss(trainer.model, inputs).backward()
    return compute_gradient(trainer.model), (trainer._metrics["train"].get("kl") or [0.0])[0]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--no-share_prefix",),
        ("--temperature", "0.7"),
        ("--batch_size", "1", "--gradient_accumulation_steps", "2"),
        ("--beta", "0.5"),
        ("--beta", "0.2", "--temperature", "0.7", "--batch_size", "1", "--gradient_accumulation_steps", "2"),
    ],
)
def test_the_gradient_is_that_of_trl(tmp_path, tokenizer, monkeypatch, flags):
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", StockHead)
    trainer = make_policy(tmp_path / "ours", tokenizer, monkeypatch, *flags, held_out=TRAIN[:2])
    drawing, model = trainer.drawing, copy.deepcopy(trainer.model)
    expected, kl = compute_trl_gradient(tmp_path / "trl", tokenizer, model, drawing.temperature, drawing.beta)
    trainer.remember_start()
    move(trainer.model)
    groups = [*map(Group, trainer.arrays, ANSWERS, map(to_ratings, REWARDS))]
    monkeypatch.setattr(trainer, "draw", lambda samples: groups)
    size = trainer.schedule.layout.rows
    batches = [trainer.collate([*range(start, start + size)]) for start in range(0, 2, size)]
    batches, tokens = trainer.get_batch_samples(iter(batches), len(batches), trainer.model.device)
    assert int(tokens) == 3 + 2 + 2 + 4 + 2 + 1 + 3
    for batch in batches:
        trainer.training_step(trainer.model, batch, tokens)
    found = compute_gradient(trainer.model)
    assert expected.norm() > 0.01 and (found - expected).norm() < 1e-5 * expected.norm()
    assert float(trainer.told[1]["kl"]) / 17 == pytest.approx(kl, rel=1e-4) and bool(kl) == bool(drawing.beta)


def test_answers_are_weighted_by_what_they_are_better_than_the_others():
    assert compute_advantages([1.0, 0.0]) == pytest.approx([0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4)])
    assert compute_advantages([0.3] * 8) == [0.0] * 8
    groups = [*map(Group, TRAIN, ANSWERS, map(to_ratings, REWARDS))]
    kept = weigh(groups[1], [STOP])
    assert [list(sample.input_ids[6:]) for sample in kept] == ANSWERS[1][:3] and kept[0].prompt_length == 6
    assert [sample.weight for sample in kept] == compute_advantages(REWARDS[1])[:3]
    assert weigh(Group(TRAIN[0], ANSWERS[0], to_ratings([1.0] * 4)), [STOP]) == []


def test_what_is_logged_of_a_step():
    groups = [
        Group(sample, answers, to_ratings(rewards))
        for sample, answers, rewards in zip(TRAIN, ANSWERS, ([0.5] * 4, REWARDS[1]))
    ]
    facts = count_facts(groups, [STOP])._asdict() | {"seconds": 2.0}
    assert summarise([facts]) == pytest.approx(
        {
            "reward": (4 * 0.5 + 0.05) / 8,
            **{f"reward_{part}": 1 / 8 for part in ("parses", "tools", "names", "values", "exact")},
            "groups_without_gradient": 1 / 2,
            "answer_tokens": (11 + 11) / 8,
            "answers_cut": 1 / 8,
            "seconds_of_answers": 2.0,
        }
    )
    assert summarise([]) == {}


def test_how_rewards_went_is_one_line():
    logs = [
        {"reward": step / 20, "groups_without_gradient": step % 2, "seconds_of_answers": 2.0} for step in range(1, 21)
    ]
    assert describe_rewards(logs) == (
        "0.075 at first, 0.975 at last; 50% of the prompts had equal rewards; the answers of a step took 2.0 s"
    )
    assert describe_rewards(logs[:1]).startswith("0.050 at first, 0.050 at last; 100% of the prompts")


def test_what_is_rewarded_becomes_likelier(tmp_path, tokenizer, monkeypatch):
    """An answer is rewarded for its first token alone: half of all tokens are good ones."""
    flags = ("--max_steps", "40", "--num_generations", "16", "--max_new_tokens", "1", "--lora_rank", "0")
    trainer = make_policy(tmp_path, tokenizer, monkeypatch, *flags, held_out=TRAIN[:4])
    monkeypatch.setattr(trainer, "rate", lambda rows, answers, texts: to_ratings([float(a[0] < 30) for a in answers]))
    patch(monkeypatch, "is_whole", lambda answer, stops: True)  # one token is enough
    trainer.args.adam_epsilon = 1e-8
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    first, last = (sum(log["reward"] for log in part) / 5 for part in (logs[:5], logs[-5:]))
    assert first < 0.7 and last > 0.9, [round(log["reward"], 2) for log in logs]
    held = {log["step"]: log["eval_reward"] for log in trainer.state.log_history if "eval_reward" in log}
    assert [*held] == [0, 25, 40] and held[40] == 1.0


def test_a_resumed_run_draws_the_same_answers(tmp_path, tokenizer, monkeypatch):
    patch(monkeypatch, "rate_answer", lambda text, sample: to_ratings([float(len(text) % 3)])[0])
    patch(monkeypatch, "is_whole", lambda answer, stops: True)
    flags = ("--save_steps", "2", "--max_new_tokens", "4", "--eval_steps", "2", "--beta", "0.1")
    whole = make_policy(tmp_path, tokenizer, monkeypatch, *flags, held_out=TRAIN[:4])
    start = weights(whole)
    whole.train()
    ends = weights(whole)
    again = make_policy(tmp_path / "again", tokenizer, monkeypatch, *flags, held_out=TRAIN[:4])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not torch.equal(start, ends)
    rewards = [[log["reward"] for log in t.state.log_history if "reward" in log] for t in (whole, again)]
    assert rewards[0] == rewards[1] and len(rewards[0]) == 4
    assert torch.equal(weights(again), ends)
    evaluated = [[log["step"] for log in t.state.log_history if "eval_loss" in log] for t in (whole, again)]
    assert evaluated == [[0, 2, 4], [0, 2, 4]]  # not at the start again


def test_a_step_that_does_not_fit_is_computed_in_smaller_streams(tmp_path, tokenizer, monkeypatch, capsys):
    patch(monkeypatch, "rate_answer", lambda text, sample: to_ratings([float(len(text) % 3)])[0])
    patch(monkeypatch, "is_whole", lambda answer, stops: True)
    flags = ("--max_new_tokens", "4", "--beta", "0.1")
    whole = make_policy(tmp_path / "whole", tokenizer, monkeypatch, *flags, held_out=TRAIN[:4])
    start = weights(whole)
    whole.train()
    capsys.readouterr()
    sizes = limit_memory(monkeypatch, 30)
    parts = make_policy(tmp_path / "parts", tokenizer, monkeypatch, *flags, held_out=TRAIN[:4])
    assert parts.scoring_layout.rows == 8
    parts.train()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: out of GPU memory")]
    assert warnings[0].endswith("each step is computed in 2 streams of at most 4 answers; the result is the same")
    assert max(sizes) <= 30 and parts.scoring_layout.rows <= 4
    change = (weights(whole) - start).norm()
    assert change > 0.01 and (weights(parts) - weights(whole)).norm() < 1e-4 * change
    found = [[log["kl"] for log in trainer.state.log_history if "kl" in log] for trainer in (whole, parts)]
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[0][0] == 0.0 < found[0][3]


def test_the_users_own_reward_takes_the_place_of_the_rewards_alone(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions, completion_ids, source, trainer_state, **columns):\n"
        "    assert len(prompts) == len(source) and trainer_state.max_steps == 2\n"
        "    short.seen.append([*zip(source, completions)])\n"
        "    return [None if len(ids) == 1 else -float(len(ids)) for ids in completion_ids]\n\n\n"
        "short.seen = []\n"
    )
    flags = ("--max_steps", "2", "--max_new_tokens", "4", "--reward", f"{tmp_path / 'mine.py'}:short")
    trainer = make_policy(tmp_path / "out", tokenizer, monkeypatch, *flags, held_out=TRAIN[:4])
    trainer.train()
    seen = trainer.drawing.own_reward.function.seen
    assert [len(part) for part in seen] == [4, 8, 8, 4]  # two prompts of a step, and the held-out rows before and after
    drawn = [log for log in trainer.state.log_history if "reward" in log]
    assert all(-4 <= log["reward"] < -1 and log["reward_exact"] == 0 for log in drawn)


def test_answers_without_a_reward_count_in_no_mean():
    nan = math.nan
    assert compute_advantages([nan, 1.0, 0.0]) == [0.0, *compute_advantages([1.0, 0.0])]
    assert compute_advantages([nan, 1.0]) == compute_advantages([nan, nan]) == [0.0, 0.0]
    facts = count_facts([Group(TRAIN[0], ANSWERS[0], to_ratings([nan, 1.0, 0.0, nan]))], [STOP])
    assert (facts.answers, facts.rated, facts.reward, facts.equal, facts.exact) == (4, 2, 1.0, 0, 1.0)
    assert summarise([facts._asdict() | {"seconds": 1.0}])["reward"] == 0.5


def test_a_run_that_improves_nothing_says_so(tmp_path, tokenizer, monkeypatch):
    patch(monkeypatch, "rate_answer", lambda text, sample: to_ratings([0.5])[0])
    flags = ("--max_new_tokens", "4", "--eval_steps", "2", "--metric_for_best", "reward")
    trainer = make_policy(tmp_path, tokenizer, monkeypatch, *flags, held_out=TRAIN[:4])
    with pytest.raises(UserError) as error:
        train(trainer, Run(tmp_path, settings={"early_stopping_patience": None}))
    assert str(error.value) == (
        "training has not improved the model: held-out reward was 0.5000 at the start and at best 0.5000 after. No "
        f"model is written, so the one of --model_id stays the best; the checkpoints are in {tmp_path}. Try more "
        "steps or another --learning_rate"
    )
    assert trainer.state.best_global_step == 0
