"""What ends a run early, told in a line each: a mistake of the user, a signal, or the machine under the run."""

import errno
import signal
import sys
import time
from pathlib import Path

from tool_calling.arguments import to_command
from tool_calling.checkpoints import list_checkpoints
from tool_calling.files import is_disk_full
from tool_calling.processes import is_main
from tool_calling.terminal import FlagError, UserError, drop_output, hide_secrets

KNOWN_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
MEMORY = {"MemoryError": "memory", "OutOfMemoryError": "GPU memory"}  # torch's by name: it may not be imported


def explain_failure(error: Exception) -> str | None:
    """Return what ended the run if the machine did, else None."""
    if isinstance(error, BrokenPipeError):
        drop_output()
        return "nobody reads the output any more: the run ends here"
    if isinstance(error, OSError) and is_disk_full(error):
        return f"{error.filename or 'output'}: the disk is full; free some space and run again"
    if isinstance(error, OSError) and error.filename and error.errno in KNOWN_ERRORS:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; run pip install -r requirements.txt"
    if type(error).__name__ in MEMORY:
        advice = "lower --batch_size or --max_seq_length (while answers are generated, --eval_batch_size)"
        return f"out of {MEMORY[type(error).__name__]}; {advice}, or choose a smaller --model_id"
    return None


def report_failure(error: Exception) -> int:
    """Print a line for each problem and return the exit code: 2 for flags, 1 else; raise what is no user's mistake."""
    if isinstance(error, UserError):
        if not is_main():  # the first process has usually found the same, says so, and ends all
            time.sleep(5)
        lines = str(error).splitlines()
    elif explained := explain_failure(error):
        lines = [explained]
    else:
        raise error
    for line in lines:
        print(f"error: {hide_secrets(line)}", file=sys.stderr)
    return 2 if isinstance(error, FlagError) else 1


def report_interrupt(number: int, output_dir: str, argv: list[str], began: float) -> int:
    """Print what ended the run and how to go on; return the exit code.

    Args:
        argv: the words of the command line, the program first; empty if nothing can be resumed.
        began: when the run did, in seconds since 1970.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more finds the process ending anyway
    print("\033[?25h" * sys.stdout.isatty(), end="")  # a progress bar that is cut off leaves the cursor hidden
    text, marker = f"interrupted by {signal.Signals(number).name}", Path(output_dir) / "run.yaml"
    # run.yaml is written when training starts; before that, checkpoints in the folder are of an earlier run.
    started = marker.is_file() and marker.stat().st_mtime >= began
    if argv and started and list_checkpoints(output_dir):
        text += f"; go on with: {to_command(argv, output_dir)}"
    elif argv:
        text += " before a checkpoint was written; start again with the same command"
    if is_main():
        print(text, file=sys.stderr)
    return 128 + number
