"""SFTTrainer over streams."""

import argparse
import math
import shutil
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from tool_calling.engines.fsdp import gather_weights, gather_whole, split_as
from tool_calling.engines.graphs import make_room
from tool_calling.engines.losses import compute_token_losses, score_batches, to_metrics
from tool_calling.engines.start import autocast, use_checkpointing
from tool_calling.files import discard_partial, move_aside, put_in_place, write_manifest
from tool_calling.processes import Interrupted, handle_signals, is_main
from tool_calling.prompts import Sample
from tool_calling.run_folder import find_best, list_checkpoints, to_step
from tool_calling.schedule import Plan, StreamSampler, build_batch, count_trained, divide_plan, to_batches
from tool_calling.streams import split_rows
from tool_calling.terminal import UserError, list_first, plural, say, warn
from tool_calling.training.callbacks import build_progress, build_stopper

NAMED_ROWS = 8  # so many rows of a step that failed are named
CLEAR_RISE = 0.02  # nats by which, beside a tenth, the held-out loss must rise to be pointed out


def explain_memory(row: Sample, step: int) -> str:
    """Return why training cannot go on when even one row does not fit into memory, and what to change."""
    memory = ""
    if torch.cuda.is_available():
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        memory = f", with {free:.1f} of {total:.1f} GiB free for it"
    tokens = f"{len(row.input_ids):,} tokens"
    return (
        f"{row.source}: out of GPU memory at step {step:,} on this row alone, {tokens}{memory}; lower "
        "--max_seq_length, use --load_in_4bit, --gradient_checkpointing on and --no-cuda_graphs, or choose a "
        "smaller --model_id"
    )


def explain_numbers(step: int, loss: float, norm: float, rows: list[Sample]) -> str:
    """Return what is not finite in a step, its rows, and what to do."""
    wrong = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    names = dict.fromkeys(row.source for row in rows if row.prompt_length < len(row.input_ids))  # not an empty stream's
    return (
        f"step {step:,}: {wrong}; expected a finite number. Nothing of it is saved, and a checkpoint written "
        f"before is good. Lower --learning_rate, or look at the rows of this step: {list_first(names, NAMED_ROWS)}"
    )


def find_overfitting(history: list[dict]) -> str | None:
    """Return a line of advice if the held-out loss rose clearly above its best while the training loss went on falling.

    Args:
        history: what the trainer logged: training losses ("loss") and held-out ones ("eval_loss") with step and epoch.
    """
    held = [log for log in history if "eval_loss" in log]
    if not held:
        return None
    best, last = min(held, key=lambda log: log["eval_loss"]), held[-1]
    steps = [0, *(log["step"] for log in held)]

    def train_loss(evaluation: int) -> float:
        """Return the mean training loss between an evaluation and the one before it; NaN if none was logged."""
        losses = [
            log["loss"] for log in history if "loss" in log and steps[evaluation] < log["step"] <= steps[evaluation + 1]
        ]
        return sum(losses) / len(losses) if losses else math.nan

    rise = last["eval_loss"] - best["eval_loss"]
    if rise <= max(CLEAR_RISE, 0.1 * best["eval_loss"]) or not train_loss(len(held) - 1) < train_loss(held.index(best)):
        return None
    return (
        f"held-out loss rose from {best['eval_loss']:.3f} (epoch {best['epoch']:.3g}) to {last['eval_loss']:.3f} "
        f"(epoch {last['epoch']:.3g}) while the training loss fell: fewer epochs, or --metric_for_best loss keeps "
        "the best checkpoint"
    )


class StreamTrainer:
    """What this script does otherwise than TRL's SFTTrainer, which goes behind it in build_trainer.

    It is no subclass here, because Unsloth must change TRL's classes before they are imported.
    """

    def __init__(self, run: argparse.Namespace, engine: str, plan: Plan, train, held_out, **settings):
        self.run, self.engine, self.plan, self.train_rows, self.held_out_rows = run, engine, plan, train, held_out
        self.streams = plan  # what is computed at once: as planned, or smaller streams once that did not fit in memory
        self.held_out_batches = to_batches(held_out, plan) if held_out else []
        self.step_rows, self.step_loss, self.step_norm = [], 0.0, 0.0  # of the optimizer step in hand
        self.epoch_batches, self.next_batches = iter(()), []  # the micro-batches of the epoch, and of the next step
        self.tokens_computed, self.staging = 0, None
        # As arrays: lists would be turned into arrays anew in every step.
        self.arrays = [row._replace(input_ids=np.asarray(row.input_ids)) for row in train]
        last = self.arrays[0]
        self.arrays.append(last._replace(prompt_length=len(last.input_ids)))  # trains nothing: see StreamSampler
        super().__init__(data_collator=self.collate, **settings)

    def create_model_card(self, *args, **kwargs):
        """Write none: TRL's knows no scores. hand_over writes one beside each model that is kept."""

    def collate(self, indices):
        return {**build_batch([self.arrays[index] for index in indices], self.plan), "rows": indices}

    def get_train_dataloader(self):
        sampler = StreamSampler(self.plan, self.run, len(self.train_rows), lambda: int(self.state.epoch or 0))
        return self.accelerator.prepare(
            torch.utils.data.DataLoader(
                range(len(self.arrays)),
                batch_sampler=sampler,
                collate_fn=self.collate,
                pin_memory=self.args.dataloader_pin_memory,
            )
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step, and how many tokens all devices supervise in it."""
        if epoch_iterator is not self.epoch_batches:  # what was fetched of another, that was left early, is not of it
            self.epoch_batches, self.next_batches = epoch_iterator, []
        batches = self.next_batches or list(islice(epoch_iterator, num_batches))
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        return batches, self.accelerator.reduce(tokens, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the micro-batch's share of the mean over all supervised tokens of the optimizer step.

        Gradients become the mean over the devices, hence the factor: they are to be the sum.
        """
        self.tokens_computed += inputs["input_ids"].numel()
        loss = compute_token_losses(model, inputs, self.engine)[0].sum() / num_items_in_batch
        return loss * self.accelerator.num_processes

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Return the loss of a micro-batch, its gradient added to what was there.

        If memory runs out, the rows are computed anew in smaller streams, each divided by the same number of items:
        loss and gradient are sums over the streams, so they stay what they are.
        """
        rows, lost, loss = [self.arrays[index] for index in inputs.pop("rows")], [], None
        while loss is None:
            whole, losses = self.streams is self.plan, []
            again = split_rows(lost, self.streams.rows) if lost else []
            try:
                for part in (*again, *([rows] if whole else split_rows(rows, self.streams.rows))):
                    batch = inputs if whole else build_batch(part, self.streams)
                    losses.append(super().training_step(model, batch, num_items_in_batch))
                loss = sum(losses[len(again) :])
            except torch.OutOfMemoryError:
                pass  # here the failed computation is still held; below it is let go
            if loss is None:
                self.divide_streams(part, batch["input_ids"].numel())
                lost = self.step_rows  # the rows of this step before these: their gradient went to make room
        self.step_rows, self.step_loss = [*self.step_rows, *rows], self.step_loss + loss
        return loss

    def divide_streams(self, rows, tokens):
        """Halve the streams after one of these rows did not fit into memory; a row alone is a UserError."""
        step = self.state.global_step + 1
        make_room(self.model)
        if len(rows) == 1:
            raise UserError(explain_memory(rows[0], step))
        if self.accelerator.num_processes > 1:  # the others wait for one gradient, not for two halves
            raise UserError(
                f"out of GPU memory at step {step:,} with a stream of {tokens:,} tokens; lower "
                "--batch_size and raise --gradient_accumulation_steps as much"
            )
        size = -(-len(rows) // 2)
        self.streams = divide_plan(self.plan, size, self.train_rows, self.run)
        self.held_out_batches = to_batches(self.held_out_rows, self.streams) if self.held_out_rows else []
        warn(
            f"out of GPU memory at step {step:,} with a stream of {tokens:,} tokens: from here on each step is "
            f"computed in {self.plan.accumulation * -(-self.plan.rows // size)} streams of at most "
            f"{plural(size, 'row')}; the result is the same"
        )

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of split weights
        # With fp16, gradients that overflow are nothing special: the scaler leaves such a step out.
        self.step_norm = norm if self.accelerator.scaler is None else 0.0
        return norm

    def _maybe_log_save_evaluate(self, *arguments, **more):
        """Look at the step's numbers before anything of it is saved; to look earlier, the GPU would stand still.

        To look is to wait for the GPU, so the next step's micro-batches are made before, while it computes.
        """
        self.next_batches = list(islice(self.epoch_batches, self.plan.accumulation))
        loss, norm, rows = self.step_loss, self.step_norm, self.step_rows
        self.step_rows, self.step_loss = [], 0.0
        if not math.isfinite(loss + norm):
            if self.accelerator.scaler is None:  # or else only the loss of one device may be wrong
                rows = gather_object(rows)
            raise UserError(explain_numbers(self.state.global_step, float(loss), float(norm), rows))
        super()._maybe_log_save_evaluate(*arguments, **more)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """Return the held-out loss as a mean over tokens (the library's is one over batches), and exact match."""
        devices, batches = self.accelerator.num_processes, self.held_out_batches
        # With --fsdp all devices must compute as often, so that some get a batch that supervises nothing.
        batches = [*batches, *[build_batch(self.arrays[-1:], self.plan)] * (-len(batches) % devices)]
        share = batches[self.accelerator.process_index :: devices]
        scores = self.accelerator.reduce(score_batches(self.model, share, self.engine), "sum")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in to_metrics(scores).items()}
        return EvalLoopOutput(None, None, metrics, num_samples=len(self.held_out_rows))

    def _get_output_dir(self, trial):
        return str(self.staging or self.run.output_dir)

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint out of sight, and give it its name when it is whole; then remove what is too many."""
        output, state, wait = Path(self.run.output_dir), self.state, self.accelerator.wait_for_everyone
        final, best = (output / f"checkpoint-{step}" for step in (state.global_step, state.best_global_step))
        with discard_partial(final) as self.staging:
            wait()
            super()._save_checkpoint(model, trial)
            wait()
            if best == final or best.is_dir():  # where it will be, not where it is being written
                state.best_model_checkpoint = str(best)
            if is_main():
                state.save_to_json(str(self.staging / final.name / "trainer_state.json"))
                write_manifest(self.staging / final.name)
                put_in_place(final, self.staging / final.name)
        self.staging = None
        if is_main() and self.run.save_total_limit:
            for old in list_checkpoints(output)[: -self.run.save_total_limit]:
                if old != best:
                    shutil.rmtree(move_aside(old), ignore_errors=True)
        wait()


class SplitTrainer:
    """What StreamTrainer does otherwise with --fsdp: the model comes split (see split_model), and is saved whole."""

    def _wrap_model(self, model, training=True, dataloader=None):
        """Return the model with averaged gradients; without an adapter, FSDP has averaged them."""
        if not training or model is not self.model:
            return super()._wrap_model(model, training, dataloader)
        model._is_accelerate_prepared = True  # accelerate would refuse a model split in part, and average once more
        if not self.run.lora_rank:
            return model
        return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def autocast_smart_context_manager(self, cache_enabled=True):
        return autocast(self.model)

    def save_model(self, output_dir=None, _internal_call=False):
        weights = None if self.run.lora_rank else gather_weights(self.model)
        if is_main():
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir):
        whole = gather_whole(self.optimizer.state_dict())
        if is_main():
            torch.save(whole, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Load what was saved whole; each device takes its part from the file, so that none needs to hold all."""
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        state["state"] = {
            number: {name: split_as(weights[number], value) for name, value in moments.items()}
            for number, moments in state["state"].items()
        }
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


def build_trainer(args: argparse.Namespace, config, engine: str, model, tokenizer, train, held_out, plan: Plan):
    """Return a StreamTrainer on TRL's SFTTrainer over the pre-tokenised samples, batched as planned.

    TRL would render and truncate conversations in its own way, and it asks for a dataset: it is given the numbers of
    the rows.
    """
    classes = (*[SplitTrainer] * args.fsdp, StreamTrainer, SFTTrainer)
    numbers = [Dataset.from_dict({"index": range(len(rows))}) if rows else None for rows in (train, held_out)]
    trainer = type("StreamTrainer", classes, {})(
        args,
        engine,
        plan,
        train,
        held_out,
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=numbers[0],
        eval_dataset=numbers[1],
    )
    trainer.accelerator.ddp_handler.gradient_as_bucket_view = True  # or each gradient is copied back from its bucket
    trainer.remove_callback(PrinterCallback)
    trainer.progress = build_progress()
    trainer.add_callback(trainer.progress)
    if args.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    if not args.lora_rank:  # checkpoints hold weights as the model names them: experts as one, not one by one
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    # TRL makes the adapter of a 4-bit base bf16, in which late, small updates round to nothing.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # The trainer would turn checkpointing on only in train(), after the self-check.
    if engine == "unsloth":
        trainer.model.for_training(use_gradient_checkpointing=use_checkpointing(args))
    elif use_checkpointing(args):
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    return trainer


def load_trained(trainer, checkpoint: str) -> None:
    """Put the weights that training ended with into the trainer's model: of the best checkpoint, or of this one.

    The library would first make one more step: it looks only after a step whether that was the last.
    """
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    wanted = trainer.args.load_best_model_at_end and trainer.state.best_global_step
    best = find_best(checkpoint) if wanted else None
    if wanted and not best:
        warn(f"the best checkpoint, of step {trainer.state.best_global_step:,}, is gone: {checkpoint} is kept instead")
        trainer.state.best_global_step = None
    trainer._load_from_checkpoint(str(best or checkpoint))


def train_model(trainer, checkpoint: str | None, complete: bool) -> dict:
    """Train, from a checkpoint if there is one; print and return the facts of the steps made now.

    After a signal this ends with Interrupted, when the step is done and its checkpoint written.
    """
    first = to_step(checkpoint) if checkpoint else 0
    if checkpoint:
        say("resume", f"from {checkpoint}" + ", where training had ended" * complete)
    start, loss = time.perf_counter(), None
    if complete:
        load_trained(trainer, checkpoint)
    else:
        stopper = build_stopper(checkpoint)
        trainer.add_callback(stopper)
        with handle_signals(stopper.note):
            try:
                loss = trainer.train(resume_from_checkpoint=checkpoint).training_loss
            finally:  # or an error would be printed through the bar: wrapped, on stdout, without a cursor after it
                trainer.progress.bar.stop()
            number = stopper.agree()
        if number:
            raise Interrupted(number)
    seconds, last, train = time.perf_counter() - start, trainer.state.global_step, trainer.train_rows
    before, after = (count_trained(step, len(train), trainer.plan.rows_per_step) for step in (first, last))
    steps, rows = last - first, after - before
    tokens = rows * sum(len(sample.input_ids) for sample in train) / len(train)
    history = trainer.state.log_history
    losses = [log["loss"] for log in history if "loss" in log and (complete or log["step"] > first)]
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    facts = {
        "loss": sum(losses) / len(losses) if losses else loss,
        "seconds": seconds,
        "steps": steps,
        "last_step": last,
        "kept_step": best or last,
        "resumed_from": checkpoint,
        "samples_per_second": rows / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gib": torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None,
        "tokens_computed": sum(gather_object([trainer.tokens_computed])),
        "history": history,
    }
    if steps:
        say(
            "train",
            f"{steps:,} steps in {seconds:.0f} s: {facts['samples_per_second']:.1f} samples/s, "
            f"{facts['tokens_per_second']:,.0f} tokens/s of the rows; loss {facts['loss']:.4f}",
        )
    if best:
        say(
            "keep",
            f"step {best:,}, the best on held-out rows; training ended at step {last:,} of {trainer.state.max_steps:,}",
        )
    facts["advice"] = None if trainer.args.load_best_model_at_end else find_overfitting(history)
    if facts["advice"]:
        say("advice", facts["advice"])
    return facts
