"""Private names of other libraries: each is still where this project expects it."""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from tool_calling.engines.compat import PRIVATE_NAMES, compile_attention
from tool_calling.training.trainer import SplitTrainer, StreamTrainer


def read_source(module: str) -> str | None:
    """Return the source of a module, not imported, as Unsloth changes the others; None if it is not installed."""
    package, *path = module.split(".")
    found = importlib.util.find_spec(package)
    if found is None:
        return None
    return Path(found.submodule_search_locations[0], *path).with_suffix(".py").read_text(encoding="utf-8")


def find_names(source: str) -> set:
    """Return every name and every word that the code itself holds; comments do not count."""
    fields = ("name", "id", "attr", "arg", "value")
    found = [getattr(node, field, None) for node in ast.walk(ast.parse(source)) for field in fields]
    return {name for name in found if isinstance(name, str)}


@pytest.mark.parametrize("place, names, release", PRIVATE_NAMES)
def test_every_private_name_is_in_the_installed_library(place, names, release):
    module, _, owner = place.partition(":")
    if owner:
        found = dir(getattr(importlib.import_module(module), owner))
    elif (source := read_source(module)) is not None:
        found = find_names(source)
    else:
        pytest.skip(f"{module} is not installed")
    missing = {*names.split()}.difference(found)
    assert not missing, f"{place} has no {missing} any more; it was last seen in {release}"


def test_a_name_that_is_gone_is_missed():
    source = read_source("trl.trainer.utils")
    assert "add_fused_lm_head" in find_names(source)
    assert "add_fused_lm_head" not in find_names(source.replace("add_fused_lm_head", "add_head"))
    assert find_names("# _old_checkpoint") == set()


def test_attention_is_compiled_to_the_kernels_that_were_asked_for(monkeypatch):
    own = {"BLOCK_M": 64}
    kernel = SimpleNamespace(_kernel_options_for_dtype=lambda dtype: own)
    monkeypatch.setitem(sys.modules, "unsloth.utils", SimpleNamespace(prefix_grouper_kernel=kernel))
    compile_attention(False)
    assert kernel._kernel_options_for_dtype(torch.bfloat16) is own and callable(kernel._flex_attention_compiled)
    compile_attention(True)
    assert kernel._kernel_options_for_dtype(torch.bfloat16) == {"BACKEND": "FLASH"}


def test_every_hook_of_the_trainer_that_is_overridden_is_listed():
    listed = {name for place, names, _ in PRIVATE_NAMES if place == "transformers:Trainer" for name in names.split()}
    for trainer in (StreamTrainer, SplitTrainer):
        overridden = {name for name in vars(trainer) if not name.startswith("__") and hasattr(Trainer, name)}
        assert overridden and overridden <= listed, f"{overridden - listed}: not listed in compat.PRIVATE_NAMES"
