"""Runs of scripts as forks of a process that has the libraries, whose import costs more than a small run.

The server of multiprocessing imports the libraries and does nothing else, so that it has one thread and can be forked.
A fork takes over the words, environment and files of a run, and then runs the script to its end as `python WORDS` does.
What a run starts later, a process that proves its model or the workers of torchrun, are forks of the run, made before
it begins.

Some things only a new process shows: what libraries read from the environment when they are imported, whether they are
imported at all, what a signal does meanwhile, and what depends on the order of sets, whose seed all forks share.
"""

import atexit
import gc
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import TextIO
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
# One thread: the same sums in the same order, and no fight for the cores.
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "transformers", "peft", "trl.trainer.sft_trainer", "bitsandbytes"])
ONE_THREAD = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # pyarrow would start one


# ----------------------------------------------------------------------------------------------------------------------
# In the process of pytest
# ----------------------------------------------------------------------------------------------------------------------
class Child:
    """A process of multiprocessing, with what is used of subprocess.Popen."""

    def __init__(self, process: multiprocessing.Process):
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code when it ends."""
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def fork(function, *arguments: object) -> Child:
    """Start a fork of the server that computes function(*arguments); the first one starts the server."""
    process = SERVER.Process(target=function, args=arguments)
    with mock.patch.dict(os.environ, ENVIRONMENT | ONE_THREAD):
        process.start()
    child = Child(process)
    atexit.register(child.kill)  # if a test that failed has left it
    return child


class Fork(Child):
    """A fork that runs a script and writes to pipes."""

    def __init__(self, *words: object, **environment: str):
        """Start `python WORDS` in a session of its own; no library may read `environment` when it is imported."""
        self.args = [*map(str, words)]
        (out, stdout), (err, stderr) = SERVER.Pipe(duplex=False), SERVER.Pipe(duplex=False)
        with out, stdout, err, stderr:
            child = fork(run, self.args, ENVIRONMENT | environment, stdout, stderr)
            self.stdout, self.stderr = (open(os.dup(pipe.fileno())) for pipe in (out, err))
        super().__init__(child.process)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return the rest of what it writes; end it if it takes longer, or if the test is interrupted."""
        texts = ["", ""]

        def read(number: int, stream: TextIO) -> None:
            with stream:
                texts[number] = stream.read()

        readers = [Thread(target=read, args=pair, daemon=True) for pair in enumerate((self.stdout, self.stderr))]
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        finally:
            self.kill()
        for reader in readers:
            reader.join()
        return texts[0], texts[1]


def start_fresh(connection: Connection, *modules: str) -> Child:
    """Do what start_python of tool_calling.fresh does, for a run in the process of pytest."""
    return fork(serve_fresh, connection)


def serve_fresh(connection: Connection) -> None:
    """Do what `python -m tool_calling.fresh` does."""
    from tool_calling.fresh import serve

    serve(connection)


# ----------------------------------------------------------------------------------------------------------------------
# In a fork
# ----------------------------------------------------------------------------------------------------------------------
def run(words: list[str], environment: dict[str, str], *outputs: Connection) -> None:
    """Be `python WORDS`, with the outputs, if any, as stdout and stderr."""
    gc.freeze()  # as in conftest.py
    os.setsid()
    with open(os.devnull) as stdin:
        for number, file in enumerate((stdin, *outputs)):
            os.dup2(file.fileno(), number)
    for output in outputs:
        output.close()
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    try:
        if words[0] == "-m":
            run_module(*words[1:])
        else:
            run_file(*words)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def run_file(*words: str) -> None:
    """Run a script, with a fork for its fresh process."""
    sys.argv[:] = words
    sys.path.insert(0, os.path.dirname(words[0]))
    from tool_calling import fresh, processes

    former = signal.pthread_sigmask(signal.SIG_BLOCK, processes.STOP_SIGNALS)  # inherited
    waiting = Waiting(lambda connection: serve_fresh(Connection(connection)))
    signal.pthread_sigmask(signal.SIG_SETMASK, former)
    with mock.patch.object(
        fresh, "start_python", lambda connection, *modules: waiting.start(files=[connection.fileno()])
    ):
        runpy.run_path(words[0], run_name="__main__")


def run_module(name: str, *words: str) -> None:
    """Run torchrun, with forks for two workers."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    sys.argv[:] = [name, *words]
    waiting = [Waiting(run), Waiting(run)]

    def start_worker(handler, command: tuple[str, ...], environment: dict[str, str]) -> Child:
        return waiting.pop().start([*command[2:]], environment)  # python -u WORDS

    with mock.patch.object(SubprocessHandler, "_popen", start_worker):
        runpy.run_module(name, run_name="__main__", alter_sys=True)


class Waiting:
    """A fork of this process that waits for the arguments of its function."""

    def __init__(self, function):
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # whole messages
        process = multiprocessing.get_context("fork").Process(target=self.compute, args=(function, theirs))
        process.start()
        theirs.close()
        self.child = Child(process)
        atexit.register(self.ours.close)  # before multiprocessing waits for its end

    def compute(self, function, requests: socket.socket) -> None:
        """Receive the arguments and compute the function, or end when none can come any more."""
        self.ours.close()
        message, files, *_ = socket.recv_fds(requests, 2**20, 1)
        if message:
            function(*pickle.loads(message), *files)

    def start(self, *arguments: object, files=()) -> Child:
        """Let the function be computed with these arguments, and with the numbers of its own copies of the files."""
        socket.send_fds(self.ours, [pickle.dumps(arguments)], files)
        return self.child
