"""The training itself: from the first step or a checkpoint to its end or a signal, and the facts of it."""

import math
import time
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import TrainerState

from tool_calling.checkpoints import find_best
from tool_calling.processes import Interrupted, handle_signals
from tool_calling.run_folder import Run
from tool_calling.terminal import UserError, say, warn
from tool_calling.training.callbacks import Stopper

CLEAR_RISE = 0.02  # nats by which, and by a tenth, the held-out loss must rise to be pointed out
CLEAR_GAIN = 0.05  # by which the held-out exact match must still rise: about what chance does to 200 rows


def train(trainer, run: Run) -> dict:
    """Train, from the run's checkpoint if it has one; print and return the facts of the steps made now.

    After a signal this raises Interrupted, when the step is done and its checkpoint written.
    """
    complete, first = run.is_complete(trainer.schedule.steps), run.first_step
    if run.checkpoint:
        say("resume", f"from {run.checkpoint}" + (", where training had ended" if complete else ""))
    start, loss = time.perf_counter(), None
    if complete:
        load_trained(trainer, run.checkpoint)
    else:
        loss = make_steps(trainer, run.checkpoint)
    seconds, last, history = time.perf_counter() - start, trainer.state.global_step, trainer.state.log_history
    rows = trainer.schedule.count_samples(last) - trainer.schedule.count_samples(first)
    samples = trainer.schedule.samples
    tokens = rows * sum(len(sample.input_ids) for sample in samples) / len(samples)
    losses = [log["loss"] for log in history if "loss" in log and (complete or log["step"] > first)]
    keeps_best = trainer.args.load_best_model_at_end
    best = trainer.state.best_global_step if keeps_best else None
    facts = {
        "loss": sum(losses) / len(losses) if losses else loss,
        "seconds": seconds,
        "steps": last - first,
        "last_step": last,
        "kept_step": best or last,
        "resumed_from": run.checkpoint,
        "samples_per_second": rows / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gib": torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None,
        "tokens_computed": sum(gather_object([trainer.tokens_computed])),
        "tokens_padded": trainer.schedule.padded().count_tokens(range(first, last)),
        "history": history,
        "advice": None if keeps_best else find_overfitting(history) or find_unfinished(history),
    }
    show_facts(facts, best, trainer.state.max_steps)
    if best == 0:
        raise UserError(explain_no_gain(trainer.args, history))
    return facts


def describe_rewards(drawn: list[dict]) -> str:
    """Return how the rewards of drawn answers went, by the logs that have some, and what they cost."""

    def average(logs: list[dict], name: str) -> float:
        return math.fsum(log[name] for log in logs) / len(logs)

    part = -(-len(drawn) // 10)
    first, last = (average(logs, "reward") for logs in (drawn[:part], drawn[-part:]))
    equal, seconds = (average(drawn, name) for name in ("groups_without_gradient", "seconds_of_answers"))
    cost = f"the answers of a step took {seconds:.1f} s"
    return f"{first:.3f} at first, {last:.3f} at last; {equal:.0%} of the prompts had equal rewards; {cost}"


def explain_no_gain(config, history: list[dict]) -> str:
    """Return why a run ends without a model when no checkpoint was better than its start, and what to try."""
    name = f"eval_{config.metric_for_best_model}"
    first, *later = (log[name] for log in history if name in log)
    best = (max if config.greater_is_better else min)(later)
    found = f"held-out {config.metric_for_best_model} was {first:.4f} at the start and at best {best:.4f} after"
    kept = f"No model is written, so the one of --model_id stays the best; the checkpoints are in {config.output_dir}"
    return f"training has not improved the model: {found}. {kept}. Try more steps or another --learning_rate"


def make_steps(trainer, checkpoint: str | None) -> float:
    """Train to the end and return the mean loss."""
    stopper = Stopper(checkpoint)
    trainer.add_callback(stopper)
    with handle_signals(stopper.note):
        loss = train_at_once(trainer, checkpoint)
        number = stopper.agree()
    if number:
        raise Interrupted(number)
    return loss


def train_at_once(trainer, checkpoint: str | None = None) -> float:
    """Train to the end and return the mean loss; a signal does what the program lets it do."""
    try:
        return trainer.train(resume_from_checkpoint=checkpoint).training_loss
    finally:  # otherwise an error would be printed through the bar: wrapped, on stdout, the cursor hidden after it
        trainer.progress.bar.stop()


def load_trained(trainer, checkpoint: str) -> None:
    """Load the weights that training ended with into the trainer's model: of the best checkpoint, or of this one.

    The library would first make one more step: it looks only after a step whether that was the last.
    """
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    wanted = trainer.args.load_best_model_at_end and trainer.state.best_global_step
    best = find_best(checkpoint) if wanted else None
    if wanted and not best:
        warn(f"the best checkpoint, of step {trainer.state.best_global_step:,}, is gone: {checkpoint} is kept instead")
        trainer.state.best_global_step = None
    trainer._load_from_checkpoint(str(best or checkpoint))


def show_facts(facts: dict, best: int | None, steps: int) -> None:
    """Print speed and loss of the training, the step that is kept as the best, and advice."""
    if facts["steps"]:
        speed = f"{facts['samples_per_second']:.1f} samples/s, {facts['tokens_per_second']:,.0f} tokens/s of the rows"
        say("train", f"{facts['steps']:,} steps in {facts['seconds']:.0f} s: {speed}; loss {facts['loss']:.4f}")
    drawn = [log for log in facts["history"] if "reward" in log]
    if drawn:
        say("reward", describe_rewards(drawn))
    if best:
        end = f"training ended at step {facts['last_step']:,} of {steps:,}"
        say("keep", f"step {best:,}, the best on held-out rows; {end}")
    if facts["advice"]:
        say("advice", facts["advice"])


def find_overfitting(history: list[dict]) -> str | None:
    """Return a line of advice if the held-out loss rose clearly above its best while the training loss went on falling.

    Args:
        history: the trainer's log: training losses ("loss") and held-out ones ("eval_loss") with step and epoch.
    """
    held = [log for log in history if "eval_loss" in log]
    if not held:
        return None
    best, last = min(held, key=lambda log: log["eval_loss"]), held[-1]
    steps = [0, *(log["step"] for log in held)]

    def train_loss(evaluation: int) -> float:
        """Return the mean training loss between an evaluation and the one before it; NaN if none was logged."""
        logs = [log for log in history if "loss" in log and steps[evaluation] < log["step"] <= steps[evaluation + 1]]
        return sum(log["loss"] for log in logs) / len(logs) if logs else math.nan

    rise = last["eval_loss"] - best["eval_loss"]
    if rise <= max(CLEAR_RISE, 0.1 * best["eval_loss"]) or not train_loss(len(held) - 1) < train_loss(held.index(best)):
        return None
    first, then = (f"{log['eval_loss']:.3f} (epoch {log['epoch']:.3g})" for log in (best, last))
    found = f"held-out loss rose from {first} to {then} while the training loss fell"
    return f"{found}: fewer epochs, or --metric_for_best loss keeps the best checkpoint"


def find_unfinished(history: list[dict]) -> str | None:
    """Return a line of advice if the held-out exact match of a history was still rising clearly at the end."""
    held = [log for log in history if "eval_exact_match" in log][-2:]
    if len(held) < 2 or held[1]["eval_exact_match"] - held[0]["eval_exact_match"] < CLEAR_GAIN:
        return None
    first, then = (f"{log['eval_exact_match']:.1%} (epoch {log['epoch']:.3g})" for log in held)
    found = f"held-out exact match was still rising, from {first} to {then}"
    return f"{found}: a higher --learning_rate or more epochs may teach more"
