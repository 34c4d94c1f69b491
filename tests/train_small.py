"""Train a very small random Qwen3 in FOLDER, in one or many lives: python train_small.py FOLDER KILLS FLAGS...

A life is what the command line does from the checkpoint to the adapter, or with --lora_rank 0 to the trained model. The
first KILLS lives are ended by SIGKILL, each at a random moment before twice the time that the first needs for a
checkpoint and soon after its second one, so that none comes to the end; the last one does. Each fifth lives until it
has written a checkpoint, however slow the machine is. Each life is a fork, so that the libraries are loaded once. With
the flag --slow_from N, which must be the last, that step takes a minute; with --room N, the last one of several
devices has no memory for training on a stream of more tokens.
"""

# ruff: noqa: E402 (the root of the project is put on the path first)

import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_qwen3_tool_calling as script
from tool_calling.arguments import pick
from tool_calling.checkpoints import find_checkpoint, list_checkpoints
from tool_calling.engines.device import leave_group
from tool_calling.engines.fsdp import held_part
from tool_calling.engines.hub import load_tokenizer
from tool_calling.engines.start import start_engine
from tool_calling.files import lock_folder, put_in_place
from tool_calling.processes import is_main, leave
from tool_calling.run_folder import Run, read_run
from tool_calling.samples import Sample
from tool_calling.saving.merge import Trained, round_trained, save_adapter, save_whole
from tool_calling.schedule import Batching, plan_schedule
from tool_calling.training.loop import train


def make_base(folder: Path) -> None:
    """Save a random Qwen3 of two small layers with the embedded base's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / "tiny-qwen3")
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# With 1e-8, Adam turns the last bits of a gradient that is nearly zero into another step: up to lr / epsilon times its
# rounding. Above the typical gradient, steps differ as little as gradients do, on every processor.
ADAM_EPSILON = 1e-2


def make_rows(count: int, seed: int) -> list[Sample]:
    """Return random samples whose prompts have a common beginning."""
    numbers = random.Random(seed)
    return [Sample(f"row:{i}", [*range(20, 40), *numbers.choices(range(300), k=10)], 25, row=i) for i in range(count)]


def live(folder: Path, flags: list[str]) -> None:
    """Go from the newest whole checkpoint in `folder`/out, or from the start, to the adapter."""
    if not is_main():
        sys.stdout = open(os.devnull, "w")
    args = script.parse_args(
        [
            "--output_dir",
            str(folder / "out"),
            "--final_model_dir",
            str(folder / "final"),
            "--model_id",
            str(folder / "base"),
            "--no-load_in_4bit",
            "--engine",
            "transformers",
            *flags,
        ]
    )
    lock = lock_folder(args.output_dir)  # noqa: F841
    checkpoint = find_checkpoint(args.output_dir, "newest" if list_checkpoints(args.output_dir) else None)
    run = Run(Path(args.output_dir), vars(args), checkpoint, read_run(checkpoint, vars(script.parse_args([]))))
    engine = start_engine(args.engine, args.share_prefix, args.output_dir, args.seed)
    schedule, held_out = (
        plan_schedule(make_rows(23, seed=2), pick(Batching, args), engine=engine),
        make_rows(4, seed=3),
    )
    optim = script.choose_optim(args)
    run.check_agrees(schedule, optim)
    tokenizer = load_tokenizer(args.model_id)
    model = script.load_model(args, engine, schedule, tokenizer)
    held = sum(held_part(weight).numel() for weight in model.parameters())
    print(f"holds {held / sum(weight.numel() for weight in model.parameters()):.2f} of the weights")
    trainer = script.build_run_trainer(args, model, tokenizer, schedule, held_out, engine)
    trainer.args.adam_epsilon = ADAM_EPSILON
    run.start(schedule, optim)
    train(trainer, run)
    if not args.lora_rank:
        base, final = args.model_id, args.final_model_dir
        trained = Trained(base, base, None, engine, final, args.save_method, vars(args))
        whole, _ = round_trained(trained, trainer.model, schedule.layout.batch(held_out))
    if leave_group():
        if args.lora_rank:
            save_adapter(trainer.model, vars(args), tokenizer)
        else:
            put_in_place(args.final_model_dir, save_whole(trained, whole, tokenizer))


def slow_down(step: int) -> None:
    """Make the optimizer step take a minute."""
    from tool_calling.training import trainer

    compute, calls = trainer.compute_token_losses, iter(range(10**6))

    def compute_slowly(model, batch, engine):
        if model.training and next(calls) == 2 * (step - 1):  # two streams a step
            time.sleep(60)
        return compute(model, batch, engine)

    trainer.compute_token_losses = compute_slowly


def limit_memory(tokens: int) -> None:
    """Let training run out of memory on the last device, for each stream of more tokens."""
    import torch

    from tool_calling.training import trainer

    compute, last = trainer.compute_token_losses, os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)

    def compute_what_fits(model, batch, engine):
        if last and batch["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError("simulated")
        return compute(model, batch, engine)

    trainer.compute_token_losses = compute_what_fits


TROUBLES = {"--slow_from": slow_down, "--room": limit_memory}


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    return max((int(path.name[11:]) for path in list_checkpoints(folder / "out")), default=0)


def main() -> int:
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl  # noqa: F401

    folder, kills, flags = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if not (folder / "base").is_dir():
        make_base(folder / "base")
    if TROUBLES.keys() & flags[-2:-1]:
        *flags, trouble, number = flags
        TROUBLES[trouble](int(number))
    sys.argv[1:] = ["--output_dir", str(folder / "out"), *flags]  # what the interrupted command line looks at
    script.main = lambda argv: live(folder, flags)
    seconds = None
    while kills:
        began, child = time.monotonic(), os.fork()
        if child == 0:
            os._exit(script.run_command_line())
        step = newest_step(folder)
        if kills % 5 == 0 or seconds is None:
            while newest_step(folder) == step:
                time.sleep(0.01)
            seconds = seconds or 2 * (time.monotonic() - began)
        else:
            end = began + random.uniform(0, seconds)
            while time.monotonic() < end and newest_step(folder) < step + 2:
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kills -= killed  # a life that came to its end by itself does not count
        # On a line of its own, even if the killed one was about to end its line.
        print("\nkilled" if killed else "\nended", *sorted(path.name for path in (folder / "out").glob("checkpoint-*")))
        sys.stdout.flush()
    return script.run_command_line()


if __name__ == "__main__":
    leave(main())
