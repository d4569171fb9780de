"""The kinds of text that tokens stand for."""

from __future__ import annotations

import numpy as np
from conftest import TINYLM

from quantkit.evaluate.token_classes import CLASSES, token_classes
from quantkit.sources.source import open_model
from quantkit.vocabulary import Vocabulary


def test_tokens_of_a_text_by_their_kind():
    vocabulary = Vocabulary.from_metadata(open_model(TINYLM).metadata)
    ids = vocabulary.encode("The returned values,  1984\n\n  of \u4e16", add_special=False)
    names = [CLASSES[i] for i in token_classes(vocabulary, ids)]
    pieces = [vocabulary.piece(token) for token in ids.tolist()]
    assert b"".join(pieces).decode().strip() == "The returned values,  1984\n\n  of \u4e16"
    for name, piece in zip(names, pieces, strict=True):
        text = piece.decode("utf-8", "replace")
        expected = {
            "start of a word": text[:1] == " " and text[1:].isalpha(),
            "rest of a word": text.isalpha(),
            "number": text.strip().isdigit(),
            "punctuation": text.strip() in {",", "."},
            "space": text.isspace() and "\n" not in text,
            "line break": "\n" in text,
            "part of a character": "\ufffd" in text,
            "control": False,
        }
        assert expected[name], (name, piece)
    assert set(CLASSES[:6]) - {"space"} <= set(names)
    shaped = token_classes(vocabulary, np.stack([ids, ids]))
    assert shaped.shape == (2, len(ids)) and (shaped[0] == shaped[1]).all()


def test_control_tokens():
    vocabulary = Vocabulary.from_metadata(open_model(TINYLM).metadata)
    control = [i for i in range(vocabulary.n_tokens) if vocabulary.is_control(i)]
    assert control
    assert {CLASSES[i] for i in token_classes(vocabulary, np.array(control))} == {"control"}
