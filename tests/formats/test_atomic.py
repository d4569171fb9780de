"""Files appear whole or not at all, and replace nothing that they were not told to replace."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.limits import limited

from quantkit.blocks.types import GGMLType
from quantkit.errors import QuantkitError
from quantkit.formats.atomic import OutputGroup, remove_temporaries, write_whole
from quantkit.formats.gguf import GGUFFile, Metadata, TensorInfo
from quantkit.formats.imatrix import Importance, ImportanceMatrix
from quantkit.formats.logits import LogitsWriter
from quantkit.formats.output import GGUFOutput


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write_gguf(target: Path) -> None:
    with GGUFOutput(target, Metadata(), [TensorInfo("t", (32,), GGMLType.I8)]) as output:
        output.write(np.ones(32, np.uint8))


def write_logits(target: Path) -> None:
    with LogitsWriter(target, np.zeros((1, 8), np.int32), 6) as writer:
        writer.write(np.zeros((3, 10), np.uint16), 0)


def write_imatrix(target: Path) -> None:
    ImportanceMatrix({"t": Importance(np.ones((1, 4), np.float32), np.ones(1, np.int64))}).save(target)


def write_legacy_imatrix(target: Path) -> None:
    ImportanceMatrix({"t": Importance(np.ones((1, 4), np.float32), np.ones(1, np.int64))}).save_legacy(target)


def write_text(target: Path) -> None:
    write_whole(target, "ünïcode")


writers = pytest.mark.parametrize(
    "write", [write_gguf, write_logits, write_imatrix, write_legacy_imatrix, write_text], ids=lambda f: f.__name__
)


@writers
def test_nothing_existing_is_replaced(write, tmp_path: Path) -> None:
    target, other = tmp_path / "target", tmp_path / "other"
    write(target)
    before = target.read_bytes()
    with pytest.raises(QuantkitError, match="exists already") as refused:
        write(target)
    assert refused.value.option == "force"
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "dangling").symlink_to(other)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling", "pipe"):
        with pytest.raises(QuantkitError, match="never replaced"):
            write(tmp_path / name)
    with pytest.raises(QuantkitError, match="is a directory"):
        write(tmp_path)
    with pytest.raises(QuantkitError, match="there is no directory"):
        write(tmp_path / "nowhere" / "target")
    assert names(tmp_path) == ["dangling", "link", "pipe", "target"]
    assert target.read_bytes() == before and (tmp_path / "pipe").is_fifo()


@writers
def test_a_link_planted_under_a_temporary_name_is_not_followed(write, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "target.partial").symlink_to(victim)
    write(tmp_path / "target")
    assert victim.read_text() == "precious" and (tmp_path / "target").is_file()
    assert names(tmp_path) == ["target", "target.partial", "victim"]


def test_force_replaces_regular_files_only(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    with OutputGroup(force=True) as group:
        write_whole(group.add(target), "new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    (tmp_path / "link").symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "."):
        with pytest.raises(QuantkitError), OutputGroup(force=True) as group:
            group.add(tmp_path / name)
    # What takes the name while the file is written is looked at again.
    target.unlink()
    with pytest.raises(QuantkitError, match="never replaced"), OutputGroup(force=True) as group:
        write_whole(group.add(target), "new")
        os.mkfifo(target)
    assert target.is_fifo() and names(tmp_path) == ["link", "pipe", "target"]


def test_inputs_are_never_replaced(tmp_path: Path) -> None:
    """Not under another name of theirs either, nor where a link leads to one."""
    source = tmp_path / "source"
    source.write_text("weights")
    os.link(source, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(source)
    (tmp_path / "home").symlink_to(tmp_path)
    for name in ("source", "hard", "soft", "home/source"):
        for given in (source, tmp_path / "soft"):
            with pytest.raises(QuantkitError, match="is the input"), OutputGroup(force=True, inputs=[given]) as group:
                group.add(tmp_path / name)
    assert source.read_text() == "weights"


def test_all_files_of_a_group_or_none(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"

    def attempt(happen: Callable[[], object]) -> None:
        with OutputGroup(directory=home) as group:
            files = [group.add(home / name) for name in ("a", "b", "c")]
            assert names(tmp_path) == []
            for file in files:
                file.write(b"bytes")
            assert len(names(home)) == 3 and not (home / "a").exists()
            happen()

    with pytest.raises(ZeroDivisionError):
        attempt(lambda: 1 / 0)
    assert names(tmp_path) == []  # the directories too
    with pytest.raises(QuantkitError, match="exists already"):
        attempt(lambda: (home / "b").write_text("somebody else's"))
    assert names(home) == ["b"]
    shutil.rmtree(tmp_path / "new")
    attempt(lambda: None)
    assert names(home) == ["a", "b", "c"]
    with pytest.raises(QuantkitError, match="two outputs have the same name"), OutputGroup() as group:
        group.add(tmp_path / "x")
        group.add(tmp_path / "new" / ".." / "x")


def test_of_a_group_that_replaces_only_replaced_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a name cannot be given, those that were free before are free again; what was replaced cannot come back."""
    (tmp_path / "old").write_text("before")
    replace = Path.replace

    def refused(self: Path, target: Path) -> Path:
        if target.name == "third":
            raise PermissionError(13, "no")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(QuantkitError), OutputGroup(force=True) as group:
        for name in ("old", "new", "third"):
            group.add(tmp_path / name).write(b"after")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old": "after"}


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_name_taken_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Between the last look and the renaming: the system itself refuses."""
    target = tmp_path / "target"
    if not links:

        def refuse(*args: object, **options: object) -> None:
            raise OSError(errno.EPERM, "no hard links on this file system")

        monkeypatch.setattr(os, "link", refuse)
    write_text(target)
    assert target.read_text() == "ünïcode"
    with pytest.raises(QuantkitError, match="exists already"), OutputGroup() as group:
        file = group.add(tmp_path / "other")
        write_whole(file, "text")
        file.seal()
        (tmp_path / "other").write_text("first")
        file.publish()
    assert (tmp_path / "other").read_text() == "first" and names(tmp_path) == ["other", "target"]


def test_simultaneous_writers_make_one_whole_file(tmp_path: Path) -> None:
    """Eight threads write different bytes to one name: one gets it, whole, and the others are told."""
    target, told, barrier = tmp_path / "target", [], threading.Barrier(8)

    def write(number: int) -> None:
        barrier.wait()
        try:
            with OutputGroup() as group:
                file = group.add(target)
                for _ in range(50):
                    file.write(bytes([number]) * 1000)
                barrier.wait(timeout=10)
        except QuantkitError as problem:
            told.append(str(problem))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = target.read_bytes()
    assert len(data) == 50_000 and len(set(data)) == 1
    assert len(told) == 7 and all("exists already" in each for each in told)
    assert names(tmp_path) == ["target"]


def test_space_is_asked_for_all_files_together(tmp_path: Path) -> None:
    most = int(shutil.disk_usage(tmp_path).free * 0.7)
    with pytest.raises(QuantkitError, match=r"2 files need \d.* but only \d.* are free there"), OutputGroup() as group:
        group.add(tmp_path / "a", most)
        group.check_space()
        group.add(tmp_path / "b", most)
        group.check_space()
    info = TensorInfo("t", (1 << 40, 1 << 10), GGMLType.F32)
    alone = GGUFOutput(tmp_path / "t.gguf", Metadata(), [info])
    with pytest.raises(QuantkitError, match=r"t.gguf: needs \d+\.\d+ GB, but only"), alone:
        pass
    assert names(tmp_path) == []


@writers
def test_a_full_disk_leaves_nothing(write, tmp_path: Path) -> None:
    """The system refuses bytes beyond a file's allowed size as it does beyond a disk's."""
    with limited(resource.RLIMIT_FSIZE, 4), pytest.raises(QuantkitError, match="cannot be written: File too large"):
        write(tmp_path / "target")
    assert names(tmp_path) == []


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    """300 files, written to in turns, where 64 may be open."""
    with limited(resource.RLIMIT_NOFILE, 64), OutputGroup() as group:
        infos = [TensorInfo("a", (32,), GGMLType.I8), TensorInfo("b", (32,), GGMLType.I8)]
        outputs = [GGUFOutput(group.add(tmp_path / str(i)), Metadata(), infos) for i in range(300)]
        for output in outputs:
            output.__enter__()
        for name in ("b", "a"):
            for i, output in enumerate(outputs):
                output.write_tensor_at(name, 0, np.full(32, i % 251, np.uint8))
        for output in outputs:
            output.__exit__(None, None, None)
    for i in range(300):
        file = GGUFFile(tmp_path / str(i))
        assert (file.read("a") == i % 251).all() and (file.read("b") == i % 251).all()
    assert len(names(tmp_path)) == 300


def test_the_longest_name(tmp_path: Path) -> None:
    name = "n" * 250 + ".gguf"
    write_gguf(tmp_path / name)
    assert names(tmp_path) == [name]
    with pytest.raises(QuantkitError, match="File name too long"):
        write_gguf(tmp_path / (name + "x"))


def test_a_temporary_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with pytest.raises(QuantkitError), OutputGroup() as group:
        file = group.add(tmp_path / "target")
        file.write(b"some")
        file.close()
        file.temporary.unlink()
        os.link(victim, file.temporary)
        file.write(b"more")
    assert victim.read_text() == "precious"


def test_leftovers_of_a_process_that_ends_at_once() -> None:
    """`remove_temporaries` knows the files of every group."""
    probe = """
import sys, tempfile, pathlib
from quantkit.formats.atomic import OutputGroup, remove_temporaries
home = pathlib.Path(tempfile.mkdtemp())
OutputGroup().add(home / "a").write(b"bytes")
OutputGroup().add(home / "b").write(b"bytes")
print(len(list(home.iterdir())))
remove_temporaries()
print(len(list(home.iterdir())))
home.rmdir()
"""
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", "0"]
    remove_temporaries()


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_text(tmp_path / "ours")
    (tmp_path / "usual").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "ours").stat().st_nlink == 1
