"""Importance matrices: against the plain forward pass, and against what llama.cpp itself multiplies."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINYLM, requires_reference
from make_checkpoints import make_checkpoint
from record_logits import tokens
from support.conversion import convert
from support.families import LLAMA_CPP_DIFFERS, OTHER_MIXERS
from support.tiny import BOS, FAMILIES, N_VOCAB, plain_logits, tiny_metadata, tiny_weights, write_gguf

from quantkit.errors import QuantkitError
from quantkit.evaluate.divergence import divergence
from quantkit.evaluate.importance import importance_matrix, layer_statistics, statistics
from quantkit.evaluate.perplexity import chunked, tokenize
from quantkit.evaluate.settings import Chunking, Compute
from quantkit.formats.imatrix import Importance, ImportanceMatrix
from quantkit.pipeline.run import quantize
from quantkit.sources.checkpoint import CheckpointSource
from quantkit.sources.source import GGUFSource
from quantkit.vocabulary import Vocabulary

N_CTX = 64
CUT = Chunking(n_ctx=N_CTX)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tiny_metadata(), tiny_weights(5))


def some_tokens(n_chunks: int, seed: int = 1) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(0, N_VOCAB, n_chunks * N_CTX + 9).astype(np.int32)
    tokens[0] = BOS
    return tokens


def chunks_of(tokens: np.ndarray) -> np.ndarray:
    chunks = tokens[: len(tokens) // N_CTX * N_CTX].reshape(-1, N_CTX).copy()
    chunks[:, 0] = BOS
    return chunks


@pytest.mark.parametrize("process_output", [False, True])
def test_sums_of_squares_of_what_the_plain_forward_pass_multiplies(model_path: Path, process_output: bool) -> None:
    tokens = some_tokens(5)
    seen: list[tuple[float, int, float | None]] = []
    matrix = importance_matrix(
        GGUFSource(model_path), tokens, chunking=CUT, process_output=process_output, dataset="a.txt",
        progress=lambda *a: seen.append(a),
    )  # fmt: skip
    expected: dict[str, np.ndarray] = {}
    for chunk in chunks_of(tokens):
        inputs: dict[str, np.ndarray] = {}
        plain_logits(model_path, chunk, seen=inputs)
        for name, x in inputs.items():
            expected[name] = expected.get(name, 0) + np.square(x).sum(0)
    if not process_output:
        del expected["output.weight"]
    assert list(matrix.entries) == sorted(expected)
    for name, sums in expected.items():
        np.testing.assert_allclose(matrix.entries[name].sums, sums[None], rtol=2e-5)
        assert matrix.entries[name].counts.tolist() == [5 * N_CTX]
    assert (matrix.chunk_count, matrix.chunk_size, matrix.datasets) == (5, N_CTX, ["a.txt"])
    assert seen[-1] == (5, 5, None) and 0 < seen[0][0] < 5


def test_results_do_not_depend_on_batch_or_threads(model_path: Path) -> None:
    tokens = some_tokens(70)
    base = importance_matrix(model_path, tokens, chunking=Chunking(n_ctx=N_CTX, batch=1), compute=Compute(threads=1))
    for n_threads, batch in ((2, 40), (3, None), (1, 70)):
        other = importance_matrix(
            model_path, tokens, chunking=Chunking(n_ctx=N_CTX, batch=batch), compute=Compute(threads=n_threads)
        )
        for name, entry in base.entries.items():
            np.testing.assert_array_equal(other.entries[name].sums, entry.sums)


def test_snapshots_and_going_on_give_the_same_sums(model_path: Path) -> None:
    tokens = some_tokens(7)
    source = GGUFSource(model_path)
    whole = importance_matrix(source, tokens, chunking=CUT)
    saved: list[ImportanceMatrix] = []
    importance_matrix(source, tokens, chunking=Chunking(n_ctx=N_CTX, batch=2), snapshot=saved.append, snapshot_every=3)
    assert [one.chunk_count for one in saved] == [3, 6]
    first = saved[0]
    first.merge(importance_matrix(source, tokens, chunking=CUT, from_chunk=3))
    assert (first.chunk_count, first.chunk_size) == (7, N_CTX)
    for name, entry in whole.entries.items():
        np.testing.assert_allclose(first.entries[name].sums, entry.sums, rtol=1e-5)
        assert first.entries[name].counts.tolist() == entry.counts.tolist()


def test_bad_input(model_path: Path, tmp_path: Path) -> None:
    source = GGUFSource(model_path)
    with pytest.raises(QuantkitError, match="tokens, but"):
        importance_matrix(source, some_tokens(3), chunking=CUT, from_chunk=2)
    with pytest.raises(QuantkitError, match="chunk -1"):
        importance_matrix(source, some_tokens(3), chunking=CUT, from_chunk=-1)
    weights = tiny_weights()
    weights["blk.1.attn_q.weight"][0, 0] = np.nan
    broken = GGUFSource(write_gguf(tmp_path / "broken.gguf", tiny_metadata(), weights))
    with pytest.raises(QuantkitError, match=r"layer 1.*NaN"):
        importance_matrix(broken, some_tokens(3), chunking=CUT)
    with pytest.raises(QuantkitError, match="sums of"):
        importance_matrix(source, some_tokens(3), chunking=CUT).merge(
            ImportanceMatrix({"blk.0.attn_q.weight": Importance(np.ones((1, 32), np.float32), np.array([5]))})
        )


class _Tensor(ctypes.Structure):
    """struct ggml_tensor, as far as its name."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def reference_sums(path: Path, chunks: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Sums of squares and counts by tensor, of what llama.cpp's graph multiplies matrices of the layers with."""
    import llama_cpp as lib

    lib.llama_backend_init()
    base = ctypes.CDLL(str(Path(lib.__file__).parent / "lib" / "libggml-base.so"))
    base.ggml_op_desc.restype = ctypes.c_char_p
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def view(tensor: _Tensor, kind: type) -> np.ndarray:
        """The tensor as an array [ne2, ne1, ne0], whatever its strides."""
        shape, strides = tuple(tensor.ne)[2::-1], tuple(tensor.nb)[2::-1]
        nbytes = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + ctypes.sizeof(kind)
        raw = (ctypes.c_char * nbytes).from_address(tensor.data)
        return np.ndarray(shape, np.dtype(kind), raw, strides=strides)

    def observe(pointer: int, ask: bool, _: object) -> bool:
        node = _Tensor.from_address(pointer)
        operation = base.ggml_op_desc(ctypes.c_void_p(pointer))
        if operation not in (b"MUL_MAT", b"MUL_MAT_ID"):
            return False
        name = node.src[0].contents.name.decode()
        if ask or not name.startswith("blk."):
            return name.startswith("blk.")
        x = view(node.src[1].contents, ctypes.c_float).astype(np.float64)
        n_matrices = node.src[0].contents.ne[2]
        sums, counts = found.setdefault(name, (np.zeros((n_matrices, x.shape[2])), np.zeros(n_matrices, int)))
        if operation == b"MUL_MAT":
            for i, rows in enumerate(x):  # of matrices for each head, or of one for all
                sums[i % n_matrices] += np.square(rows).sum(0)
                counts[i % n_matrices] += len(rows)
            return True
        chosen = view(node.src[2].contents, ctypes.c_int32)[0]
        for row, experts in enumerate(chosen):
            for rank, expert in enumerate(experts):
                sums[expert] += np.square(x[row, rank % x.shape[1]])
                counts[expert] += 1
        return True

    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(observe)
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    assert model
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.n_threads = params.n_threads_batch = 2
    params.type_k = params.type_v = lib.GGML_TYPE_F32
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cb_eval = ctypes.cast(callback, type(params.cb_eval))
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(chunks.shape[1], 0, 1)
    for chunk in chunks:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch.n_tokens = len(chunk)
        for i, token in enumerate(chunk.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
        assert lib.llama_decode(context, batch) == 0
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return found


@requires_reference
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3moe", "gemma3", "phi3", "gptneox"])
def test_sums_equal_those_of_llama_cpps_graph(tmp_path: Path, family: str) -> None:
    """The tensors that llama-imatrix collects, its counts, and its sums but for the order of additions."""
    if family == "llama":
        path = write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights(5))
    else:
        path = write_gguf(tmp_path / "m.gguf", FAMILIES[family].metadata(), FAMILIES[family].weights(5))
    tokens = some_tokens(3)
    matrix = importance_matrix(path, tokens, chunking=CUT)
    expected = reference_sums(path, chunks_of(tokens))
    assert list(matrix.entries) == sorted(expected)
    # ggml looks GELU up in a table of float16; elsewhere both compute in float32.
    tolerance = 2e-3 if family in ("gemma3", "gptneox") else 5e-5
    for name, (sums, counts) in expected.items():
        assert matrix.entries[name].counts.tolist() == counts.tolist()
        np.testing.assert_allclose(matrix.entries[name].sums, sums, rtol=tolerance)


@requires_reference
@pytest.mark.parametrize("name", [name for name in OTHER_MIXERS if name not in LLAMA_CPP_DIFFERS])
def test_sums_of_other_mixers_equal_those_of_llama_cpps_graph(tmp_path: Path, name: str) -> None:
    """The same for layers that are not plain attention: every matrix that a token goes through is among them."""
    path = convert(make_checkpoint(name, tmp_path), tmp_path / "m.gguf", "f32")
    ids = tokens(3 * N_CTX).astype(np.int32)
    matrix = importance_matrix(path, ids, chunking=CUT)
    ids, bos = tokenize(Vocabulary.from_metadata(GGUFSource(path).metadata), ids)
    expected = reference_sums(path, chunked(ids, CUT, bos, "the text"))
    assert list(matrix.entries) == sorted(expected)
    # ggml looks GELU up in a table of float16.
    tolerance = 2e-3 if name.startswith("tiny-gemma4") else 5e-4
    for tensor, (sums, counts) in expected.items():
        assert matrix.entries[tensor].counts.tolist() == counts.tolist()
        np.testing.assert_allclose(matrix.entries[tensor].sums, sums, rtol=tolerance, atol=1e-6 * sums.max())


def test_statistics() -> None:
    squares = np.array([[4.0, 0.0, 8.0, 4.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    matrix = ImportanceMatrix(
        {
            "blk.0.ffn_up_exps.weight": Importance(squares[:, ::-1].copy(), np.array([2, 0])),
            "blk.1.ffn_up_exps.weight": Importance(squares, np.array([2, 0])),
            "output.weight": Importance(np.full((1, 3), 6, np.float32), np.array([2])),
            "blk.1.unseen.weight": Importance(np.ones((1, 3), np.float32), np.array([0])),
        }
    )
    up, before, output = statistics(matrix)
    assert (up.name, before.name, output.name) == (
        "blk.0.ffn_up_exps.weight", "blk.1.ffn_up_exps.weight", "output.weight"
    )  # fmt: skip
    up, before = before, up
    # Mean squares 2, 0, 4, 2.
    assert (up.total, up.minimum, up.maximum, up.mean, up.n) == (8, 0, 4, 2, 4)
    assert up.deviation == pytest.approx(2**0.5)
    assert (up.active, up.zd) == (0.75, 0.25)
    assert up.entropy == pytest.approx(1.5) and up.normalised_entropy == pytest.approx(0.75)
    assert up.cosine == pytest.approx((4 * 4 + 0 + 0 + 4 * 4) / 96)
    assert (before.cosine, output.block, output.cosine, output.kind, up.kind) == (0, None, 0, "output", "ffn_up_exps")
    layers = layer_statistics([up, before, output])
    assert [one.block for one in layers] == [0, 1]
    assert (layers[1].total, layers[1].zd, layers[1].cosine) == pytest.approx((8, 0.25, up.cosine))


def test_quantizing_with_it_diverges_less(tmp_path: Path) -> None:
    source = CheckpointSource(TINYLM)
    calibration = (ROOT / "fixtures" / "tinylm-calib.txt").read_text(encoding="utf-8")
    text = (ROOT / "fixtures" / "tinylm-test.txt").read_text(encoding="utf-8")
    importance_matrix(source, calibration, chunking=Chunking(n_ctx=128, chunks=40)).save(tmp_path / "imatrix.gguf")
    for kind in ("Q4_K_M", "Q2_K"):
        quantize(source, tmp_path / "without.gguf", type=kind, force=True)
        quantize(source, tmp_path / "with.gguf", type=kind, force=True, imatrix=tmp_path / "imatrix.gguf")
        without, with_it = (
            divergence(tmp_path / name, source, text, chunking=Chunking(n_ctx=128, chunks=16)).kld.value
            for name in ("without.gguf", "with.gguf")
        )
        assert with_it < without
