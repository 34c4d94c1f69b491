"""GGUF files and an Ollama Modelfile, made by llama.cpp."""

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

from jinja2 import Environment, FileSystemLoader

from tool_calling.arguments import CONVERTED_GGUF
from tool_calling.files import discard_partial, put_in_place
from tool_calling.prompts import PROBE, render_text
from tool_calling.terminal import UserError

CONVERTER, QUANTIZER, SERVER = "convert_hf_to_gguf.py", "llama-quantize", "llama-server"
NAMES = {CONVERTER: (CONVERTER, "convert-hf-to-gguf")}  # as llama.cpp has it, and as its package installs it
MIN_CONTEXT = 4096  # tokens: requests may be longer than the samples
FOLDER = Path(__file__).parent
MODELFILE = Environment("<%", "%>", "<<", ">>", "<#", "#>", trim_blocks=True, loader=FileSystemLoader(FOLDER))


def find_gguf_tools(names: str | None) -> tuple[list[str], list[str]]:
    """Return the commands of llama.cpp's (converter, quantizer) for these GGUF files; UserError if one is missing."""
    if names is None:
        return [], []
    needed = [CONVERTER] if set(names.split(",")) <= set(CONVERTED_GGUF) else [CONVERTER, QUANTIZER]
    tools = {name: find_llama_tool(name) for name in needed}
    if missing := [name for name, command in tools.items() if not command]:
        places = "PATH, in ./llama.cpp, or where Unsloth installs it: $UNSLOTH_LLAMA_CPP_PATH or ~/.unsloth/llama.cpp"
        raise UserError(f"--save_gguf {names}: {' and '.join(missing)} of llama.cpp not found; expected on {places}")
    return tools[CONVERTER], tools.get(QUANTIZER, [])


def find_llama_tool(name: str) -> list[str]:
    """Return the command of a program of llama.cpp, from PATH, a build or where Unsloth installs it; [] if none."""
    for same in NAMES.get(name, (name,)):
        if found := shutil.which(same):
            return [found]
    unsloth = os.environ.get("UNSLOTH_LLAMA_CPP_PATH") or Path.home() / ".unsloth" / "llama.cpp"
    folders = [str(Path(folder) / inner) for folder in ("llama.cpp", unsloth) for inner in ("", "build/bin")]
    if found := shutil.which(name, os.F_OK, os.pathsep.join(folders)):
        return [sys.executable, found] if found.endswith(".py") else [found]
    return []


def find_server(names: str | None) -> list[str]:
    """Return the program of --serve_check: vLLM or, for GGUF files of these names, llama.cpp's; UserError if none."""
    if found := shutil.which("vllm"):
        return [found]
    if names and (found := find_llama_tool(SERVER)):
        return found
    advice = f"vllm is not on PATH{f', nor is {SERVER} where llama.cpp is looked for' if names else ''}"
    raise UserError(f"--serve_check: {advice}; install it, or leave out the flag")


def run_llama_tool(command: list[str], what: str) -> None:
    """Run a program of llama.cpp; if it fails, its last line becomes a UserError."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    except (OSError, subprocess.CalledProcessError) as error:
        output = str(error) if isinstance(error, OSError) else (error.stderr or error.stdout).strip()
        reason = output.splitlines()[-1] if output else "it says nothing"
        raise UserError(f"{what}: {shlex.join(command[:2])} failed: {reason}") from None


def check_gguf(names: str, converter: list[str], config, tokenizer) -> None:
    """Refuse a model that llama.cpp's converter does not know, by having it convert the tokenizer alone."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        command = [*converter, folder, "--vocab-only", "--outfile", str(Path(folder) / "vocabulary.gguf")]
        run_llama_tool(command, f"--save_gguf {names}: --model_id {tokenizer.name_or_path}")


def to_modelfile(tokenizer, file: str, context: int, thinks: bool, tools: tuple[dict, ...] = ()) -> str:
    """Return an Ollama Modelfile for a GGUF file, whose template writes what the chat template writes.

    Its fixed texts are cut from a rendered prompt, so they are those of training. So is the one list of `tools` with
    which all rows were trained, where there is one: Ollama would space, order and prune the JSON of those that a
    request brings, so they only say that there are some, or nothing where the chat template leaves the tools out. A
    chat format other than Qwen's is left to Ollama, which knows the common ones.
    """
    render = partial(render_text, tokenizer, add_generation_prompt=True, enable_thinking=thinks)
    user, tool = {"role": "user", "content": "USER"}, {"type": "function", "function": {"name": "x"}}
    asked = [{"role": "system", "content": "SYSTEM"}, user]
    text = render(asked, tools=[tool])
    before, listed, after = text.partition(json.dumps(tool))
    head, fixed = "<|im_start|>system\nSYSTEM" + ("\n\n" if listed else "<|im_end|>"), {}
    if text.startswith(head) and '<tool_call>\n{"name": "probe_tool", "arguments": ' in render(PROBE[:2]):
        system = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", render([user]), re.DOTALL)
        fixed = {
            "before": before.partition("SYSTEM\n\n")[2].rstrip("\n"),
            "after": after.partition("<|im_end|>")[0],
            "opening": text.rpartition("<|im_end|>\n")[2],
            "system": system and system[1],  # Qwen2.5 says who it is where no system message does
        }
        if tools:
            listed = render(asked, tools=[*tools]).removeprefix(before.rstrip("\n")).removesuffix(after)
            fixed["tools"] = listed.replace("{{", '{{"{{"}}')  # Go's mark of an action
    return MODELFILE.get_template("modelfile.jinja").render(file=file, context=max(MIN_CONTEXT, context), **fixed)


def name_gguf(model_dir: str | Path, name: str) -> str:
    """Return the file name of the GGUF file of this type, of the model in `model_dir`."""
    return f"{Path(model_dir).resolve().name}-{name}.gguf"


def write_gguf(model_dir: str | Path, names: str, programs: tuple[list[str], list[str]], to_text) -> Path:
    """Write the 16-bit model in `model_dir` as GGUF files, with a Modelfile for the first; return their folder.

    Args:
        names: those of --save_gguf.
        programs: from find_gguf_tools.
        to_text: to_modelfile of the run, given the name of the first file.
    """
    model, (converter, quantizer) = Path(model_dir), programs
    what = f"--save_gguf (the model is whole in {model})"
    with discard_partial(model / "gguf") as folder:
        folder.mkdir()
        whole = folder / "whole.gguf"
        files = {name: folder / name_gguf(model, name) for name in names.split(",")}
        if quantizer:
            run_llama_tool([*converter, str(model), "--outfile", str(whole), "--outtype", "bf16"], what)
        for name, file in files.items():
            convert = [*converter, str(model), "--outfile", str(file), "--outtype", name]
            quantize = [*quantizer, str(whole), str(file), name.upper()]
            run_llama_tool(convert if name in CONVERTED_GGUF else quantize, what)
            if not file.is_file():
                raise UserError(f"{what}: llama.cpp wrote no {file.name}")
        whole.unlink(missing_ok=True)
        (folder / "Modelfile").write_text(to_text(next(iter(files.values())).name), encoding="utf-8")
        put_in_place(model / "gguf")
    return model / "gguf"
