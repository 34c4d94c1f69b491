"""Environment variables that libraries read once, when they are imported."""

import os
import sys


def refuse_telemetry() -> None:
    """Keep the libraries from reporting home: Hugging Face's count their use, Unsloth sends what machine this is.

    They look at these variables when they are imported, so this comes before everything else. A user who wants to be
    counted sets one to 0; it is removed then, because Unsloth asks only whether its variable is there.
    """
    for name in ("UNSLOTH_DISABLE_STATISTICS", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY"):
        if os.environ.setdefault(name, "1") == "0":
            del os.environ[name]


def return_pages() -> None:
    """Let PyTorch give GPU memory back by the page, not only once all that was taken together is free.

    Otherwise 8 MiB that Unsloth keeps for good hold 1.2 GiB, and the process that merges finds as much less. Unsloth
    sets this too, but PyTorch reads it when it is imported, and that is before. Not where the driver has no pages to
    give: on Windows, also under Linux (WSL), and on Jetson boards.
    """
    if sys.platform != "linux" or "microsoft" in os.uname().release.lower() or os.path.exists("/etc/nv_tegra_release"):
        return
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its former name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
