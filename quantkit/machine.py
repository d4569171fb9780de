"""What this machine gives a process: processors and memory."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Instructions that OpenBLAS's SkylakeX kernels are made of.
_AVX512 = frozenset({"avx512f", "avx512cd", "avx512dq", "avx512bw", "avx512vl"})
CORE_TYPE = "OPENBLAS_CORETYPE"


@dataclass(frozen=True)
class Processor:
    """A processor as Linux tells of it: vendor, family and model, and the instructions that the system lets it use."""

    vendor: str
    family: int
    model: int
    flags: frozenset[str]

    @classmethod
    def parse(cls, cpuinfo: str) -> Processor | None:
        """The first processor in the text of /proc/cpuinfo; None where it does not name one as x86 does."""
        first = cpuinfo.split("\n\n", 1)[0]
        lines = (line.partition(":") for line in first.splitlines())
        known = {key.strip(): value.strip() for key, _, value in lines}
        try:
            flags = frozenset(known["flags"].split())
            return cls(known["vendor_id"], int(known["cpu family"]), int(known["model"]), flags)
        except (KeyError, ValueError):
            return None

    @classmethod
    def here(cls) -> Processor | None:
        """This machine's, or None where it does not say."""
        with suppress(OSError, ValueError), open("/proc/cpuinfo", encoding="utf-8") as file:
            return cls.parse(file.read(1 << 14))
        return None

    def openblas_kernels(self) -> str | None:
        """The kernels that OpenBLAS should be told to use here, since by itself it would take slower ones; or None.

        OpenBLAS chooses by family and model. It does not know AMD's Zen 5 (family 26), nor in some versions Zen 4
        (family 25 from model 16 on), and takes its AVX2 kernels there, although they have AVX-512.
        """
        unknown = self.family == 26 or (self.family == 25 and self.model >= 0x10)
        return "SkylakeX" if self.vendor == "AuthenticAMD" and unknown and self.flags >= _AVX512 else None


def choose_openblas_kernels(
    processor: Processor | None, environment: MutableMapping[str, str], numpy_is_loaded: bool
) -> None:
    """Ask for the right kernels of OpenBLAS through its environment variable, which it reads when numpy loads it.

    Changes nothing where the user has set the variable, nor where that would come too late.
    """
    wanted = None if processor is None else processor.openblas_kernels()
    if wanted is not None and not numpy_is_loaded:
        environment.setdefault(CORE_TYPE, wanted)


def default_threads() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes of memory that a process could still allocate here; a guess where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
                break
        else:
            raise ValueError
        for name in ("memory.max", "memory.current"):
            if not (Path("/sys/fs/cgroup") / name).is_file():
                return available
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return available if limit == "max" else max(0, min(available, int(limit) - used))
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 4 << 30


def peak_memory() -> int | None:
    """The peak resident memory of this process, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
