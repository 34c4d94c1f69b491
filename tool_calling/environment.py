"""Environment variables that libraries read once, when they are imported."""

import os
import sys


def refuse_telemetry() -> None:
    """Keep Hugging Face's libraries from counting their use, and Unsloth from sending what machine this is.

    To be counted, a user sets a variable to 0; it is then removed, because Unsloth only asks whether it exists.
    """
    for name in ("UNSLOTH_DISABLE_STATISTICS", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY"):
        if os.environ.setdefault(name, "1") == "0":
            del os.environ[name]


def return_pages() -> None:
    """Let PyTorch return GPU memory by the page, not only when a whole segment is free.

    Otherwise the 8 MiB that Unsloth keeps hold 1.2 GiB, which the process that merges then lacks. Unsloth sets this
    too, but after torch is imported. Drivers on Windows, WSL and Jetson boards cannot do it.
    """
    if sys.platform != "linux" or "microsoft" in os.uname().release.lower() or os.path.exists("/etc/nv_tegra_release"):
        return
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its former name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
