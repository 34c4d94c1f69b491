"""Callbacks of the trainer: progress on screen, and signals that end training after a step."""

import os
import sys
import time

import torch
import torch.distributed as distributed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from tool_calling.checkpoints import find_best
from tool_calling.page import show_interval, show_percent
from tool_calling.processes import count_devices, is_main, raise_interrupted
from tool_calling.terminal import say, warn


class ProgressBar(TrainerCallback):
    """Draws a progress bar, and prints about twenty losses and every held-out loss."""

    def __init__(self):
        columns = ("train    ", BarColumn(), MofNCompleteColumn(), "steps", TextColumn("{task.fields[loss]}"))
        self.bar = Progress(*columns, TimeRemainingColumn(), transient=True, disable=not sys.stdout.isatty())

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, loss="")
        self.logged = state.global_step
        self.bar.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            step, text, every = state.global_step, f"loss {float(logs['loss']):.4f}", max(1, state.max_steps // 20)
            if "reward" in logs:
                equal = f"{logs['groups_without_gradient']:.0%} of the prompts with equal rewards"
                text = f"reward {logs['reward']:.3f}, {equal}"
            self.bar.update(self.task, completed=step, loss=text)
            if step == 1 or step // every > self.logged // every or step == state.max_steps:
                say("", f"step {step:>5,} of {state.max_steps:,}  {text}")
            self.logged = step

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        interval = show_interval([metrics["eval_exact_low"], metrics["eval_exact_high"]])
        exact = f"{show_percent(metrics['eval_exact_match'], 1)} ({interval})"
        held_out = f"held-out loss {metrics['eval_loss']:.4f}, exact match {exact}"
        held_out += f", reward {metrics['eval_reward']:.4f}" if "eval_reward" in metrics else ""
        say("", f"step {state.global_step:>5,} of {state.max_steps:,}  epoch {state.epoch:.3g}: {held_out}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.stop()


class Stopper(TrainerCallback):
    """Its `note` handles signals: the first ends training after its step and a checkpoint, the second at once.

    A step that ends an epoch leaves the checkpoint to the end of the epoch, after the held-out rows are scored, as in a
    run that goes on. Signals reach several processes at different moments: before any of them decides, all `agree`, or
    one would stop while another waits for it in the next step.
    """

    number, noted, group = None, 0.0, None

    def __init__(self, checkpoint: str | None = None):
        self.checkpoint = checkpoint  # from which training goes on

    def note(self, number, frame):
        # A signal to all processes may reach one directly and through torchrun: that is one signal, not two.
        if self.number and (count_devices() == 1 or time.monotonic() > self.noted + 2):
            raise_interrupted(number, frame)
        if not self.number and is_main():
            # Not print: the signal may come while a print is going on.
            os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")
        self.number, self.noted = self.number or number, self.noted or time.monotonic()

    def agree(self) -> int | None:
        """Return the signal that this process, or any other before this moment, has received."""
        if not self.group:
            return self.number
        number = torch.tensor(self.number or 0)
        distributed.all_reduce(number, distributed.ReduceOp.MAX, self.group)
        if number and not self.number:
            self.note(number.item(), None)
        return number.item() or None

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # a resumed run has the intervals of its own flags
        if self.checkpoint and state.best_global_step and not find_best(self.checkpoint):  # else its score would rule
            gone = f"the best checkpoint, of step {state.best_global_step:,}, is gone"
            warn(f"{gone}: the search for the best starts anew")
            state.best_metric = state.best_global_step = None
        if count_devices() > 1:
            self.group = distributed.new_group(backend="gloo")  # so that no GPU has to wait

    def on_step_end(self, args, state, control, **kwargs):
        if self.agree():
            control.should_training_stop = True
            control.should_save = control.should_save or is_within_epoch(state)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.agree():
            control.should_training_stop = control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if not self.agree():
            return
        if is_within_epoch(state):  # the library takes every stop for the end of an epoch
            control.should_evaluate = control.should_save = False
        else:
            control.should_training_stop = control.should_save = True


def is_within_epoch(state) -> bool:
    """Return whether the last step ended neither an epoch nor the training."""
    return state.epoch % 1 != 0 and state.global_step < state.max_steps
