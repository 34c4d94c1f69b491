"""Environment variables that libraries read when they are imported."""

import os
import subprocess
import sys
import types

from conftest import ROOT

from tool_calling.environment import refuse_telemetry, return_pages


def test_telemetry_is_off_unless_asked_for(monkeypatch):
    variables = ("UNSLOTH_DISABLE_STATISTICS", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY")
    for name in variables:
        monkeypatch.setenv(name, "kept so that monkeypatch puts it back")
        monkeypatch.delenv(name)
    refuse_telemetry()
    assert [os.environ[name] for name in variables] == ["1", "1", "1"]
    monkeypatch.setenv("UNSLOTH_DISABLE_STATISTICS", "0")
    refuse_telemetry()
    assert "UNSLOTH_DISABLE_STATISTICS" not in os.environ


def test_gpu_memory_is_given_back_by_the_page_where_the_driver_can(monkeypatch):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

    def found(release="6.8.0-generic", board=False, platform="linux", **given) -> str | None:
        for name in names:
            monkeypatch.setenv(name, given.get(name, ""))
            if name not in given:
                monkeypatch.delenv(name)
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(release=release))
        monkeypatch.setattr(os.path, "exists", lambda path: board and path == "/etc/nv_tegra_release")
        return_pages()
        return os.environ.get("PYTORCH_ALLOC_CONF")

    assert found() == "expandable_segments:True"
    assert found(release="5.15.90.1-microsoft-standard-WSL2") is found(board=True) is found(platform="win32") is None
    assert found(PYTORCH_ALLOC_CONF="backend:cudaMallocAsync") == "backend:cudaMallocAsync"
    assert found(PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64") is None


def test_libraries_are_told_before_they_are_imported():
    """They read these variables only once."""
    names = ["PYTORCH_ALLOC_CONF", "UNSLOTH_DISABLE_STATISTICS", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY"]
    code = (
        "import os, sys, train_qwen3_tool_calling as script\n"
        f"found = lambda *_: sys.exit(repr([*map(os.environ.get, {names}), 'torch' in sys.modules]))\n"
        "script.check_folder = found\nscript.main([])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in (*names, "PYTORCH_CUDA_ALLOC_CONF")},
    )
    assert result.stderr.splitlines()[-1] == "['expandable_segments:True', '1', '1', '1', False]"
