"""Models are checked before they are loaded: no foreign code, whole weights from safetensors alone, the right base."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

import train_qwen3_tool_calling as script
from tool_calling.engines.hub import (
    check_merge_base,
    check_model,
    check_quantised,
    count_parameters,
    load_config,
    load_tokenizer,
)
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


def test_a_file_or_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    for path, what in (
        (TINY / "config.json", "is a file; expected the folder of a model"),
        (tmp_path, "is an adapter; expected the model that it belongs to, its base"),
    ):
        with pytest.raises(UserError) as error:
            load_tokenizer(str(path))
        assert str(error.value) == f"--model_id {path}: its tokenizer cannot be loaded: {what}"


def test_full_fine_tuning_needs_the_16_bit_model():
    config = SimpleNamespace(quantization_config={"load_in_4bit": True})
    with pytest.raises(UserError, match="--model_id some/bnb-4bit: is quantised, and --lora_rank 0 trains 16-bit"):
        check_quantised(config, "some/bnb-4bit", adapter=False)
    assert check_quantised(config, "some/bnb-4bit", adapter=True) is True
    assert check_quantised(SimpleNamespace(), "some/model", adapter=False) is False


@pytest.mark.parametrize("adapter", [True, False])
def test_a_base_that_is_quantised_otherwise_is_refused(adapter):
    config = SimpleNamespace(quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="--model_id some/fp8: is quantised by fp8, .*; expected the original"):
        check_quantised(config, "some/fp8", adapter)


def test_an_adapter_is_merged_into_the_same_model_in_16_bits(tmp_path):
    """A model that was quantised by somebody else names its original."""
    config, quantised = load_config(str(TINY)), load_config(str(TINY))
    quantised.quantization_config = {"load_in_4bit": True}
    assert check_merge_base(config, "some/model", None, False) == "some/model"
    assert check_merge_base(quantised, "some/4bit", str(TINY), False) == str(TINY)
    for named in (None, "some/4bit"):  # itself is not its original
        with pytest.raises(UserError, match="^--model_id some/4bit: is already quantised, .*--merge_model_id$"):
            check_merge_base(quantised, "some/4bit", named, False)
    shutil.copytree(TINY, tmp_path / "other")
    original = json.loads((TINY / "config.json").read_text())
    for changes, message in (
        ({"hidden_size": 640}, "hidden_size is 640, and 320 in --model_id; expected the same model in 16 bits"),
        ({"quantization_config": {"load_in_4bit": True}}, "is quantised too; expected the 16-bit original"),
    ):
        (tmp_path / "other" / "config.json").write_text(json.dumps(original | changes))
        with pytest.raises(UserError) as error:
            check_merge_base(quantised, "some/4bit", str(tmp_path / "other"), False)
        assert str(error.value) == f"--merge_model_id {tmp_path / 'other'}: {message}"


def test_adapters_stand_on_the_named_layers_only():
    config = check_model(str(TINY))  # 8 layers, 320 wide
    assert count_parameters(config, 4, targets=["q_proj", "up_proj"])["adapter"] == 8 * 4 * (640 + 320 + 896)
    with pytest.raises(UserError) as error:
        count_parameters(config, 4, targets=["q_proj", "lm_head", "experts"])
    assert count_parameters(config, 0, targets=["experts"])["adapter"] == 0  # names are those of adapters
    assert str(error.value) == (
        "--target_modules experts lm_head: the model has no such linear layer; expected some of down_proj, "
        "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
