"""GGUF files and an Ollama Modelfile, by llama.cpp."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from tool_calling.arguments import CONVERTED_GGUF
from tool_calling.files import discard_partial, put_in_place
from tool_calling.prompts import render_text
from tool_calling.terminal import UserError


def find_llama_tool(name: str) -> list[str]:
    """Return the command of a program of llama.cpp, from PATH or from where it is built or Unsloth puts it; or []."""
    if found := shutil.which(name):
        return [found]
    unsloth = os.environ.get("UNSLOTH_LLAMA_CPP_PATH") or Path.home() / ".unsloth" / "llama.cpp"
    for path in (Path(folder) / inner / name for folder in ("llama.cpp", unsloth) for inner in ("", "build/bin")):
        if path.is_file():
            return [sys.executable, str(path)] if path.suffix == ".py" else [str(path)]
    return []


def run_llama_tool(command: list[str], what: str) -> None:
    """Run a program of llama.cpp; if it fails, the last line that it wrote becomes a UserError."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        failed, lines = result.returncode != 0, (result.stderr or result.stdout).strip().splitlines()
    except OSError as error:
        failed, lines = True, [str(error)]
    if failed:
        raise UserError(f"{what}: {shlex.join(command[:2])} failed: {lines[-1] if lines else 'it says nothing'}")


def find_gguf_tools(names: str | None) -> tuple[list[str], list[str]]:
    """Return the commands of llama.cpp's (converter, quantizer) for these GGUF files; a missing one is refused."""
    if names is None:
        return [], []
    tools = {"convert_hf_to_gguf.py": find_llama_tool("convert_hf_to_gguf.py")}
    if not set(names.split(",")) <= set(CONVERTED_GGUF):
        tools["llama-quantize"] = find_llama_tool("llama-quantize")
    if missing := [name for name, command in tools.items() if not command]:
        raise UserError(
            f"--save_gguf {names}: {' and '.join(missing)} of llama.cpp not found; expected on PATH, in "
            "./llama.cpp, or where Unsloth installs it: $UNSLOTH_LLAMA_CPP_PATH or ~/.unsloth/llama.cpp"
        )
    return tools["convert_hf_to_gguf.py"], tools.get("llama-quantize", [])


def check_gguf(args: argparse.Namespace, converter: list[str], config, tokenizer) -> None:
    """Refuse a model that llama.cpp's converter does not know, by having it convert the tokenizer alone."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        run_llama_tool(
            [*converter, folder, "--vocab-only", "--outfile", str(Path(folder) / "vocabulary.gguf")],
            f"--save_gguf {args.save_gguf}: --model_id {args.model_id}",
        )


OLLAMA_TEMPLATE = """\
{{ if or .System .Tools }}<|im_start|>system
{{ .System }}{{ if .Tools }}{{ if .System }}

{{ end }}<BEFORE>{{ range .Tools }}
{"type": "function", "function": {{ .Function }}}{{ end }}<AFTER>{{ end }}<|im_end|>
{{ end }}{{ $replies := false }}{{ range $i, $message := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}\
{{ if and $replies (ne .Role "tool") }}<|im_end|>
{{ $replies = false }}{{ end }}\
{{ if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}{{ $calls := .ToolCalls }}{{ if and .Content $calls }}
{{ end }}{{ if .ToolCalls }}{{ range $n, $call := .ToolCalls }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>{{ if ne (len (slice $calls $n)) 1 }}
{{ end }}{{ end }}{{ end }}{{ if not $last }}<|im_end|>
{{ end }}\
{{ else if eq .Role "tool" }}{{ if not $replies }}<|im_start|>user{{ $replies = true }}{{ end }}
<tool_response>
{{ .Content }}
</tool_response>{{ if $last }}<|im_end|>
{{ end }}{{ end }}{{ if and $last (ne .Role "assistant") }}<OPENING>{{ end }}{{ end }}"""


def to_modelfile(tokenizer, file: str, context: int, thinks: bool) -> str:
    """Return an Ollama Modelfile for a GGUF file, whose template writes what the chat template writes.

    Its fixed texts are cut out of a rendered prompt, so they are those of training. Only the JSON of tools is spaced
    and ordered as Ollama does it. A chat format other than Qwen's is left to Ollama, which knows the common ones.
    """
    render = partial(render_text, tokenizer, add_generation_prompt=True, enable_thinking=thinks)
    user, tool = {"role": "user", "content": "USER"}, {"type": "function", "function": {"name": "x"}}
    before, _, after = render([{"role": "system", "content": "SYSTEM"}, user], tools=[tool]).partition(json.dumps(tool))
    lines = [f"FROM ./{file}", "PARAMETER temperature 0", f"PARAMETER num_ctx {context}"]
    if before.startswith("<|im_start|>system\nSYSTEM\n\n") and "<tool_call>" in after:
        template = OLLAMA_TEMPLATE.replace("<BEFORE>", before.partition("SYSTEM\n\n")[2].rstrip("\n"))
        template = template.replace("<AFTER>", after.partition("<|im_end|>")[0])
        template = template.replace("<OPENING>", after.rpartition("<|im_end|>\n")[2])
        lines += [f'PARAMETER stop "{token}"' for token in ("<|im_start|>", "<|im_end|>")]
        lines += [f'TEMPLATE """{template}"""']
        system = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", render([user]), re.DOTALL)
        lines += [f'SYSTEM """{system[1]}"""'] if system else []  # Qwen2.5 says who it is where nobody else does
    return "\n".join(lines) + "\n"


def write_gguf(args: argparse.Namespace, tools: tuple[list[str], list[str]], tokenizer, thinks: bool) -> Path:
    """Write the final 16-bit model as GGUF files with a Modelfile for the first to its folder `gguf`; return that."""
    model, (converter, quantizer) = Path(args.final_model_dir), tools
    what = f"--save_gguf (the model is whole in {model})"
    with discard_partial(model / "gguf") as folder:
        folder.mkdir()
        whole = folder / "whole.gguf"
        files = {name: folder / f"{model.resolve().name}-{name}.gguf" for name in args.save_gguf.split(",")}
        if quantizer:
            run_llama_tool([*converter, str(model), "--outfile", str(whole), "--outtype", "bf16"], what)
        for name, file in files.items():
            convert = [*converter, str(model), "--outfile", str(file), "--outtype", name]
            quantize = [*quantizer, str(whole), str(file), name.upper()]
            run_llama_tool(convert if name in CONVERTED_GGUF else quantize, what)
            if not file.is_file():
                raise UserError(f"{what}: llama.cpp wrote no {file.name}")
        whole.unlink(missing_ok=True)
        first = next(iter(files.values())).name
        (folder / "Modelfile").write_text(
            to_modelfile(tokenizer, first, max(4096, args.max_seq_length), thinks), encoding="utf-8"
        )
        put_in_place(model / "gguf")
    return model / "gguf"
