"""What a processor is, and which of OpenBLAS's kernels it should run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from quantkit.machine import CORE_TYPE, Processor, choose_openblas_kernels

# Lines of /proc/cpuinfo as Linux prints them, the flags cut to those that tell the processors apart.
AVX2 = "fpu vme de pse tsc msr sse4_2 x2apic movbe popcnt aes xsave avx f16c rdrand bmi1 avx2 smep bmi2 erms"
AVX512 = f"{AVX2} avx512f avx512dq rdseed adx smap avx512ifma clflushopt clwb avx512cd sha_ni avx512bw avx512vl"
CPUINFO = """processor\t: 0
vendor_id\t: {vendor}
cpu family\t: {family}
model\t\t: {model}
model name\t: {name}
stepping\t: 1
cpu cores\t: 2
flags\t\t: {flags}
bugs\t\t: sysret_ss_attrs spectre_v1

processor\t: 1
vendor_id\t: Another
"""


@pytest.mark.parametrize(
    ("name", "vendor", "family", "model", "flags", "kernels"),
    [
        ("AMD EPYC 7B13 (Zen 3)", "AuthenticAMD", 25, 1, AVX2, None),
        ("AMD EPYC 9654 (Zen 4)", "AuthenticAMD", 25, 17, AVX512, "SkylakeX"),
        ("AMD Ryzen 9 7950X (Zen 4)", "AuthenticAMD", 25, 97, AVX512, "SkylakeX"),
        ("AMD EPYC 9575F (Zen 5)", "AuthenticAMD", 26, 2, AVX512, "SkylakeX"),
        ("AMD EPYC 9575F, its AVX-512 hidden by a hypervisor", "AuthenticAMD", 26, 2, AVX2, None),
        ("AMD EPYC 9575F, part of its AVX-512 hidden", "AuthenticAMD", 26, 2, f"{AVX2} avx512f avx512dq", None),
        ("AMD EPYC 7742 (Zen 2)", "AuthenticAMD", 23, 49, AVX2, None),
        ("Intel Xeon Platinum 8481C (Sapphire Rapids), which OpenBLAS knows", "GenuineIntel", 6, 143, AVX512, None),
        ("Hygon C86", "HygonGenuine", 24, 1, AVX2, None),
    ],
)
def test_kernels_are_chosen_where_openblas_would_take_slower_ones(name, vendor, family, model, flags, kernels):
    text = CPUINFO.format(vendor=vendor, family=family, model=model, name=name, flags=flags)
    processor = Processor.parse(text)
    assert processor == Processor(vendor, family, model, frozenset(flags.split()))
    assert processor.openblas_kernels() == kernels
    for before, numpy_is_loaded, after in [
        ({}, False, {} if kernels is None else {CORE_TYPE: kernels}),
        ({CORE_TYPE: "Haswell"}, False, {CORE_TYPE: "Haswell"}),
        ({}, True, {}),
    ]:
        environment = dict(before)
        choose_openblas_kernels(processor, environment, numpy_is_loaded)
        assert environment == after


@pytest.mark.parametrize("text", ["", "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\n", "cpu family\t: x\n"])
def test_processors_that_are_not_told_of_as_x86_is(text):
    assert Processor.parse(text) is None
    environment: dict[str, str] = {}
    choose_openblas_kernels(None, environment, False)
    assert environment == {}


def run(code: str, **environment: str) -> str:
    known = {key: value for key, value in os.environ.items() if key != CORE_TYPE}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**known, **environment}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_quantkit_chooses_before_numpy_is_loaded():
    """In processes of their own, on a processor that is said to be a Zen 5."""
    patch = (
        "import sys, os; from pathlib import Path; import importlib.util as u;"
        "spec = u.spec_from_file_location('quantkit.machine', 'quantkit/machine.py'); m = u.module_from_spec(spec);"
        "sys.modules['quantkit.machine'] = m; spec.loader.exec_module(m);"
        f"m.Processor.here = classmethod(lambda cls: cls('AuthenticAMD', 26, 2, frozenset({AVX512!r}.split())));"
    )
    ask = f"print(os.environ.get({CORE_TYPE!r}))"
    assert run(f"{patch} import quantkit; assert 'numpy' not in sys.modules; {ask}") == "SkylakeX"
    assert run(f"{patch} import quantkit.cli.main; assert 'numpy' not in sys.modules; {ask}") == "SkylakeX"
    assert run(f"{patch} import quantkit; {ask}", **{CORE_TYPE: "Zen"}) == "Zen"
    assert run(f"{patch} import numpy, quantkit; {ask}") == "None"
    assert run(f"import os, quantkit.cli.main; {ask}") in ("None", "SkylakeX")
