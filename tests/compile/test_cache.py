"""Where machine code is kept, in processes of their own: what a new machine sees."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from quantkit.compile import cache as kernel_cache

# Encodes and decodes one block of Q8_0 and says how many kernels were compiled for it.
WORK = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from numba.core import event
import numpy as np
from quantkit import GGMLType, blocks
with event.install_recorder("numba:compile") as compiled:
    rows = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
    assert np.allclose(blocks.decode(blocks.encode(rows, GGMLType.Q8_0), GGMLType.Q8_0), rows, atol=0.01)
names = {e.data["dispatcher"].py_func.__qualname__ for _, e in compiled.buffer}
print(len(names & {"Q8_0.encode", "Q8_0.decode"}), "compiled")
"""


def work(package: Path = ROOT, code: str = WORK, **environment: str) -> str:
    """Run `WORK` with the package in a directory, in a clean environment and `environment`; returns what it printed."""
    ours = {"NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "LOCALAPPDATA", "PYTHONPATH"}
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def kept(directory: Path) -> int:
    """How many pieces of machine code are below `directory`."""
    return len(list(directory.rglob("*.nbc")))


def by_convention(home: Path) -> tuple[Path, dict[str, str]]:
    """The user's cache of quantkit where `home` is the home directory, and the environment that says so."""
    if sys.platform == "win32":
        return home / "quantkit", {"LOCALAPPDATA": str(home), "USERPROFILE": str(home)}
    folder = home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "quantkit"
    return folder, {"HOME": str(home)}


def test_the_users_cache_directory_and_no_other(tmp_path: Path) -> None:
    package = tmp_path / "site" / "quantkit"
    shutil.copytree(ROOT / "quantkit", package, ignore=shutil.ignore_patterns("__pycache__"))
    folder, environment = by_convention(tmp_path / "home")
    assert "2 compiled" in work(package.parent, **environment)
    assert kept(folder) == 2
    assert kept(tmp_path) == 2  # none beside the sources
    assert "0 compiled" in work(package.parent, **environment)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG is the convention elsewhere")
def test_xdg(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    work(**environment)
    assert kept(tmp_path / "xdg" / "quantkit") == kept(tmp_path) == 2
    work(**{**environment, "XDG_CACHE_HOME": "relative"})
    assert kept(tmp_path / "home" / ".cache" / "quantkit") == 2


def test_numbas_own_setting_wins(tmp_path: Path) -> None:
    _, environment = by_convention(tmp_path / "home")
    work(**environment, XDG_CACHE_HOME=str(tmp_path / "xdg"), NUMBA_CACHE_DIR=str(tmp_path / "numba"))
    assert kept(tmp_path / "numba") == kept(tmp_path) == 2


def test_no_directory_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "2 compiled" in work(NUMBA_CACHE_DIR=str(tmp_path / "file"))


def test_machine_code_depends_on_every_source_file(tmp_path: Path) -> None:
    package = tmp_path / "site" / "quantkit"
    shutil.copytree(ROOT / "quantkit", package, ignore=shutil.ignore_patterns("__pycache__"))
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    work(package.parent, **cache)
    for name, compiled in (("evaluate/kernels.py", 0), ("blocks/bytes.py", 2), ("compile/kernel.py", 2)):
        with open(package / name, "a") as file:
            file.write("# another version\n")
        assert f"{compiled} compiled" in work(package.parent, **cache), name


def test_old_versions_go(tmp_path: Path) -> None:
    package, home = tmp_path / "package", tmp_path / "home"
    package.mkdir()
    (home / "packagemate-0").mkdir(parents=True)
    folders = []
    for version in range(kernel_cache.KEPT_VERSIONS + 3):
        (package / "source.py").write_text(str(version))
        kernel_cache.source_digest.cache_clear()
        kernel_cache._folder.cache_clear()
        folder = kernel_cache._folder(package, home)
        assert folder is not None
        os.utime(folder, (version, version))
        folders.append(folder)
    assert {path for path in home.iterdir() if path.name != "packagemate-0"} == set(folders[3:])
    assert (home / "packagemate-0").is_dir()
    kernel_cache.source_digest.cache_clear()
    kernel_cache._folder.cache_clear()


def test_damaged_files_are_made_anew(tmp_path: Path) -> None:
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    work(**cache)
    for pattern, contents in (("*.nbc", b"\x80nonsense"), ("*.nbi", b""), ("*.nbc", b"")):
        for file in tmp_path.rglob(pattern):
            file.write_bytes(contents)
        assert "2 compiled" in work(**cache)
        assert "0 compiled" in work(**cache)


def test_signatures_do_not_share_files(tmp_path: Path) -> None:
    """Two processes that compile different signatures of a kernel at once would share numba's index."""
    other = WORK.replace("blocks.encode(rows, GGMLType.Q8_0)", "encode(rows)")
    other = other.replace(
        "with event",
        "def encode(rows):\n"
        "    out = np.empty((1, 68), np.uint8)\n"
        "    blocks.block(GGMLType.Q8_0).encode(rows.reshape(-1), out.reshape(-1), 64, None)\n"
        "    return out\nwith event",
    )
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert "2 compiled" in work(**cache)
    assert "1 compiled" in work(code=other, **cache)
    assert kept(tmp_path) == len(list(tmp_path.rglob("*.nbi"))) == 3
    assert "0 compiled" in work(**cache) and "0 compiled" in work(code=other, **cache)


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Machine code with a flipped bit used to crash the process."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    work(**cache)
    for file in tmp_path.rglob("*.nbc"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert "2 compiled" in work(**cache)
    assert "0 compiled" in work(**cache)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no modes")
def test_folders_are_the_users_alone(tmp_path: Path) -> None:
    cache = {"NUMBA_CACHE_DIR": str(tmp_path)}
    work(**cache)
    home = tmp_path / "quantkit"
    assert {path.stat().st_mode & 0o777 for path in (home, *home.iterdir())} == {0o700}
    home.chmod(0o777)
    assert "0 compiled" in work(**cache)
    assert home.stat().st_mode & 0o777 == 0o700


PLANTED = """
import os, pickle, sys
class Planted:
    def __reduce__(self):
        return os.system, ("touch " + sys.argv[1],)
data = pickle.dumps(Planted())
import hashlib, pathlib
for path in pathlib.Path(sys.argv[2]).rglob("*.nb?"):
    path.write_bytes(hashlib.sha256(data).digest() + data)
    os.chown(path, 12345, 12345)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_what_others_own_is_not_loaded(tmp_path: Path) -> None:
    cache, trace = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}, tmp_path / "executed"
    work(**cache)
    subprocess.run([sys.executable, "-c", PLANTED, trace, tmp_path / "cache"], check=True)
    assert "2 compiled" in work(**cache)
    assert not trace.exists()
    os.chown(tmp_path / "cache" / "quantkit", 12345, 12345)
    assert "2 compiled" in work(**cache)  # such a folder is not used at all
