"""Model cards, and the command that serves a model."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tool_calling.engines.hub import find_base
from tool_calling.engines.tokens import NO_ROWS
from tool_calling.files import write_file
from tool_calling.origins import is_adapter, list_ancestors, list_trained_tokens
from tool_calling.page import list_scores
from tool_calling.prompts import needs_switch
from tool_calling.run_folder import AGREED, CLIENT, TOOLS
from tool_calling.terminal import hide_secrets

TEMPLATE = Path(__file__).with_name("card.md.jinja")
PORT = "--port 8000"  # which client.py asks, and vLLM's default; llama.cpp's is another


# vLLM's --reasoning-parser by the family of a model, as config.json begins its name
REASONING = {"gemma4": "gemma4", "nemotron": "nemotron_v3", "olmo3": "olmo3"}


@dataclass(frozen=True)
class Serving:
    """How a server is to treat the model, by vLLM's names."""

    parser: str  # reads its calls
    thinks: bool = False  # whether it was trained to think
    reasoning: str | None = None  # reads its thoughts; of a model that never thinks it would take the answers
    switch: bool = False  # whether the chat template must be told that the model thinks, or does not

    @classmethod
    def of(cls, tokenizer, model_type: str, parser: str, thinks: bool) -> "Serving":
        """Return how a model of this family is served if it was trained to think, or not to."""
        tagged = "qwen3" if "<think>" in tokenizer.chat_template else None
        reasoning = next((name for family, name in REASONING.items() if model_type.startswith(family)), tagged)
        return cls(parser, thinks, reasoning if thinks else None, needs_switch(tokenizer, thinks))

    def to_command(self, words: str) -> str:
        """Return the command by which vLLM serves a model, or to_lora_words, on the prompts that it was trained on."""
        command = f"vllm serve {words} --enable-auto-tool-choice --tool-call-parser {self.parser}"
        if self.reasoning:
            command += f" --reasoning-parser {self.reasoning}"
        if self.switch:
            command += f" --default-chat-template-kwargs '{json.dumps({'enable_thinking': self.thinks})}'"
        return command

    def to_llama_command(self, file: str | Path) -> str:
        """Return the command by which llama.cpp serves a GGUF file; it lets all templates think that can, by itself."""
        command = f"llama-server -m {shlex.quote(str(file))} {PORT} --jinja --temp 0"
        return command if self.thinks else f"{command} --reasoning off"


def list_notes(folder: str | Path, shown: str = TOOLS) -> list[str]:
    """Return the lines below the command that serves `folder`: what a server cannot do with it, and its tools."""
    notes = [f"# {NO_ROWS}"] if list_trained_tokens(str(folder)) else []
    sent = f"# requests send the tools in {shown}, as {CLIENT} beside it does"
    return notes + ([sent] if (Path(folder) / TOOLS).is_file() else [])


def to_lora_words(base: str, adapter: str, rank: int) -> str:
    """Return the words by which vLLM serves an adapter on its base, for ranks up to a power of two from 16 on.

    The base's own tokenizer may have another chat template, or another token at the end of an answer, and its settings
    for answers are not greedy.
    """
    highest, adapter = max(16, 1 << (rank - 1).bit_length()), shlex.quote(adapter)
    lora = f"--enable-lora --max-lora-rank {highest} --lora-modules tools={adapter}"
    return f"{shlex.quote(base)} --tokenizer {adapter} --generation-config {adapter} {lora}"


def hide_folders(text: str) -> str:
    """Return a word of a command line, or the name of a file or model, without the folders of this machine."""
    return re.sub(r"(^|=)[/~].*/(?=[^/])", r"\1", text)


def is_on_hub(name: str) -> bool:
    """Return whether a model's name is one on the Hub, not a path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).is_dir()


def to_card(report: dict, adapter: bool, name: str, command: str) -> str:
    """Return the model card of an adapter or of a whole model: what it is, how well it calls tools, how to use it."""
    args = report["args"]
    ancestors = list_ancestors(args["model_id"])
    hub = next(filter(is_on_hub, ancestors), None)
    base, *shown = (hide_folders(name.rstrip("/")) for name in (hub or find_base(args["model_id"])[0], *ancestors))
    head = ModelCardData(
        base_model=hub,  # for whoever reads it, an address on the Hub
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["tool-calling", "function-calling"],
    )
    length = "max_steps" if args["max_steps"] else "num_epochs"
    card = ModelCard.from_template(
        head,
        str(TEMPLATE),
        report=report,
        name=name,
        base=base,
        origin=", which comes from ".join(f"`{name}`" for name in shown) if shown[1:] else None,
        scores=list_scores(report["scores"], report.get("trials")),
        command=command,
        paths=", ".join(f"`{hide_folders(path)}`" for path in args["dataset_path"]),
        losses=[log["loss"] for log in report["train"]["history"] if "loss" in log],  # also from before a resume
        repeat=shlex.join(hide_folders(word) for word in shlex.split(report["command"])),
        shown=lambda value: hide_folders(str(value)),
        settings=[length, "batch_size", "gradient_accumulation_steps", "max_seq_length", *AGREED[1:]],
    )
    return hide_secrets(card.content + "\n")


def write_card(folder: str | Path, report: dict, serve: Callable[[str], str], also: tuple[str, ...] = ()) -> None:
    """Write the card of an adapter or a whole model into its folder.

    Args:
        serve: Serving.to_command of the run.
        also: other commands that serve what is in the folder.
    """
    args, adapter = report["args"], is_adapter(str(folder))
    uploaded = args["push_to_hub"] if adapter == (args["save_method"] == "lora") else None  # of two, the model is
    name = uploaded or Path(folder).resolve().name
    base = hide_folders(find_base(args["model_id"])[0].rstrip("/"))
    words = to_lora_words(base, name, args["lora_rank"]) if adapter else shlex.quote(name)
    command = "\n".join([serve(words), *also, *list_notes(folder)])
    write_file(Path(folder) / "README.md", to_card(report, adapter, name, command))
