"""Starting an engine: Unsloth comes before the libraries that it patches, or not at all."""

import subprocess
import sys

import pytest
from conftest import ROOT, write_jsonl
from jobs import ENVIRONMENT, ROWS, arguments

from tool_calling.engines import start
from tool_calling.engines.start import has_flash_attention, import_unsloth, start_engine
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
    "release, capability, fit",
    [
        (4, (9, 0), True),
        (4, (12, 0), True),
        (4, (8, 9), False),
        (2, (9, 0), False),
        ("broken", (9, 0), False),
        (None, (9, 0), False),
    ],
)
def test_flash_attention_is_the_fourth_release_on_a_new_gpu(tmp_path, monkeypatch, release, capability, fit):
    if release:
        package = tmp_path / "flash_attn"
        (package / "cute" if release == 4 else package).mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('undefined symbol')" if release == "broken" else "")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    try:
        assert has_flash_attention() is fit
    finally:
        sys.modules.pop("flash_attn", None)


@pytest.mark.parametrize(
    "engine, shared, found", [("transformers", True, True), ("unsloth", False, True), ("unsloth", True, False)]
)
def test_flash_attention_is_refused_where_nothing_would_use_it(monkeypatch, engine, shared, found):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr(start, "has_flash_attention", lambda: found)
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
