"""The processes of a run: which one speaks, how signals end them, how they leave."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from multiprocessing import resource_tracker
from typing import NoReturn

PATIENCE = 3600  # seconds that processes wait for each other, as for the one that writes a large checkpoint


class Interrupted(BaseException):
    """The user wants the run to end: no library that catches every Exception may swallow it. args[0] is the signal."""


def is_main() -> bool:
    """Say whether this process speaks and writes: of those that torchrun starts, one for each GPU, only the first."""
    return os.environ.get("RANK", "0") == "0"


def count_devices() -> int:
    """Return how many processes share the rows of a step: as many as torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_launcher() -> list[str]:
    """Return the words that started this process, as a command line shows them."""
    devices, here = count_devices(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = ["--nnodes", str(devices // here)] if devices > here else []
    return ["torchrun", *nodes, "--nproc_per_node", str(here)] if devices > 1 else ["python"]


LAUNCHER = find_launcher()  # now, because leave_group forgets it


def raise_interrupted(number: int, frame) -> None:
    """End whatever is going on, as the handler of a signal; but an import or a __del__ only when it is done.

    An import that is cut off leaves half a library behind: the next error hides what happened, or the process aborts.
    Of a __del__ Python would swallow the exception.
    """
    while frame and frame.f_code.co_name != "run_command_line":
        if frame.f_code.co_filename.startswith("<frozen importlib") or frame.f_code.co_name == "__del__":
            later = threading.Timer(0.01, os.kill, (os.getpid(), number))
            later.daemon = True
            return later.start()
        frame = frame.f_back
    raise Interrupted(number)


@contextlib.contextmanager
def handle_signals(handler, numbers: tuple = (signal.SIGINT, signal.SIGTERM)):
    """Let `handler(number, frame)` answer Ctrl-C and SIGTERM (or these) for a while; then the former handlers do again.

    Signals reach the main thread alone, so for a caller in another one nothing changes.
    """
    numbers = numbers if threading.current_thread() is threading.main_thread() else ()
    former = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in former.items():
            signal.signal(number, old)


@contextlib.contextmanager
def block_signals():
    """Block SIGINT and SIGTERM for what is started meanwhile: a Ctrl-C is for this process alone. Not on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # or it is started with the process, and unblocks them
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def leave(code: int) -> NoReturn:
    """End this process; of several that torchrun started, those beside the first one late, and none with a tear-down.

    Late, because the first may not have read yet what they sent last. Without tearing Python down, because a thread of
    Gloo that then lets go of a tensor aborts its process (PyTorch issue 190489), and torchrun would end the others.
    """
    if len(LAUNCHER) == 1:
        sys.exit(code)
    if not is_main():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(2)
    atexit._run_exitfuncs()  # as multiprocessing ends its processes
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
