"""llama.cpp's converter and server, on a small Qwen3 with the stock tokenizer: PATH=... python -m pytest -m serve"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ALARM, WEATHER, native, qwen3_config, run_script, write_jsonl
from jobs import ROWS
from transformers import GenerationConfig, Qwen3ForCausalLM

from tool_calling.saving.gguf import CONVERTER, SERVER, find_llama_tool
from tool_calling.saving.rehearsal import DIRECT, TIES, run_server

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(not find_llama_tool(CONVERTER), reason="llama.cpp's converter is not on PATH"),
]
needs_server = pytest.mark.skipif(not find_llama_tool(SERVER), reason="llama-server is not on PATH")
ROME = {"name": "get_weather", "arguments": {"city": "Rome"}}
WAKE = {"name": "set_alarm", "arguments": {"time": "6:45", "loud": True}}
ANSWERED = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "wake me at 6:45"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": WAKE}]},
    {"role": "tool", "content": '{"set": true}'},
    {"role": "assistant", "content": "It is set — gute Nacht!"},
]
SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}  # as Qwen3's own settings


@pytest.fixture(scope="module")
def run(tmp_path_factory, real_tokenizer) -> tuple[Path, subprocess.CompletedProcess]:
    """Train on a few rows until they are known, save as GGUF, and serve them if llama-server is here."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(qwen3_config(64, 128, 2, 8, tied=True))
    model.generation_config = GenerationConfig(**SAMPLED, eos_token_id=real_tokenizer.eos_token_id)
    model.save_pretrained(folder / "base")
    real_tokenizer.save_pretrained(folder / "base")
    parallel = native(
        "rain in Rome, and wake me at 6:45", *((call["name"], call["arguments"]) for call in (ROME, WAKE))
    )
    rows = [*ROWS[:4], parallel, native("hi", content="Hello!"), {"messages": ANSWERED}]
    path = write_jsonl(folder / "rows.jsonl", rows)
    (folder / "tools.json").write_text(json.dumps([WEATHER, ALARM]))
    flags = ["--model_id", folder / "base", "--dataset_path", path, "--eval_dataset_path", path]
    flags += [
        "--tools_path",
        folder / "tools.json",
        "--output_dir",
        folder / "out",
        "--final_model_dir",
        folder / "final",
    ]
    flags += ["--lora_rank", 0, "--no-load_in_4bit", "--learning_rate", 0.01, "--max_steps", 100, "--batch_size", 8]
    flags += ["--gradient_accumulation_steps", 1, "--save_steps", 100, "--eval_steps", 100, "--save_gguf", "q8_0"]
    flags += ["--serve_check"] if find_llama_tool(SERVER) else []
    folders = os.environ["PATH"].split(os.pathsep)  # vLLM would serve in its place
    there = os.pathsep.join(place for place in folders if not Path(place, "vllm").exists())
    return folder, run_script(*flags, timeout=1200, PATH=there)


def test_the_converter_takes_template_tokens_and_no_sampling_of_the_base(run, real_tokenizer):
    gguf = pytest.importorskip("gguf")
    folder, result = run
    assert result.returncode == 0, result.stderr
    read = gguf.GGUFReader(folder / "final" / "gguf" / "final-q8_0.gguf")
    fields = {name: field.contents() for name, field in read.fields.items()}
    assert fields["tokenizer.chat_template"] == (folder / "final" / "chat_template.jinja").read_text()
    tokens = real_tokenizer.convert_ids_to_tokens(range(len(real_tokenizer)))
    assert fields["tokenizer.ggml.tokens"][: len(tokens)] == tokens
    assert fields["tokenizer.ggml.eos_token_id"] == real_tokenizer.eos_token_id
    assert {name: value for name, value in fields.items() if ".sampling." in name} == {"general.sampling.top_k": 1}
    assert {"tool-calling", "function-calling"} <= {*fields["general.tags"]}


@needs_server
def test_llama_server_answers_as_scored(run):
    folder, result = run
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["scores"]["trained"]["call_exact"] > 0.5, "the model has learned too little to show anything"
    agreement = report["serve_check"]
    rows, equal = agreement["rows"], agreement["equal"]
    assert agreement["server"] == SERVER and rows == 4 + 4 and equal["prompt_lengths"] == rows
    assert equal["verdicts"] >= rows - TIES and "--serve_check" not in result.stderr


@needs_server
def test_the_line_for_llama_server_answers_greedily_what_its_client_asks(run):
    folder, result = run
    line = next(line.strip() for line in result.stdout.splitlines() if line.strip().startswith(f"{SERVER} "))
    assert line == f"{SERVER} -m {folder}/final/gguf/final-q8_0.gguf --port 8000 --jinja --temp 0 --reasoning off"
    words = shlex.split(line.replace(" --port 8000", ""))[1:]
    with run_server([*find_llama_tool(SERVER), *words], folder / "log") as url:
        props = json.load(DIRECT.open(url.replace("/v1", "/props")))["default_generation_settings"]["params"]
        assert (props["temperature"], props["top_k"]) == (0, 1)
        asked = "rain in Rome, and wake me at 6:45"
        client = [sys.executable, folder / "final" / "client.py", asked, url]
        answer = subprocess.run(client, capture_output=True, text=True, timeout=120)
        expected = [f"{call['name']} {call['arguments']}" for call in (ROME, WAKE)]
    calls = [line.split(" ", 1) for line in answer.stdout.splitlines()]
    assert [f"{name} {json.loads(arguments)}" for name, arguments in calls] == expected, answer.stderr
