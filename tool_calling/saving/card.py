"""Model cards, and the command that serves a model."""

import argparse
import re
import shlex
from pathlib import Path

import yaml

from tool_calling.files import write_file
from tool_calling.page import show_percent
from tool_calling.run_folder import AGREED
from tool_calling.saving.gguf import write_gguf
from tool_calling.saving.upload import push_folder
from tool_calling.terminal import hide_secrets, say


def to_vllm_command(config, model: str, parser: str, thinks: bool) -> str:
    """Return the command by which vLLM serves a model with tools, on the prompts that it was trained on.

    A model that was never trained to think gets no reasoning parser: it would take an answer for a thought.
    """
    command = f"vllm serve {model} --enable-auto-tool-choice --tool-call-parser {parser}"
    if not config.model_type.startswith("qwen3"):
        return command
    return command + (
        " --reasoning-parser qwen3" if thinks else """ --default-chat-template-kwargs '{"enable_thinking": false}'"""
    )


def hide_folders(text: str) -> str:
    """Return a word of a command line, or the name of a file or model, without the folders of this machine."""
    return re.sub(r"(^|=)[/~].*/(?=[^/])", r"\1", text)


def to_card(report: dict, adapter: bool, name: str, command: str) -> str:
    """Return the model card of an adapter or of a whole model: what it is, how well it calls tools, how to use it."""
    args, data, train = report["args"], report["data"], report["train"]
    steps = f"{train['kept_step']:,} steps" + (
        f" of {train['last_step']:,}, the best on held-out rows" if train["kept_step"] < train["last_step"] else ""
    )
    losses = [log["loss"] for log in train["history"] if "loss" in log]  # also of before the run was resumed
    loss = f", mean loss {sum(losses) / len(losses):.4f}" if losses else ""
    base, rank = hide_folders(args["model_id"].rstrip("/")), args["lora_rank"]
    how = f"LoRA of rank {rank}" if rank else "full fine-tuning"
    what = (
        "the adapter alone"
        if adapter
        else {"merged_16bit": "16-bit weights", "merged_4bit": "4-bit weights (bitsandbytes, nf4)"}[args["save_method"]]
    )
    head = yaml.safe_dump(
        {
            "base_model": base,
            "library_name": "peft" if adapter else "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["tool-calling", "function-calling"],
        }
    )
    scores = [
        f"| {model} | {show_percent(row['exact_match'], 1)} | {show_percent(row['ast_match'], 1)} | "
        f"{show_percent(row['tool_macro_f1'], 1)} | {row['broken_json']} | {row['n']} |"
        for model, row in report["scores"].items()
    ]
    settings = [
        f"| `{key}` | {args[key]} |"
        for key in (
            "num_epochs",
            "max_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "max_seq_length",
            *AGREED[1:],
        )
        if args[key] is not None and not (key == "num_epochs" and args["max_steps"])
    ]
    words = [shlex.quote(hide_folders(word)) for word in shlex.split(report["command"])]
    paths = ", ".join(f"`{hide_folders(path)}`" for path in args["dataset_path"])
    return hide_secrets(f"""---
{head}---
# {name}

`{base}` taught to call tools by {how}: {what}.

| | exact match | AST match | tool macro-F1 | broken JSON | {"held-out" if data["held_out"] else "training"} requests |
|---|---|---|---|---|---|
{chr(10).join(scores)}

Each model wrote its answers greedily. *Exact* compares calls as JSON values, in any order; a request that needs no
call is right when none is made, and one without tools when the text is the same.

## Use

```bash
{command}
```

## Training

{data["train"]:,} samples of {paths}, {data["held_out"]:,} held out; {steps}{loss};
{report["device"]}, {report["finished"]}.

```bash
{" ".join(words)}
```

| setting | value |
|---|---|
{chr(10).join(settings)}
""")


def hand_over(
    args: argparse.Namespace,
    config,
    tokenizer,
    adapter: str | None,
    report: dict,
    parser: str,
    thinks: bool,
    gguf: tuple[list[str], list[str]],
) -> None:
    """Write model cards and GGUF files, upload, and say how to serve; what was proven stays, whatever fails here."""
    only_adapter = args.save_method == "lora"
    result = adapter if only_adapter else args.final_model_dir
    lora = f"--enable-lora --max-lora-rank {max(16, 1 << (args.lora_rank - 1).bit_length())} --lora-modules tools="
    for folder in {adapter, result} - {None}:
        is_adapter = folder == adapter
        name = args.push_to_hub if args.push_to_hub and folder == result else Path(folder).resolve().name
        quoted = shlex.quote(name)
        served = f"{shlex.quote(hide_folders(args.model_id))} {lora}{quoted}" if is_adapter else quoted
        serve = to_vllm_command(config, served, parser, thinks)
        write_file(f"{folder}/README.md", to_card(report, is_adapter, name, serve))
    if args.save_gguf:
        folder = write_gguf(args, gguf, tokenizer, thinks)
        say(
            "gguf",
            f"{folder}: {args.save_gguf}; for Ollama: ollama create NAME -f {shlex.quote(str(folder / 'Modelfile'))}",
        )
    if args.push_to_hub:
        say("push", push_folder(args.push_to_hub, result))
    say("done", f"{'adapter' if only_adapter else 'merged model' if adapter else 'trained model'}: {result}")
    served = f"{shlex.quote(args.model_id)} {lora}{shlex.quote(result)}" if only_adapter else shlex.quote(result)
    say("serve", to_vllm_command(config, served, parser, thinks))
