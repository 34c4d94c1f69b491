"""What has to be set before libraries are imported: variables that they read once, and Python's garbage collection."""

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Iterator


def refuse_telemetry() -> None:
    """Keep Hugging Face's libraries and Unsloth from reporting their use and this machine, unless a user sets 0."""
    for name in ("UNSLOTH_DISABLE_STATISTICS", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY"):
        if os.environ.setdefault(name, "1") == "0":
            del os.environ[name]  # Unsloth only asks whether it exists


def return_pages() -> None:
    """Let PyTorch return GPU memory by the page, not only when a whole segment is free.

    Otherwise the 8 MiB that Unsloth keeps hold 1.2 GiB, which the merge lacks; Unsloth itself sets this too late, after
    the import of torch. Drivers on Windows, WSL and Jetson boards cannot do it.
    """
    if sys.platform != "linux" or "microsoft" in os.uname().release.lower() or os.path.exists("/etc/nv_tegra_release"):
        return
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its former name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@contextlib.contextmanager
def keep_objects() -> Iterator[None]:
    """Collect no garbage in this block, and never look again at the objects that exist after it.

    Imports make a million objects that stay. To look through them again and again takes a third of the imports' time,
    and half a second whenever GPU memory is given back, as Unsloth does a dozen times while it loads a model.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # what goes last would miss the modules that it needs
