"""Task files of llama.cpp's formats, and scores against the same worked out from llama.cpp's own logits."""

from __future__ import annotations

import ctypes
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINYLM, requires_reference
from support.tiny import tiny_metadata, tiny_weights, write_gguf
from test_reference import reference_logits

from quantkit.errors import QuantkitError
from quantkit.evaluate import tasks as module
from quantkit.evaluate.settings import Compute
from quantkit.evaluate.tasks import Task, read_tasks, tasks
from quantkit.sources.source import GGUFSource

HELLASWAG = [
    ("Cooking: A man cuts onions. He", 0, "puts them into a pan.", "flies to the moon in it.", "sings.", "is a car."),
    (
        "Files: Open the file, then",
        2,
        "eat the bread.",
        "run away from it.",
        "read all of its lines.",
        "read it, or not.",
    ),
    ("Python: The list is", 1, "empty now", "empty now, and the function returns None.", "green", "a of the and"),
]
WINOGRANDE = [
    ("The file did not fit on the disk because _ was too large.", "the file", "the disk", 1),
    ('"Ann told Mary, quietly, that _ had won the prize."', "Ann", "Mary", 2),
    ("Call the function _.", "twice", "again", 1),
    ("Dropped, as the reader of prompts has it: _ is last.", "this", "that", 1),
]
CHOICES = [
    ("What is returned?", ["None", "A list of all names", "It is"], [0, 1, 0]),
    ("The sky is", ["blue", "made of old Python files", "12", "a", "for"], [1, 0, 0, 0, 0]),
]


def hellaswag_bytes(items=HELLASWAG) -> bytes:
    return "".join(f"{context}\n{right}\n" + "\n".join(ends) + "\n" for context, right, *ends in items).encode()


def winogrande_bytes() -> bytes:
    lines = [f"{i},{sentence},{a},{b},{right}" for i, (sentence, a, b, right) in enumerate(WINOGRANDE)]
    return "\n".join([lines[0], "no task, this", lines[1], "5,has no gap,a,b,1", *lines[2:]]).encode() + b"\n"


def choices_bytes(items=CHOICES) -> bytes:
    def text(words: str) -> bytes:
        return struct.pack("<I", len(words.encode())) + words.encode()

    bodies = []
    for question, answers, labels in items:
        one = struct.pack("<I", len(answers)) + b"".join(map(text, answers)) + struct.pack(f"<{len(labels)}i", *labels)
        bodies.append(text(question) + one + struct.pack("<I", 1) + text("none") + struct.pack("<i", 1))
    at, positions = 4 + 4 * len(items), []
    for body in bodies:
        positions.append(at)
        at += len(body)
    return struct.pack(f"<{1 + len(items)}I", len(items), *positions) + b"".join(bodies)


def written(tmp_path, data: bytes):
    path = tmp_path / "tasks"
    path.write_bytes(data)
    return path


def test_random_numbers_are_cplusplus_own():
    """What std::mt19937 rng(1) and std::uniform_int_distribution gave, compiled with g++ 12 and its library."""
    assert module._mt19937()() == 1791095845
    draw = module._mt19937()
    sizes = [*range(10042, 10030, -1), *range(9, 0, -1)]
    expected = [4187, 10012, 7232, 9361, 1, 1285, 3034, 10025, 1472, 2368, 926, 3978, 1, 3, 2, 4, 1, 3, 1, 1, 0]
    assert [module._uniform(draw, n) for n in sizes] == expected
    draw = module._mt19937()
    # With so many, numbers are thrown away.
    expected = [1251065995, 2991554425, 2160973468, 2797672084, 384373343, 906997703, 440267677, 277015786]
    assert [module._uniform(draw, 3000000001) for _ in expected] == expected
    # int(scale * rng() * n) for n from 1267 down.
    places = [528, 1262, 911, 1178, 0, 161, 381, 1258, 184, 296, 116, 498]
    left, picked = list(range(1267)), []
    for place in places:
        picked.append(left[place])
        left[place] = left[-1]
        left.pop()
    assert module._picked(1267, 12) == picked


def test_hellaswag_files(tmp_path):
    items = [(f"context {i}", i % 4, *(f"ending {i} {j}" for j in range(4))) for i in range(9)]
    path = written(tmp_path, hellaswag_bytes(items))
    shuffled = read_tasks("hellaswag", path)
    assert sorted(int(task.texts[0].split()[1]) for task in shuffled) == list(range(9))
    assert [task.texts[0] for task in shuffled] != [f"context {i} ending {i} 0" for i in range(9)]
    for task in shuffled:
        number = int(task.texts[0].split()[1])
        assert task == Task(tuple(f"context {number} ending {number} {j}" for j in range(4)), frozenset([number % 4]))
    assert read_tasks("hellaswag", path, 4) == shuffled[:4]
    assert read_tasks("hellaswag", path, 99) == shuffled


def test_winogrande_files(tmp_path):
    items = read_tasks("winogrande", written(tmp_path, winogrande_bytes()))
    assert len(items) == 3
    assert items[0].stems == (
        "The file did not fit on the disk because the file",
        "The file did not fit on the disk because the disk",
    )
    assert items[1].texts == (
        "Ann told Mary, quietly, that Ann had won the prize.",
        "Ann told Mary, quietly, that Mary had won the prize.",
    )
    assert [item.right for item in items] == [{0}, {1}, {0}]
    picked = read_tasks("winogrande", tmp_path / "tasks", 2)
    assert picked == [items[1], items[2]]


def test_multiple_choice_files(tmp_path):
    path = written(tmp_path, choices_bytes())
    items = read_tasks("multiple-choice", path)
    assert items[0] == Task(
        ("What is returned? None", "What is returned? A list of all names", "What is returned? It is"), frozenset([1])
    )
    assert items[1].right == {0}
    assert len(items[1].texts) == 5
    assert read_tasks("multiple-choice", path, 1) == items[:1]


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("hellaswag", b"one\ntwo\n", "2 lines"),
        ("hellaswag", b"c\n4\na\nb\nc\nd\n", "line 2"),
        ("hellaswag", b"c\nx\na\nb\nc\nd\n", "line 2"),
        ("hellaswag", b"c\n\x1e80\na\nb\nc\nd\n", "line 2"),
        ("hellaswag", b"c\n-1\na\nb\nc\nd\n", "line 2"),
        ("hellaswag", b"c\n" + b"9" * 5000 + b"\na\nb\nc\nd\n", "line 2"),
        ("hellaswag", b"", "no hellaswag tasks"),
        ("winogrande", b"i,a _ b,c,d," + b"9" * 5000 + b"\n\n", "no winogrande tasks"),
        ("hellaswag", b"\xff\n", "not UTF-8"),
        ("winogrande", b"nothing\n", "no winogrande tasks"),
        ("multiple-choice", b"", "cut off at byte 0"),
        ("multiple-choice", b"\xff\xff\xff\xff", "cut off at byte 4"),
        ("multiple-choice", choices_bytes()[:-1], "cut off"),
        ("multiple-choice", struct.pack("<4I", 1, 8, 0, 101), "101 answers"),
        ("multiple-choice", choices_bytes([("", ["a"], [1])]), "task 0 has an empty"),
        ("riddles", b"", "riddles"),
    ],
)
def test_bad_files(tmp_path, kind, data, message):
    with pytest.raises(QuantkitError, match=message):
        read_tasks(kind, written(tmp_path, data))


def test_missing_file_and_no_tasks(tmp_path):
    with pytest.raises(QuantkitError, match="No such file"):
        read_tasks("hellaswag", tmp_path / "none")
    with pytest.raises(QuantkitError, match="0 tasks"):
        read_tasks("hellaswag", written(tmp_path, hellaswag_bytes()), 0)


class Reference:
    """llama.cpp's tokens and log-probabilities, and from them the scores, one text after the other."""

    def __init__(self, path) -> None:
        import llama_cpp as lib

        self.path, self.lib = path, lib
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.vocab_only = True
        self.model = lib.llama_model_load_from_file(str(path).encode(), params)
        self.vocab = lib.llama_model_get_vocab(self.model)

    def tokens(self, text: str) -> list[int]:
        data = text.encode()
        buffer = (ctypes.c_int32 * (len(data) + 8))()
        n = self.lib.llama_tokenize(self.vocab, data, len(data), buffer, len(buffer), True, False)
        assert n > 0
        return list(buffer[:n])

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        logits = reference_logits(self.path, np.array(tokens, np.int32)).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def endings(self, texts: tuple[str, ...]) -> list[float]:
        """hellaswag_score and multiple_choice_score: the mean over what follows the common prefix."""
        all_tokens = [self.tokens(text) for text in texts]
        common = 0
        while len({tokens[common] for tokens in all_tokens}) == 1:
            common += 1
        scores = []
        for tokens in all_tokens:
            p = self.log_probabilities(tokens)
            scores.append(np.mean([p[i - 1, tokens[i]] for i in range(common, len(tokens))]))
        return scores

    def winogrande(self, first: str, choices: tuple[str, str], second: str) -> list[float]:
        """winogrande_score, with the place from which it takes the second choice's first prediction."""
        all_tokens = [self.tokens(first + choice + second) for choice in choices]
        common = 0
        while all_tokens[0][common] == all_tokens[1][common]:
            common += 1
        skip = all(len(tokens) - common > 3 for tokens in all_tokens)
        tables = [self.log_probabilities(tokens) for tokens in all_tokens]
        scores = []
        for i, tokens in enumerate(all_tokens):
            base = len(self.tokens(first + choices[i])) if skip else common
            last = 1 if len(tokens) - base > 1 else 0
            values = [tables[i][j, tokens[j + 1]] for j in range(base - 1, len(tokens) - 1 - last)]
            if i == 1 and not skip:
                values[0] = tables[0][len(all_tokens[0]) - 1, tokens[base]]
            scores.append(sum(values) / (len(tokens) - base - last))
        return scores


@requires_reference
def test_scores_equal_llama_cpps(tmp_path, tinylm_f32):
    reference, source = Reference(tinylm_f32), GGUFSource(tinylm_f32)
    for kind, data in (("hellaswag", hellaswag_bytes()), ("multiple-choice", choices_bytes())):
        items = read_tasks(kind, written(tmp_path, data))
        result = tasks(source, items, kind=kind, compute=Compute(threads=2))
        for item, own, chosen in zip(items, result.scores, result.chosen, strict=True):
            expected = reference.endings(item.texts)
            assert own == pytest.approx(expected, rel=1e-4)
            assert chosen == int(np.argmax(expected))
        assert result.n_right == sum(c in item.right for c, item in zip(result.chosen, items, strict=True))
    items = read_tasks("winogrande", written(tmp_path, winogrande_bytes()))
    result = tasks(source, items, kind="winogrande", compute=Compute(threads=2))
    skipped = set()
    for (sentence, a, b, _), own, chosen in zip(WINOGRANDE, result.scores, result.chosen, strict=False):
        first, second = sentence.strip('"').split("_")
        expected = reference.winogrande(first, (a, b), second)
        skipped.add(second == ".")
        assert own == pytest.approx(expected, rel=1e-4)
        assert chosen == (0 if expected[0] > expected[1] else 1)
    assert skipped == {True, False}


def test_accuracy_and_wilsons_interval(tmp_path):
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights()))
    texts = [(f"question {i * i} yes", f"question {i + 5}", f"question {i * 3} {i}?") for i in range(30)]
    chosen = tasks(source, [Task(each, frozenset([0])) for each in texts], compute=Compute(threads=2)).chosen
    assert len(set(chosen)) > 1
    right = [c if i % 3 else (c + 1) % 3 for i, c in enumerate(chosen)]
    seen = []
    result = tasks(
        source,
        [Task(each, frozenset([r])) for each, r in zip(texts, right, strict=True)],
        compute=Compute(threads=2),
        progress=lambda *args: seen.append(args),
    )
    assert (result.n_right, result.n_tasks, result.accuracy.value) == (20, 30, pytest.approx(2 / 3))
    assert result.accuracy.stderr == pytest.approx((2 / 9 / 29) ** 0.5)
    # Wilson's interval for 20 of 30.
    assert (result.low, result.high) == (pytest.approx(0.4878, abs=1e-4), pytest.approx(0.8077, abs=1e-4))
    assert result.running[:3] == [0.0, 0.5, pytest.approx(2 / 3)]
    assert seen[-1] == (30, 30, pytest.approx(2 / 3))


def test_an_ending_that_another_begins_with(tmp_path):
    """Both keep a token to score."""
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", tiny_metadata(), tiny_weights()))
    result = tasks(source, [Task(("a b", "a b c"), frozenset([0])), Task(("a b", "a b"), frozenset([0]))])
    assert np.isfinite(result.scores[0]).all()
    assert result.scores[1][0] == pytest.approx(result.scores[1][1], rel=1e-5)
    with pytest.raises(QuantkitError, match="no tasks"):
        tasks(source, [])


def test_the_command_line(tmp_path):
    path = written(tmp_path, hellaswag_bytes())
    words = [sys.executable, "-c", "from quantkit.cli.main import main; main()", "tasks", str(TINYLM), "-t", "1"]
    done = subprocess.run([*words, "--hellaswag", str(path), "--json"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)["tasks"][0]
    result = tasks(TINYLM, read_tasks("hellaswag", path), kind="hellaswag", compute=Compute(threads=1))
    assert (shown["kind"], shown["n_tasks"], shown["chosen"]) == ("hellaswag", 3, result.chosen)
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.startswith("error: no tasks: give a file")) == (1, True)
