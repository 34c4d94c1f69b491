"""GGUF files by doubles of llama.cpp's programs, and the Modelfile by the template engine of Ollama."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ALARM, TINY, WEATHER, native, write_jsonl
from doubles import make_tools
from jobs import run_forked
from transformers import AutoConfig

from tool_calling.prompts import HIDDEN
from tool_calling.saving.gguf import check_gguf, find_gguf_tools, to_modelfile, write_gguf
from tool_calling.terminal import UserError

CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"


def read_log(folder: Path) -> list[list[str]]:
    """Return the calls of the doubles in a folder."""
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """A home and working folder on a machine without llama.cpp."""
    for name, value in {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "UNSLOTH_LLAMA_CPP_PATH": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_programs_of_llama_cpp_are_found_on_the_path(nowhere, monkeypatch):
    monkeypatch.setenv("PATH", make_tools(nowhere / "bin"))
    converter, quantizer = [str(nowhere / "bin" / CONVERTER)], [str(nowhere / "bin" / QUANTIZER)]
    assert find_gguf_tools(None) == ([], [])
    assert find_gguf_tools("q8_0,f16") == (converter, [])
    assert find_gguf_tools("q8_0,q4_k_m") == (converter, quantizer)


def test_the_converter_is_found_as_its_package_installs_it(nowhere, monkeypatch):
    monkeypatch.setenv("PATH", make_tools(nowhere / "bin", **{"convert-hf-to-gguf": ""}))
    assert find_gguf_tools("q8_0") == ([str(nowhere / "bin" / "convert-hf-to-gguf")], [])


@pytest.mark.parametrize("folder", ["llama.cpp", "llama.cpp/build/bin", ".unsloth/llama.cpp", "elsewhere/build/bin"])
def test_programs_of_llama_cpp_are_found_where_they_are_built(nowhere, monkeypatch, folder):
    monkeypatch.setenv("UNSLOTH_LLAMA_CPP_PATH", str(nowhere / "elsewhere") if folder.startswith("elsewhere") else "")
    (nowhere / folder).parent.mkdir(parents=True, exist_ok=True)
    make_tools(nowhere / folder)
    (nowhere / folder / CONVERTER).chmod(0o644)  # as of an archive: Python reads it all the same
    place = Path(folder) if folder.startswith("llama.cpp") else nowhere / folder
    assert find_gguf_tools("q4_0") == ([sys.executable, str(place / CONVERTER)], [str(place / QUANTIZER)])


@pytest.mark.parametrize("names, missing", [("q8_0", CONVERTER), ("q8_0,q4_k_m", f"{CONVERTER} and {QUANTIZER}")])
def test_programs_of_llama_cpp_that_are_missing_are_named(nowhere, names, missing):
    with pytest.raises(UserError) as error:
        find_gguf_tools(names)
    assert str(error.value) == (
        f"--save_gguf {names}: {missing} of llama.cpp not found; expected on PATH, in ./llama.cpp, or where Unsloth "
        "installs it: $UNSLOTH_LLAMA_CPP_PATH or ~/.unsloth/llama.cpp"
    )


def test_a_tokenizer_is_converted_alone(tmp_path, tokenizer):
    make_tools(tmp_path / "bin")
    config = AutoConfig.from_pretrained(TINY)
    check_gguf("q8_0", [str(tmp_path / "bin" / CONVERTER)], config, tokenizer)
    ((_, folder, *options),) = read_log(tmp_path / "bin")
    assert options == ["--vocab-only", "--outfile", f"{folder}/vocabulary.gguf"] and not Path(folder).exists()


@pytest.mark.parametrize(
    "program, reason",
    [
        ("import sys\nprint('x')\nsys.exit('loading\\nUnknown: BPE pre-tokenizer')", "Unknown: BPE pre-tokenizer"),
        ("print('all is lost')\nraise SystemExit(3)", "all is lost"),
        ("raise SystemExit(3)", "it says nothing"),
    ],
)
def test_a_tokenizer_that_cannot_be_converted_is_refused(tmp_path, tokenizer, program, reason):
    make_tools(tmp_path / "bin", **{CONVERTER: program})
    converter = [sys.executable, str(tmp_path / "bin" / CONVERTER)]
    with pytest.raises(UserError) as error:
        check_gguf("q8_0,f16", converter, AutoConfig.from_pretrained(TINY), tokenizer)
    assert str(error.value) == f"--save_gguf q8_0,f16: --model_id {TINY}: {' '.join(converter)} failed: {reason}"


def test_a_program_that_is_gone_is_named(tmp_path, tokenizer):
    with pytest.raises(UserError) as error:
        check_gguf("f16", ["/no/such/program"], AutoConfig.from_pretrained(TINY), tokenizer)
    assert str(error.value).startswith(f"--save_gguf f16: --model_id {TINY}: /no/such/program ")
    assert str(error.value).endswith(" failed: [Errno 2] No such file or directory: '/no/such/program'")


@pytest.mark.slow
def test_gguf_tools_that_are_missing_end_the_run_before_training(tmp_path, tools_path):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [native(f"Rain in {i}?", ("get_weather", {"city": str(i)})) for i in range(4)]
    )
    command = ["--model_id", TINY, "--dataset_path", path, "--tools_path", tools_path]
    command += ["--output_dir", tmp_path / "out", "--final_model_dir", tmp_path / "final"]
    nowhere = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "UNSLOTH_LLAMA_CPP_PATH": ""}

    def run(names: str) -> list[str]:
        result = run_forked(*command, "--save_gguf", names, **nowhere)
        assert result.returncode == 1
        return [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]

    assert run("q8_0,q4_k_m") == [
        "error: --save_gguf q8_0,q4_k_m: convert_hf_to_gguf.py and llama-quantize of llama.cpp not found; expected on "
        "PATH, in ./llama.cpp, or where Unsloth installs it: $UNSLOTH_LLAMA_CPP_PATH or ~/.unsloth/llama.cpp"
    ]
    tools = tmp_path / ".unsloth"  # a converter there that does not know the model
    tools.mkdir()
    make_tools(tools / "llama.cpp", **{CONVERTER: "import sys\nsys.exit('Unknown: BPE pre-tokenizer')"})
    assert run("q8_0") == [
        f"error: --save_gguf q8_0: --model_id {TINY}: {sys.executable} {tools / 'llama.cpp' / CONVERTER} failed: "
        "Unknown: BPE pre-tokenizer"
    ]
    assert not (tmp_path / "out").exists() and not (tmp_path / "final").exists()


def test_gguf_files_are_converted_or_quantised_from_the_whole(tmp_path):
    shutil.copytree(TINY, tmp_path / "final")
    make_tools(tmp_path / "bin")
    tools = [str(tmp_path / "bin" / CONVERTER)], [str(tmp_path / "bin" / QUANTIZER)]
    final = tmp_path / "final"
    assert write_gguf(final, "q4_k_m,f16", tools, "first {}".format) == final / "gguf"
    inside = final / ".gguf.partial"
    assert read_log(tmp_path / "bin") == [
        ["convert", str(final), "--outfile", str(inside / "whole.gguf"), "--outtype", "bf16"],
        ["quantize", str(inside / "whole.gguf"), str(inside / "final-q4_k_m.gguf"), "Q4_K_M"],
        ["convert", str(final), "--outfile", str(inside / "final-f16.gguf"), "--outtype", "f16"],
    ]
    assert sorted(os.listdir(final / "gguf")) == ["Modelfile", "final-f16.gguf", "final-q4_k_m.gguf"]
    assert (final / "gguf" / "Modelfile").read_text() == "first final-q4_k_m.gguf"
    write_gguf(final, "f16", (tools[0], []), "second {}".format)
    assert sorted(os.listdir(final / "gguf")) == ["Modelfile", "final-f16.gguf"]  # in place of the others
    assert (final / "gguf" / "Modelfile").read_text() == "second final-f16.gguf"


def test_a_gguf_that_fails_leaves_the_model_whole(tmp_path):
    shutil.copytree(TINY, tmp_path / "final")
    before = sorted(os.listdir(tmp_path / "final"))
    make_tools(tmp_path / "bin")
    converter = [sys.executable, str(tmp_path / "bin" / CONVERTER)]
    for quantizer, reason in ((["false"], "false .* failed: it says nothing"), (["true"], "wrote no final-q4_0.gguf")):
        with pytest.raises(UserError, match=f"the model is whole in {tmp_path / 'final'}.*{reason}"):
            write_gguf(tmp_path / "final", "q4_0", (converter, quantizer), str)
        assert sorted(os.listdir(tmp_path / "final")) == before


CALLS = [
    {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}},
    {"type": "function", "function": {"name": "set_alarm", "arguments": {"time": "6"}}},
]
ASKED = {"role": "user", "content": "Rome?"}
CHATS = [
    [ASKED],
    [{"role": "system", "content": "Be short."}, ASKED],
    [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "content": "22"},
        {"role": "tool", "content": "ok"},
    ],
    [
        {"role": "system", "content": "Be short."},
        ASKED,
        {"role": "assistant", "content": "Let me see.", "tool_calls": CALLS[:1]},
        {"role": "tool", "content": "22"},
        {"role": "assistant", "content": "22 degrees."},
        {"role": "user", "content": "And now?"},
    ],
]


def read_template(modelfile: str) -> str:
    return modelfile.split('TEMPLATE """')[1].split('"""')[0]


TOOLS = ({**WEATHER, "function": {**WEATHER["function"], "description": 'Of {{city}}, "now".'}}, ALARM)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("go"), reason="Go is not here, whose templates Ollama has")
@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize(
    "trained, hidden", [((), False), (TOOLS, False), (TOOLS, True)], ids=["several lists", "one list", "left out"]
)
def test_ollama_sends_the_prompts_of_training(tokenizer, tmp_path, monkeypatch, thinks, trained, hidden):
    """Of one list of tools to the byte, however Ollama writes those of a request, or without it."""
    monkeypatch.setattr(tokenizer, "chat_template", HIDDEN * hidden + tokenizer.chat_template)
    subprocess.run(
        ["go", "build", "-o", tmp_path / "render", Path(__file__).with_name("ollama_template.go")],
        check=True,
        env={**os.environ, "GO111MODULE": "off"},
    )
    template = read_template(to_modelfile(tokenizer, "x.gguf", 4096, thinks, trained))
    for chat in CHATS:
        for tools in ([], [*TOOLS]):
            system = "".join(message["content"] for message in chat if message["role"] == "system")
            sent = [{"function": {"name": "changed"}}] if trained and tools else tools
            values = json.dumps({"Template": template, "System": system, "Messages": chat, "Tools": sent})
            rendered = subprocess.run([tmp_path / "render"], input=values, capture_output=True, text=True, check=True)
            assert rendered.stdout == tokenizer.apply_chat_template(
                chat, tools=tools or None, add_generation_prompt=True, enable_thinking=thinks, tokenize=False
            )


def test_the_modelfile_has_the_one_list_of_tools_as_trained(tokenizer):
    template = read_template(to_modelfile(tokenizer, "x.gguf", 4096, False, (WEATHER, ALARM)))
    listed = "\n".join(map(json.dumps, (WEATHER, ALARM)))
    assert f"<tools>\n{listed}\n</tools>\n\n" in template and "range .Tools" not in template


def test_the_modelfile_leaves_out_the_tools_that_the_chat_template_leaves_out(tokenizer, monkeypatch):
    whole = read_template(to_modelfile(tokenizer, "x", 4096, False, (WEATHER, ALARM)))
    monkeypatch.setattr(tokenizer, "chat_template", HIDDEN + tokenizer.chat_template)
    template = read_template(to_modelfile(tokenizer, "x", 4096, False, (WEATHER, ALARM)))
    # Ollama refuses tools to a template that does not name them, so it does, and writes nothing.
    start = "{{ if or .System }}<|im_start|>system\n{{ .System }}{{ if .Tools }}{{ end }}<|im_end|>\n{{ end }}"
    messages = whole[whole.index("{{ $replies := false }}") :]
    assert template == start + messages and "{{ if .ToolCalls }}" in messages


def test_the_modelfile_keeps_the_tools(tokenizer):
    modelfile = to_modelfile(tokenizer, "x-q8_0.gguf", 8192, False)
    assert modelfile.splitlines()[:5] == [
        "FROM ./x-q8_0.gguf",
        "PARAMETER temperature 0",
        "PARAMETER num_ctx 8192",
        'PARAMETER stop "<|im_start|>"',
        'PARAMETER stop "<|im_end|>"',
    ]
    template = read_template(modelfile)
    assert "<BEFORE>" not in template and "{{ end }}# Tools\n\nYou may call one or more functions" in template
    assert (
        '<tools>{{ range .Tools }}\n{"type": "function", "function": {{ .Function }}}{{ end }}\n</tools>\n\n'
        in template
    )
    assert "<|im_start|>assistant\n<think>\n\n</think>\n\n{{ end }}{{ end }}" in template
    # Ollama finds the mark of a call as the first text after the first `if .ToolCalls`.
    assert template.split("{{ if .ToolCalls }}")[1].startswith("{{ range $n, $call := .ToolCalls }}<tool_call>\n{")
    assert "SYSTEM" not in modelfile

    class Qwen25:  # whose template says who it is where no system message does
        def apply_chat_template(self, messages, **options):
            if messages[0]["role"] != "system":
                messages = [{"role": "system", "content": "You are Qwen."}, *messages]
            return tokenizer.apply_chat_template(messages, **options)

    assert to_modelfile(Qwen25(), "x", 4096, False).endswith('"""\nSYSTEM """You are Qwen."""\n')

    class Xml:  # calls that the Modelfile does not write
        def apply_chat_template(self, messages, **options):
            return tokenizer.apply_chat_template(messages, **options).replace('{"name": ', "<function=")

    class Other:
        def apply_chat_template(self, messages, **options):
            return "<s>[INST] " + messages[-1]["content"]

    for other in (Xml(), Other()):  # Ollama takes the template of the GGUF
        assert to_modelfile(other, "x", 4096, False) == ("FROM ./x\nPARAMETER temperature 0\nPARAMETER num_ctx 4096\n")
