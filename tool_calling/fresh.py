"""Compute a function in a new Python process."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from tool_calling.processes import STOP_SIGNALS, hold_signals
from tool_calling.terminal import UserError

ROOT = str(Path(__file__).resolve().parent.parent)


def run_fresh(function, *arguments):
    """Return function(*arguments), or raise its error, computed in a new Python process that ends with this one."""
    ours, theirs = Pipe()
    with contextlib.ExitStack() as stack:
        with hold_signals():  # until the process is sure to be killed
            process = start_python(theirs)
            stack.callback(process.wait)
            stack.callback(process.kill)
        theirs.close()
        try:
            ours.send_bytes(pickle.dumps((function, arguments)))
            result = pickle.loads(ours.recv_bytes())
        except (EOFError, ConnectionError):
            raise UserError("the process that merges was killed; it needs memory for the whole 16-bit model") from None
        process.wait()
    if isinstance(result, Exception):
        raise result
    return result


def start_python(connection: Connection) -> subprocess.Popen:
    """Run this module in a new process that inherits the connection, with Ctrl-C and SIGTERM blocked."""
    number = connection.fileno()
    path = [ROOT, os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [ROOT]
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # inherited
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "tool_calling.fresh", str(number)],  # -P: import nothing from the cwd
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.DEVNULL,
            pass_fds=[number],
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def serve(connection: Connection) -> None:
    """Receive a function with its arguments; send back its result, or the error that it raises."""

    def follow_parent():
        connection.poll(None)  # until the other end is closed, at the latest when its process dies
        os._exit(1)

    job = connection.recv_bytes()
    threading.Thread(target=follow_parent, daemon=True).start()
    try:
        function, arguments = pickle.loads(job)
        answer = pickle.dumps(function(*arguments))
    except Exception as error:  # those of libraries often cannot be pickled
        plain = isinstance(error, UserError) or type(error).__module__ in ("builtins", "torch")
        answer = pickle.dumps(error if plain else RuntimeError(f"{type(error).__name__}: {error}"))
    connection.send_bytes(answer)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
