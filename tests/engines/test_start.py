"""Starting an engine: Unsloth comes before the libraries that it patches, or not at all."""

import importlib.util
import subprocess
import sys

import pytest
from conftest import ROOT, write_jsonl
from jobs import ENVIRONMENT, ROWS, arguments

from tool_calling.engines import start
from tool_calling.engines.start import import_unsloth, start_engine
from tool_calling.terminal import UserError

# A run up to its engine, which prints what Unsloth would come too late for.
UP_TO_THE_ENGINE = """
import sys
import tool_calling.saving.upload
import train_qwen3_tool_calling as script
assert "torch" not in sys.modules
from tool_calling.engines import start

def stop(*_):
    print("late:", sorted({"trl", "transformers", "peft"} & sys.modules.keys()))
    raise SystemExit

start.start_engine = stop
script.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_imports_nothing_that_unsloth_patches_before_its_engine(tmp_path, tools_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    command = [sys.executable, "-c", UP_TO_THE_ENGINE, *map(str, arguments(tmp_path))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "late: []"


def test_unsloth_after_what_it_patches_is_a_mistake_of_this_project():
    import transformers  # noqa: F401

    with pytest.raises(RuntimeError, match="^Unsloth must be imported before .*transformers.*: it patches them$"):
        import_unsloth(True, "out")


def test_unsloth_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="^--engine unsloth needs a CUDA GPU, and torch sees none; use --engine trans"):
        start_engine("unsloth", True, "out", 1)


@pytest.mark.parametrize(
    "engine, shared, packages, capability, fit",
    [
        ("unsloth", True, {"flash_attn", "flash_attn.cute"}, (9, 0), True),
        ("unsloth", True, {"flash_attn", "flash_attn.cute"}, (12, 0), True),
        ("unsloth", True, {"flash_attn", "flash_attn.cute"}, (8, 9), False),
        ("unsloth", True, {"flash_attn"}, (9, 0), False),  # FlashAttention 2
        ("unsloth", True, set(), (9, 0), False),
        ("unsloth", False, {"flash_attn", "flash_attn.cute"}, (9, 0), False),
        ("transformers", True, {"flash_attn", "flash_attn.cute"}, (9, 0), False),
    ],
)
def test_flash_attention_is_refused_where_nothing_would_use_it(monkeypatch, engine, shared, packages, capability, fit):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in packages else None)
    monkeypatch.setattr(start, "import_unsloth", lambda *_: None)
    if fit:
        return start_engine(engine, shared, "out", 1, flash=True)
    needs = "Unsloth, shared prefixes, a Hopper or Blackwell GPU, and the package flash-attn-4"
    with pytest.raises(UserError, match=f"^--flash_attention needs {needs}; leave it out$"):
        start_engine(engine, shared, "out", 1, flash=True)


# What Unsloth does when it is imported: it looks through TRL's trainers, and rewrites each.
UNSLOTH = """
rewritten = []
_patch_trl_rl_trainers = rewritten.append

def patch_trl_rl_trainers():
    for name in ("dpo_trainer", "grpo_trainer", "sft_trainer"):
        _patch_trl_rl_trainers(name)
"""
REWRITE = """
import sys
from tool_calling.engines.start import OneTrainer
before = list(sys.meta_path)
sys.meta_path.insert(0, OneTrainer())
import unsloth
print(unsloth.models.rl.rewritten, sys.meta_path == before)
"""


def test_unsloth_rewrites_the_one_trainer_that_is_used(tmp_path):
    models = tmp_path / "unsloth" / "models"
    models.mkdir(parents=True)
    (tmp_path / "unsloth" / "__init__.py").write_text("from unsloth.models import rl\nrl.patch_trl_rl_trainers()\n")
    (models / "__init__.py").write_text("")
    (models / "rl.py").write_text(UNSLOTH)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = subprocess.run([sys.executable, "-c", REWRITE], capture_output=True, text=True, env=environment)
    assert (result.stdout, result.returncode) == ("['sft_trainer'] True\n", 0), result.stderr
