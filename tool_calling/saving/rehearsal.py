"""A rehearsal of serving: a server of the model that was saved is started, asked, compared and stopped."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tool_calling.agreement import compare_served
from tool_calling.data.examples import Example
from tool_calling.report import show_agreement
from tool_calling.samples import choose
from tool_calling.saving.card import PORT
from tool_calling.saving.proof import Questions
from tool_calling.saving.served import Server
from tool_calling.scores import Proof
from tool_calling.terminal import UserError, cut_text, say, warn

FLAG = "--serve_check"
ROWS = 50  # that the server answers
TIES = 2  # of these rows whose verdicts may differ: where two tokens are almost equally likely, rounding decides
STARTING = 900  # seconds: the first start of vLLM compiles
STOPPING = 30
SLOTS = 4  # requests that llama-server answers at once, as by default
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names


def to_words(program: list[str], commands: list[str], questions: Questions) -> list[str]:
    """Return the words that start a program of find_server, by that one of hand_over's commands which is for it.

    Both servers would reserve memory for the longest prompts that the base can read; these are for those asked.
    """
    name = Path(program[-1]).name
    command = next(command for command in commands if command.split()[0] == name)
    longest = max(sample.prompt_length for sample in questions.samples) + questions.max_new_tokens
    length = f"--max-model-len {longest}" if name == "vllm" else f"--parallel {SLOTS} --ctx-size {SLOTS * longest}"
    return [*program, *shlex.split(command.replace(f" {PORT}", ""))[1:], *length.split()]


def rehearse(proof: Proof, questions: Questions, examples: list[Example], command: list[str], log: Path) -> dict | None:
    """Return how a server that `command` starts agrees with the last model of the proof, and print it.

    What goes wrong is a warning: the model is saved and scored.

    Args:
        examples: of both sides, as rendered: samples name theirs by its index.
        log: file for what the server prints.
    """
    asked, name = choose(questions.samples, ROWS), Path(command[0]).name
    answers = dict(zip(map(id, questions.samples), proof.results[proof.last]["answers"]))
    say("rehearse", f"{shlex.join([name, *command[1:]])}; what it prints is in {log}")
    start = time.perf_counter()
    try:
        with run_server(command, log) as url:
            ready = time.perf_counter()
            served = Server.find(url, None, FLAG).answer(replace(questions, samples=asked), examples)
    except UserError as error:
        return warn(str(error))
    here = {"answers": [answers[id(sample)] for sample in asked]}
    agreement = compare_served(Proof.of(asked, {proof.last: here, name: served}))[name]
    show_agreement(name, agreement)
    seconds = (ready - start, time.perf_counter() - ready)
    say("", "started in {:.0f} s, answered in {:.0f} s".format(*seconds))
    if (different := len(asked) - agreement["equal"]["verdicts"]) > TIES:
        found = f"{different} of {len(asked)} verdicts differ, more than rounding explains"
        warn(f"{FLAG}: {name} does not answer as scored: {found}")
    return {"server": name, **agreement}


@contextlib.contextmanager
def run_server(command: list[str], log: Path) -> Iterator[str]:
    """Start a server on a free port of this machine; give its address when it is ready; stop it and all it started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):  # of a group that may outlive its first process
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOPPING)


def wait_until_ready(process: subprocess.Popen, address: str, log: Path) -> None:
    """Return once a server says that it is ready; UserError if it ends before, or never does."""
    limit, name = time.monotonic() + STARTING, Path(process.args[0]).name
    while time.monotonic() < limit:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
            raise UserError(f"{FLAG}: {name} ended before it served anything: {cut_text(last.strip())}; more in {log}")
        with contextlib.suppress(OSError):  # not there yet, or still loading
            DIRECT.open(address, timeout=10).close()
            return
        time.sleep(0.5)
    raise UserError(f"{FLAG}: {name} is not ready after {STARTING} s; see {log}")
