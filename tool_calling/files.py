"""Files and folders that are whole or absent, their locks and digests."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

from tool_calling.processes import handle_signals, is_main
from tool_calling.terminal import UserError

MANIFEST = "manifest.json"  # in each checkpoint: size and SHA-256 of its files
LOCK = ".lock"  # in --output_dir, and for --final_model_dir among the temporary files: held while a run lasts


def partial_folder(final: str | Path) -> Path:
    """Return where a folder is written before it is renamed to its final name."""
    return Path(final).with_name(f".{Path(final).name}.partial")


def move_aside(folder: Path) -> Path:
    """Return the hidden name that a folder, if it is there, now has: killed in between, its removal leaves no half."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    return old


def put_in_place(final: str | Path, written: Path | None = None) -> None:
    """Give a finished folder (its partial one) its final name; what was there is removed only after that."""
    written = written or partial_folder(final)
    umask = os.umask(0)
    os.umask(umask)
    for file in written.glob("*.safetensors"):  # written for the owner alone
        file.chmod(0o666 & ~umask)
    noted: list[int] = []
    try:
        with handle_signals(lambda number, frame: noted.append(number)):  # between the two there is no such folder
            old = move_aside(Path(final))
            written.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        for number in noted:
            signal.raise_signal(number)


def write_file(path: str | Path, text: str) -> None:
    """Write a text file under a hidden name and then give it its own: a broken write leaves no half one."""
    # Half a character, of a row or of a file's name, as JSON writes it.
    partial_folder(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    partial_folder(path).replace(path)


def is_disk_full(error: BaseException) -> bool:
    """Say whether an error is that of a full disk, or of a used-up quota, also as torch and safetensors word it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # torch names no reason: its archive writer only says that a write failed, or that it is not where it should be.
    return any(text in str(error) for text in ("No space left", "PytorchStreamWriter failed", "unexpected pos"))


@contextlib.contextmanager
def discard_partial(final: str | Path):
    """Yield the partial folder of `final`; whatever happens, nothing of it stays, and a full disk is a UserError.

    Of several processes, the first one looks after the folder.
    """
    folder = partial_folder(final)
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    except Exception as error:
        if is_disk_full(error):
            raise UserError(
                f"{final}: the disk is full; free some space, then go on from the last checkpoint with "
                "--resume_from_checkpoint"
            ) from None
        raise
    finally:
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON value, in which the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Write the size and the SHA-256 of every file of a checkpoint into it."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, by its manifest; None if it is whole."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
            if hash_file(path) != expected["sha256"]:
                return f"{name} is not as it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return f"{MANIFEST} cannot be read"
    return None


def lock_folder(folder: str, flag: str = "--output_dir"):
    """Return the locked file for a folder of that flag, to be closed when the run ends; one in use is a UserError.

    The lock dies with the process that holds it. Where there are no such locks, as on Windows, the run does without.
    Of several processes only the one that writes locks. The final folder is replaced as a whole: its lock lies outside.
    """
    if not is_main() or os.name == "nt":
        return contextlib.nullcontext()
    import fcntl

    name = f"qwen3-{os.getuid()}-{digest(str(Path(folder).resolve()))[:16]}{LOCK}"
    path = Path(folder) / LOCK if flag == "--output_dir" else Path(tempfile.gettempdir()) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written: {error.strerror}; choose another folder") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"{flag} {folder}: in use by another run (process {file.read().strip() or 'unknown'}); "
            "wait for its end or choose another folder"
        ) from None
    except OSError:  # a file system without locks
        pass
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def find_existing(path: str) -> Path:
    """Return a folder, or if it is not there yet, the nearest above it: where its disk can be asked."""
    folder = Path(path).resolve()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
