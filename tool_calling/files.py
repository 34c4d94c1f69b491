"""Files and folders that are whole or absent, their locks and digests."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from tool_calling.processes import hold_signals, is_main
from tool_calling.terminal import UserError

try:
    import fcntl
except ImportError:  # Windows, where runs do without locks
    fcntl = None

MANIFEST = "manifest.json"  # in each checkpoint: size and SHA-256 of its files
LOCK = ".lock"  # held while a run lasts; in --output_dir, and for --final_model_dir in the temporary folder


def partial_folder(final: str | Path) -> Path:
    """Return the hidden path at which a folder or file is written before it gets its final name."""
    return Path(final).with_name(f".{Path(final).name}.partial")


def move_aside(folder: Path) -> Path:
    """Rename a folder, if it exists, to the hidden path that is returned, so that half a removal is never seen."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    return old


def put_in_place(final: str | Path, written: Path | None = None) -> None:
    """Give a finished folder (by default the partial one) its final name, and remove what had that name before."""
    written = written or partial_folder(final)
    umask = os.umask(0)
    os.umask(umask)
    for file in written.glob("*.safetensors"):  # readable by the owner alone until now
        file.chmod(0o666 & ~umask)
    with hold_signals():  # between the two renames there is no such folder
        old = move_aside(Path(final))
        written.rename(final)
        shutil.rmtree(old, ignore_errors=True)


def write_file(path: str | Path, text: str) -> None:
    """Write a text file at its partial path, then rename it: nobody ever sees half of it."""
    # Unpaired surrogates, which JSON rows and file names may hold, are written as escapes.
    partial_folder(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    partial_folder(path).replace(path)


def is_disk_full(error: BaseException) -> bool:
    """Say whether an error means a full disk or an exhausted quota, also as torch and safetensors word it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # torch gives no reason: its archive writer only says that a write failed, or that it is not where it should be.
    return any(text in str(error) for text in ("No space left", "PytorchStreamWriter failed", "unexpected pos"))


@contextlib.contextmanager
def discard_partial(final: str | Path):
    """Yield the partial folder of `final`, which the main process removes afterwards; a full disk is a UserError."""
    folder = partial_folder(final)
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    except Exception as error:
        if not is_disk_full(error):
            raise
        advice = "free some space, then go on from the last checkpoint with --resume_from_checkpoint"
        raise UserError(f"{final}: the disk is full; {advice}") from None
    finally:
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def measure_file(path: Path) -> dict:
    """Return the size in bytes and the SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_manifest(folder: Path) -> None:
    """Write the size and the SHA-256 of every file of a checkpoint into it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = {str(path.relative_to(folder)): measure_file(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, by its manifest; None if it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            found = measure_file(checkpoint / name)
            if found["size"] != expected["size"]:
                return f"{name} has {found['size']:,} bytes instead of {expected['size']:,}"
            if found != expected:
                return f"{name} is not as it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return f"{MANIFEST} cannot be read"
    return None


def lock_folder(folder: str | Path, flag: str = "--output_dir"):
    """Lock the folder of a flag and return the lock, to be closed when the run ends; one in use is a UserError.

    The kernel drops the lock when its process dies. Of several processes only the main one locks. The final folder is
    replaced as a whole, so its lock lies in the temporary folder.
    """
    if not is_main() or fcntl is None:
        return contextlib.nullcontext()
    path = Path(folder) / LOCK
    if flag != "--output_dir":
        path = Path(tempfile.gettempdir(), f"qwen3-{os.getuid()}-{digest(str(Path(folder).resolve()))[:16]}{LOCK}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written: {error.strerror}; choose another folder") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system without locks does not stop the run
        if isinstance(error, BlockingIOError):
            file.seek(0)
            holder = f"in use by another run (process {file.read().strip() or 'unknown'})"
            raise UserError(f"{flag} {folder}: {holder}; wait for its end or choose another folder") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def find_existing(path: str | Path) -> Path:
    """Return a folder or its nearest existing parent, whose disk can be asked."""
    folder = Path(path).resolve()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
