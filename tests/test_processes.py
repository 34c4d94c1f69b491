"""Processes: which one speaks, how it was started, how signals stop it, how it exits."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from tool_calling.processes import (
    STOP_SIGNALS,
    Interrupted,
    count_devices,
    find_launcher,
    handle_signals,
    hold_signals,
    is_main,
    raise_interrupted,
    unwrap_interrupt,
)


def test_a_process_alone_is_the_main_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (is_main(), count_devices(), find_launcher()) == (True, 1, ["python"])


@pytest.mark.parametrize("rank, main", [("0", True), ("1", False), ("10", False)])
def test_of_several_processes_the_first_is_the_main_one(monkeypatch, rank, main):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert (is_main(), count_devices()) == (main, 16)


def test_a_signal_waits_for_the_end_of_an_import(tmp_path, monkeypatch):
    """Half a library would make the next error one of its own, or abort the process."""
    text = "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.3)\nwhole = True\n"
    (tmp_path / "slow_library.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Interrupted), handle_signals(raise_interrupted):
        import slow_library

        time.sleep(10)
    assert slow_library.whole and sys.modules.pop("slow_library")


@pytest.mark.parametrize("devices, rank, torn", [(1, 0, "torn down\n"), (2, 0, ""), (2, 1, "")])
def test_of_several_processes_none_tears_python_down(devices, rank, torn):
    """A thread of Gloo may abort a process that does, and torchrun would end the one that merges."""
    code = """
import atexit, tool_calling.processes as processes
class Held:
    __del__ = lambda self: print("torn down")
held = Held()
atexit.register(print, "tidied")
processes.leave(3)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "WORLD_SIZE": str(devices), "RANK": str(rank)},
    )
    assert (result.returncode, result.stdout, result.stderr) == (3, "tidied\n" + torn, "")


@pytest.mark.parametrize(
    "devices, here, words",
    [(1, 1, "python"), (4, 4, "torchrun --nproc_per_node 4"), (16, 8, "torchrun --nnodes 2 --nproc_per_node 8")],
)
def test_the_command_to_go_on_is_started_as_this_one_was(monkeypatch, devices, here, words):
    monkeypatch.setenv("WORLD_SIZE", str(devices))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    assert " ".join(find_launcher()) == words


def test_signals_are_handled_inside_the_block_alone():
    found, former = [], [*map(signal.getsignal, STOP_SIGNALS)]  # a shell's job in the background ignores Ctrl-C
    with handle_signals(lambda number, frame: found.append(number)):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with handle_signals(lambda number, frame: found.append("inner"), (signal.SIGTERM,)):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert found == [signal.SIGTERM, signal.SIGINT, "inner", signal.SIGINT, signal.SIGTERM]
    assert [*map(signal.getsignal, STOP_SIGNALS)] == former


def test_another_thread_leaves_the_handlers_alone():
    inside, former = [], signal.getsignal(signal.SIGINT)

    def look():
        with handle_signals(print), hold_signals():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert inside == [former]


def test_held_signals_are_raised_after_the_block():
    found = []
    with handle_signals(lambda number, frame: found.append(number)):
        with hold_signals():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
            found.append("end")
    assert found == ["end", signal.SIGTERM, signal.SIGINT, signal.SIGTERM]


def test_held_signals_are_raised_also_if_the_block_fails():
    with pytest.raises(Interrupted) as stopped, handle_signals(raise_interrupted):
        with hold_signals():
            signal.raise_signal(signal.SIGINT)
            raise OSError("no room")
    assert stopped.value.args == (signal.SIGINT,) and str(stopped.value.__context__) == "no room"


def test_a_signal_waits_for_the_end_of_a_del(capsys):
    class Slow:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.1)
            print("whole")

    held = Slow()
    with pytest.raises(Interrupted) as stopped, handle_signals(raise_interrupted):
        del held
        time.sleep(10)
    assert stopped.value.args == (signal.SIGTERM,) and capsys.readouterr() == ("whole\n", "")


def test_an_interrupt_that_a_library_wraps_is_raised_again():
    stop, error = Interrupted(signal.SIGTERM), None
    try:
        try:
            raise stop
        except Interrupted as caught:
            raise OSError("a library's") from caught
    except OSError:
        try:
            raise ValueError("another library's")
        except ValueError as caught:
            error = caught
    with pytest.raises(Interrupted) as found:
        unwrap_interrupt(error)
    assert found.value is stop
    unwrap_interrupt(ValueError("of its own"))
    unwrap_interrupt(None)
