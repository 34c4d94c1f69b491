#!/usr/bin/env python3
"""Teach a small Qwen3 to call your tools: tool-calling JSON in, a merged model in safetensors out, with proof.

    python train_qwen3_tool_calling.py
    python train_qwen3_tool_calling.py --dataset_path data/mine.jsonl --tools_path data/my_tools.json

This file is the recipe: defaults to edit, flags, the model, the trainer's settings, and the run from the first row to
the report. Its machinery is the package tool_calling/ beside it. The data flows row -> example -> sample -> stream ->
model -> answers -> report. What can be checked without a model is checked before torch is imported, so a mistake costs
a second and not an hour; modules that need torch are therefore imported inside of functions, after Unsloth.
"""

import argparse
import contextlib
import os
import shlex
import sys
import time
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

from tool_calling.arguments import (
    GGUF_NAMES,
    SCHEDULERS,
    Parser,
    drop_resume,
    number,
    one_of,
    pick,
    read_config,
    split_names,
)
from tool_calling.checkpoints import find_checkpoint
from tool_calling.conflicts import find_conflict
from tool_calling.data.examples import Checked, Reading, check_rows, read_examples, write_converted
from tool_calling.data.formats import FORMATS
from tool_calling.data.literals import as_list
from tool_calling.data.rows import split_share
from tool_calling.data.splits import check_one_list, find_warnings, is_thinking, split_folds
from tool_calling.data.variants import SHARES, find_held_out
from tool_calling.editions import Rows, Variation
from tool_calling.environment import refuse_telemetry, return_pages
from tool_calling.failures import report_failure, report_interrupt
from tool_calling.files import discard_partial, lock_folder
from tool_calling.fresh import start_fresh
from tool_calling.origins import LORA_FLAGS, check_4_bits, is_adapter, list_trained_tokens, read_adapter, read_shape
from tool_calling.processes import (
    LAUNCHER,
    PATIENCE,
    Interrupted,
    handle_signals,
    is_main,
    leave,
    raise_interrupted,
    unwrap_interrupt,
)
from tool_calling.prompts import find_date, hide_tools, set_default
from tool_calling.reward_file import load_reward
from tool_calling.run_folder import Run, check_final, check_folder, check_models_stay, mark_output, read_run, write_run
from tool_calling.samples import (
    Rendering,
    check_shown,
    check_sides,
    choose,
    find_longest,
    list_plain,
    name_unit,
    render_valid,
    show_rows,
)
from tool_calling.saving.gguf import check_gguf, find_gguf_tools, find_server
from tool_calling.templates import check_name, list_bundled, read_template
from tool_calling.terminal import FlagError, UserError, report_problems, say, warn

__all__ = ["FlagError", "Interrupted", "UserError", "main"]  # of a program that imports this file

# ----------------------------------------------------------------------------------------------------------------------
# Defaults: edit these for a new dataset; each is also a flag
# ----------------------------------------------------------------------------------------------------------------------
MODEL_ID = "Qwen/Qwen3-0.6B"  # the smallest Qwen3: enough for tens of tools, trains on any GPU
DATASET_PATH = "data/synthetic_finetune_dataset.json"
TOOLS_PATH = "data/tools.json"  # for native rows; a path that the user names serves all rows without tools
OUTPUT_DIR = "outputs/qwen3_tool_calling_unsloth"  # checkpoints and the adapter
FINAL_MODEL_DIR = "models/qwen3_tool_calling_merged"  # the model to serve

TRAIN_TEST_SPLIT = 0.1  # share of the rows held out from training
NUM_EPOCHS = 3  # a third pass still helps on a few thousand rows; more begins to memorise
BATCH_SIZE = 2  # samples per device and micro-batch: fits 8 GB cards with samples of 2,048 tokens
GRADIENT_ACCUMULATION_STEPS = 4  # 2 x 4 = 8 samples per optimizer step
LEARNING_RATE = 2e-4  # the usual rate for LoRA; full fine-tuning takes a tenth of it
WARMUP_STEPS = 10  # Adam's moments are noise in the first steps
WEIGHT_DECAY = 0.01
LR_SCHEDULER_TYPE = "linear"
MAX_SEQ_LENGTH = 2048  # longer samples are reported, never cut
SEED = 3407

GRPO_LEARNING_RATE = 1e-5  # drawn answers are a noisy signal
GRPO_STEPS = 100
GRPO_EVAL_STEPS = 25  # from one look at the held-out rows, and one checkpoint, to the next
NUM_GENERATIONS = 8  # the more, the surer what a better answer is
TEMPERATURE = 1.0  # answers as likely as the model finds them
HARD_ROWS = 0.1  # of the rows that the start surely answers right: some, so that it does not forget them

DOUBT_FOLDS = 2  # each model learns from half of the rows: together they cost as much as a run

LORA_RANK = 16
LORA_ALPHA = 16  # alpha / rank = 1: the adapter's output is not scaled
LORA_DROPOUT = 0.0  # 0 lets steps be recorded as CUDA graphs
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

EVAL_SAMPLES = 200  # held-out samples answered by the base, the adapter and the merged model: +-3 of 100 at 95 %

PROGRAM = sys.argv[0] if __name__ == "__main__" else __file__  # as the command line is shown


# ----------------------------------------------------------------------------------------------------------------------
# Flags
# ----------------------------------------------------------------------------------------------------------------------
# fmt: off
def build_parser() -> Parser:
    """Return the declaration of all flags. A flag without `default` is None unless given, which --help would show."""
    parser = Parser(
        description="Fine-tune a Qwen3 model to call your tools, and save it merged in safetensors.",
        formatter_class=partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=34, width=120),
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
    )
    count, path = number(int, 1), os.path.expanduser  # after "=" and in --config, no shell expands ~
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--config", metavar="FILE",
                        help="YAML file of settings, `flag: value`, as the run.yaml of each run; flags override it")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_path", nargs="+", type=path, default=DATASET_PATH, metavar="PATH",
        help="JSON, JSONL, CSV or Parquet files, folders of them, or Hugging Face datasets: name[:split]; at the end "
             "of each, :0.3 takes a share of its rows, :2 takes them twice")
    add("--format", choices=["auto", *FORMATS], default="auto", help="shape of the rows (auto: each row's own)")
    add("--tools_path", type=path, metavar="PATH",
        help="JSON array of tools for all rows without their own; the default serves native rows only "
             f"(default: {TOOLS_PATH})")
    add("--train_test_split", type=number(float, 0, 1), default=TRAIN_TEST_SPLIT, metavar="SHARE",
        help="share of the rows to hold out")
    add("--max_samples", type=count, metavar="N", help="use N rows, chosen by hash after all are read (default: all)")
    add("--max_seq_length", type=count, default=MAX_SEQ_LENGTH, metavar="TOKENS",
        help="longest sample; a longer one is a problem, it is never cut")
    add("--on_invalid", choices=["error", "skip", "keep"], default="error",
        help="a row with a problem: end the run, skip the row, or keep it if only a schema refuses its calls")
    add("--thinking", choices=["auto", "on", "off"], default="auto",
        help="train answers with reasoning: auto: those that have some, on: all must, off: drop it")
    add("--compact_tools", type=number(float, 0, 1), default=0.0, metavar="SHARE",
        help="train this share of the rows, chosen by hash, on their tools as Ollama writes them: without spaces, keys "
             "in another order, keywords that it does not know left out")
    add("--augment", nargs="?", const=",".join(SHARES), type=one_of([*SHARES], several=True), metavar="KINDS",
        help="train each epoch on other lists of tools in some rows, so that the model reads the list: "
             + ", ".join(f"{kind} {share:g}" for kind, share in SHARES.items()) + " of the rows; missing: the right "
             "tool is not in it, and the answer refuses; shuffled: another order, some tools fewer; masked: made-up "
             "names for what has a description (no KINDS: all)")
    add("--holdout_tools", type=split_names, metavar="NAMES|auto",
        help="how well will it call tools added later? Rows that call these tools are scored by themselves, and no "
             "list of a training row has them, as none has a tool that is added later; auto: a quarter of the tools")
    add("--tools_in_prompt", choices=["all", "none"], default="all",
        help="none: prompts go without the list of tools, in training and by the saved chat template; requests still "
             "bring it, and all rows must have the same one")
    add("--eval_dataset_path", nargs="+", type=path, metavar="PATH",
        help="rows to hold out, instead of a share of --dataset_path; as there")
    add("--convert_to", type=path, metavar="PATH",
        help="train nothing: write the rows of --dataset_path in the OpenAI form to this new JSONL file")
    add("--dry_run", action="store_true",
        help="train nothing: print what a run would do, and write it to OUTPUT_DIR/audit.json")
    add("--show_row", type=count, metavar="N", help="print the N-th valid row whole, as the model sees it")

    add = parser.add_argument_group("model").add_argument
    add("--model_id", default=MODEL_ID, help="Hub id or folder of the base model, or folder of an adapter to train on")
    add("--chat_template", type=check_name, metavar="FILE|NAME",
        help=f"Jinja file, or bundled: {', '.join(list_bundled())}; in place of the base's own, for one without tools")
    add("--merge_model_id", metavar="MODEL", help="16-bit original to merge into, when --model_id is already quantised")
    add("--engine", choices=["auto", "unsloth", "transformers"], default="auto",
        help="auto: Unsloth on CUDA, Transformers + PEFT elsewhere")
    add("--load_in_4bit", action=switch,
        help="train on a 4-bit base (QLoRA); never with --lora_rank 0 (default: True)")
    add("--trust_remote_code", action="store_true", default=False,
        help="run the Python code that a model brings along: only if you know who wrote it")
    add("--lora_rank", type=number(int, 0), default=LORA_RANK, metavar="R",
        help="rank of the adapter; 0 trains all weights of the model instead")
    add("--lora_alpha", type=count, default=LORA_ALPHA, metavar="A", help="scale: alpha / rank")
    add("--lora_dropout", type=number(float, 0, 1), default=LORA_DROPOUT, metavar="P",
        help="dropout in front of the adapter")
    add("--use_rslora", action=switch, default=False, help="scale by alpha / sqrt(rank) (rsLoRA): for high ranks")
    add("--target_modules", nargs="+", default=" ".join(TARGET_MODULES), metavar="NAME",
        help="linear layers that get an adapter")
    add("--train_tokens", nargs="+", default="auto", metavar="TOKEN",
        help="tokens whose embedding rows are trained beside the adapter; auto: those in answers that were never "
             "trained, off: none")

    train = parser.add_argument_group("training")
    add = train.add_argument
    add("--method", choices=["sft", "grpo"], default="sft",
        help="sft: train on the answers of the rows; grpo: on the model's own answers, by how right they are")
    add("--num_generations", type=number(int, 2), metavar="N",
        help=f"grpo: answers drawn to each prompt (default: {NUM_GENERATIONS})")
    add("--temperature", type=number(float, 0, low_open=True), default=TEMPERATURE, metavar="T",
        help="grpo: at which they are drawn")
    add("--hard_rows", type=number(float, 0, 1, high_open=False), metavar="SHARE",
        help="grpo: of the rows that the start surely answers right, train on this share alone, chosen by hash "
             f"(default: {HARD_ROWS}; with --reward all)")
    add("--reward", type=path, metavar="FILE.py:NAME",
        help="grpo: Python function that rates answers, as TRL calls it, instead of their likeness to the reference; "
             "the file is run")
    add("--beta", type=number(float, 0), default=0.0, metavar="B",
        help="grpo: weight of the penalty for leaving the start (KL)")
    add("--num_epochs", type=count, default=NUM_EPOCHS, metavar="N", help="passes over the data")
    add("--max_steps", type=count, metavar="N",
        help=f"train N optimizer steps, not --num_epochs (default: grpo {GRPO_STEPS})")
    add("--batch_size", type=count, default=BATCH_SIZE, metavar="N", help="samples per device and micro-batch")
    add("--gradient_accumulation_steps", type=count, default=GRADIENT_ACCUMULATION_STEPS, metavar="N",
        help="micro-batches per optimizer step")
    add("--learning_rate", type=number(float, 0, low_open=True), metavar="LR",
        help=f"peak rate; with --lora_rank 0 a tenth of the default (default: {LEARNING_RATE}, "
             f"grpo {GRPO_LEARNING_RATE})")
    add("--lr_scheduler_type", type=one_of(SCHEDULERS), default=LR_SCHEDULER_TYPE, metavar="NAME",
        help="linear, cosine, constant, ... as Transformers names them")
    warmup = train.add_mutually_exclusive_group()  # argparse tells a given number from the default, which is a text
    warmup.add_argument("--warmup_steps", type=number(int, 0), default=str(WARMUP_STEPS), metavar="N",
                        help="steps until the peak rate")
    warmup.add_argument("--warmup_ratio", type=number(float, 0, 1), metavar="SHARE",
                        help="the same as a share of all steps, instead of --warmup_steps")
    add("--weight_decay", type=number(float, 0), default=WEIGHT_DECAY, metavar="W", help="AdamW's decay")
    add("--optim", metavar="NAME",
        help="optimizer (default: adamw_torch; on CUDA adamw_torch_fused, or adamw_8bit if all weights are trained on "
             "each GPU)")
    add("--gradient_checkpointing", choices=["auto", "on", "off"], default="auto",
        help="compute activations twice instead of keeping them; auto: on CUDA, where they would not fit")
    add("--share_prefix", action=switch, default=True, help="compute what rows have in common once per stream")
    add("--cuda_graphs", action=switch, default=True,
        help="record the step and replay it with a few launches (Unsloth)")
    add("--flash_attention", action="store_true", default=False,
        help="compute streams with the package flash-attn-4: faster for large ones, on Hopper and newer GPUs")
    add("--fsdp", action=switch, default=False,
        help="split the weights over all GPUs (FSDP2), for models too large for one")
    add("--seed", type=number(int, 0, 2**32), default=SEED, help="seed of everything random")
    add("--logging_steps", type=count, default=1, metavar="N", help="steps from one loss to the next")
    add("--save_steps", type=count, metavar="N", help="steps from one checkpoint to the next (default: an epoch)")
    add("--save_total_limit", type=count, metavar="N",
        help="keep the N newest checkpoints, and the best one (default: all)")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_steps", type=count, metavar="N",
        help=f"steps from one held-out loss and exact match to the next (default: an epoch, grpo {GRPO_EVAL_STEPS})")
    add("--metric_for_best", choices=["exact_match", "loss", "reward"],
        help="keep the checkpoint that is best on the held-out rows; reward: grpo alone has it (default: the last, "
             "grpo exact_match, with --reward reward)")
    add("--early_stopping_patience", type=count, metavar="N",
        help="stop after N evaluations without improvement (default: never)")
    add("--eval_samples", type=count, default=EVAL_SAMPLES, metavar="N",
        help="held-out rows, chosen by hash, to answer at the end with base, adapter and merged model")
    add("--eval_batch_size", type=count, metavar="N",
        help="answers generated at once (default: 64, on a GPU as many as fit, at most 256)")
    add("--max_new_tokens", type=count, metavar="N",
        help="longest answer (default: as long as the longest reference, and some more)")
    add("--eval_only", nargs="+", metavar="MODEL|URL",
        help="train nothing: score these models, adapters and OpenAI-compatible servers (http://localhost:8000/v1) on "
             "the held-out rows, side by side")
    add("--eval_model", metavar="NAME", help="model of the server of --eval_only (default: its only one)")
    add("--doubt", nargs="?", type=number(int, 2), const=DOUBT_FOLDS, metavar="FOLDS",
        help="keep no model: rank the labels that are probably wrong, by models of which each is trained without one "
             f"of FOLDS parts of the rows and asked about it (no FOLDS: {DOUBT_FOLDS})")
    add("--serve_check", action="store_true", default=False,
        help="at the end, serve the model with an installed vLLM or llama-server and compare its answers with the "
             "scored ones")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=path, default=OUTPUT_DIR, help="folder for checkpoints and the adapter")
    add("--final_model_dir", type=path, default=FINAL_MODEL_DIR, help="folder for the merged model")
    add("--save_method", choices=["merged_16bit", "merged_4bit", "lora"], default="merged_16bit",
        help="what to save at the end; lora: only the adapter, in OUTPUT_DIR/adapter")
    add("--save_gguf", type=one_of(GGUF_NAMES, several=True), metavar="NAMES",
        help="also write GGUF files and an Ollama Modelfile, with llama.cpp: q8_0,q4_k_m,...")
    add("--push_to_hub", metavar="REPO",
        help="upload the result to this Hugging Face repository at the end; a new one is private")
    add("--resume_from_checkpoint", nargs="?", const="newest", metavar="PATH",
        help="go on from a checkpoint (no PATH: the newest in --output_dir)")
    add("--report_to", default="none", metavar="NAME", help="tensorboard, wandb, ... or none")
    add("--run_name", metavar="NAME", help="the run's name there")
    return parser
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the settings of a run: of the command line, else of the file of --config, else the defaults.

    A wrong flag is a FlagError; --help ends the program.
    """
    parser = build_parser()
    unset = [action.dest for action in parser._actions if action.default == argparse.SUPPRESS]
    args = argparse.Namespace(**dict.fromkeys([*unset, *LORA_FLAGS]))
    config = getattr(parser.parse_args(argv), "config", None)
    for words in (read_config(parser, config) if config else [], argv):
        share = args.warmup_ratio
        parser.parse_args(words, namespace=args)
        if None not in (args.warmup_ratio, args.warmup_steps):  # the later of the two counts
            setattr(args, "warmup_steps" if share is None else "warmup_ratio", None)
    del args.config, args.help
    args.dataset_path = as_list(args.dataset_path)  # a list as default would look like Python in --help
    settle_shape(args, parser)
    args.train_tokens = as_list(args.train_tokens)
    args.dry_run = bool(args.dry_run)
    settle_method(args)
    if conflict := find_conflict(vars(args), TEMPERATURE):
        parser.error(conflict)
    settle_defaults(args)
    return args


def settle_shape(args: argparse.Namespace, parser: Parser) -> None:
    """Set the shape of the adapter: that of an adapter that is trained on, else what flags say, else the defaults."""
    if args.target_modules is not None:  # their order means nothing
        args.target_modules = sorted({*" ".join(args.target_modules).split()})
    fixed = read_shape(args.model_id, "--model_id") if is_adapter(args.model_id) else {}
    defaults = {flag: parser.get_default(flag) for flag in LORA_FLAGS} | {"target_modules": sorted(TARGET_MODULES)}
    for flag, value in (defaults | fixed).items():
        given = getattr(args, flag)
        if fixed and given not in (None, value):
            given, value = (" ".join(map(str, as_list(words))) for words in (given, value))
            advice = "leave the flag out, or give a merged model as --model_id, which gets an adapter of its own"
            parser.error(f"--{flag} {given}: the adapter --model_id {args.model_id} has {value}; {advice}")
        setattr(args, flag, value if given is None else given)


def settle_method(args: argparse.Namespace) -> None:
    """Set what depends on --method."""
    if args.method == "grpo":
        defaults = {"num_generations": NUM_GENERATIONS, "max_steps": GRPO_STEPS}
        defaults |= {"learning_rate": GRPO_LEARNING_RATE, "eval_steps": GRPO_EVAL_STEPS}
        # A reward of the user's may say otherwise what is right.
        defaults |= {"metric_for_best": "reward" if args.reward else "exact_match"}
        defaults |= {"hard_rows": 1.0 if args.reward else HARD_ROWS}
        for flag, value in defaults.items():
            setattr(args, flag, value if getattr(args, flag) is None else getattr(args, flag))


def settle_defaults(args: argparse.Namespace) -> None:
    """Set what depends on other flags."""
    # Unsloth's classes for full fine-tuning take no streams, its kernels no split weights, and its decoder none of the
    # caches in which answers are drawn.
    if not args.lora_rank or args.fsdp or args.method == "grpo" or args.doubt:
        args.engine = "transformers"
    if args.load_in_4bit is None:
        args.load_in_4bit = args.lora_rank > 0
    args.learning_rate = args.learning_rate or LEARNING_RATE / (1 if args.lora_rank else 10)
    if args.early_stopping_patience and not args.metric_for_best:
        args.metric_for_best = "exact_match"
    if args.metric_for_best:  # a checkpoint to keep must have been scored
        args.save_steps = args.eval_steps


# ----------------------------------------------------------------------------------------------------------------------
# Model and trainer
# ----------------------------------------------------------------------------------------------------------------------
def load_model(args: argparse.Namespace, engine: str, schedule, tokenizer):
    """Return the base model, in 4 bits if asked, with fresh LoRA on --target_modules or the adapter of --model_id.

    With --lora_rank 0 it is the base alone, in fp32: late, small updates round to nothing in 16 bits. The trainer's
    autocast computes in 16 bits on CUDA all the same, so only memory is the price. (TRL and Unsloth do so too.)
    """
    if engine == "unsloth":
        from unsloth import FastLanguageModel

    from peft import LoraConfig, get_peft_model

    from tool_calling.engines.compat import compile_attention, take_all_targets
    from tool_calling.engines.fsdp import split_model
    from tool_calling.engines.hub import find_base
    from tool_calling.engines.loading import go_on_from, load_trainable, set_adapter_weights
    from tool_calling.engines.tokens import compute_rows_alone, prepare_tokens

    base, _ = find_base(args.model_id)
    if engine == "unsloth":
        model, _ = FastLanguageModel.from_pretrained(
            base,
            max_seq_length=args.max_seq_length,
            load_in_4bit=args.load_in_4bit,
            dtype=None,
            use_safetensors=True,
            trust_remote_code=args.trust_remote_code,
            use_exact_model_name=True,  # not a copy of it in Unsloth's own repositories
            text_only=True,  # of models that see images, too
        )
    else:
        model = load_trainable(base, args.load_in_4bit, args.trust_remote_code, not args.lora_rank, split=args.fsdp)
    wanted = (args.train_tokens, list_trained_tokens(args.model_id), args.save_method == "lora")
    rows = prepare_tokens(model, tokenizer, schedule.samples, *wanted)
    names = ("lora_alpha", "lora_dropout", "use_rslora", "target_modules")
    lora = {"r": args.lora_rank, "bias": "none", **{name: getattr(args, name) for name in names}, **rows}
    if engine == "unsloth":
        prepared = "unsloth" if args.gradient_checkpointing != "off" else False  # see build_run_trainer
        model = FastLanguageModel.get_peft_model(
            model, **lora, random_state=args.seed, use_gradient_checkpointing=prepared
        )
        if base != args.model_id:
            set_adapter_weights(model, args.model_id)
    elif base != args.model_id:
        model = go_on_from(model, args.model_id, rows)
    elif args.lora_rank:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    compute_rows_alone(model)
    if engine == "unsloth":
        take_all_targets()
        if schedule.layout.share_prefix:
            compile_attention(args.flash_attention)
    return split_model(model) if args.fsdp else model


def to_sft_config(args: argparse.Namespace, schedule, evaluate: bool):
    """Return the settings of the run as TRL names them; they open the group of several processes."""
    import torch
    from trl import SFTConfig

    from tool_calling.engines.compat import use_own_device
    from tool_calling.engines.device import to_dtype

    cuda = torch.cuda.is_available()
    dtype = to_dtype("cuda" if cuda else "cpu")
    # fmt: off
    config = SFTConfig(
        output_dir=args.output_dir, report_to=args.report_to, run_name=args.run_name, seed=args.seed,
        # Steps
        per_device_train_batch_size=schedule.layout.rows, per_device_eval_batch_size=schedule.layout.rows,
        gradient_accumulation_steps=schedule.streams_per_step,
        num_train_epochs=args.num_epochs, max_steps=args.max_steps or -1,
        # Optimizer
        optim=choose_optim(args), weight_decay=args.weight_decay,
        learning_rate=args.learning_rate, lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps if args.warmup_ratio is None else args.warmup_ratio,  # below 1: a share
        # Arithmetic and memory
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=not cuda, dataloader_pin_memory=cuda,
        gradient_checkpointing=args.gradient_checkpointing == "on",  # auto: see build_run_trainer
        # Logs, checkpoints, evaluation
        logging_steps=args.logging_steps, disable_tqdm=True,
        logging_nan_inf_filter=False,  # it hides what StreamTrainer looks for
        save_strategy="no" if args.doubt else "steps" if args.save_steps else "epoch",
        save_steps=args.save_steps or 500, save_total_limit=args.save_total_limit,
        restore_callback_states_from_checkpoint=True,
        eval_strategy="no" if not evaluate else "steps" if args.eval_steps else "epoch", eval_steps=args.eval_steps,
        eval_on_start=evaluate and args.method == "grpo",
        load_best_model_at_end=bool(args.metric_for_best), metric_for_best_model=args.metric_for_best,
        greater_is_better=args.metric_for_best != "loss",
        # Rows come rendered and batched: TRL is to leave them as they are
        max_length=None, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True},
        router_aux_loss_coef=0.0,  # routers of experts are not trained, and the loss is that of the answers alone
        # Several GPUs
        ddp_timeout=PATIENCE,
        accelerator_config={"even_batches": False, "non_blocking": cuda},
    )
    # fmt: on
    use_own_device(config)
    return config


def build_run_trainer(args: argparse.Namespace, model, tokenizer, schedule, held_out: list, engine: str):
    """Return the trainer of the run."""
    from transformers import EarlyStoppingCallback

    from tool_calling.engines.fsdp import is_split
    from tool_calling.engines.graphs import find_recorded, read_streams, use_checkpointing
    from tool_calling.training.policy import Drawing, PolicyTrainer
    from tool_calling.training.trainer import SplitTrainer, StreamTrainer, build_trainer

    config = to_sft_config(args, schedule, bool(held_out))
    streams = engine == "unsloth" and schedule.layout.share_prefix
    recording = streams and args.cuda_graphs and not args.lora_dropout  # a replay would drop the same again
    twice = use_checkpointing(args.gradient_checkpointing, engine, schedule, model, recording)
    config.gradient_checkpointing = twice
    if streams:
        read_streams(model, find_recorded(schedule, model.config, twice) if recording else ())
    copy = deepcopy(tokenizer)  # TRL changes what it is given, and the tokenizer is saved with the model
    given = (schedule, choose(held_out, len(held_out)), engine)
    if args.method == "grpo":
        own = load_reward(args.reward) if args.reward else None
        drawing = Drawing(args.temperature, args.max_new_tokens, args.beta, own)
        make = partial(PolicyTrainer, *given, drawing=drawing)
    else:
        make = partial(SplitTrainer if is_split(model) else StreamTrainer, *given)
    trainer = build_trainer(make, model, copy, config)
    trainer.can_recompute = engine == "unsloth" and args.gradient_checkpointing == "auto" and not twice
    if args.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    return trainer


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> dict | None:
    """Run the whole job: read, check, render, plan, load, train, save, prove, report.

    Args:
        argv: the words of a command line without the program's name; None: those that this process was started with.
    Returns: what report.json holds; with --dry_run, audit.json; with --convert_to, None.
    Raises: UserError (FlagError if in a flag), Interrupted after a signal in training.
    """
    argv = [*map(str, sys.argv[1:] if argv is None else argv)]
    args = parse_args(argv)
    command = shlex.join([*LAUNCHER, PROGRAM, *drop_resume(argv)])  # repeats the run
    refuse_telemetry()
    return_pages()
    if not is_main() and (args.convert_to or args.dry_run or args.eval_only):
        return None  # the first process does these alone
    if args.convert_to:
        return write_converted(args.convert_to, args.dataset_path, to_reading(args))
    if not is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    check_folder(args.output_dir, "--output_dir")
    if args.eval_only:
        return evaluate_only(args, command)
    if args.load_in_4bit:
        check_4_bits(args.model_id)
    with contextlib.ExitStack() as locks:  # released when the run ends, however it ends
        return (rank_labels if args.doubt else train_and_prove)(args, command, locks)


def train_and_prove(args: argparse.Namespace, command: str, locks: contextlib.ExitStack) -> dict | None:
    """Train, save, score and report as `args` say, with the folders locked; or audit all of it with --dry_run."""
    final = check_final_folder(args)
    if existed := Path(args.output_dir).is_dir():
        locks.enter_context(lock_folder(args.output_dir))
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if args.dry_run:
        return dry_run(args)
    run = Run(Path(args.output_dir), vars(args), checkpoint, read_run(checkpoint, vars(parse_args([]))))

    # Read and check the rows, and what else can be checked before torch is imported.
    examples, held_out, total = read_sides(args)
    asked = [*examples, *held_out]
    check_shown(args.show_row, asked)
    thinks, gguf = is_thinking(examples), find_programs(args)
    if args.reward:
        load_reward(args.reward)
    compute = locks.enter_context(start_fresh("tool_calling.saving.proof")) if is_main() else None

    # Import the engine first, then what is built on it. Render the samples and plan the steps.
    from tool_calling.engines.start import start_engine

    run.watch.note("read")
    engine = start_engine(args.engine, args.share_prefix, args.output_dir, args.seed, args.flash_attention)
    run.watch.note("import")
    trained, tokenizer, config = check_models(args, engine, gguf)
    run = run.with_date(tokenizer)
    rows = pick(Variation, args).prepare(tokenizer, examples, held_out, pick(Rendering, args), run.date)
    set_default(tokenizer, thinks)  # rendering did not depend on it
    show_rows(tokenizer, [*rows.train, *rows.held_out, *rows.unseen] if args.show_row else rows.train, args.show_row)
    schedule = plan_run(args, run, rows, engine, config)
    run.watch.note("render")

    # Train; then prove in a fresh process that what was saved does what was trained.
    if not existed:
        locks.enter_context(lock_folder(args.output_dir))
    if final:
        locks.enter_context(lock_folder(final, "--final_model_dir"))
    from tool_calling.report import finish, measure_lengths, to_report
    from tool_calling.saving.handover import Serving, hand_over
    from tool_calling.saving.proof import Questions, prove

    with discard_partial(final) if final else contextlib.nullcontext():
        saved = train_and_save(args, run, trained, tokenizer, schedule, rows.held_out)
        if saved is None:  # not the first process
            return None
        trained, before, facts, layout, scored = saved
        questions = Questions.of(scored, args.eval_batch_size, args.max_new_tokens, rows.trials)
        args.max_new_tokens = questions.max_new_tokens
        proof = prove(trained, questions, layout, before, compute)
        run.watch.note("prove")
        run.watch.show()

    # Report, and hand over.
    facts |= {"stages": run.watch.seconds}
    report = to_report(vars(args), command, proof, rows.count(total) | measure_lengths(rows.train), facts)
    report = finish(args.output_dir, report, proof)
    serving = Serving.of(tokenizer, config.model_type, rows.plain[0].parser, thinks)
    commands = hand_over(report, trained, tokenizer, gguf, serving)
    return check_served(args, report, proof, questions, asked, commands) if args.serve_check else report


def check_final_folder(args: argparse.Namespace) -> str | None:
    """Return the folder of the model to keep, None for an adapter, after all that can be wrong with it."""
    final = args.final_model_dir if args.save_method != "lora" else None
    if final:
        check_folder(final, "--final_model_dir")
        check_final(Path(final), Path(args.output_dir), list_inputs(args))
    check_models_stay(Path(args.output_dir), list_inputs(args)["model_id"])
    return final


def check_served(args: argparse.Namespace, report: dict, proof, questions, examples: list, commands: list) -> dict:
    """Return the report with how a server, started by one of hand_over's `commands`, answers as scored."""
    from tool_calling.report import write_report
    from tool_calling.saving.rehearsal import rehearse, to_words

    command = to_words(find_server(args.save_gguf), commands, questions)
    served = rehearse(proof, questions, examples, command, Path(args.output_dir) / "serve_check.log")
    return write_report(args.output_dir, report | {"serve_check": served})


def to_reading(args: argparse.Namespace) -> Reading:
    """Return how rows are read: a --tools_path that is given serves all rows without tools, its default native ones."""
    path, named = args.tools_path or TOOLS_PATH, args.tools_path is not None
    return Reading(path, args.format, args.max_samples, args.thinking, args.on_invalid, named)


def list_inputs(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return what a run reads, by flag: paths and names on the Hub."""
    flags = """model_id chat_template merge_model_id dataset_path eval_dataset_path tools_path
        resume_from_checkpoint""".split()
    inputs = {flag: [split_share(path)[0] for path in as_list(getattr(args, flag) or [])] for flag in flags}
    inputs["reward"] = [args.reward.rpartition(":")[0]] if args.reward else []
    if is_adapter(args.model_id):
        inputs["model_id"].append(read_adapter(args.model_id, "--model_id")["base_model_name_or_path"])
    return inputs


def read_sides(args: argparse.Namespace) -> tuple[list, list, int]:
    """Return (examples, held-out examples of --eval_dataset_path, number of rows read), and print warnings."""
    reading = to_reading(args)
    examples, skipped = read_examples(args.dataset_path, reading)
    held_out, more = read_examples(args.eval_dataset_path, reading) if args.eval_dataset_path else ([], 0)
    for warning in find_warnings(examples, held_out):
        warn(warning)
    check_one_list([*examples, *held_out], args.tools_in_prompt)
    settle_tools(args, [*examples, *held_out])
    return examples, held_out, len(examples) + len(held_out) + skipped + more


def settle_tools(args: argparse.Namespace, examples: list) -> None:
    """Set --holdout_tools to names of tools that the rows call."""
    if args.holdout_tools:
        args.holdout_tools = ",".join(find_held_out(examples, args.holdout_tools))


def find_programs(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the programs of --save_gguf, after a look for that of --serve_check and at the Hub for --push_to_hub."""
    gguf = find_gguf_tools(args.save_gguf)
    if args.serve_check:
        find_server(args.save_gguf)
    if args.push_to_hub:
        from tool_calling.saving.upload import check_hub

        check_hub(args.push_to_hub)
    return gguf


def check_models(args: argparse.Namespace, engine: str, gguf: tuple[list[str], list[str]]) -> tuple:
    """Return (what will be Trained, tokenizer, config), after all checks that need no weights."""
    from tool_calling.engines.choices import check_optim, check_report_to
    from tool_calling.engines.hub import check_base, check_dropout, find_tokenizer, load_tokenizer
    from tool_calling.engines.tokens import fit_config
    from tool_calling.saving.merge import Trained

    check_report_to(args.report_to)
    check_optim(choose_optim(args))
    merges = args.save_method != "lora" and not args.doubt
    base, config, merge_base = check_base(
        args.model_id, args.merge_model_id, bool(args.lora_rank), merges, args.trust_remote_code
    )
    check_dropout(args.lora_dropout, config, args.model_id)
    start = args.model_id if base != args.model_id else None
    if start:
        shape = ", ".join(f"{flag} {' '.join(map(str, as_list(getattr(args, flag))))}" for flag in LORA_FLAGS)
        say("adapter", f"{start} is trained on, on its base {base}: {shape}")
    folder, template = find_tokenizer(args.model_id, base), read_template(args.chat_template)
    tokenizer = load_tokenizer(folder, args.trust_remote_code, template=template)
    hide_tools(tokenizer, args.tools_in_prompt == "none")
    trained = Trained(
        base, merge_base, config.dtype, engine, args.final_model_dir, args.save_method, vars(args), start=start
    )
    config = fit_config(config, tokenizer)
    if args.save_gguf:
        check_gguf(args.save_gguf, gguf[0], config, tokenizer)
    return trained, tokenizer, config


def choose_optim(args: argparse.Namespace) -> str:
    """Return the optimizer of the run on this machine."""
    from tool_calling.engines.choices import find_optim

    return find_optim(args.optim, args.lora_rank, args.fsdp)


def plan_run(args: argparse.Namespace, run: Run, rows: Rows, engine: str, config):
    """Return the schedule of the run, after the checks of what it shares with a former run and of disk space."""
    from tool_calling.engines.hub import can_share, count_parameters
    from tool_calling.estimates import Saving
    from tool_calling.schedule import Batching, plan_schedule, show_cost, show_plan

    # A run that went on without sharing goes on without it.
    share = args.share_prefix and run.former.get("share_prefix", True)
    args.share_prefix = share and can_share(engine, config, rows.find_longest())
    schedule = plan_schedule(rows.train, pick(Batching, args), engine=engine)
    run.check_agrees(schedule, choose_optim(args))
    saving = pick(Saving, args)
    parameters = count_parameters(config, args.lora_rank, args.trust_remote_code, args.target_modules)
    checkpoints = saving.count_checkpoints(schedule.list_saves(args.save_steps), run.first_step)
    saving.check_disk(parameters, choose_optim(args), checkpoints)
    show_plan(schedule)
    if args.augment:
        show_cost(schedule, rows.plain)
    return schedule


def train_and_save(args: argparse.Namespace, run: Run, trained, tokenizer, schedule, held_out: list) -> tuple | None:
    """Load the model, prove that sharing a prefix changes nothing, train, and save what was trained.

    Returns: (trained, the held-out loss of fully trained weights, facts of the training, the layout it ended with, the
    samples to score); None for all processes but the first. The model lives in here alone: merging needs its memory.
    """
    from tool_calling.engines.device import free_gpu, report_gpu
    from tool_calling.engines.loading import warn_of_frozen_experts
    from tool_calling.saving.merge import keep_trained
    from tool_calling.training.loop import train

    model = load_model(args, trained.engine, schedule, tokenizer)
    warn_of_frozen_experts(model)
    report_gpu()
    trainer = build_run_trainer(args, model, tokenizer, schedule, held_out, trained.engine)
    run.watch.note("load")
    trainer = check_trainer(args, trainer, tokenizer, held_out)
    schedule = trainer.schedule
    run.watch.note("check")
    chosen = {}
    if args.method == "grpo" and args.hard_rows < 1:
        from tool_calling.training.hard_rows import leave_out

        chosen = {"hard_rows_chosen": leave_out(trainer, args.hard_rows, run.former.get("hard_rows_chosen"))}
        run.watch.note("choose")
    run.start(schedule, choose_optim(args), **chosen)
    facts = train(trainer, run) | chosen
    run.watch.note("train")
    report_gpu()
    scored = choose(held_out or list_plain(schedule.samples), args.eval_samples)
    kept, layout = keep_trained(trained, trainer, tokenizer, scored), trainer.layout
    del model, trainer
    free_gpu()
    return kept and (*kept, facts, layout, scored)


def check_trainer(args: argparse.Namespace, trainer, tokenizer, held_out: list):
    """Return the trainer, or one without sharing if that changes more than rounding does."""
    from tool_calling.engines.graphs import make_room
    from tool_calling.schedule import Batching, plan_schedule
    from tool_calling.training.selfcheck import check_sharing

    if not args.share_prefix or check_sharing(trainer.model, trainer.schedule, trainer.engine, args.flash_attention):
        return trainer
    args.share_prefix = False
    make_room(trainer.model)  # of what the check has recorded
    schedule = plan_schedule(trainer.schedule.samples, pick(Batching, args), engine=trainer.engine)
    return build_run_trainer(args, trainer.model, tokenizer, schedule, held_out, trainer.engine)


# ----------------------------------------------------------------------------------------------------------------------
# What keeps no model
# ----------------------------------------------------------------------------------------------------------------------
def dry_run(args: argparse.Namespace) -> dict:
    """Print, write and return what a run would do, without a GPU and without weights; problems of rows come last."""
    start, reading = time.perf_counter(), to_reading(args)
    sides = [check_rows(side, reading) if side else Checked() for side in (args.dataset_path, args.eval_dataset_path)]
    both = [*sides[0].examples, *sides[1].examples]
    check_shown(args.show_row, both)
    check_one_list(both, args.tools_in_prompt)
    if args.reward:
        load_reward(args.reward)

    from tool_calling.audit import Data, find_model, finish_audit
    from tool_calling.engines.start import quiet_libraries
    from tool_calling.estimates import Saving
    from tool_calling.plan import Training, preview_run
    from tool_calling.schedule import Batching

    quiet_libraries()
    tokenizer, missing, config = find_model(args.model_id, args.trust_remote_code, read_template(args.chat_template))
    hide_tools(tokenizer, args.tools_in_prompt == "none")
    settle_tools(args, both)
    data = Data(sides, tokenizer, missing, pick(Rendering, args), pick(Variation, args))
    audit = data.audit()
    if data.train:
        batching = replace(pick(Batching, args), max_seq_length=data.limit)
        longest = find_longest([*data.train, *data.held_out, *data.unseen])
        audit |= preview_run(data.train, longest, config, batching, pick(Saving, args), pick(Training, args))
    audit = finish_audit(audit, data, args.show_row, vars(args))
    say("audit", f"{Path(args.output_dir) / 'audit.json'} ({time.perf_counter() - start:.1f} s)")
    report_problems(data.problems, args.on_invalid, data.total)
    check_sides(data.train, data.held_out, data.rendering)
    return audit


def evaluate_only(args: argparse.Namespace, command: str) -> dict:
    """Score models and servers on --eval_dataset_path, or on the held-out rows of --dataset_path; train nothing."""
    examples, skipped = read_examples(args.eval_dataset_path or args.dataset_path, to_reading(args))
    args.engine = "transformers"

    from tool_calling.engines.start import start_engine

    start_engine(args.engine, args.share_prefix, args.output_dir, args.seed)
    from tool_calling.report import finish, to_report
    from tool_calling.saving.evaluation import Evaluation

    settle_tools(args, examples)
    proof, data, longest = pick(Evaluation, args).run(examples, pick(Rendering, args), pick(Variation, args))
    data["skipped"] += skipped
    mark_output(vars(args), args.output_dir)
    folder = str(Path(args.output_dir) / "eval_only")  # beside the report of a training run, not in its place
    write_run(vars(args), folder)  # repeats this into the same folder
    args.output_dir, args.max_new_tokens = folder, longest
    return finish(folder, to_report(vars(args), command, proof, data, None), proof)


def rank_labels(args: argparse.Namespace, command: str, locks: contextlib.ExitStack) -> dict:
    """Rank the labels that models contradict which were trained without them, and write them into the output folder."""
    if existed := Path(args.output_dir).is_dir():
        locks.enter_context(lock_folder(args.output_dir))
    paths = [*args.dataset_path, *(args.eval_dataset_path or [])]
    examples, skipped = read_examples(paths, to_reading(args))
    check_one_list(examples, args.tools_in_prompt)

    from tool_calling.engines.start import start_engine

    engine = start_engine(args.engine, args.share_prefix, args.output_dir, args.seed, args.flash_attention)
    from tool_calling.doubts import finish_doubts, rank
    from tool_calling.report import describe_run

    _, tokenizer, config = check_models(args, engine, ([], []))
    rendering = replace(pick(Rendering, args), train_test_split=0)
    samples, _ = render_valid(tokenizer, examples, [], rendering, find_date(tokenizer))
    folds = split_folds(examples, args.doubt)
    sides = [[sample for sample in samples if folds[sample.row] == fold] for fold in range(args.doubt)]
    if not all(sides):
        raise UserError(f"--doubt {args.doubt}: expected at least {args.doubt} different requests; add rows")
    say("render", f"{len(samples):,} samples in {args.doubt} folds of {min(map(len, sides)):,} and more")
    if not existed:
        locks.enter_context(lock_folder(args.output_dir))
    mark_output(vars(args), args.output_dir)
    doubts = rank(find_doubts(args, engine, tokenizer, config, sides))
    data = {"path": " ".join(paths), "rows": len(samples), "skipped": skipped, "unit": name_unit(samples)}
    return finish_doubts(args.output_dir, doubts, {"data": data} | describe_run(vars(args), command))


def find_doubts(args: argparse.Namespace, engine: str, tokenizer, config, sides: list[list]) -> list:
    """Return the doubts about the samples of each fold, by a model that was trained on all others."""
    from tool_calling.doubts import Doubter
    from tool_calling.engines.answers import limit_answers
    from tool_calling.engines.hub import can_share
    from tool_calling.engines.loading import warn_of_frozen_experts
    from tool_calling.schedule import Batching, plan_schedule, show_plan

    samples, plan = sum(sides, []), partial(plan_schedule, batching=pick(Batching, args), engine=engine)
    args.share_prefix = args.share_prefix and can_share(engine, config, find_longest(samples))
    doubter = Doubter(tokenizer, engine, args.eval_batch_size, args.max_new_tokens or limit_answers(samples))
    model = load_model(args, engine, plan(samples), tokenizer)
    warn_of_frozen_experts(model)

    def make_trainer(samples: list):
        schedule = plan(samples, batching=pick(Batching, args))  # sharing may have been switched off
        show_plan(schedule)
        return check_trainer(args, build_run_trainer(args, model, tokenizer, schedule, [], engine), tokenizer, [])

    return doubter.ask_folds(model, sides, make_trainer)


# ----------------------------------------------------------------------------------------------------------------------
# Errors and exit codes
# ----------------------------------------------------------------------------------------------------------------------
def run_command_line() -> int:
    """Run main; return 0, or 1 (2 for flags) with one line per problem, or 128 + the signal that ended the run."""
    began, argv = time.time(), sys.argv[1:]
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
    except Interrupted as stop:
        resumable = [] if args.eval_only or args.dry_run or args.doubt else [PROGRAM, *argv]
        return report_interrupt(stop.args[0], args.output_dir, resumable, began)
    except (UserError, OSError, MemoryError, RuntimeError, ModuleNotFoundError) as error:
        return report_failure(error)
    return 0


if __name__ == "__main__":
    leave(run_command_line())
