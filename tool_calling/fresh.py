"""A function computed in a fresh Python process."""

import multiprocessing
import os
import sys
import threading

from tool_calling.processes import Interrupted, block_signals, handle_signals
from tool_calling.terminal import UserError


def send_result(sender, function, arguments: tuple) -> None:
    """Send function(*arguments), or the error that it ends with, to the process that waits for it."""

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    if hasattr(os, "fork"):  # locks that libraries make here then have no name that a killed process leaves behind
        multiprocessing.set_start_method("fork", force=True)
    try:
        result = function(*arguments)
    except Exception as error:
        # Errors of libraries often cannot be sent as they are.
        plain = isinstance(error, UserError) or type(error).__module__ in ("builtins", "torch")
        result = error if plain else RuntimeError(f"{type(error).__name__}: {error}")
    sender.send(result)


def run_fresh(function, *arguments):
    """Return function(*arguments), computed in a new Python process that ends when this one is stopped or dies."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(sender, function, arguments))
    # A new process begins by importing the main module: a program that calls main() would call it there again.
    caller, sys.modules["__main__"] = sys.modules["__main__"], sys.modules[__name__]
    noted: list[int] = []
    try:
        with handle_signals(lambda number, frame: noted.append(number)):
            with block_signals():
                process.start()
    finally:
        sys.modules["__main__"] = caller
    sender.close()
    try:
        if noted:
            raise Interrupted(noted[0])
        result = receiver.recv()
        process.join()
    except EOFError:
        raise UserError("the process that merges was killed; it needs memory for the whole 16-bit model") from None
    finally:
        process.kill()
        process.join()
    if isinstance(result, Exception):
        raise result
    return result
