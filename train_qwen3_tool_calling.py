#!/usr/bin/env python3
"""Teach a small Qwen3 to call your tools: tool-calling JSON in, a merged model in safetensors out.

    python train_qwen3_tool_calling.py --dataset_path data/mine.jsonl --tools_path data/tools.json

The data flows through this file from top to bottom: row -> example -> sample -> stream -> model -> merged model.
Each section takes what the one above it gives. Everything that can be checked without a model is checked
before torch is imported, so a mistake costs a second and not an hour.
"""

import argparse
import contextlib
import errno
import json
import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

from tool_calling.arguments import GGUF_NAMES, SCHEDULERS, Parser, drop_resume, number, one_of, read_config, to_command
from tool_calling.data.examples import Checked, Reading, check_rows, find_warnings, read_examples, write_converted
from tool_calling.data.formats import FORMATS
from tool_calling.data.literals import as_list
from tool_calling.data.messages import is_trained
from tool_calling.environment import refuse_telemetry, return_pages
from tool_calling.files import discard_partial, is_disk_full, lock_folder, put_in_place
from tool_calling.fresh import run_fresh
from tool_calling.processes import (
    LAUNCHER,
    PATIENCE,
    Interrupted,
    count_devices,
    handle_signals,
    is_main,
    leave,
    raise_interrupted,
    unwrap_interrupt,
)
from tool_calling.prompts import (
    NOT_HELD_OUT,
    check_sides,
    count_origins,
    describe_length,
    find_date,
    find_shown,
    name_unit,
    render_all,
    render_examples,
    show_rows,
    to_sides,
)
from tool_calling.run_folder import (
    check_final,
    check_folder,
    check_resume,
    find_checkpoint,
    is_complete,
    list_checkpoints,
    mark_output,
    read_run,
    start_output,
    write_run,
)
from tool_calling.saving.gguf import check_gguf, find_gguf_tools
from tool_calling.scores import score_results
from tool_calling.terminal import FlagError, UserError, drop_output, hide_secrets, report_problems, say, warn

MODEL_ID = "Qwen/Qwen3-0.6B"  # the smallest Qwen3: enough for tens of tools, trains on any GPU
DATASET_PATH = "data/synthetic_finetune_dataset.json"
TOOLS_PATH = "data/tools.json"  # for rows that bring no tools of their own
OUTPUT_DIR = "outputs/qwen3_tool_calling_unsloth"  # checkpoints and the adapter
FINAL_MODEL_DIR = "models/qwen3_tool_calling_merged"  # the model to serve
TRAIN_TEST_SPLIT = 0.1  # share of the rows held out from training
NUM_EPOCHS = 3  # a third pass still helps on a few thousand rows; more begins to memorise
BATCH_SIZE = 2  # samples per device and micro-batch: fits 8 GB cards with rows of 2,048 tokens
GRADIENT_ACCUMULATION_STEPS = 4  # 2 x 4 = 8 samples per optimizer step
LEARNING_RATE = 2e-4  # the usual rate for LoRA; full fine-tuning takes a tenth of it
WARMUP_STEPS = 10  # Adam's moments are noise in the first steps
WEIGHT_DECAY = 0.01
LR_SCHEDULER_TYPE = "linear"
MAX_SEQ_LENGTH = 2048  # longer samples are reported, never cut
SEED = 3407
LORA_RANK = 16
LORA_ALPHA = 16  # alpha / rank = 1: the adapter's output is not scaled
LORA_DROPOUT = 0.0  # 0 lets steps be recorded as CUDA graphs
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVAL_SAMPLES = 200  # held-out rows answered by the base, the adapter and the merged model: +-3 of 100 at 95 %
EVAL_BATCH_SIZE = 64  # answers written at once
MAX_NEW_TOKENS = 256  # longest answer; several calls fit
PROGRAM = sys.argv[0] if __name__ == "__main__" else __file__  # as the command line is shown


def build_parser() -> Parser:
    """Return the declaration of all flags. Those without `default` are None unless given, which --help would show."""
    parser = Parser(
        description="Fine-tune a Qwen3 model to call your tools, and save it merged in safetensors.",
        formatter_class=partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=34, width=120),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    count, path = number(int, 1), os.path.expanduser  # after "=" and in --config, no shell sees to ~
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of settings, `flag: value`, as the run.yaml of each run; flags override it",
    )

    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset_path",
        nargs="+",
        type=path,
        default=DATASET_PATH,
        metavar="PATH",
        help="JSON or JSONL files, folders of them, or Hugging Face datasets: name[:split]",
    )
    add("--format", choices=["auto", *FORMATS], default="auto", help="shape of the rows (auto: each row's own)")
    add("--tools_path", type=path, default=TOOLS_PATH, help="JSON array of tools for rows without their own")
    add(
        "--train_test_split",
        type=number(float, 0, 1),
        default=TRAIN_TEST_SPLIT,
        metavar="SHARE",
        help="share of the rows to hold out",
    )
    add("--max_samples", type=count, metavar="N", help="use only the first N rows (default: all)")
    add(
        "--max_seq_length",
        type=count,
        default=MAX_SEQ_LENGTH,
        metavar="TOKENS",
        help="longest sample; a longer one is a problem, it is never cut",
    )
    add("--on_invalid", choices=["error", "skip"], default="error", help="what to do with a row that has a problem")
    add(
        "--thinking",
        choices=["auto", "on", "off"],
        default="auto",
        help="train answers with reasoning: auto: those that have some, on: all must, off: drop it",
    )
    add(
        "--eval_dataset_path",
        nargs="+",
        type=path,
        metavar="PATH",
        help="rows to hold out, instead of a share of --dataset_path; as there",
    )
    add(
        "--convert_to",
        type=path,
        metavar="PATH",
        help="train nothing: write the rows of --dataset_path in the OpenAI form to this new JSONL file",
    )
    add(
        "--dry_run",
        action="store_true",
        help="train nothing: print what a run would do, and write it to OUTPUT_DIR/audit.json",
    )
    add("--show_row", type=count, metavar="N", help="print the N-th valid row whole, as the model sees it")

    add = parser.add_argument_group("model").add_argument
    add("--model_id", default=MODEL_ID, help="Hub id or folder of the base model")
    add("--merge_model_id", metavar="MODEL", help="16-bit original to merge into, when --model_id is already quantised")
    add(
        "--engine",
        choices=["auto", "unsloth", "transformers"],
        default="auto",
        help="auto: Unsloth on CUDA, Transformers + PEFT elsewhere",
    )
    add(
        "--load_in_4bit",
        action=argparse.BooleanOptionalAction,
        help="train on a 4-bit base (QLoRA); never with --lora_rank 0 (default: True)",
    )
    add(
        "--trust_remote_code",
        action="store_true",
        default=False,
        help="run the Python code that a model brings along: only if you know who wrote it",
    )
    add(
        "--lora_rank",
        type=number(int, 0),
        default=LORA_RANK,
        metavar="R",
        help="rank of the adapter; 0 trains all weights of the model instead",
    )
    add("--lora_alpha", type=count, default=LORA_ALPHA, metavar="A", help="scale: alpha / rank")
    add(
        "--lora_dropout",
        type=number(float, 0, 1),
        default=LORA_DROPOUT,
        metavar="P",
        help="dropout in front of the adapter",
    )
    add(
        "--use_rslora",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="scale by alpha / sqrt(rank) (rsLoRA): for high ranks",
    )
    add(
        "--target_modules",
        nargs="+",
        default=" ".join(TARGET_MODULES),
        metavar="NAME",
        help="linear layers that get an adapter",
    )

    train = parser.add_argument_group("training")
    add = train.add_argument
    add("--num_epochs", type=count, default=NUM_EPOCHS, metavar="N", help="passes over the data")
    add("--max_steps", type=count, metavar="N", help="train N optimizer steps, not --num_epochs")
    add("--batch_size", type=count, default=BATCH_SIZE, metavar="N", help="samples per device and micro-batch")
    add(
        "--gradient_accumulation_steps",
        type=count,
        default=GRADIENT_ACCUMULATION_STEPS,
        metavar="N",
        help="micro-batches per optimizer step",
    )
    add(
        "--learning_rate",
        type=number(float, 0, low_open=True),
        metavar="LR",
        help=f"peak rate; with --lora_rank 0 a tenth of the default (default: {LEARNING_RATE})",
    )
    add(
        "--lr_scheduler_type",
        type=one_of(SCHEDULERS),
        default=LR_SCHEDULER_TYPE,
        metavar="NAME",
        help="linear, cosine, constant, ... as Transformers names them",
    )
    warmup = train.add_mutually_exclusive_group()  # argparse tells a given number from the default, which is a text
    warmup.add_argument(
        "--warmup_steps", type=number(int, 0), default=str(WARMUP_STEPS), metavar="N", help="steps until the peak rate"
    )
    warmup.add_argument(
        "--warmup_ratio",
        type=number(float, 0, 1),
        metavar="SHARE",
        help="the same as a share of all steps, instead of --warmup_steps",
    )
    add("--weight_decay", type=number(float, 0), default=WEIGHT_DECAY, metavar="W", help="AdamW's decay")
    add(
        "--optim",
        metavar="NAME",
        help="optimizer (default: adamw_torch; on CUDA adamw_torch_fused, or adamw_8bit if all weights are trained on "
        "each GPU)",
    )
    add(
        "--gradient_checkpointing",
        choices=["auto", "on", "off"],
        default="auto",
        help="compute activations twice instead of keeping them; auto: on with CUDA",
    )
    add(
        "--share_prefix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute what rows have in common once per stream",
    )
    add(
        "--cuda_graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="record the step and replay it with a few launches (Unsloth)",
    )
    add(
        "--fsdp",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="split the weights over all GPUs (FSDP2), for models too large for one",
    )
    add("--seed", type=number(int, 0, 2**32), default=SEED, help="seed of everything random")
    add("--logging_steps", type=count, default=1, metavar="N", help="steps from one loss to the next")
    add("--save_steps", type=count, metavar="N", help="steps from one checkpoint to the next (default: an epoch)")
    add(
        "--save_total_limit",
        type=count,
        metavar="N",
        help="keep the N newest checkpoints, and the best one (default: all)",
    )

    add = parser.add_argument_group("evaluation").add_argument
    add(
        "--eval_steps",
        type=count,
        metavar="N",
        help="steps from one held-out loss and exact match to the next (default: an epoch)",
    )
    add(
        "--metric_for_best",
        choices=["exact_match", "loss"],
        help="keep the checkpoint that is best on the held-out rows (default: the last)",
    )
    add(
        "--early_stopping_patience",
        type=count,
        metavar="N",
        help="stop after N evaluations without improvement (default: never)",
    )
    add(
        "--eval_samples",
        type=count,
        default=EVAL_SAMPLES,
        metavar="N",
        help="held-out rows to answer at the end with base, adapter and merged model",
    )
    add("--eval_batch_size", type=count, default=EVAL_BATCH_SIZE, metavar="N", help="answers written at once")
    add("--max_new_tokens", type=count, default=MAX_NEW_TOKENS, metavar="N", help="longest answer")
    add("--eval_only", metavar="MODEL", help="train nothing: score this model or adapter on the held-out rows")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=path, default=OUTPUT_DIR, help="folder for checkpoints and the adapter")
    add("--final_model_dir", type=path, default=FINAL_MODEL_DIR, help="folder for the merged model")
    add(
        "--save_method",
        choices=["merged_16bit", "merged_4bit", "lora"],
        default="merged_16bit",
        help="what to save at the end; lora: only the adapter, in OUTPUT_DIR/adapter",
    )
    add(
        "--save_gguf",
        type=one_of(GGUF_NAMES, several=True),
        metavar="NAMES",
        help="also write GGUF files and an Ollama Modelfile, with llama.cpp: q8_0,q4_k_m,...",
    )
    add(
        "--push_to_hub",
        metavar="REPO",
        help="upload the result to this Hugging Face repository at the end; a new one is private",
    )
    add(
        "--resume_from_checkpoint",
        nargs="?",
        const="newest",
        metavar="PATH",
        help="go on from a checkpoint (no PATH: the newest in --output_dir)",
    )
    add("--report_to", default="none", metavar="NAME", help="tensorboard, wandb, ... or none")
    add("--run_name", metavar="NAME", help="the run's name there")

    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the settings of a run: of the command line, else of the file of --config, else the defaults.

    A wrong flag is a FlagError; --help ends the program.
    """
    parser = build_parser()
    unset = [action.dest for action in parser._actions if action.default == argparse.SUPPRESS]
    args = argparse.Namespace(**dict.fromkeys(unset))
    config = getattr(parser.parse_args(argv), "config", None)
    for words in (read_config(parser, config) if config else [], argv):
        share = args.warmup_ratio
        parser.parse_args(words, namespace=args)
        if None not in (args.warmup_ratio, args.warmup_steps):  # the later of the two counts
            setattr(args, "warmup_steps" if share is None else "warmup_ratio", None)
    del args.config, args.help
    args.dataset_path = as_list(args.dataset_path)  # a list as default would look like Python in --help
    args.target_modules = sorted({*" ".join(as_list(args.target_modules)).split()})  # their order means nothing
    if args.lora_rank and not args.target_modules:
        parser.error("--target_modules: expected at least one name")
    args.dry_run = bool(args.dry_run)
    if args.eval_only and (args.dry_run or args.show_row or args.resume_from_checkpoint):
        parser.error("--eval_only trains nothing: leave out --dry_run, --show_row and --resume_from_checkpoint")
    if args.convert_to and (args.dry_run or args.eval_only):
        parser.error("--convert_to only writes rows: leave out --dry_run and --eval_only")
    if args.dry_run and args.resume_from_checkpoint:
        parser.error("--dry_run shows a run from its start: leave out --resume_from_checkpoint")
    if not args.lora_rank:
        if args.load_in_4bit or args.engine == "unsloth" or args.save_method == "lora":
            parser.error(
                "--lora_rank 0 trains the 16-bit weights themselves, with Transformers: leave out "
                "--load_in_4bit, --engine unsloth and --save_method lora"
            )
        args.engine = "transformers"  # Unsloth's full fine-tuning runs on classes that take no streams
    if args.load_in_4bit is None:
        args.load_in_4bit = args.lora_rank > 0
    if args.fsdp:
        if count_devices() == 1 or args.engine == "unsloth":
            parser.error(
                "--fsdp splits the weights over several GPUs, with Transformers: start it with torchrun, and "
                "leave out --engine unsloth"
            )
        if not args.lora_rank and args.optim not in (None, "adamw_torch", "adamw_torch_fused"):
            parser.error(
                f"--fsdp --lora_rank 0 splits the optimizer too, as PyTorch's alone can: leave out --optim "
                f"{args.optim}, or give adamw_torch or adamw_torch_fused"
            )
        args.engine = "transformers"  # Unsloth's kernels take whole weights only
    args.learning_rate = args.learning_rate or LEARNING_RATE / (1 if args.lora_rank else 10)
    if args.save_gguf and args.save_method != "merged_16bit":
        parser.error(f"--save_gguf is made from the 16-bit model: leave out --save_method {args.save_method}")
    if args.early_stopping_patience and not args.metric_for_best:
        args.metric_for_best = "exact_match"
    if args.metric_for_best:  # a checkpoint to keep must have been scored
        args.save_steps = args.save_steps or args.eval_steps
        if args.save_steps != args.eval_steps:
            parser.error("--metric_for_best keeps a checkpoint by its score: --save_steps must be --eval_steps")
    return args


def load_model(args: argparse.Namespace, engine: str, plan):
    """Return the base model, in 4 bits if asked, with fresh LoRA adapters on --target_modules.

    With --lora_rank 0 it is the base alone, in fp32: late, small updates round to nothing in 16 bits. The trainer's
    autocast computes in 16 bits on CUDA all the same, so only memory is the price. (TRL and Unsloth do so too.)
    """
    from tool_calling.engines.fsdp import split_model
    from tool_calling.engines.graphs import find_recorded, read_streams
    from tool_calling.engines.hub import load_config
    from tool_calling.engines.loading import load_base
    from tool_calling.engines.start import use_checkpointing

    lora = dict(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias="none",
        use_rslora=args.use_rslora,
        target_modules=args.target_modules,
    )
    import torch

    if engine == "unsloth":
        from torch.nn.attention.flex_attention import flex_attention
        from trl.trainer.utils import add_fused_lm_head
        from unsloth import FastLanguageModel
        from unsloth.utils import prefix_grouper_kernel

        model, _ = FastLanguageModel.from_pretrained(
            args.model_id,
            max_seq_length=args.max_seq_length,
            load_in_4bit=args.load_in_4bit,
            dtype=None,
            use_safetensors=True,
            trust_remote_code=args.trust_remote_code,
            use_exact_model_name=True,
        )  # not a copy of it in Unsloth's own repositories
        model = FastLanguageModel.get_peft_model(
            model,
            **lora,
            random_state=args.seed,
            use_gradient_checkpointing="unsloth" if use_checkpointing(args) else False,
        )
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "is_top1"))
        # Streams have few lengths, so attention compiled for exactly these is worth it: half the time of "any length".
        # By fullgraph, what cannot be compiled is an error (see check_sharing), and not run uncompiled as by Unsloth.
        prefix_grouper_kernel._flex_attention_compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        read_streams(model, find_recorded(args, plan, model.config))
        return model

    from peft import LoraConfig, get_peft_model

    dtype, split = None if args.lora_rank else torch.float32, {}
    if args.fsdp:  # from the CPU; but to quantise there takes minutes, so a 4-bit base is on each GPU whole at first
        cuda = torch.cuda.is_available()
        # Held as fp32: PyTorch gathers bf16 through fp32, by which 4-bit numbers that look like NaN become others.
        split = {"place": None if args.load_in_4bit and cuda else "cpu", "storage": torch.float32}
        if not args.lora_rank:  # whole, it is held in the type that it was saved in
            dtype = load_config(args.model_id, trust=args.trust_remote_code).dtype
    model = load_base(args.model_id, args.load_in_4bit, args.trust_remote_code, dtype, **split)
    model.config.use_cache = False
    if args.lora_rank:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    return split_model(model) if args.fsdp else model


def to_sft_config(args: argparse.Namespace, plan, evaluate: bool):
    """Return the settings of a run as TRL names them."""
    import torch
    from trl import SFTConfig

    from tool_calling.engines.start import find_optim, to_dtype, use_checkpointing

    cuda = torch.cuda.is_available()
    dtype = to_dtype("cuda" if cuda else "cpu")
    config = SFTConfig(
        output_dir=args.output_dir,
        per_device_train_batch_size=plan.rows,
        per_device_eval_batch_size=plan.rows,
        gradient_accumulation_steps=plan.accumulation,
        num_train_epochs=args.num_epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps if args.warmup_ratio is None else args.warmup_ratio,  # below 1: a share
        weight_decay=args.weight_decay,
        optim=find_optim(args),
        seed=args.seed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        gradient_checkpointing=use_checkpointing(args),
        logging_steps=args.logging_steps,
        report_to=args.report_to,
        run_name=args.run_name,
        disable_tqdm=True,
        save_strategy="steps" if args.save_steps else "epoch",
        save_steps=args.save_steps or 500,
        eval_strategy="no" if not evaluate else "steps" if args.eval_steps else "epoch",
        eval_steps=args.eval_steps,
        load_best_model_at_end=bool(args.metric_for_best),
        metric_for_best_model=args.metric_for_best,
        greater_is_better=args.metric_for_best == "exact_match",
        dataloader_pin_memory=cuda,
        use_cpu=not cuda,
        logging_nan_inf_filter=False,  # it hides what StreamTrainer looks for
        router_aux_loss_coef=0.0,  # routers of experts are not trained, and the loss is that of the answers alone
        restore_callback_states_from_checkpoint=True,
        max_length=None,
        remove_unused_columns=False,
        ddp_timeout=PATIENCE,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        accelerator_config={"even_batches": False, "non_blocking": cuda},
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    if not cuda:
        config.__dict__["_setup_devices"] = torch.device("cpu")  # of several "cpu:0", which torch cannot load to
    else:
        config._n_gpu = 1  # of several visible GPUs a process uses its own
    return config


def dry_run(args: argparse.Namespace) -> dict:
    """Print, write and return what a run would do, without a GPU and without weights; problems of rows come last."""
    start = time.perf_counter()
    reading = Reading(args.tools_path, args.format, args.max_samples, args.thinking, args.on_invalid)
    checked = check_rows(args.dataset_path, reading)
    more = check_rows(args.eval_dataset_path, reading) if args.eval_dataset_path else Checked()
    examples, held_out, total = checked.examples, more.examples, checked.total + more.total
    both = [*examples, *held_out]
    shown = find_shown(args, both)
    from tool_calling.audit import (
        audit_calls,
        audit_lengths,
        audit_repeats,
        audit_run,
        audit_sizes,
        find_model,
        list_some,
        show_data,
        show_run,
        write_audit,
    )
    from tool_calling.engines.start import quiet_libraries

    quiet_libraries()
    tokenizer, missing, config = find_model(args)
    limit = sys.maxsize if missing else args.max_seq_length  # a limit in tokens says nothing about characters
    groups, unrendered = render_examples(tokenizer, both, sys.maxsize)
    kept, lengths = audit_lengths(both, groups, limit)
    too_long = [(where, describe_length(size, limit)) for where, size in lengths["too_long"]]
    problems = [*checked.problems, *more.problems, *unrendered, *too_long]
    sides = to_sides(args, examples, held_out, kept)
    unmeasured = bool(sides[0]) and not sides[1] and args.train_test_split > 0  # 0 says that it is so wished

    bad, rows = len({where for where, _ in problems}), [*map(count_origins, sides)]
    audit = {
        "rows": {"total": total, "valid": total - bad, "with_problems": bad, "training": rows[0], "held_out": rows[1]},
        **audit_calls(both),
        "problems": list_some(problems),
        "unit": "characters" if missing else "tokens",
        "tokenizer_missing": missing,
        "turns": sum(map(len, groups)),
        "sizes": audit_sizes(tokenizer, both, groups),
        "length": {} if missing else lengths,
        "repeats": audit_repeats(examples, held_out),
        "warnings": find_warnings(examples, held_out) + [NOT_HELD_OUT] * unmeasured,
    }
    if sides[0]:
        limited = argparse.Namespace(**{**vars(args), "max_seq_length": limit})
        audit |= audit_run(limited, sides[0], config)
    show_data(audit)
    if "plan" in audit:
        show_run(audit)
    for warning in audit["warnings"]:
        warn(warning)
    if shown and missing:
        warn("--show_row: without the tokenizer a row cannot be shown as the model sees it")
    elif shown:
        show_rows(tokenizer, [turn for group in groups for turn in group], shown)
    path = write_audit(args, audit)
    say("audit", f"{path} ({time.perf_counter() - start:.1f} s)")
    report_problems(problems, args.on_invalid, total)
    check_sides(args, *sides)
    return json.loads(path.read_text(encoding="utf-8"))


def evaluate_only(args: argparse.Namespace, command: str) -> dict:
    """Score a model or an adapter on --eval_dataset_path, or on the held-out rows of --dataset_path; train nothing."""
    from tool_calling.engines.answers import generate_answers
    from tool_calling.engines.hub import check_model, check_weights, load_tokenizer
    from tool_calling.engines.loading import find_place, load_adapter, load_base
    from tool_calling.engines.start import start_engine
    from tool_calling.report import finish

    reading = Reading(args.tools_path, args.format, args.max_samples, args.thinking, args.on_invalid)
    examples, skipped = read_examples(args.eval_dataset_path or args.dataset_path, reading)
    args.engine = "transformers"
    start_engine(args)
    base_id, flag, given = args.eval_only, "--eval_only", f"--eval_only {args.eval_only}"
    settings = Path(args.eval_only) / "adapter_config.json"
    if is_adapter := settings.is_file():
        try:
            base_id, flag = json.loads(settings.read_text())["base_model_name_or_path"], f"{given}: its base"
        except (ValueError, KeyError, TypeError):
            base_id = None
        if not base_id:
            raise UserError(f"{given}: adapter_config.json names no base; expected one saved by PEFT")
        if not list(settings.parent.glob("*.safetensors")):
            raise UserError(f"{given}: the adapter holds no *.safetensors; expected one saved by PEFT")
        check_weights(settings.parent, given)
    check_model(base_id, flag, args.trust_remote_code)
    tokenizer = load_tokenizer(base_id, args.trust_remote_code, flag)
    groups, problems = render_examples(tokenizer, examples, args.max_seq_length)
    report_problems(problems, args.on_invalid, len(groups))
    sides = to_sides(args, *(([], examples) if args.eval_dataset_path else (examples, [])), groups)
    samples = (sides[1] or sides[0])[: args.eval_samples]
    if not samples:
        raise UserError(f"{' '.join(args.eval_dataset_path or args.dataset_path)}: no row is left to score; add rows")
    four_bit = is_adapter and args.load_in_4bit
    model = load_base(base_id, four_bit, args.trust_remote_code, place=find_place(args, four_bit))
    if is_adapter:
        import torch

        try:
            model = load_adapter(model, args.eval_only)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:  # the last line names the first layer
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{flag} {base_id} is another model than it was trained on ({reason})") from None
        say("load", f"adapter on its base {base_id} in {4 if four_bit else 16} bits")
    results = {"model": {"answers": generate_answers(model, tokenizer, samples, args, args.eval_only)}}
    held_out = len(samples) if sides[1] else 0
    if not held_out:
        warn(NOT_HELD_OUT)
    data = {
        "train": len(samples) - held_out,
        "held_out": held_out,
        "skipped": skipped + groups.count([]),
        "unit": name_unit(samples),
    }
    mark_output(args)
    folder = str(Path(args.output_dir) / "eval_only")  # beside a training run's report, not in its place
    write_run(args, folder)
    args.output_dir = folder
    return finish(args, command, samples, results, *score_results(samples, results), data, [])


def main(argv: list[str] | None = None) -> dict | None:
    """Run the whole job: read, check, render, train, save, score, report.

    Args:
        argv: the words of a command line without the program's name; None: those that this process was started with.
    Returns: what report.json holds; with --dry_run, audit.json; with --convert_to, None.
    Raises: UserError (FlagError if in a flag), Interrupted after a signal in training.
    """
    argv = [*map(str, sys.argv[1:] if argv is None else argv)]
    args, command = parse_args(argv), shlex.join([*LAUNCHER, PROGRAM, *drop_resume(argv)])  # to repeat it
    refuse_telemetry()
    return_pages()
    if not is_main() and (args.convert_to or args.dry_run or args.eval_only):
        return None  # these the first process does alone
    if args.convert_to:
        reading = Reading(args.tools_path, args.format, args.max_samples, args.thinking, args.on_invalid)
        return write_converted(args.convert_to, args.dataset_path, reading)
    if not is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    check_folder(args.output_dir, "--output_dir")
    if args.eval_only:
        return evaluate_only(args, command)
    with contextlib.ExitStack() as locks:  # let go of when the run ends, however it does
        return train_and_prove(args, command, locks)


def train_and_prove(args: argparse.Namespace, command: str, locks: contextlib.ExitStack) -> dict | None:
    """Train, save, score and report as `args` say, with the folders locked; or do all of it that --dry_run does."""
    if args.save_method != "lora":
        check_folder(args.final_model_dir, "--final_model_dir")
        check_final(args)
    if existed := Path(args.output_dir).is_dir():
        locks.enter_context(lock_folder(args.output_dir))
    checkpoint = find_checkpoint(args)
    if args.dry_run:
        return dry_run(args)
    former = read_run(checkpoint, vars(parse_args([])))
    reading = Reading(args.tools_path, args.format, args.max_samples, args.thinking, args.on_invalid)
    examples, skipped = read_examples(args.dataset_path, reading)
    held_out, more_skipped = read_examples(args.eval_dataset_path, reading) if args.eval_dataset_path else ([], 0)
    rows = len(examples) + len(held_out) + skipped + more_skipped
    shown = find_shown(args, [*examples, *held_out])
    for warning in find_warnings(examples, held_out):
        warn(warning)
    thinks = any(
        "reasoning_content" in message for example in examples for message in filter(is_trained, example.messages)
    )
    gguf = find_gguf_tools(args.save_gguf)
    if args.push_to_hub:
        from tool_calling.saving.upload import check_hub

        check_hub(args.push_to_hub)

    from tool_calling.engines.start import start_engine

    engine = start_engine(args)
    from tool_calling.engines.graphs import empty_weights, make_room
    from tool_calling.engines.hub import (
        can_share,
        check_dropout,
        check_merge_base,
        check_model,
        check_same_shape,
        load_tokenizer,
    )
    from tool_calling.engines.loading import warn_of_frozen_experts
    from tool_calling.engines.start import check_optim, check_report_to, free_gpu, leave_group, report_gpu, start_engine
    from tool_calling.estimates import check_disk
    from tool_calling.report import finish
    from tool_calling.saving.card import hand_over
    from tool_calling.saving.merge import round_trained, save_adapter, save_whole
    from tool_calling.saving.proof import check_merged, check_trained, merge_and_score, show_saved
    from tool_calling.schedule import count_checkpoints, count_padded, plan_streams, show_plan, to_small_batches
    from tool_calling.training.selfcheck import check_sharing
    from tool_calling.training.trainer import build_trainer, train_model

    check_report_to(args.report_to)
    check_optim(args)
    config = check_model(args.model_id, trust=args.trust_remote_code)
    check_dropout(args, config)
    merge_base = check_merge_base(args, config)
    check_same_shape(config, merge_base, args.trust_remote_code) if merge_base != args.model_id else None
    tokenizer = load_tokenizer(args.model_id, args.trust_remote_code)
    check_gguf(args, gguf[0], config, tokenizer) if args.save_gguf else None
    date = former.get("prompt_date") or find_date(tokenizer)  # a resumed run has the prompts that it began with
    train, held_out = render_all(args, tokenizer, examples, held_out, date)
    show_rows(tokenizer, [*train, *held_out] if shown else train, shown)
    args.share_prefix = args.share_prefix and former.get("share_prefix", True)  # a run that did without goes on without
    args.share_prefix = args.share_prefix and can_share(engine, config)
    check_resume(args, checkpoint, former, train)
    check_disk(args, config, count_checkpoints(args, train, checkpoint))
    plan = plan_streams(train, args, engine)
    show_plan(train, args, plan)

    if not existed:
        locks.enter_context(lock_folder(args.output_dir))
    if args.save_method != "lora":
        locks.enter_context(lock_folder(args.final_model_dir, "--final_model_dir"))
    model = load_model(args, engine, plan)
    warn_of_frozen_experts(model)
    report_gpu()
    trainer = build_trainer(
        args, to_sft_config(args, plan, bool(held_out)), engine, model, tokenizer, train, held_out, plan
    )
    if plan.share_prefix and not check_sharing(args, trainer.model, train, plan, engine):
        args.share_prefix = False
        make_room(trainer.model)  # of what the check has recorded
        plan = plan_streams(train, args, engine)
        trainer = build_trainer(
            args, to_sft_config(args, plan, bool(held_out)), engine, model, tokenizer, train, held_out, plan
        )
    start_output(args, checkpoint, train, plan, date)
    complete = checkpoint is not None and is_complete(args, checkpoint, train)
    facts = train_model(trainer, checkpoint, complete)
    end = trainer.state.global_step
    facts["tokens_padded"] = count_padded(args, train, plan, range(end - facts["steps"], end))
    report_gpu()

    plan, tested = trainer.streams, (held_out or train)[: args.eval_samples]
    start = time.perf_counter()
    with discard_partial(args.final_model_dir) if args.save_method != "lora" else contextlib.nullcontext():
        batches = to_small_batches(tested, plan)
        adapter = trained = before = None
        if not args.lora_rank:
            trained, before = round_trained(args, trainer.model, config.dtype, batches, engine)
        if not leave_group():
            return
        if args.lora_rank:
            adapter = save_adapter(trainer.model, args.output_dir)
            say("save", f"adapter: {adapter}")
        else:
            save_whole(args, trained)
        if engine == "unsloth":
            empty_weights(trainer.model)
        del trainer, model, trained
        free_gpu()
        results = run_fresh(merge_and_score, args, merge_base, adapter, tested, plan)
        scores, verdicts = score_results(tested, results)
        if not adapter:
            check_trained(args, results["trained"]["loss"], before)
        elif "merged" in results:
            check_merged(args, adapter, results, scores, [verdict.exact for verdict in verdicts["adapter"]])
        if args.save_method != "lora":
            put_in_place(args.final_model_dir)
    show_saved(args, results, before, time.perf_counter() - start)
    used = count_origins(train) + count_origins(held_out)
    data = {"train": len(train), "held_out": len(held_out), "skipped": rows - used, "unit": name_unit(train, held_out)}
    lengths = [len(row.input_ids) for row in train]
    report = finish(args, command, tested, results, scores, verdicts, data, lengths, facts)
    hand_over(args, config, tokenizer, adapter, report, train[0].parser, thinks, gguf)
    return report


def explain_interrupt(args: argparse.Namespace, argv: list[str], number: int, began: float) -> str:
    """Return one line: what ended the run that began then (seconds since 1970), and how to go on."""
    name, marker = signal.Signals(number).name, Path(args.output_dir) / "run.yaml"
    if args.eval_only or args.dry_run:
        return f"interrupted by {name}"
    # run.yaml is written when training starts; before that, checkpoints in the folder are of an earlier run.
    started = marker.is_file() and marker.stat().st_mtime >= began
    if started and list_checkpoints(args.output_dir):
        return f"interrupted by {name}; go on with: {to_command([PROGRAM, *argv], args.output_dir)}"
    return f"interrupted by {name} before a checkpoint was written; start again with the same command"


def run_command_line() -> int:
    """Run main; return 0, or 1 (2 for flags) with one line per problem, or 128 + the signal that ended the run."""
    began, argv, code = time.time(), sys.argv[1:], 1
    for stream in (sys.stdout, sys.stderr):  # not all terminals have every character
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parse_args(argv)  # as they are now: a file of settings may change while the run lasts
        with handle_signals(raise_interrupted):
            try:
                main(argv)
            except Exception as error:
                unwrap_interrupt(error)
                raise
        return 0
    except UserError as error:
        if not is_main():  # the first process has as a rule found the same, says so, and ends all
            time.sleep(5)
        lines, code = str(error).splitlines(), 2 if isinstance(error, FlagError) else 1
    except Interrupted as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more finds the process ending anyway
        print("\033[?25h" * sys.stdout.isatty(), end="")  # a progress bar that is cut off leaves the cursor hidden
        if is_main():
            print(explain_interrupt(args, argv, stop.args[0], began), file=sys.stderr)
        return 128 + stop.args[0]
    except BrokenPipeError:
        drop_output()
        lines = ["nobody reads the output any more: the run ends here"]
    except OSError as error:
        reason = error.strerror
        if is_disk_full(error):
            reason = "the disk is full; free some space and run again"
        elif not error.filename or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
            raise
        lines = [f"{error.filename or 'output'}: {reason}"]
    except (MemoryError, RuntimeError) as error:
        kinds = {"MemoryError": "memory", "OutOfMemoryError": "GPU memory"}  # torch's by its name, without its import
        if type(error).__name__ not in kinds:
            raise
        lines = [
            f"out of {kinds[type(error).__name__]}; lower --batch_size or --max_seq_length (while answers are "
            "written, --eval_batch_size), or choose a smaller --model_id"
        ]
    for line in lines:
        print(f"error: {hide_secrets(line)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    leave(run_command_line())
