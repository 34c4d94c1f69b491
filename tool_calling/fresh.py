"""A function computed in a new Python process."""

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from tool_calling.environment import keep_objects
from tool_calling.processes import GROUP, STOP_SIGNALS, hold_signals
from tool_calling.terminal import UserError

ROOT = str(Path(__file__).resolve().parent.parent)


@contextlib.contextmanager
def start_fresh(*modules: str) -> Iterator[Callable]:
    """Give a function that computes function(*arguments) in a new Python process, which ends with the block.

    Args:
        modules: imported there from now on, while this process does something else.
    """
    ours, theirs = Pipe()
    with contextlib.ExitStack() as stack:
        with hold_signals():  # until the process is sure to be killed
            process = start_python(theirs, *modules)
            stack.callback(process.wait)
            stack.callback(process.kill)
        theirs.close()

        def compute(function, *arguments):
            try:
                ours.send_bytes(pickle.dumps((function, arguments)))
                result = pickle.loads(ours.recv_bytes())
                process.wait()
            except (EOFError, ConnectionError):
                advice = "it needs memory for the whole 16-bit model"
                raise UserError(f"the process that merges was killed; {advice}") from None
            finally:
                stack.close()  # after a signal it writes nothing more that somebody has just removed
            if isinstance(result, Exception):
                raise result
            return result

        yield compute


def start_python(connection: Connection, *modules: str) -> subprocess.Popen:
    """Run this module in a new process that inherits the connection, with Ctrl-C and SIGTERM blocked.

    It is none of those that share the work of a run: its libraries would wait for the others.
    """
    number = connection.fileno()
    path = [ROOT, os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [ROOT]
    inherited = {name: value for name, value in os.environ.items() if name not in GROUP}
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # inherited
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "tool_calling.fresh", str(number), *modules],  # -P: nothing from the cwd
            env=inherited | {"PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.DEVNULL,
            pass_fds=[number],
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def serve(connection: Connection, *modules: str) -> None:
    """Import modules, receive a function with its arguments; send back its result, or the error that it raises."""

    def follow_parent():
        connection.poll(None)  # until the other end is closed, at the latest when its process dies
        os._exit(1)

    with keep_objects():
        for module in modules:
            with contextlib.suppress(Exception):  # the job, which needs the module too, will tell
                importlib.import_module(module)
    try:
        job = connection.recv_bytes()
    except EOFError:  # there is none: the run ended before
        return
    threading.Thread(target=follow_parent, daemon=True).start()
    try:
        function, arguments = pickle.loads(job)
        answer = pickle.dumps(function(*arguments))
    except Exception as error:  # those of libraries often cannot be pickled
        plain = isinstance(error, UserError) or type(error).__module__ in ("builtins", "torch")
        answer = pickle.dumps(error if plain else RuntimeError(f"{type(error).__name__}: {error}"))
    connection.send_bytes(answer)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), *sys.argv[2:])
