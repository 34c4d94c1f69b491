"""--serve_check: a server is started, asked, compared and stopped, by a double of vLLM."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, WEATHER, native, run_script, write_jsonl
from doubles import make_tools
from jobs import run_forked

from tool_calling.data.examples import Example
from tool_calling.samples import Sample
from tool_calling.saving import rehearsal, served
from tool_calling.saving.gguf import find_server
from tool_calling.saving.proof import Questions
from tool_calling.saving.rehearsal import rehearse, run_server, to_words
from tool_calling.scores import Proof
from tool_calling.terminal import UserError

CITIES = ["Rome", "Oslo", "Lima", "Cairo"]
VLLM = """#!{python}
import json, sys
sys.path.insert(0, {tests!r})
from canned import Canned, completion
print("up", *sys.argv[1:], flush=True)
port, answers = int(sys.argv[sys.argv.index("--port") + 1]), json.load(open({answers!r}))
def reply(body):
    name = answers[body["messages"][-1]["content"]]
    return completion(None, {{"name": "get_weather", "arguments": {{"city": name}}}})
Canned(reply, port=port).serve_forever()
"""
MORTAL = "#!{python}\nimport sys\nsys.exit('loading\\nno room for the weights')\n"
DEAF = "#!{python}\nimport signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)\n"


def write_program(folder: Path, text: str = VLLM, **answers: str) -> Path:
    """Write a program of the name vllm, which answers `weather in KEY` by a call for VALUE; return its path."""
    folder.mkdir()
    (folder / "answers").write_text(json.dumps({f"weather in {city}": name for city, name in answers.items()}))
    program = folder / "vllm"
    program.write_text(text.format(python=sys.executable, tests=str(ROOT / "tests"), answers=str(folder / "answers")))
    program.chmod(0o755)
    return program


def to_call(city: str) -> str:
    call = json.dumps({"name": "get_weather", "arguments": {"city": city}})
    return f"<tool_call>\n{call}\n</tool_call>"


@pytest.fixture
def scored() -> tuple[Proof, Questions, list[Example]]:
    """Four requests to a model that answers all of them as it should."""
    samples, examples = [], []
    for row, city in enumerate(CITIES):
        request, source = f"weather in {city}", f"x:{row + 1}"
        samples.append(Sample(source, [row, 1, 2], 1, to_call(city), [WEATHER], request, row=row, turn=1))
        called = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
        turns = [{"role": "user", "content": request}, {"role": "assistant", "content": "", "tool_calls": [called]}]
        examples.append(Example(source, turns, [WEATHER]))
    proof = Proof.of(samples, {"base": {"answers": [""] * 4}, "merged": {"answers": [*map(to_call, CITIES)]}})
    return proof, Questions(samples, 4, 50), examples


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_that_answers_as_scored_is_said_to_and_stopped(scored, tmp_path, capsys):
    program, log = write_program(tmp_path / "bin", **{city: city for city in CITIES}), tmp_path / "log"
    agreement = rehearse(*scored, [str(program), "serve", "final"], log)
    assert agreement["equal"] == {"verdicts": 4, "answers": 4} and agreement["different"] == []
    assert (agreement["server"], agreement["against"], agreement["model"]) == ("vllm", "merged", "tuned")
    out, err = capsys.readouterr()
    assert f"rehearse vllm serve final; what it prints is in {log}\n" in out and err == ""
    assert "served   vllm against merged: equal are 4 of 4 verdicts, 4 of 4 answers\n" in out
    port = log.read_text().split()[-1]
    assert log.read_text() == f"up serve final --host 127.0.0.1 --port {port}\n"


def test_a_server_that_answers_otherwise_is_warned_of_with_the_first_row(scored, tmp_path, capsys):
    program = write_program(tmp_path / "bin", Rome="Rome", Oslo="x", Lima="x", Cairo="x")
    agreement = rehearse(*scored, [str(program), "serve", "final"], tmp_path / "log")
    assert agreement["equal"] == {"verdicts": 1, "answers": 1}
    assert [row["where"] for row in agreement["different"]] == ["x:2", "x:3", "x:4"]
    out, err = capsys.readouterr()
    found = "vllm does not answer as scored: 3 of 4 verdicts differ, more than rounding explains"
    assert err == f"warning: --serve_check: {found}\n"
    assert "the first that differs: x:2  weather in Oslo\n" in out


def test_two_rows_may_be_ties(scored, tmp_path, capsys):
    program = write_program(tmp_path / "bin", Rome="Rome", Oslo="Oslo", Lima="x", Cairo="x")
    assert rehearse(*scored, [str(program)], tmp_path / "log")["equal"]["verdicts"] == 2
    assert capsys.readouterr().err == ""


def test_a_server_that_answers_no_request_is_warned_of(scored, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(served, "RETRIES", 0)
    program = write_program(tmp_path / "bin")
    assert rehearse(*scored, [str(program), "serve"], tmp_path / "log") is None
    port, out = (tmp_path / "log").read_text().split()[5], capsys.readouterr()
    assert out.err.startswith(f"warning: --serve_check http://127.0.0.1:{port}/v1: cannot be reached (")


def test_a_server_that_does_not_start_is_warned_of(scored, tmp_path, capsys):
    program, log = write_program(tmp_path / "bin", MORTAL), tmp_path / "log"
    assert rehearse(*scored, [str(program)], log) is None
    found = f"vllm ended before it served anything: no room for the weights; more in {log}"
    assert capsys.readouterr().err == f"warning: --serve_check: {found}\n"


def test_a_server_that_is_never_ready_is_stopped_even_if_it_will_not_end(scored, tmp_path, capsys, monkeypatch):
    for name, seconds in {"STARTING": 2, "STOPPING": 0.2}.items():
        monkeypatch.setattr(rehearsal, name, seconds)
    started, real = [], rehearsal.wait_until_ready

    def note(process, *more):
        started.append(process)
        real(process, *more)

    monkeypatch.setattr(rehearsal, "wait_until_ready", note)
    program, log = write_program(tmp_path / "bin", DEAF), tmp_path / "log"
    assert rehearse(*scored, [str(program)], log) is None
    assert capsys.readouterr().err == f"warning: --serve_check: vllm is not ready after 2 s; see {log}\n"
    assert started[0].wait(10) == -9 and not is_alive(started[0].pid)


def test_a_server_is_stopped_if_the_run_is(tmp_path):
    program = write_program(tmp_path / "bin")
    with pytest.raises(KeyboardInterrupt), run_server([str(program)], tmp_path / "log") as url:
        assert url.startswith("http://127.0.0.1:") and url.endswith("/v1")
        raise KeyboardInterrupt
    with pytest.raises(OSError):
        rehearsal.DIRECT.open(url.replace("/v1", "/health"), timeout=5)


def test_the_program_that_is_there_serves(tmp_path, monkeypatch):
    for name, value in {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "UNSLOTH_LLAMA_CPP_PATH": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    advice = "install it, or leave out the flag"
    with pytest.raises(UserError) as error:
        find_server(None)
    assert str(error.value) == f"--serve_check: vllm is not on PATH; {advice}"
    with pytest.raises(UserError) as error:
        find_server("q8_0")
    where = "vllm is not on PATH, nor is llama-server where llama.cpp is looked for"
    assert str(error.value) == f"--serve_check: {where}; {advice}"
    make_tools(tmp_path / "llama.cpp", **{"llama-server": ""})
    llama, vllm = ["llama.cpp/llama-server"], [str(write_program(tmp_path / "bin"))]
    assert find_server("q8_0") == llama
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert find_server("q8_0") == find_server(None) == vllm


def test_a_server_has_room_for_the_longest_prompt_with_its_answer():
    commands = ["vllm serve final --tool-call-parser hermes", "llama-server -m 'a b.gguf' --port 8000 --jinja"]
    questions = Questions([Sample("x:1", [0] * 80, 60), Sample("x:2", [0] * 75, 70)], 4, 29)
    vllm, llama = ["/bin/vllm"], ["llama.cpp/llama-server"]
    words = "serve final --tool-call-parser hermes --max-model-len 99".split()
    assert to_words(vllm, commands, questions) == [*vllm, *words]
    words = ["-m", "a b.gguf", "--jinja", "--parallel", "4", "--ctx-size", "396"]
    assert to_words(llama, commands, questions) == [*llama, *words]


@pytest.mark.slow
def test_a_run_ends_with_the_answers_of_a_server(tmp_path, tools_path):
    cities = [*CITIES, "Paris", "Quito", "Delhi", "Turin"]
    rows = [native(f"weather in {city}", ("get_weather", {"city": city})) for city in cities]
    program = write_program(tmp_path / "bin", **{city: city for city in cities})
    dataset = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = ["--model_id", TINY, "--dataset_path", dataset, "--tools_path", tools_path]
    flags += ["--output_dir", tmp_path / "out", "--final_model_dir", tmp_path / "final", "--train_test_split", 0.25]
    flags += [
        "--max_steps",
        2,
        "--learning_rate",
        0.01,
        "--warmup_steps",
        0,
        "--max_new_tokens",
        24,
        "--serve_check",
        "--no-load_in_4bit",
    ]
    result = run_forked(*flags, PATH=f"{program.parent}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    agreement, log = report["serve_check"], (tmp_path / "out" / "serve_check.log").read_text()
    equal = agreement["equal"]["verdicts"]
    assert agreement["rows"] == 2 and f"served   vllm against merged: equal are {equal} of 2" in result.stdout
    assert log.startswith(f"up serve {tmp_path / 'final'} --enable-auto-tool-choice --tool-call-parser hermes ")
    assert re.search(r" --max-model-len \d{3} --host 127.0.0.1 --port ", log)

    refused = run_forked(*flags, "--save_method", "lora")
    assert refused.returncode == 2
    assert "--serve_check serves a whole model: leave out --save_method lora" in refused.stderr


@pytest.mark.serve
@pytest.mark.skipif(not shutil.which("vllm"), reason="vllm is not on PATH")
def test_vllm_answers_as_scored(tmp_path):
    """The real one, of any environment: PATH=$PATH:.../bin python -m pytest -m serve"""
    flags = ["--model_id", TINY, "--max_steps", 10, "--batch_size", 32, "--gradient_accumulation_steps", 1]
    flags += ["--learning_rate", 0.01, "--warmup_steps", 2, "--no-load_in_4bit", "--eval_samples", 50, "--serve_check"]
    flags += ["--output_dir", tmp_path / "out", "--final_model_dir", tmp_path / "final"]
    result = run_script(*flags, timeout=1200, VLLM_CPU_KVCACHE_SPACE="2")  # GiB
    assert result.returncode == 0, result.stderr
    agreement = json.loads((tmp_path / "out" / "report.json").read_text())["serve_check"]
    assert (agreement["rows"], agreement["equal"]["prompt_lengths"]) == (50, 50)
    assert agreement["equal"]["verdicts"] >= 50 - rehearsal.TIES and "--serve_check" not in result.stderr
