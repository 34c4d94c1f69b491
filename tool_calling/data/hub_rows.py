"""Rows of Hugging Face datasets."""

import sys
from pathlib import Path

import datasets
import huggingface_hub

from tool_calling.data.tables import BATCH_ROWS, to_rows
from tool_calling.terminal import UserError


def load_hub(name: str, config: str | None):
    """Return {split: table} of a dataset on the Hub or in the local cache; UserError says why it cannot be loaded."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said below, in one line
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
    if (Path(datasets.__file__).parent / "packaged_modules" / name).is_dir():  # "json" would read the working folder
        raise UserError(f"{name}: cannot be read: No such file or directory")
    try:
        return datasets.load_dataset(name, config)
    except ConnectionError:
        advice = "unset HF_HUB_OFFLINE" if datasets.config.HF_HUB_OFFLINE else "check the connection"
        reason = f"is no file or folder, not in the local cache, and the Hub cannot be reached; {advice}"
    except datasets.exceptions.DatasetNotFoundError as error:
        reason = "is no file or folder, and no public dataset on the Hub; check the name, or log in with: hf auth login"
        if "gated" in str(error):
            reason = f"is gated; accept its terms at https://huggingface.co/datasets/{name}, log in with: hf auth login"
    except Exception as error:  # whatever else can be wrong with a dataset: its own message says it best
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        reason = f"cannot be read as a table: {cause}; expected {name}, {name}:SPLIT or {name}:CONFIG:SPLIT"
    raise UserError(f"{name}: {reason}")


def read_hub(name: str, config: str | None, split: str | None):
    """Yield (name:split[index], row) of a dataset on the Hub or in the local cache, without null-filled keys."""
    splits, whole, split = load_hub(name, config), f"{name}:{config}" if config else name, split or "train"
    if split not in splits:
        expected = " or ".join(f"{whole}:{found}" for found in splits)
        raise UserError(f'{whole}: has no split "{split}"; expected {expected}')
    parts = splits[split].with_format("arrow").iter(BATCH_ROWS)
    yield from to_rows((batch for part in parts for batch in part.to_batches()), f"{whole}:{split}")
