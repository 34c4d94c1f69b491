"""What is set before libraries are imported."""

import gc
import os
import subprocess
import sys
import types

from conftest import ROOT

from tool_calling.environment import keep_objects, refuse_telemetry, return_pages


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


def test_objects_of_imports_are_left_out_of_garbage_collection_for_good():
    program = """
import gc
from tool_calling.environment import keep_objects
runs = []
gc.callbacks.append(lambda phase, info: runs.append(phase))
with keep_objects():
    kept = [[] for _ in range(10**5)]
print(runs, gc.isenabled(), gc.get_freeze_count() > len(kept), len(gc.get_objects()) < 100)
more = [[] for _ in range(10**5)]
print(bool(runs))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (result.stdout, result.returncode) == ("[] True True True\nTrue\n", 0), result.stderr


def test_what_was_kept_is_collected_while_its_modules_are_still_there(tmp_path):
    (tmp_path / "locks.py").write_text("""
import os
class Lock:
    def __init__(self):
        self.me = self
    def __del__(self):
        print(os.getpid() > 0)
""")
    program = f"""
import sys
from tool_calling.environment import keep_objects
sys.path.insert(0, {str(tmp_path)!r})
with keep_objects():
    import locks
    locks.Lock()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (result.stdout, result.stderr) == ("True\n", "")


def test_garbage_is_collected_again_after_an_import_that_fails():
    try:
        with keep_objects():
            raise ImportError
    except ImportError:
        assert gc.isenabled()
    gc.unfreeze()
