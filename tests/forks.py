"""Runs of scripts as forks of a process that has the libraries, whose import costs more than a small run.

The server of multiprocessing imports the libraries and does nothing else, so that it has one thread and can be forked.
A fork takes over the words, environment and files of a run, and then runs the script to its end as `python WORDS` does.
The fresh process of a run is a fork of the run, made before the script begins.

Some things only a new process shows: what libraries read from the environment when they are imported, whether they are
imported at all, what a signal does meanwhile, and what depends on the order of sets, whose seed all forks share.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from tool_calling import fresh
from tool_calling.processes import STOP_SIGNALS

ROOT = Path(__file__).resolve().parent.parent
# One thread: the same sums in the same order, and no fight for the cores.
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "transformers", "peft", "trl.trainer.sft_trainer", "bitsandbytes"])
ONE_THREAD = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # pyarrow would start one


def fork(function, *arguments: object) -> multiprocessing.Process:
    """Start a fork of the server that computes function(*arguments); the first one starts the server."""
    process = SERVER.Process(target=function, args=arguments)
    with mock.patch.dict(os.environ, ENVIRONMENT | ONE_THREAD):
        process.start()
    atexit.register(end, process)  # if a test that failed has left it
    return process


def end(process: multiprocessing.Process) -> None:
    """End a process at once, if it has not ended."""
    if process.is_alive():
        process.kill()


class Fork:
    """A fork that runs a script, with what tests use of subprocess.Popen."""

    def __init__(self, *words: object, **environment: str):
        """Start `python WORDS` in a session of its own; no library may read `environment` when it is imported."""
        self.args = [*map(str, words)]
        (out, stdout), (err, stderr) = SERVER.Pipe(duplex=False), SERVER.Pipe(duplex=False)
        with out, stdout, err, stderr:
            self.process = fork(run, self.args, ENVIRONMENT | environment, stdout, stderr)
            self.stdout, self.stderr = (open(os.dup(pipe.fileno())) for pipe in (out, err))
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self.process.exitcode

    returncode = property(poll)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, unless it has ended."""
        end(self.process)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return the rest of what it writes; end it if it takes longer, or if the test is interrupted."""
        with ThreadPoolExecutor() as readers, self.stdout, self.stderr:
            texts = [readers.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.process.join(timeout)
                if self.poll() is None:
                    raise subprocess.TimeoutExpired(self.args, timeout)
            finally:
                self.kill()
            return texts[0].result(), texts[1].result()


def run(words: list[str], environment: dict[str, str], stdout: Connection, stderr: Connection) -> None:
    """Be `python WORDS` in this fork."""
    os.setsid()
    with open(os.devnull) as stdin, stdout, stderr:
        for number, file in enumerate((stdin, stdout, stderr)):
            os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv[:] = words
    sys.path.insert(0, os.path.dirname(words[0]))
    try:
        with fork_fresh():
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


@contextlib.contextmanager
def fork_fresh():
    """Fork this process now for what tool_calling.fresh would later start as a new one."""
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context("fork").Process(target=wait_to_serve, args=(theirs, ours))
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # inherited
    process.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, former)
    theirs.close()

    def start_python(connection: Connection) -> SimpleNamespace:
        with ours:
            socket.send_fds(ours, [b"serve"], [connection.fileno()])
        return SimpleNamespace(kill=process.kill, wait=process.join)

    with mock.patch.object(fresh, "start_python", start_python), ours:
        yield


def wait_to_serve(requests: socket.socket, other: socket.socket) -> None:
    """Serve one connection, or none if the run ends without."""
    other.close()
    _, connections, *_ = socket.recv_fds(requests, 5, 1)
    for number in connections:
        fresh.serve(Connection(number))


def start_fresh(connection: Connection) -> SimpleNamespace:
    """Do what start_python of tool_calling.fresh does, for a run in the process of pytest."""
    process = fork(fresh.serve, connection)
    return SimpleNamespace(kill=process.kill, wait=process.join)
