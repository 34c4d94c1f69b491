#!/usr/bin/env python3
"""What --method grpo gives, and how fast it is beside TRL's GRPOTrainer with Unsloth.

    python tests/bench_grpo.py outputs/grpo --learn --seeds 1 2 3 --at_once
    python tests/bench_grpo.py outputs/grpo --learn --settings "--learning_rate 1e-3" "--learning_rate 3e-3 --beta 0.01"
    python tests/bench_grpo.py outputs/grpo --speed FOLDER_OR_NAME        # a CUDA machine with Unsloth

--learn trains the embedded base as README's first command does, once; then it goes on with --method grpo, once for each
setting and seed. The table says how many of all held-out rows get exactly the right call, and how many get a call that
nobody wants. Flags that this program does not have go to the grpo runs. With CUDA_VISIBLE_DEVICES= and
OMP_NUM_THREADS=2 each run takes two cores.

--speed times steps of 8 answers to each of 8 prompts, always the same: here, and by TRL's GRPOTrainer with Unsloth,
which draws answers by `generate`. All answers are of --completion_tokens tokens. Each side has a process of its own.
Both tables are also in table.md and speed.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench_forgetting import BASE, FLAGS, ROOT, SCORED, finish, read_report, start, write_table

ADAPTER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS, ANSWERS, WARM = 8, 8, 2  # of a step; steps that are not counted
HEAD = ["setting", "seed", "exact: base", "after SFT", "after GRPO", "gain", "false calls: SFT", "GRPO"]
HEAD += ["step that is kept", "minutes"]


def count_false_calls(score: dict) -> int:
    """Return to how many rows that expect no call a model has not answered without one."""
    return round((1 - score["no_call"]) * score["rows"]["no_call"])


def find_best(folder: Path) -> int | None:
    """Return the best step of a run by its newest checkpoint: 0 for one that has not improved its model."""
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime)
    return json.loads(states[-1].read_text())["best_global_step"] if states else None


def learn(args: argparse.Namespace, more: list[str]) -> str:
    """Train and return the table."""
    sft, out = args.folder / "sft", args.folder / "sft_out"
    if not (sft / "config.json").is_file():
        places = ("--output_dir", out, "--final_model_dir", sft)
        finish([start("--model_id", BASE, *FLAGS, "--eval_samples", SCORED, *places)])
    runs = []
    for number, setting in enumerate(args.settings):
        for seed in args.seeds:
            name = args.folder / f"grpo_{number}_{seed}"
            flags = ["--method", "grpo", "--model_id", sft, "--no-load_in_4bit", "--on_invalid", "skip"]
            flags += [
                "--eval_samples",
                SCORED,
                "--seed",
                seed,
                "--output_dir",
                f"{name}_out",
                "--final_model_dir",
                name,
            ]
            runs.append((setting, seed, Path(f"{name}_out"), start(*flags, *more, *setting.split())))
            if not args.at_once:
                runs[-1][-1].wait()
    scores, lines = read_report(out)["scores"], []
    for setting, seed, folder, run in runs:
        failed, before, after, step, minutes = run.wait(), scores["merged"], scores["merged"], "none was better", ""
        if failed and find_best(folder) != 0:
            sys.exit(f"the run with {setting} and seed {seed} failed")
        if not failed:
            report = read_report(folder)
            before, after = report["scores"]["base"], report["scores"]["merged"]
            step, minutes = report["train"]["kept_step"], f"{sum(report['train']['stages'].values()) / 60:.0f}"
        exact = [score["exact_match"] for score in (scores["base"], before, after)]
        shares = [f"{share:.1%}" for share in exact] + [f"{100 * (exact[2] - exact[1]):+.1f}"]
        false = [count_false_calls(score) for score in (before, after)]
        lines.append([f"`{setting}`", seed, *shares, *false, step, minutes])
    return write_table(args.folder / "table.md", HEAD, lines)


def speed(args: argparse.Namespace) -> str:
    """Time both sides, each in a process of its own, and return the table."""
    lines = []
    for side, name in (("ours", "--method grpo"), ("trl", "TRL's GRPOTrainer with Unsloth")):
        command = [sys.executable, Path(__file__).resolve(), args.folder, "--speed", args.speed, "--side", side]
        command += ["--completion_tokens", args.completion_tokens, "--steps", args.steps]
        command += ["--load_in_4bit"] if args.load_in_4bit else []
        result = subprocess.run([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            sys.exit(f"{name} failed: see above")
        found = json.loads(result.stdout.splitlines()[-1])
        lines.append([name, *(f"{found[key]:.2f}" for key in ("whole", "drawing", "training", "gib"))])
    head = ["a step of 8 x 8 answers", "seconds", "of them drawing", "training", "peak GiB"]
    return write_table(args.folder / "speed.md", head, lines)


def rate(completion_ids: list[list[int]], **columns) -> list[float]:
    """Return rewards of answers of random tokens, so that groups have a gradient."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def make_samples(args: argparse.Namespace, settings: argparse.Namespace) -> tuple:
    """Return the tokenizer and the samples whose prompts are answered: the first ones."""
    import train_qwen3_tool_calling as script
    from tool_calling.engines.hub import load_tokenizer
    from tool_calling.samples import Rendering, render_valid

    tokenizer = load_tokenizer(args.speed)
    examples, held_out, _ = script.read_sides(settings)
    samples, _ = render_valid(tokenizer, examples, held_out, script.pick(Rendering, settings))
    return tokenizer, samples[:PROMPTS]


class Times:
    """Seconds of steps, of drawing and of both, and the memory that they take."""

    def __init__(self):
        self.drawing, self.steps, self.last = [], [], None

    def wait(self) -> float:
        """Return the time when the GPU has done what it was given."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def around(self, draw):
        """Return a function that draws and notes how long that takes."""

        def timed(*arguments, **more):
            began = self.wait()
            try:
                return draw(*arguments, **more)
            finally:
                self.drawing.append(self.wait() - began)

        return timed

    def watch(self, trainer) -> None:
        """Note how long each step of a trainer takes, from the end of the one before."""
        from transformers import TrainerCallback

        times = self

        class Watch(TrainerCallback):
            def on_train_begin(self, *arguments, **more):
                times.last = times.wait()

            def on_step_end(self, *arguments, **more):
                now = times.wait()
                times.steps.append(now - times.last)
                times.last = now

        trainer.add_callback(Watch())

    def show(self) -> None:
        """Print the medians as JSON."""
        import torch

        drawing, steps = self.drawing[WARM : len(self.steps)], self.steps[WARM:]
        training = [whole - part for whole, part in zip(steps, drawing)]
        found = dict(zip(("whole", "drawing", "training"), map(statistics.median, (steps, drawing, training))))
        gib = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0
        print(json.dumps(found | {"gib": gib}))


def time_ours(args: argparse.Namespace) -> None:
    """Time steps of this project."""
    from conftest import patch
    from pytest import MonkeyPatch

    import train_qwen3_tool_calling as script
    from tool_calling.engines.start import start_engine
    from tool_calling.schedule import Batching, plan_schedule

    settings = parse(args, "--method", "grpo", "--num_generations", ANSWERS, "--max_new_tokens", args.completion_tokens)
    engine = start_engine(settings.engine, settings.share_prefix, settings.output_dir, settings.seed)
    tokenizer, samples = make_samples(args, settings)
    settings.metric_for_best, settings.save_steps = None, 10**9  # nothing is held out, and nothing saved
    schedule = plan_schedule(samples, script.pick(Batching, settings), engine=engine)
    model = script.load_model(settings, engine, schedule, tokenizer)
    trainer = script.build_run_trainer(settings, model, tokenizer, schedule, [], engine)
    patch(MonkeyPatch(), "is_whole", lambda answer, stops: True)  # all answers are as long, and all are trained
    trainer.stops, times = [-1], Times()
    trainer.rate = lambda rows, answers, texts: to_ratings(rate(answers))
    trainer.draw = times.around(trainer.draw)
    times.watch(trainer)
    trainer._save_checkpoint = lambda *arguments: None
    trainer.train()
    times.show()


def to_ratings(rewards: list[float]) -> list:
    """Return ratings with these rewards."""
    from tool_calling.rewards import EXACT

    return [EXACT._replace(reward=reward) for reward in rewards]


def time_trl(args: argparse.Namespace) -> None:
    """Time steps of TRL's GRPOTrainer with Unsloth, set up as Unsloth's notebooks do."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("error: TRL's GRPOTrainer with Unsloth needs a CUDA GPU")
    from unsloth import FastLanguageModel  # isort: skip (before trl)
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    settings = parse(args)
    _, samples = make_samples(args, settings)
    longest = max(sample.prompt_length for sample in samples) + args.completion_tokens
    model, tokenizer = FastLanguageModel.from_pretrained(
        args.speed, max_seq_length=longest, load_in_4bit=settings.load_in_4bit, dtype=None, fast_inference=False
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, target_modules=ADAPTER, use_gradient_checkpointing="unsloth", random_state=3407
    )
    prompts = [tokenizer.decode(sample.input_ids[: sample.prompt_length]) for sample in samples]
    config = GRPOConfig(
        output_dir=str(args.folder / "trl_out"),
        per_device_train_batch_size=PROMPTS * ANSWERS,
        gradient_accumulation_steps=1,
        num_generations=ANSWERS,
        max_completion_length=args.completion_tokens,
        generation_kwargs={"min_new_tokens": args.completion_tokens},
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        learning_rate=1e-5,
        optim="adamw_torch_fused",
        max_steps=args.steps,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[rate],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        peft_config=None,
    )
    times = Times()
    trainer._generate = times.around(trainer._generate)
    times.watch(trainer)
    trainer.train()
    times.show()


def parse(args: argparse.Namespace, *more: object) -> argparse.Namespace:
    """Return the settings of the project for a run of --speed."""
    import train_qwen3_tool_calling as script

    flags = ["--model_id", args.speed, "--max_steps", args.steps, "--batch_size", PROMPTS, "--warmup_steps", 0]
    flags += ["--gradient_accumulation_steps", 1, "--output_dir", args.folder / "ours_out", "--on_invalid", "skip"]
    flags += [] if args.load_in_4bit else ["--no-load_in_4bit"]
    return script.parse_args([*map(str, [*flags, *more])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where models, reports and tables go")
    parser.add_argument("--learn", action="store_true", help="train, and write the table of scores")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--settings", nargs="+", default=[""], help="each a text of flags for the grpo runs")
    parser.add_argument("--at_once", action="store_true", help="train all at the same time")
    parser.add_argument("--speed", metavar="MODEL", help="time steps of this model")
    parser.add_argument("--completion_tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--steps", type=int, default=10, help=f"of --speed; the first {WARM} are not counted")
    parser.add_argument("--load_in_4bit", action="store_true", help="train on a 4-bit base")
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)  # of a process of --speed
    args, more = parser.parse_known_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)  # where the training runs start, too: paths mean the same
    if args.side:
        return (time_ours if args.side == "ours" else time_trl)(args)
    if args.learn:
        print(learn(args, more), end="")
    if args.speed:
        print(speed(args), end="")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
