"""Models are checked before they are loaded: no foreign code, and weights from safetensors alone."""

import json
import shutil

import pytest
import torch
from conftest import TINY

import train_qwen3_tool_calling as script
from tool_calling.engines.hub import check_model
from tool_calling.engines.loading import load_base
from tool_calling.terminal import UserError

CODE = """
from pathlib import Path
from transformers import Qwen3Config
Path({marker!r}).touch()

class OwnConfig(Qwen3Config):
    model_type = "own_qwen3"
"""


def test_code_that_comes_with_a_model_is_run_only_if_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = tmp_path / "model", tmp_path / "it ran"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_qwen3", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    with pytest.raises(UserError) as error:
        check_model(str(folder))
    assert str(error.value) == (
        f"--model_id {folder}: brings Python code of its own, which is not run; if you know "
        "who wrote it, add --trust_remote_code"
    )
    assert not marker.exists()
    assert check_model(str(folder), trust=True).model_type == "own_qwen3"
    assert marker.exists()
    assert script.parse_args([]).trust_remote_code is False
    assert script.parse_args(["--trust_remote_code"]).trust_remote_code is True


def test_weights_are_read_from_safetensors_alone(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match="the folder holds no .*safetensors"):
        check_model(str(tmp_path / "model"))
    with pytest.raises(UserError, match="its weights cannot be loaded: .*safetensors"):
        load_base(str(tmp_path / "model"), load_in_4bit=False)
