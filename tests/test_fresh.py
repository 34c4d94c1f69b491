"""A function in a fresh process: what comes back, and how each of the two processes ends."""

import importlib
import operator
import os
import pickle
import runpy
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import ROOT

from tool_calling.fresh import start_fresh
from tool_calling.processes import Interrupted, handle_signals, raise_interrupted
from tool_calling.terminal import UserError, report_problems

KILLED = "^the process that merges was killed; it needs memory for the whole 16-bit model$"


def run_fresh(function, *arguments):
    """Return function(*arguments), computed in a new process."""
    with start_fresh() as compute:
        return compute(function, *arguments)


def run_python(*words: object, **settings) -> str:
    """Return what a Python process prints that finds the package on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **settings)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_the_result_comes_from_another_process():
    assert run_fresh(divmod, 17, 5) == (3, 2)
    assert run_fresh(operator.getitem, {"key": [1.5, None]}, "key") == [1.5, None]
    assert run_fresh(bytes, 10_000_000) == bytes(10_000_000)  # more than a pipe holds
    assert run_fresh(len, bytes(10_000_000)) == 10_000_000
    assert run_fresh(os.getpid) != os.getpid()
    assert run_fresh(os.getppid) == os.getpid()


@pytest.mark.parametrize(
    "function, arguments, kind, text",
    [
        (int, ["x"], ValueError, "invalid literal for int() with base 10: 'x'"),
        (importlib.import_module, ["no_such_module"], ModuleNotFoundError, "No module named 'no_such_module'"),
        (report_problems, [[("a:1", "no")], "error", 3, "tool"], UserError, "a:1: no\n1 problem in 1 of 3 tools"),
        (pickle.loads, [b""], EOFError, "Ran out of input"),
        (pickle.loads, [b"?"], RuntimeError, "UnpicklingError: invalid load key, '?'."),
        (threading.Lock, [], TypeError, "cannot pickle '_thread.lock' object"),
    ],
)
def test_errors_are_raised_here(function, arguments, kind, text):
    with pytest.raises(kind) as error:
        run_fresh(function, *arguments)
    assert type(error.value) is kind and str(error.value) == text


def test_an_error_of_torch_keeps_its_kind(tmp_path, monkeypatch):
    import torch

    (tmp_path / "full.py").write_text("import torch\n\ndef fail():\n    raise torch.OutOfMemoryError('no room')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(torch.OutOfMemoryError, match="^no room$"):
        run_fresh(importlib.import_module("full").fail)


def test_a_killed_process_is_a_user_error():
    with pytest.raises(UserError, match=KILLED):
        run_fresh(signal.raise_signal, signal.SIGKILL)
    with pytest.raises(UserError, match=KILLED):
        run_fresh(os._exit, 0)


def test_a_process_that_dies_before_it_has_read_is_a_user_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=KILLED):
        run_fresh(len, bytes(10_000_000))


def test_a_program_without_a_main_guard_runs_once_in_any_folder(tmp_path):
    for folder in ("programs", "here"):
        (tmp_path / folder).mkdir()
    (tmp_path / "here" / "pickle.py").write_text("raise SystemExit('a file of the user, not the library')")
    program = tmp_path / "programs" / "program.py"
    program.write_text(
        "from tool_calling.fresh import start_fresh\n"
        "print('before', flush=True)\n"
        "with start_fresh() as compute:\n"
        "    compute(print, 'inside')\n"
        "with start_fresh() as compute:\n"
        "    print(compute(sum, [1, 2]))\n"
    )
    assert run_python(program, cwd=tmp_path / "here") == "before\ninside\n3\n"


def test_modules_are_imported_before_the_function_comes(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w').close()\n\ndef one():\n    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with start_fresh("no_such_module", "slow") as compute:
        while not (tmp_path / "imported").exists():
            time.sleep(0.05)
        assert compute(importlib.import_module("slow").one) == 1


def test_a_process_without_a_function_ends_with_the_block(capfd):
    before = {*psutil.Process().children()}
    with start_fresh():
        [process] = {*psutil.Process().children()} - before
    assert not process.is_running()
    parent = "import os\nfrom tool_calling.fresh import start_fresh\nwith start_fresh():\n    os._exit(3)\n"
    result = subprocess.run([sys.executable, "-c", parent], cwd=ROOT)
    assert result.returncode == 3 and capfd.readouterr() == ("", "")


def test_it_shares_no_work_of_several_processes(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_fresh(os.getenv, "RANK") is None and run_fresh(os.getenv, "WORLD_SIZE") is None


def test_nothing_is_read_from_the_terminal():
    with pytest.raises(EOFError):
        run_fresh(input)


def test_signals_are_for_the_parent_alone():
    assert run_fresh(signal.pthread_sigmask, signal.SIG_BLOCK, []) == {signal.SIGINT, signal.SIGTERM}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_ctrl_c_reaches_the_parent_alone(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, subprocess, threading\n"
        "from tool_calling.fresh import start_fresh\n"
        "signal.signal(signal.SIGINT, lambda number, frame: print('parent', flush=True))\n"
        "threading.Timer(1, os.killpg, [0, signal.SIGINT]).start()\n"
        "with start_fresh() as compute:\n"
        "    print(compute(subprocess.call, ['sleep', '2']))\n"
    )
    assert run_python(program, start_new_session=True) == "parent\n0\n"


def test_a_signal_kills_the_process_at_once():
    threading.Timer(1, os.kill, [os.getpid(), signal.SIGTERM]).start()
    began = time.monotonic()
    with pytest.raises(Interrupted), handle_signals(raise_interrupted):
        run_fresh(time.sleep, 60)
    assert 0.9 < time.monotonic() - began < 20
    assert [child for child in psutil.Process().children() if "tool_calling.fresh" in child.cmdline()] == []


def test_after_a_signal_the_process_writes_nothing_more(tmp_path):
    """What it has written is removed next, by whoever waits for it, while the block goes on."""
    file = tmp_path / "file"
    (tmp_path / "write.py").write_text(f"while True:\n    open({str(file)!r}, 'a').write('more')\n")
    with handle_signals(raise_interrupted), start_fresh() as compute:
        threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Interrupted):
            compute(runpy.run_path, str(tmp_path / "write.py"))
        size = file.stat().st_size
        time.sleep(0.3)
        assert file.stat().st_size == size > 0


def test_a_signal_during_the_start_is_not_lost(monkeypatch):
    started, start = [], subprocess.Popen

    def start_and_signal(*arguments, **settings):
        signal.raise_signal(signal.SIGTERM)
        started.append(start(*arguments, **settings))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start_and_signal)
    with pytest.raises(Interrupted) as stopped, handle_signals(raise_interrupted):
        run_fresh(time.sleep, 60)
    assert stopped.value.args == (signal.SIGTERM,) and started[0].returncode == -signal.SIGKILL


def test_the_process_that_merges_ends_with_the_one_that_waits_for_it(tmp_path):
    """Also if that is killed and can tell nobody: it would hold the GPU's memory."""
    words = ["sh", "-c", f"touch {tmp_path}/runs; exec sleep 30"]
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"""if __name__ == "__main__":
        import subprocess, tool_calling.fresh
        with tool_calling.fresh.start_fresh() as compute:
            compute(subprocess.call, {words})""",
        ],
        cwd=ROOT,
    )
    while not (tmp_path / "runs").exists():
        assert parent.poll() is None
        time.sleep(0.05)
    merging = [child for child in psutil.Process(parent.pid).children() if "tool_calling.fresh" in child.cmdline()]
    assert len(merging) == 1
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(merging, timeout=20)[1] == []
