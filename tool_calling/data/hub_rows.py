"""Rows of Hugging Face datasets."""

import sys
from pathlib import Path

import datasets
import huggingface_hub

from tool_calling.terminal import UserError


def drop_null_columns(value: object, feature: object) -> object:
    """Return a value of a table without the keys whose value is null; one that JSON cannot hold is a ValueError.

    A table has the same columns in every row: the arguments of one tool appear as nulls in the calls of all others, and
    would be trained as arguments. Only columns are treated so. An object whose keys were all null stays as {}, because
    empty arguments look the same; a null in a list, or in a column that keeps JSON text, was in the data and stays.
    """
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: drop_null_columns(inner, feature[key]) for key, inner in value.items() if inner is not None}
    if isinstance(value, list) and hasattr(feature, "feature"):
        return [drop_null_columns(inner, feature.feature) for inner in value]
    if not isinstance(value, str | int | float | list | dict | None):
        raise ValueError(
            f"holds the {type(value).__name__} {str(value)[:40]}; expected text or another JSON value "
            "(a table may have made dates of texts: name the dataset's own file instead)"
        )
    return value


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
    table = splits[split]
    for index, row in enumerate(table):
        # No format reads a whole column of images or dates; such a value inside an object is a problem.
        columns = {key: value for key, value in row.items() if isinstance(value, str | int | float | list | dict)}
        try:
            row = drop_null_columns(columns, table.features)
        except ValueError as error:
            row = error
        yield f"{whole}:{split}[{index}]", row
