"""Files and folders that are whole or absent, locks, digests and manifests."""

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from tool_calling.files import (
    digest,
    discard_partial,
    find_damage,
    find_existing,
    is_disk_full,
    lock_folder,
    measure_file,
    move_aside,
    partial_folder,
    put_in_place,
    write_file,
    write_manifest,
)
from tool_calling.processes import Interrupted, handle_signals, raise_interrupted
from tool_calling.terminal import UserError

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of nothing
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of b"abc", FIPS 180-2


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_hidden_names():
    assert partial_folder("models/final") == Path("models/.final.partial")
    assert partial_folder(Path("/a/report.json")) == Path("/a/.report.json.partial")


def test_a_folder_is_moved_aside_over_what_an_earlier_kill_left(tmp_path):
    final, old = tmp_path / "final", tmp_path / ".final.old"
    assert move_aside(final) == old and names(tmp_path) == []
    for folder, file in ((final, "new"), (old, "left")):
        folder.mkdir()
        (folder / file).touch()
    assert move_aside(final) == old
    assert names(tmp_path) == [".final.old"] and names(old) == ["new"]


def test_a_full_disk_is_known_by_all_its_names(tmp_path):
    import numpy
    import torch
    from safetensors.numpy import save_file

    def fill_plain():
        with open("/dev/full", "wb") as file:
            file.write(b"0" * 100_000)

    for fill in (fill_plain, lambda: torch.save(torch.zeros(100_000), "/dev/full")):
        with pytest.raises((OSError, RuntimeError)) as error:
            fill()
        assert is_disk_full(error.value), error.value
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    with pytest.raises(Exception) as error:
        save_file({"x": numpy.zeros(4)}, tmp_path / "no" / "such" / "folder")
    assert not is_disk_full(error.value)


def test_a_full_disk_leaves_nothing_partial(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'final'}: the disk is full; free some space")):
        with discard_partial(tmp_path / "final") as folder:
            folder.mkdir()
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert names(tmp_path) == []


def test_a_final_folder_belongs_to_one_run_and_its_lock_lies_elsewhere(tmp_path):
    file = lock_folder(tmp_path / "final", "--final_model_dir")
    other = lock_folder(tmp_path / "other", "--final_model_dir")
    with pytest.raises(UserError) as error:
        lock_folder(f"{tmp_path}/x/../final", "--final_model_dir")
    assert str(error.value) == (
        f"--final_model_dir {tmp_path}/x/../final: in use by another run (process {os.getpid()}); "
        "wait for its end or choose another folder"
    )
    assert names(tmp_path) == []
    for lock in (file, other):
        os.remove(lock.name)
        lock.close()


def test_a_lock_dies_with_its_holder(tmp_path):
    code = (
        f"import time, tool_calling.files as s; lock = s.lock_folder({str(tmp_path)!r}); "
        "print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=rf"in use by another run \(process {holder.pid}\); wait for its end"):
        lock_folder(tmp_path)
    holder.kill()
    holder.communicate()
    file = lock_folder(tmp_path)
    assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    file.close()


def test_a_final_folder_is_replaced_whole(tmp_path):
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").write_text("old")
    partial_folder(str(final)).mkdir()
    (partial_folder(str(final)) / "new").write_text("new")
    put_in_place(str(final))
    assert names(tmp_path) == ["final"] and names(final) == ["new"]


def test_a_signal_between_two_names_comes_after_the_second(tmp_path, monkeypatch):
    final, rename, seen = tmp_path / "final", Path.rename, []
    for folder, file in ((final, "old"), (partial_folder(final), "new")):
        folder.mkdir()
        (folder / file).touch()

    def rename_and_signal(source, target):
        rename(source, target)
        seen.append(names(tmp_path))
        if len(seen) == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Path, "rename", rename_and_signal)
    with pytest.raises(Interrupted), handle_signals(raise_interrupted):
        put_in_place(final)
    assert seen == [[".final.old", ".final.partial"], [".final.old", "final"]]
    assert names(tmp_path) == ["final"] and names(final) == ["new"]


def test_weights_in_place_can_be_read_by_all_that_the_umask_lets(tmp_path):
    written = tmp_path / "written"
    written.mkdir()
    for name in ("a.safetensors", "b.json"):
        (written / name).touch(0o600)
    former = os.umask(0o027)
    try:
        put_in_place(tmp_path / "final", written)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(former)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "final").iterdir()}
    assert modes == {"a.safetensors": 0o640, "b.json": 0o600} and names(tmp_path) == ["final"]


def test_a_text_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    write_file(tmp_path / "report.json", "é \ud83d")
    assert (tmp_path / "report.json").read_bytes() == "é \\ud83d".encode()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError):
        write_file(str(tmp_path / "report.json"), "new")
    assert (tmp_path / "report.json").read_bytes() == "é \\ud83d".encode()


def test_an_exhausted_quota_is_a_full_disk():
    assert is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not is_disk_full(ValueError("nothing of this"))


def test_partial_folders_go_whatever_happens(tmp_path, monkeypatch):
    partial_folder(tmp_path / "final").mkdir()
    with discard_partial(tmp_path / "final") as folder:
        assert folder == tmp_path / ".final.partial" and not folder.exists()
        folder.mkdir()
        (folder / "half").touch()
    assert names(tmp_path) == []
    with pytest.raises(KeyError):
        with discard_partial(tmp_path / "final") as folder:
            folder.mkdir()
            raise KeyError("of its own")
    assert names(tmp_path) == []
    monkeypatch.setenv("RANK", "1")
    with discard_partial(tmp_path / "final") as folder:
        folder.mkdir()
    assert names(tmp_path) == [".final.partial"]  # the first process removes it


def test_a_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [1, None]}) == digest({"b": [1, None], "a": 1})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})
    assert digest("") == "12ae32cb1ec02d01eda3581b127c1fee3b0dc53572ed6baf239721a03d82e126"  # of two quotes


def test_a_manifest_holds_size_and_digest_of_every_file(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "weights").write_bytes(b"abc")
    (tmp_path / "deep" / "empty").touch()
    assert measure_file(tmp_path / "weights") == {"size": 3, "sha256": ABC}
    write_manifest(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == {"deep/empty": {"size": 0, "sha256": EMPTY}, "weights": {"size": 3, "sha256": ABC}}
    assert find_damage(tmp_path) is None
    (tmp_path / "later").touch()
    assert find_damage(tmp_path) is None
    (tmp_path / "weights").write_bytes(b"abd")
    assert find_damage(tmp_path) == "weights is not as it was written"
    (tmp_path / "weights").write_bytes(b"0" * 1234)
    assert find_damage(tmp_path) == "weights has 1,234 bytes instead of 3"
    (tmp_path / "weights").unlink()
    assert find_damage(tmp_path) == "weights is missing"
    for text in ("{", "[]", '{"deep/empty": 1}', '{"deep/empty": {}}'):
        (tmp_path / "manifest.json").write_text(text)
        assert find_damage(tmp_path) == "manifest.json cannot be read"
    (tmp_path / "manifest.json").unlink()
    assert find_damage(tmp_path) == "manifest.json is missing"


def test_only_the_first_process_locks_and_a_folder_must_be_writable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        lock_folder(tmp_path / "file" / "out")
    assert str(error.value) == (
        f"--output_dir {tmp_path}/file/out: cannot be written: Not a directory; choose another folder"
    )
    monkeypatch.setenv("RANK", "1")
    with lock_folder(tmp_path / "file" / "out"):
        assert names(tmp_path) == ["file"]


def test_a_file_system_without_locks_does_not_stop_the_run(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with lock_folder(tmp_path / "out"), lock_folder(tmp_path / "out"):
        assert (tmp_path / "out" / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_lock_is_free_again_when_it_is_closed(tmp_path):
    with contextlib.ExitStack() as locks:
        locks.enter_context(lock_folder(tmp_path))
        with pytest.raises(UserError, match="in use"):
            lock_folder(tmp_path)
    lock_folder(tmp_path).close()


def test_the_nearest_folder_that_exists(tmp_path):
    assert find_existing(str(tmp_path / "a" / "b")) == tmp_path.resolve()
    assert find_existing(tmp_path) == tmp_path.resolve()
    assert find_existing("/no/such/folder") == Path("/")
