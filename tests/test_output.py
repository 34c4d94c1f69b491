"""What a run leaves to be used: a whole run of full fine-tuning, with GGUF files and an upload."""

import json
import re

import pytest
import torch
import yaml
from conftest import ALARM, ROOT, TINY, WEATHER, run_script, write_jsonl
from doubles import TOKEN, Hub, make_tools, on_hub
from jobs import FINAL_FILES, ROWS, arguments, names
from safetensors.torch import load_file

import train_qwen3_tool_calling as script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """One finished run of full fine-tuning with GGUF files and an upload: (folder, result, hub)."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "tools.json").write_text(json.dumps([WEATHER, ALARM]))
    write_jsonl(folder / "rows.jsonl", ROWS)
    path = make_tools(folder / "bin")
    with Hub() as hub:
        result = run_script(
            *arguments(folder, "--lora_rank", 0, "--learning_rate", 1e-3),
            *("--save_gguf", "Q8_0,q4_k_m", "--push_to_hub", "me/tools"),
            PATH=path,
            **on_hub(hub),
        )
    return folder, result, hub


def test_full_fine_tuning_writes_the_model_in_the_bases_type_and_no_adapter(full):
    folder, result, _ = full
    assert result.returncode == 0, result.stderr
    assert names(folder / "final") == sorted([*FINAL_FILES, "gguf"])
    assert names(folder / "out") == [
        *(".lock", "answers.jsonl", "checkpoint-3", "checkpoint-6", "report.html", "report.json", "run.yaml")
    ]
    base, trained = load_file(TINY / "model.safetensors"), load_file(folder / "final" / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in trained.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    kept = [name for name in base if torch.equal(base[name], trained[name])]
    assert all("norm" in name for name in kept)  # a norm's weights of 1 can be too coarse for so few steps
    assert (
        folder / "out" / "checkpoint-6" / "model.safetensors"
    ).stat().st_size > 4 * 11_475_264  # fp32, to go on from
    settings = yaml.safe_load((folder / "final" / "run.yaml").read_text())
    assert (settings["lora_rank"], settings["load_in_4bit"], settings["engine"]) == (0, False, "transformers")
    again = script.parse_args(["--config", str(folder / "final" / "run.yaml")])
    assert (again.save_gguf, again.push_to_hub, again.learning_rate) == ("q8_0,q4_k_m", "me/tools", 1e-3)


def test_full_fine_tuning_is_checked_and_proven(full):
    folder, result, _ = full
    lines = result.stdout.splitlines()
    assert any(line.startswith("check    sharing changes the loss of 4 rows by ") for line in lines)
    saved = next(line for line in lines if line.startswith("save     16-bit, read back by a fresh process: "))
    loss, before = map(float, re.findall(r"(?:loss|saving) ([\d.]+)", saved))
    assert loss == pytest.approx(before, abs=1e-3)
    report = json.loads((folder / "out" / "report.json").read_text())
    assert list(report["scores"]) == ["base", "trained"]
    assert report["scores"]["trained"]["exact_match"] > report["scores"]["base"]["exact_match"]
    assert lines[-4:] == [
        f"done     trained model: {folder / 'final'}",
        f"serve    vllm serve {folder / 'final'} --enable-auto-tool-choice --tool-call-parser hermes",
        f"         llama-server -m {folder}/final/gguf/final-q8_0.gguf --port 8000 --jinja --temp 0 --reasoning off",
        f"         # requests send the tools in {folder / 'final'}/tools.json, as client.py beside it does",
    ]
    assert result.stderr == "warning: no row without a call: the model will forget to refuse\n"


def test_the_model_card_says_what_it_is_and_names_no_folder_of_this_machine(full):
    folder, _, _ = full
    card = (folder / "final" / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tool-calling", "function-calling"],
    }
    assert "`tiny-qwen3` taught to call tools by full fine-tuning: 16-bit weights." in text
    scores = json.loads((folder / "out" / "report.json").read_text())["scores"]
    assert "| | held-out requests | base | trained |\n" in text
    shares = (f"{100 * scores[name]['exact_match']:.1f} % (" for name in ("base", "trained"))
    assert re.search(r"\n\| exact \| 6 \| {}[^|]* \| {}[^|]* \|\n".format(*map(re.escape, shares)), text)
    assert "18 samples of `rows.jsonl`, 6 held out; 6 steps," in text and "| `learning_rate` | 0.001 |" in text
    assert (
        "\nvllm serve me/tools --enable-auto-tool-choice --tool-call-parser hermes\n"
        "llama-server -m gguf/final-q8_0.gguf --port 8000 --jinja --temp 0 --reasoning off\n# requests send "
    ) in text
    assert "--model_id tiny-qwen3 --dataset_path rows.jsonl" in text
    assert str(folder) not in card and str(ROOT) not in card and TOKEN not in card


def test_gguf_files_are_made_of_the_final_folder(full):
    folder, result, _ = full
    final, inside = folder / "final", folder / "final" / ".gguf.partial"
    calls = [json.loads(line) for line in (folder / "bin" / "log").read_text().splitlines()]
    check = calls.pop(0)  # of the tokenizer alone, before anything is trained
    assert check[2] == "--vocab-only"
    assert calls == [
        ["convert", str(final), "--outfile", str(inside / "whole.gguf"), "--outtype", "bf16"],
        ["convert", str(final), "--outfile", str(inside / "final-q8_0.gguf"), "--outtype", "q8_0"],
        ["quantize", str(inside / "whole.gguf"), str(inside / "final-q4_k_m.gguf"), "Q4_K_M"],
    ]
    assert names(final / "gguf") == ["Modelfile", "final-q4_k_m.gguf", "final-q8_0.gguf"]
    assert (
        (final / "gguf" / "Modelfile")
        .read_text()
        .startswith("FROM ./final-q8_0.gguf\nPARAMETER temperature 0\nPARAMETER num_ctx 4096\n")
    )
    assert f"gguf     {final / 'gguf'}: q8_0,q4_k_m; for Ollama: ollama create NAME -f " in result.stdout


def test_the_upload_is_private_whole_and_without_what_is_of_this_machine(full):
    folder, result, hub = full
    assert hub.private is True
    assert sorted(hub.files) == sorted(
        [*(set(FINAL_FILES) - {"run.yaml"}), "gguf/Modelfile", "gguf/final-q4_k_m.gguf", "gguf/final-q8_0.gguf"]
    )
    assert hub.requests[0] == "GET /api/whoami-v2"  # before training
    assert {request.split("?")[0] for request in hub.requests[1:]} <= {
        "POST /api/repos/create",
        "POST /api/validate-yaml",
        "POST /api/models/me/tools/preupload/main",
        "GET /api/models/me/tools/revision/main",
        "GET /api/models/me/tools",
        "POST /api/models/me/tools/commit/main",
    }
    assert f"push     {hub.url}/me/tools" in result.stdout
    written = [
        path for path in folder.rglob("*") if path.suffix in (".json", ".yaml", ".html", ".md") or path.name == "log"
    ]
    assert len(written) > 10 and not [path for path in written if TOKEN in path.read_text()]
    assert TOKEN not in result.stdout + result.stderr
