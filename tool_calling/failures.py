"""Failures of the machine under a run, told as one line: its disk, its memory, a file, a reader of the output."""

import errno

from tool_calling.files import is_disk_full
from tool_calling.terminal import drop_output

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
    if type(error).__name__ in MEMORY:
        return (
            f"out of {MEMORY[type(error).__name__]}; lower --batch_size or --max_seq_length (while answers are "
            "generated, --eval_batch_size), or choose a smaller --model_id"
        )
    return None
