"""TRL's SFTTrainer over streams."""

import math
import shutil
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from tool_calling.checkpoints import list_checkpoints
from tool_calling.engines.compat import set_checkpointing
from tool_calling.engines.device import average_gradients, begin_alike, join_gradients, set_gradients
from tool_calling.engines.fsdp import gather_weights, gather_whole, is_split, split_as
from tool_calling.engines.graphs import make_room, replays
from tool_calling.engines.heads import fuse_head
from tool_calling.engines.loading import TOKEN_ROWS
from tool_calling.engines.losses import compute_token_losses, score_batches, to_metrics
from tool_calling.files import discard_partial, move_aside, put_in_place, write_manifest
from tool_calling.processes import is_main
from tool_calling.samples import Sample
from tool_calling.schedule import Schedule, StreamSampler
from tool_calling.streams import IGNORED, Layout, split_rows
from tool_calling.terminal import UserError, list_first, plural, warn
from tool_calling.training.callbacks import ProgressBar

NAMED_ROWS = 8  # rows of a failed step that are named
TOKEN_RATE = 4  # of rows of tokens, as a multiple of the adapter's rate: these start anew, and few steps meet them


class Noted(NamedTuple):
    """A step that has been launched, and its numbers: loss, norm, sum of losses to log, norm to log."""

    step: int
    epoch: float
    rows: list[Sample]
    numbers: torch.Tensor
    arrival: torch.cuda.Event | None  # when the numbers are on the CPU
    log: dict | None  # how many steps it sums up and their rate, if it is logged


class StreamTrainer(SFTTrainer):
    """What this project does otherwise than TRL: streams, a loss per token, whole checkpoints, less memory on demand.

    TRL would render and truncate conversations in its own way, and it asks for a dataset: it gets the samples' numbers.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the supervised tokens of the whole step
    can_recompute = False  # whether activations are kept that may be computed twice instead
    aside = None  # the sum of the gradients of the step's streams, if these are replayed

    def __init__(self, schedule: Schedule, held_out: list[Sample], engine: str, **settings):
        self.held_out, self.engine = held_out, engine
        self.take(schedule)
        self.step_rows, self.step_loss, self.step_norm = [], 0.0, 0.0  # of the current optimizer step
        self.noted = []  # steps whose numbers are still to be checked and logged
        self.epoch_batches, self.next_batches = iter(()), []  # the micro-batches of the epoch, and of the next step
        self.tokens_computed, self.staging = 0, None
        self.progress = ProgressBar()
        numbers = [Dataset.from_dict({"index": range(len(rows))}) if rows else None for rows in (self.arrays, held_out)]
        super().__init__(data_collator=self.collate, train_dataset=numbers[0], eval_dataset=numbers[1], **settings)
        # Gradients are averaged in training_step; accelerate would wrap the model to do it.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.remove_callback(PrinterCallback)
        self.add_callback(self.progress)

    def take(self, schedule: Schedule) -> None:
        """Train by this schedule, with as many streams per step as the one that the trainer was made with."""
        self.schedule = schedule
        self.layout = schedule.layout  # as planned, or smaller streams once those did not fit into memory
        # As arrays: lists would be turned into arrays anew in every step.
        self.arrays = [sample._replace(input_ids=np.asarray(sample.input_ids)) for sample in schedule.samples]
        last = self.arrays[0]
        self.arrays.append(last._replace(prompt_length=len(last.input_ids)))  # trains nothing: see StreamSampler

    def create_optimizer(self, model=None):
        """Return the optimizer, with a group of their own for rows of tokens: at TOKEN_RATE, and without decay."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        rows = [weight for name, weight in self.model.named_parameters() if TOKEN_ROWS in name]
        if rows:
            for group in optimizer.param_groups:
                group["params"] = [weight for weight in group["params"] if all(weight is not row for row in rows)]
            optimizer.add_param_group({"params": rows, "lr": TOKEN_RATE * self.args.learning_rate, "weight_decay": 0.0})
        return optimizer

    def create_model_card(self, *args, **kwargs):
        """Write none: TRL's knows no scores. A card with scores is written beside each model that is kept."""

    def collate(self, indices):
        return {**self.schedule.layout.build([self.arrays[index] for index in indices]), "rows": indices}

    def batch_held_out(self) -> list[dict]:
        """Return the micro-batches of this device's share of the held-out samples, as many as others have of theirs."""
        rows = self.held_out[self.accelerator.process_index :: self.accelerator.num_processes]
        batches = self.scoring_layout.batch(rows) if rows else []
        # With --fsdp all devices must compute as often, so some get a batch that supervises nothing.
        missing = max(gather_object([len(batches)])) - len(batches)
        return batches + [self.schedule.layout.build(self.arrays[-1:])] * missing

    @property
    def scoring_layout(self) -> Layout:
        """A layout of samples, each of which has one answer, that are as many as are trained at once."""
        planned = self.layout is self.schedule.layout  # by prompts; streams that are divided count answers
        return replace(self.layout, rows=self.layout.rows * (self.schedule.answers if planned else 1))

    def find_rows(self, indices) -> list[Sample]:
        """Return the samples of a micro-batch by what it says of them."""
        return [self.arrays[index] for index in indices]

    def get_train_dataloader(self):
        sampler = StreamSampler(self.schedule, lambda: int(self.state.epoch or 0))
        pinned = self.args.dataloader_pin_memory
        loader = torch.utils.data.DataLoader(
            range(len(self.arrays)), batch_sampler=sampler, collate_fn=self.collate, pin_memory=pinned
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of a step, and how many tokens all devices supervise in it."""
        if epoch_iterator is not self.epoch_batches:  # what was fetched in an epoch left early does not belong here
            self.epoch_batches, self.next_batches = epoch_iterator, []
        batches = self.next_batches or list(islice(epoch_iterator, num_batches))
        tokens = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
        return batches, self.accelerator.reduce(tokens, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the micro-batch's share of the weighted mean over all supervised tokens of the optimizer step.

        The factor turns the devices' mean gradient into their sum.
        """
        self.tokens_computed += inputs["input_ids"].numel()
        losses = compute_token_losses(model, inputs, self.engine)[0]
        loss = (losses * self.weigh_tokens(model, inputs, losses.detach())).sum() / num_items_in_batch
        return loss * self.accelerator.num_processes

    def weigh_tokens(self, model, inputs, losses):
        """Return the weights of the supervised tokens of a micro-batch in the loss."""
        return inputs["weights"]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Return the loss of a micro-batch, its gradient added to what was there.

        If memory runs out, the rows are computed anew in smaller streams, each divided by the same number of items:
        loss and gradient are sums over the streams, so they do not change.
        """
        model.zero_grad = self.drop_gradients  # what the library calls after the step
        rows, lost, loss = self.find_rows(inputs.pop("rows")), [], None
        while loss is None:
            whole, losses = self.layout is self.schedule.layout, []
            again = split_rows(lost, self.layout.rows) if lost else []
            try:
                for part in (*again, *([rows] if whole else split_rows(rows, self.layout.rows))):
                    batch = inputs if whole else self.layout.build(part)
                    losses.append(super().training_step(model, batch, num_items_in_batch))
                    if self.schedule.streams_per_step > 1 and replays(self.model):
                        self.set_aside()
                loss = sum(losses[len(again) :])
            except torch.OutOfMemoryError:
                pass  # the failed computation is still held here; it is released below
            if loss is None:
                self.divide_streams(part, batch["input_ids"].numel())
                lost = self.step_rows  # the rows of this step before these: their gradient was dropped to make room
        self.step_rows, self.step_loss = [*self.step_rows, *rows], self.step_loss + loss
        if self.accelerator.sync_gradients:  # the last micro-batch of the step
            if self.aside is not None:
                set_gradients(self.trained, self.aside)
            average_gradients(self.trained)
        return loss

    def set_aside(self) -> None:
        """Add the gradients of a stream to the step's, out of the way of those of the next replayed one."""
        total = join_gradients(self.trained) + (0.0 if self.aside is None else self.aside)
        self.drop_gradients()
        self.aside = total

    def divide_streams(self, rows: list[Sample], tokens: int) -> None:
        """Compute activations twice, if they were kept, or halve the streams after these rows did not fit into memory.

        UserError if a row alone did not.
        """
        step, devices = self.state.global_step + 1, self.accelerator.num_processes
        make_room(self.model)
        where = f"device {self.accelerator.process_index + 1} of {devices} is " if devices > 1 else ""
        failed = f"{where}out of GPU memory at step {step:,} with a stream of {tokens:,} tokens"
        if self.can_recompute:
            self.can_recompute, change = False, "activations are computed twice, and steps not replayed"
            set_checkpointing(self.model, True)
        elif len(rows) == 1:
            raise UserError(explain_memory(rows[0], step))
        elif is_split(self.model):  # all devices compute as often
            raise UserError(f"{failed}; lower --batch_size and raise --gradient_accumulation_steps as much")
        else:
            size, answers = -(-len(rows) // 2), self.schedule.answers
            self.layout = self.schedule.divide(size)
            streams = self.schedule.streams_per_step * -(-self.schedule.layout.rows * answers // size)
            parts = plural(size, "row" if answers == 1 else "answer")
            change = f"each step is computed in {streams} streams of at most {parts}"
        warn(f"{failed}: from here on {change}; the result is the same", everywhere=True)

    @cached_property
    def trained(self) -> list:
        """The weights that are trained. To find them takes the CPU milliseconds, and the library would three times."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def drop_gradients(self, set_to_none=True):
        self.aside = None
        for weight in self.trained:
            weight.grad = None

    def _clip_grad_norm(self, model):
        if is_split(self.model):  # of weights that are split and others that are not
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of split weights
        # In fp16, gradients that overflow are nothing special: the scaler leaves such a step out.
        self.step_norm = norm if self.accelerator.scaler is None else 0.0
        return norm

    def floating_point_ops(self, inputs):
        """Count none: the library would go through all weights in every step."""
        return 0

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *arguments, learning_rate=None, **more):
        """Log, evaluate and save as the library does, but look at a step's numbers while the next one computes.

        To look at once would wait for the GPU, which would then wait for the next step. Nothing of a step is evaluated
        or saved before its numbers are checked.
        """
        self.next_batches = list(islice(self.epoch_batches, self.schedule.streams_per_step))
        control, state = self.control, self.state
        if self.step_rows:  # not at the end of an epoch, where the last step has been noted
            self.noted.append(self.note_step(tr_loss, grad_norm, learning_rate))
        wanted = control.should_evaluate or control.should_save or control.should_training_stop
        self.check_steps(0 if wanted or state.global_step >= state.max_steps else 1)
        control.should_log = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *arguments, learning_rate=learning_rate, **more)

    def note_step(self, tr_loss, grad_norm, learning_rate) -> Noted:
        """Return the numbers of the step that has been launched, on their way to the CPU."""
        log, step = None, self.state.global_step
        numbers = [self.step_loss, self.step_norm, tr_loss, tr_loss if grad_norm is None else grad_norm]
        numbers = torch.stack([torch.as_tensor(number, device=tr_loss.device).float() for number in numbers])
        if self.control.should_log:
            numbers[2] = self.accelerator.reduce(numbers[2], "mean")
            tr_loss.zero_()  # as the library does: it adds up the losses since the last log
            log = {"steps": step - self._globalstep_last_logged, "learning_rate": learning_rate}
            self._globalstep_last_logged = step
        numbers, arrival = numbers.to("cpu", non_blocking=True), None
        if torch.cuda.is_available():
            arrival = torch.cuda.Event()
            arrival.record()
        noted = Noted(step, self.state.epoch, self.step_rows, numbers, arrival, log)
        self.step_rows, self.step_loss = [], 0.0
        return noted

    def check_steps(self, left: int) -> None:
        """Check and log the numbers of the noted steps but the last `left`; UserError if one is not finite."""
        while len(self.noted) > left:
            noted = self.noted.pop(0)
            if noted.arrival:
                noted.arrival.synchronize()
            loss, norm, logged, grad_norm = noted.numbers.tolist()
            if not math.isfinite(loss + norm):
                rows = noted.rows
                if self.accelerator.scaler is None:  # with a scaler, only the loss of one device may be wrong
                    rows = gather_object(rows)
                raise UserError(explain_numbers(noted.step, loss, norm, rows))
            if noted.log:
                self._total_loss_scalar += logged
                now = self.state.global_step, self.state.epoch
                self.state.global_step, self.state.epoch = noted.step, noted.epoch
                rate = noted.log["learning_rate"]
                self.log({"loss": logged / noted.log["steps"], "grad_norm": grad_norm, "learning_rate": rate})
                self.state.global_step, self.state.epoch = now

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """Return token exact match, and the held-out loss as a mean over tokens (the library's is one over batches)."""
        scores = score_batches(self.model, self.batch_held_out(), self.engine)
        scores = self.accelerator.reduce(scores, "sum")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in to_metrics(scores).items()}
        return EvalLoopOutput(None, None, metrics, num_samples=len(self.held_out))

    def _get_output_dir(self, trial):
        return str(self.staging or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint out of sight, name it when it is whole, then remove the checkpoints beyond the limit."""
        output, state, wait = Path(self.args.output_dir), self.state, self.accelerator.wait_for_everyone
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
        if is_main() and self.args.save_total_limit:
            for old in list_checkpoints(output)[: -self.args.save_total_limit]:
                if old != best:
                    shutil.rmtree(move_aside(old), ignore_errors=True)
        wait()


class SplitTrainer(StreamTrainer):
    """A StreamTrainer of a model that split_model has split over the devices; what it saves is whole."""

    def save_model(self, output_dir=None, _internal_call=False):
        weights = None if isinstance(self.model, PeftModel) else gather_weights(self.model)
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
        for number, moments in state["state"].items():
            state["state"][number] = {name: split_as(weights[number], value) for name, value in moments.items()}
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


def build_trainer(make, model, tokenizer, config) -> StreamTrainer:
    """Return the trainer of a model.

    Args:
        make: the kind of trainer, with all that it takes beside these.
        config: TRL's SFTConfig of the run.
    """
    trainer = make(model=model, args=config, processing_class=tokenizer)
    # Checkpoints hold weights as the model names them, all experts as one tensor; and of a larger vocabulary the rows
    # that are trained, not the table.
    options = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {"save_original_format": False}
    model.save_pretrained = partial(model.save_pretrained, **options)
    # TRL makes the adapter of a 4-bit base bf16, in which late, small updates round to nothing.
    for weight in trainer.trained:
        weight.data = weight.data.float()
    begin_alike(trainer.trained)
    if torch.cuda.is_available() and not is_split(model):
        fuse_head(model)
    # The trainer would turn checkpointing on only in train(), after the self-check.
    if trainer.engine == "unsloth":
        set_checkpointing(trainer.model, config.gradient_checkpointing)
    elif config.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
    return trainer


def explain_memory(row: Sample, step: int) -> str:
    """Return why training cannot go on when even one row does not fit into memory, and what to change."""
    memory = ""
    if torch.cuda.is_available():
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        memory = f", with {free:.1f} of {total:.1f} GiB free for it"
    found = f"out of GPU memory at step {step:,} on this row alone, {len(row.input_ids):,} tokens{memory}"
    advice = "lower --max_seq_length, use --load_in_4bit, --gradient_checkpointing on and --no-cuda_graphs"
    return f"{row.source}: {found}; {advice}, or choose a smaller --model_id"


def explain_numbers(step: int, loss: float, norm: float, rows: list[Sample]) -> str:
    """Return what is not finite in a step, its rows, and what to do."""
    wrong = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    names = dict.fromkeys(row.source for row in rows if row.prompt_length < len(row.input_ids))  # not an empty stream's
    kept = "Nothing of it is saved, and earlier checkpoints are good"
    advice = f"Lower --learning_rate, or look at the rows of this step: {list_first(names, NAMED_ROWS)}"
    return f"step {step:,}: {wrong}; expected a finite number. {kept}. {advice}"
