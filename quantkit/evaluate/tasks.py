"""HellaSwag, Winogrande and multiple-choice tasks: which ending of a text a model finds likeliest.

Files, selection of tasks, tokens and scores are those of llama-perplexity (`--hellaswag`, `--winogrande`,
`--multiple-choice`), so its published scores compare with ours.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.evaluate.backends import AnyModel, load
from quantkit.evaluate.model import Model
from quantkit.evaluate.settings import Compute, Estimate, Progress
from quantkit.vocabulary import Vocabulary

log = logging.getLogger(__name__)

# The standard normal's two-sided 95% point.
_Z = 1.959963984540054
_MAX_FILE = 1 << 30
_MAX_ANSWERS = 100
# A Winogrande choice is skipped where more tokens than this follow the common prefix in both sentences.
_WINOGRANDE_TRAILING = 3


@dataclass(frozen=True)
class Task:
    """Texts that end differently, and the numbers of the right ones.

    Scored are a text's tokens after those that all texts of the task begin with. For Winogrande `stems` holds each
    text up to the end of the choice.
    """

    texts: tuple[str, ...]
    right: frozenset[int]
    stems: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TasksResult:
    """How many tasks a model gets right.

    `accuracy` is a share of one; `low` and `high` bound it with 95% confidence (Wilson's interval). `chosen` is each
    task's likeliest text and `scores` the mean log-likelihoods, in nats a token, of all its texts; `running` the
    accuracy after each task.
    """

    kind: str
    accuracy: Estimate
    low: float
    high: float
    n_right: int
    n_tasks: int
    backend: str
    precision: str
    blas: str
    chosen: list[int] = field(repr=False)
    scores: list[list[float]] = field(repr=False)
    running: list[float] = field(repr=False)


# -- files


def read_tasks(kind: str, path: str | Path, n_tasks: int | None = None) -> list[Task]:
    """The tasks in the file `path`, of `kind` hellaswag, winogrande or multiple-choice.

    With `n_tasks` that many are picked at random, the same as llama-perplexity picks (built with GNU's standard
    library); HellaSwag's are shuffled in any case. Raises QuantkitError for files that are not of this kind.
    """
    if n_tasks is not None and n_tasks < 1:
        raise QuantkitError(f"cannot score {n_tasks} tasks: use 1 or more")
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise QuantkitError(f"{path}: {error.strerror or error}") from None
    if len(data) > _MAX_FILE:
        raise QuantkitError(f"{path}: larger than {_MAX_FILE >> 20} MiB, so not a file of tasks")
    readers = {"hellaswag": _hellaswag, "winogrande": _winogrande, "multiple-choice": _multiple_choice}
    if kind not in readers:
        raise QuantkitError(f"no tasks of the kind {kind!r} are known, only {', '.join(readers)}")
    tasks = readers[kind](data, str(path), n_tasks)
    if not tasks:
        raise QuantkitError(f"{path}: no {kind} tasks in this file")
    return tasks


def _lines(data: bytes, name: str) -> list[str]:
    """The lines of a text file, a newline at its end not counted, as llama.cpp reads prompts."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise QuantkitError(f"{name}: not UTF-8 text (byte {error.start})") from None
    lines = text.removesuffix("\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def _hellaswag(data: bytes, name: str, n_tasks: int | None) -> list[Task]:
    lines = _lines(data, name)
    if len(lines) % 6:
        raise QuantkitError(f"{name}: {len(lines)} lines, but a HellaSwag task has 6: context, answer, four endings")
    left = list(range(len(lines) // 6))
    draw, tasks = _mt19937(), []
    for _ in range(len(left) if n_tasks is None else min(n_tasks, len(left))):
        at = left.pop(_uniform(draw, len(left))) * 6
        context, answer = lines[at], re.match(r"\s*\+?0*([0-3])(?!\d)", lines[at + 1], re.ASCII)
        if answer is None:
            raise QuantkitError(f"{name}: line {at + 2} is {lines[at + 1][:40]!r}, not the number of an ending, 0 to 3")
        texts = tuple(f"{context} {ending}" for ending in lines[at + 2 : at + 6])
        tasks.append(Task(texts, frozenset([int(answer[1])])))
    return tasks


def _winogrande(data: bytes, name: str, n_tasks: int | None) -> list[Task]:
    # llama.cpp drops the last line, which no newline ends once its reader of prompts has taken that away.
    tasks = []
    for line in data.decode("utf-8", "replace").removesuffix("\n").split("\n")[:-1]:
        commas, quoted = [], False
        for i, character in enumerate(line):
            if character == '"':
                quoted = not quoted
            elif character == "," and not quoted:
                commas.append(i)
                if len(commas) == 4:
                    break
        if len(commas) < 4:
            log.warning("%s: not a Winogrande task, left out: %s", name, line[:80])
            continue
        sentence, one, two = (line[a + 1 : b] for a, b in itertools.pairwise(commas))
        if sentence.startswith('"'):
            sentence = sentence[1:-1]
        answer = re.match(r"\s*\+?0*([12])(?!\d)", line[commas[3] + 1 :], re.ASCII)
        if "_" not in sentence or answer is None:
            log.warning("%s: no _ in the sentence or no answer, left out: %s", name, line[:80])
            continue
        before, after = sentence.split("_", 1)
        stems = before + one, before + two
        tasks.append(Task(tuple(stem + after for stem in stems), frozenset([int(answer[1]) - 1]), stems))
    return tasks if n_tasks is None or n_tasks >= len(tasks) else [tasks[i] for i in _picked(len(tasks), n_tasks)]


def _multiple_choice(data: bytes, name: str, n_tasks: int | None) -> list[Task]:
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        if size > len(data) - at:
            raise QuantkitError(f"{name}: cut off at byte {at}, or not a multiple-choice file")
        at += size
        return data[at - size : at]

    def number() -> int:
        value: int = struct.unpack("<I", take(4))[0]
        return value

    def text() -> str:
        return take(number()).decode("utf-8", "replace")

    def answers() -> tuple[list[str], tuple[int, ...]]:
        count = number()
        if count > _MAX_ANSWERS:
            raise QuantkitError(f"{name}: {count} answers at byte {at - 4}: not a multiple-choice file, or damaged")
        return [text() for _ in range(count)], struct.unpack(f"<{count}i", take(4 * count))

    n = number()
    positions = struct.unpack(f"<{n}I", take(4 * n))
    body = at
    picked = range(n) if n_tasks is None or n_tasks >= n else _picked(n, n_tasks)
    tasks = []
    for i in picked:
        if isinstance(picked, list):
            if not body <= positions[i] <= len(data):
                raise QuantkitError(f"{name}: task {i} is said to stand at byte {positions[i]} of {len(data)}")
            at = positions[i]
        question, (choices, labels) = text(), answers()
        answers()  # with several right ones, which llama.cpp does not score either
        if not question or not choices or not all(choices):
            raise QuantkitError(f"{name}: task {i} has an empty question or answer")
        right = frozenset(j for j, label in enumerate(labels) if label == 1)
        tasks.append(Task(tuple(f"{question} {choice}" for choice in choices), right))
    return tasks


# -- random numbers, as C++'s std::mt19937 rng(1) draws them


def _mt19937(seed: int = 1) -> Callable[[], int]:
    """The generator's 32-bit numbers (Matsumoto and Nishimura 1998, initialised as in their version of 2002)."""
    state = [seed]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + i) & 0xFFFFFFFF)
    generator = random.Random()
    generator.setstate((3, (*state, 624), None))
    return lambda: generator.getrandbits(32)


def _uniform(draw: Callable[[], int], n: int) -> int:
    """A number below `n`, drawn as libstdc++ does (Lemire 2019)."""
    product = draw() * n
    if product & 0xFFFFFFFF < n:
        while product & 0xFFFFFFFF < (1 << 32) % n:
            product = draw() * n
    return product >> 32


def _picked(n: int, count: int) -> list[int]:
    """`count` of `n` numbers; each drawn one leaves its place to the last. The arithmetic is in float32."""
    draw, left, picked = _mt19937(), list(range(n)), []
    for _ in range(count):
        share = np.float32(draw()) * np.float32(2.0**-32)
        at = min(int(share * np.float32(len(left))), len(left) - 1)
        picked.append(left[at])
        left[at] = left[-1]
        left.pop()
    return picked


# -- scores


@dataclass(frozen=True)
class _Prepared:
    """The tokens of a task's texts, and for each text the pairs (text, position) -> token that are scored.

    `spans` are the first and last (exclusive) scored token of each text. The score of text i is the mean of the
    log-likelihoods of its span, where the first may be predicted elsewhere: `borrowed` holds the text whose last
    position predicts it instead, or None.
    """

    tokens: list[np.ndarray]
    spans: list[tuple[int, int]]
    borrowed: int | None = None

    @property
    def extent(self) -> tuple[int, int]:
        """About where the first scored token stands, and the length of the longest text."""
        return min(start for start, _ in self.spans) // 16, max(len(each) for each in self.tokens)


def _prepare(task: Task, vocabulary: Vocabulary) -> _Prepared:
    tokens = [vocabulary.encode(text) for text in task.texts]
    shortest = min(len(each) for each in tokens)
    if shortest < 2:
        raise QuantkitError(f"a task with too short a text: {task.texts[0][:80]!r}")
    heads = np.stack([each[:shortest] for each in tokens])
    differ = np.flatnonzero((heads != heads[0]).any(axis=0))
    # Every text keeps a token to score, even where it is how another begins; and one before it.
    common = max(1, min(int(differ[0]) if differ.size else shortest, shortest - 1))
    if task.stems is None:
        return _Prepared(tokens, [(common, len(each)) for each in tokens])
    skip = all(len(each) - common > _WINOGRANDE_TRAILING for each in tokens)
    spans = []
    for each, stem in zip(tokens, task.stems, strict=True):
        start = len(vocabulary.encode(stem)) if skip else common
        # The last token, mostly the full stop, does not count where another does.
        spans.append((start, max(start, len(each) - (1 if len(each) - start > 1 else 0))))
    # llama.cpp predicts the second choice's first token from the end of the first sentence when the choice counts.
    return _Prepared(tokens, spans, None if skip else 0)


def tasks(
    model: AnyModel,
    items: Sequence[Task],
    *,
    kind: str = "tasks",
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> TasksResult:
    """Let `model` (a loaded model, a source, or a path) choose the likeliest text of each of `items` (`read_tasks`).

    The score of a text is the mean log-likelihood of its scored tokens; the first of equal ones wins, in Winogrande
    the last. `compute` says what computes. `progress` is told of tasks, and of the accuracy so far.

    Raises QuantkitError without tasks, for tasks without tokens to score, and when logits are NaN.
    """
    if not items:
        raise QuantkitError("there are no tasks to score")
    model = load(model, compute)
    vocabulary = Vocabulary.from_metadata(model.source.metadata)
    prepared = [_prepare(task, vocabulary) for task in items]
    scores: list[list[float]] = [[] for _ in items]
    # Tasks alike in where their scored tokens begin and end run together: little is padded, few logits are for nothing.
    order = sorted(range(len(items)), key=lambda i: prepared[i].extent)
    done = right = count = 0

    def within(share: float) -> None:
        if progress is not None:
            progress(done + share * count, len(order), right / done if done else None)

    while done < len(order):
        count = n_texts = 0
        for i in order[done:]:
            _, longest = prepared[i].extent
            n_texts += len(prepared[i].tokens)
            if count and n_texts > max(model.batch(longest), 8):
                break
            count += 1
        some = order[done : done + count]
        with model.telling(within):
            found = _score(model, [prepared[i] for i in some])
        for i, own in zip(some, found, strict=True):
            scores[i] = own
            right += _choose(items[i], own) in items[i].right
        done += count
        if progress is not None:
            progress(done, len(order), right / done)
    chosen = [_choose(task, own) for task, own in zip(items, scores, strict=True)]
    hits = np.cumsum([choice in task.right for task, choice in zip(items, chosen, strict=True)])
    n = len(items)
    accuracy = Estimate.share(int(hits[-1]), n)
    share = accuracy.value
    z = _Z * _Z / n
    half = z * math.sqrt(n * (4 * share * (1 - share) + z)) / (2 * _Z)
    return TasksResult(
        kind=kind,
        accuracy=accuracy,
        low=(share + z / 2 - half) / (1 + z),
        high=(share + z / 2 + half) / (1 + z),
        n_right=int(hits[-1]),
        n_tasks=n,
        backend=model.backend,
        precision=model.precision,
        blas=model.blas,
        chosen=chosen,
        scores=scores,
        running=(hits / np.arange(1, n + 1)).tolist(),
    )


def _choose(task: Task, scores: list[float]) -> int:
    if task.stems is not None:
        return 0 if scores[0] > scores[1] else 1
    return int(np.argmax(scores))


def _score(model: Model, batch: list[_Prepared]) -> list[list[float]]:
    """The scores of each task's texts. The texts are padded at their end, where causal attention does not look."""
    sequences = [each for one in batch for each in one.tokens]
    # One position more than the longest text has: after it stands the token that a borrowed prediction is asked for.
    width = max(len(each) for each in sequences) + 1
    tokens = np.zeros((len(sequences), width), np.int32)
    for row, each in zip(tokens, sequences, strict=True):
        row[: len(each)] = each
    at = 0
    for one in batch:
        if one.borrowed is not None:
            lender = one.tokens[one.borrowed]
            tokens[at + one.borrowed, len(lender)] = one.tokens[1][one.spans[1][0]]
        at += len(one.tokens)
    first = min(span[0] for one in batch for span in one.spans) - 1
    likelihoods = model.log_likelihoods(tokens, first)
    results, at = [], 0
    for one in batch:
        own = []
        for i, (start, stop) in enumerate(one.spans):
            values = likelihoods[at + i, start - 1 - first : stop - 1 - first].copy()
            if one.borrowed is not None and i == 1:
                values[:1] = likelihoods[at + one.borrowed, len(one.tokens[one.borrowed]) - 1 - first]
            own.append(float(values.mean()) if values.size else math.nan)
        results.append(own)
        at += len(one.tokens)
    return results
