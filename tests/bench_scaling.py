"""Steady speed and memory of this script for one model on one or several GPUs: one line of a table.

    python tests/bench_scaling.py --model_id Qwen/Qwen3-8B --batch_size 64 --gradient_accumulation_steps 1
    torchrun --nproc_per_node 4 tests/bench_scaling.py --model_id Qwen/Qwen3-8B --batch_size 64 ...

Takes the flags of train_qwen3_tool_calling.py; trains 10 steps that are not counted and 15 that are.
"""

import sys
import tempfile
import types

from bench_throughput import make_rows, script, time_steps

WARM_UP, STEPS = 10, 15


def main() -> None:
    import torch

    args = script.parse_args([*sys.argv[1:], "--max_steps", str(WARM_UP + STEPS), "--output_dir", tempfile.mkdtemp()])
    engine = script.start_engine(args)
    train = make_rows(args, script.load_tokenizer(args.model_id), None)
    args.num_epochs = -(-args.max_steps * script.count_rows(args) // len(train))
    plan = script.plan_streams(train, args, engine)
    model = script.load_model(args, engine, plan)
    loaded = torch.cuda.max_memory_reserved() / 2**30
    trainer = script.build_trainer(args, engine, model, script.load_tokenizer(args.model_id), train, [], plan)
    if not script.check_sharing(args, trainer.model, train, plan, engine):
        raise RuntimeError("sharing is switched off")
    result = types.SimpleNamespace(**time_steps(trainer, WARM_UP))
    if script.is_main():
        bits = 4 if args.load_in_4bit else 16
        print(f"| {args.model_id.rstrip('/').split('/')[-1]} | {plan.devices} | {bits}-bit | {plan.rows_per_step} | "
              f"{plan.rows_per_step / result.seconds:.1f} | {1000 * result.seconds:.0f} | {result.peak:.2f} | {loaded:.2f} |")
    script.leave_group()


if __name__ == "__main__":
    main()
