"""What is imported is declared, what is declared is imported, and what could break in a new version is bounded."""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict

import pytest
from conftest import ROOT

tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")

SOURCES = sorted((ROOT / "quantkit").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# Distributions whose module has another name.
DISTRIBUTIONS = {
    "google": "protobuf",
    "huggingface_hub": "huggingface-hub",
    "in_toto_attestation": "in-toto-attestation",
    "llama_cpp": "llama-cpp-python",
    "yaml": "pyyaml",
}
# Names that numba does not promise to keep: a release that changes one breaks the kernels. Raise the upper bound after
# trying these.
PRIVATE_OF_NUMBA = {
    "numba.core": {"config", "event", "types"},
    "numba.core.caching": {"CompileResultCacheImpl", "FunctionCache", "IndexDataCacheFile"},
    "numba.core.cgutils": {"gep_inbounds", "pack_array", "unpack_tuple"},
    "numba.core.codegen": {"JITCodeLibrary"},
    "numba.core.compiler": {"Compiler"},
    "numba.core.compiler_machinery": {"register_pass"},
    "numba.core.errors": {"RequireLiteralValue", "TypingError"},
    "numba.core.imputils": {"lower_builtin", "lower_constant", "lower_getattr_generic"},
    "numba.core.lowering": {"Lower"},
    "numba.core.typed_passes": {"NativeLowering"},
    "numba.core.typing.templates": {
        "AttributeTemplate", "ConcreteTemplate", "infer_getattr", "infer_global", "signature",
    },
    "numba.np.arrayobj": {"make_array", "populate_array"},
}  # fmt: skip
PRIVATE_ATTRIBUTES = {
    # numba's cache of kernels
    "_cache_path", "_data_path", "_dump", "_impl", "_index_key", "_index_path", "_open_for_write", "_source_stamp",
    # its code libraries and arrays
    "_ensure_finalized", "_getvalue",
    # the standard library's
    "_Hash", "_exit",
}  # fmt: skip


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert found
    return found[0].lower()


def imports() -> dict[str, set[str]]:
    """The names that quantkit takes from each module of others; none where it imports the module."""
    found = defaultdict(set)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found[alias.name] |= set()
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found[node.module] |= {alias.name for alias in node.names}
    return found


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    modules = {module.split(".")[0] for module in imports()} - sys.stdlib_module_names - {"quantkit", "__future__"}
    used = {DISTRIBUTIONS.get(module, module) for module in modules}
    always = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    extras = {name_of(r) for name in ("attest", "cluster", "torch") for r in PROJECT["optional-dependencies"][name]}
    assert always <= used
    assert used <= always | extras


def test_numbas_private_names_are_these() -> None:
    private = {module: names for module, names in imports().items() if re.match(r"numba\.(?!extending$)", module)}
    assert private == PRIVATE_OF_NUMBA


def test_private_attributes_of_others_are_these() -> None:
    used, own = set(), set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
                (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    assert used - own == PRIVATE_ATTRIBUTES


@pytest.mark.parametrize("name", ["numba", "llvmlite", "gguf"])
def test_what_could_break_in_a_new_version_is_bounded(name: str) -> None:
    """numba and llvmlite for their private names, gguf for the names, keys and grids that output is made of."""
    (requirement,) = [r for r in PROJECT["dependencies"] if name_of(r) == name]
    assert re.search(r"<\d", requirement)
