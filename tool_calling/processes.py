"""The processes of a run: which one speaks, how signals stop them, how they exit."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from typing import NoReturn

PATIENCE = 3600  # seconds that processes wait for each other, e.g. while one writes a large checkpoint
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# By which the libraries of a process find those that share its work.
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Interrupted(BaseException):
    """The user stops the run; args[0] is the signal. Not an Exception, so that no library swallows it."""


def is_main() -> bool:
    """Say whether this process speaks and writes: torchrun starts one per GPU, and only the first does."""
    return os.environ.get("RANK", "0") == "0"


def count_devices() -> int:
    """Return how many processes torchrun or accelerate started; they share the rows of each step."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_launcher() -> list[str]:
    """Return the words of the command line that started this process, up to the script's name."""
    devices, here = count_devices(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = ["--nnodes", str(devices // here)] if devices > here else []
    return ["torchrun", *nodes, "--nproc_per_node", str(here)] if devices > 1 else ["python"]


LAUNCHER = find_launcher()  # now, because leave_group deletes the variables


def raise_interrupted(number: int, frame) -> None:
    """Raise Interrupted for a signal, but first let an import or a __del__ finish.

    Half an import fails later with an error of its own, and what a __del__ raises is lost.
    """
    for caller, _ in traceback.walk_stack(frame):
        code = caller.f_code
        if code.co_name == "run_command_line":  # the script may itself be imported
            break
        if code.co_filename.startswith("<frozen importlib") or code.co_name == "__del__":
            return threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
    raise Interrupted(number)


def unwrap_interrupt(error: BaseException | None) -> None:
    """Raise the Interrupted that a library turned into this error, if there is one."""
    while error is not None:
        if isinstance(error, Interrupted):
            raise error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def handle_signals(handler, numbers: tuple = STOP_SIGNALS):
    """Let `handler(number, frame)` handle these signals inside the block; only the main thread can do so."""
    numbers = numbers if threading.current_thread() is threading.main_thread() else ()
    former = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in former.items():
            signal.signal(number, old)


@contextlib.contextmanager
def hold_signals():
    """Hold Ctrl-C and SIGTERM back inside the block and raise them after it, also if it fails."""
    held: list[int] = []
    try:
        with handle_signals(lambda number, frame: held.append(number)):
            yield
    finally:
        for number in held:
            signal.raise_signal(number)


def leave(code: int) -> NoReturn:
    """Exit; under torchrun without Python's teardown, in which Gloo may abort (PyTorch issue 190489)."""
    if len(LAUNCHER) == 1:
        sys.exit(code)
    if not is_main():  # the first may still be reading what this one has sent
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(2)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
