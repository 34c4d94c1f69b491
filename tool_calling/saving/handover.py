"""The end of a run: cards, GGUF files, an upload, and the command that serves the model."""

import shlex
from functools import partial

from tool_calling.run_folder import TOOLS
from tool_calling.saving.card import Serving, list_notes, to_lora_words, write_card
from tool_calling.saving.gguf import name_gguf, to_modelfile, write_gguf
from tool_calling.saving.merge import Trained
from tool_calling.saving.upload import push_folder
from tool_calling.terminal import say


def hand_over(
    report: dict, trained: Trained, tokenizer, gguf_tools: tuple[list[str], list[str]], serving: Serving
) -> list[str]:
    """Write model cards and GGUF files, upload, and print how to serve; what was proven stays, whatever fails here.

    Returns: the commands that serve the model: by vLLM and, where there are GGUF files, by llama.cpp.

    Args:
        report: as write_report returns it; its settings say what to write and where to upload.
        gguf_tools: see find_gguf_tools.
    """
    settings, result = report["args"], trained.adapter if trained.method == "lora" else trained.final
    for folder in {trained.adapter, result} - {None}:  # before GGUF files, whose tags are those of the card
        write_card(folder, report, serving.to_command)
    also = []
    if names := settings["save_gguf"]:
        tools, context = trained.tools if trained.alike else (), settings["max_seq_length"]
        modelfile = partial(to_modelfile, tokenizer, context=context, thinks=serving.thinks, tools=tools)
        folder = write_gguf(result, names, gguf_tools, modelfile)
        say("gguf", f"{folder}: {names}; for Ollama: ollama create NAME -f {shlex.quote(str(folder / 'Modelfile'))}")
        if not (tools or settings["compact_tools"]):
            found = "Ollama writes the tools of a request with other spaces than those trained on"
            say("", f"# {found}: compare there, or train with --compact_tools")
        file = name_gguf(result, names.split(",")[0])
        also = [serving.to_llama_command(folder / file)]
        write_card(result, report, serving.to_command, (serving.to_llama_command(f"{folder.name}/{file}"),))
    if repo := settings["push_to_hub"]:
        say("push", push_folder(repo, result))
    kind = "adapter" if trained.method == "lora" else "merged model" if trained.adapter else "trained model"
    say("done", f"{kind}: {result}")
    words = shlex.quote(result)
    if trained.method == "lora":
        words = to_lora_words(trained.model_id, result, settings["lora_rank"])
    command = serving.to_command(words)
    say("serve", command)
    for line in also + list_notes(result, f"{result}/{TOOLS}"):
        say("", line)
    return [command, *also]
