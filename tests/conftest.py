"""Paths and small helpers that several test files share."""

import contextlib
import gc
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries are imported
if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at once: threads would only fight for the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "models" / "tiny-qwen3"
REAL_TOKENIZER = ROOT.parent / "shared" / "qwen3-tokenizer"  # the stock Qwen3 tokenizer, where there is one
sys.path.insert(0, str(ROOT))


def pytest_collection_finish() -> None:
    """Spare the many objects of the libraries each gc.collect(); that of a trainer takes longer than all its steps."""
    gc.freeze()


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
                "units": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
        },
    },
}
ALARM = {
    "type": "function",
    "function": {
        "name": "set_alarm",
        "description": "Set an alarm.",
        "parameters": {
            "type": "object",
            "required": ["time"],
            "properties": {
                "time": {"type": "string"},
                "loud": {"type": "boolean"},
                "place": {"type": "object", "required": ["room"], "properties": {"room": {"type": "string"}}},
            },
        },
    },
}


def native(request: str, *calls: tuple, content: str | None = None) -> dict:
    """Return a native row with the calls (name, arguments)."""
    calls = [{"name": name, "arguments": arguments} for name, arguments in calls]
    if content is not None:
        return {"input": request, "output": {"content": content}}
    return {"input": request, "output": {"function_call": calls[0]} if len(calls) == 1 else {"function_calls": calls}}


def write_jsonl(path: Path, rows: list) -> str:
    """Write rows, one JSON object a line; a string row is written as it is."""
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def run_script(*arguments: object, timeout: int = 240, **environment: str) -> subprocess.CompletedProcess:
    """Run the real command line in a new process, without a GPU and without the network."""
    command = [sys.executable, str(ROOT / "train_qwen3_tool_calling.py"), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)


def run_here(*arguments: object) -> subprocess.CompletedProcess:
    """Run the command line in this process: for what trains nothing, importing torch again would take the longest."""
    from forks import start_fresh

    import train_qwen3_tool_calling as script
    from tool_calling import fresh

    out, err, former = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["train_qwen3_tool_calling.py", *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            contextlib.chdir(ROOT),
            mock.patch.object(fresh, "start_python", start_fresh),
        ):
            code = script.run_command_line()
    except SystemExit as error:
        code = error.code
    finally:
        sys.argv = former
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def patch(monkeypatch, name: str, value: object) -> None:
    """Replace a function or constant in every module of the project that has it."""
    found = [
        module
        for key, module in sys.modules.items()
        if key.split(".")[0] in ("tool_calling", "train_qwen3_tool_calling") and hasattr(module, name)
    ]
    assert found, f"no imported module has {name}"
    for module in found:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def tools_path(tmp_path: Path) -> str:
    """A tools file with get_weather and set_alarm."""
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([WEATHER, ALARM]))
    return str(path)


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded base's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="session")
def real_tokenizer():
    """The stock Qwen3 tokenizer; tests skip where it is not to be had."""
    from transformers import AutoTokenizer

    if not REAL_TOKENIZER.is_dir():
        pytest.skip("the stock Qwen3 tokenizer is not here")
    return AutoTokenizer.from_pretrained(REAL_TOKENIZER)


def qwen3_config(hidden: int, inner: int, layers: int, heads: int, tied: bool):
    """Return the config of a Qwen3 of a published size."""
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        vocab_size=151936,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )
