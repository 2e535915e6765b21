"""What every data set must keep, wherever its text comes from: checked on every one that discovery finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.datasets.base import Dataset
from experiments.datasets.synthetic import FIRST_ID, Synthetic
from experiments.registry import discover
from tests.conformance.refusals import refusal_of

DATASETS: dict[str, type[Dataset]] = discover("dataset")[0]
#: What a data set cannot do without, by its name.
OPTIONS: dict[str, dict[str, Any]] = {"local": {"path": "FOLDER"}}
#: Documents that are compared; a data set may be endless.
_MOST = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts")
    for i in range(3):
        (path / f"{i}.txt").write_text(f"Text {i}. " + "Experts é and tokens. " * 20, encoding="utf-8")
    return path


@pytest.fixture(params=sorted(DATASETS))
def dataset(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A data set as a run has it; one whose text is not here must say so in one line."""
    monkeypatch.setattr("experiments.datasets.hub._hub_answers", lambda: False)  # what is not here is not fetched
    given = OPTIONS.get(request.param, {})
    built = DATASETS[request.param](**{k: str(folder) if v == "FOLDER" else v for k, v in given.items()})
    if reason := refusal_of(built.validate) or refusal_of(lambda: _first(built)):
        assert reason.startswith(("dataset:", "dataset.")), reason
        pytest.skip(f"needs its text or options: {reason}")
    return built


def _first(dataset: Dataset) -> str:
    return "" if isinstance(dataset, Synthetic) else next(dataset.documents())


def documents(dataset: Dataset) -> Iterator[str]:
    return islice(dataset.documents(), _MOST)


def test_documents_are_texts_in_a_fixed_order(dataset: Dataset) -> None:
    """Every rank and every later run reads the same."""
    if isinstance(dataset, Synthetic):
        pytest.skip("has tokens and no text")
    texts = list(documents(dataset))
    assert texts
    assert all(isinstance(text, str) and text for text in texts)
    for text in texts:
        text.encode("utf-8")  # half a surrogate pair would end the tokenizer
    assert list(documents(dataset)) == texts
    assert list(documents(replace(dataset))) == texts


def test_the_fingerprint_is_that_of_the_text(dataset: Dataset) -> None:
    digest = dataset.fingerprint()
    assert digest == dataset.fingerprint() == replace(dataset).fingerprint()
    assert 0 < len(digest) <= 64
    assert digest.isalnum()


def test_drawn_tokens_are_tokens_and_always_the_same(dataset: Dataset) -> None:
    if not isinstance(dataset, Synthetic):
        pytest.skip("has text")
    ids = dataset.ids(500, 300)
    assert ids.shape == (500,)
    assert ids.dtype == np.int32
    assert ids.min() >= FIRST_ID
    assert ids.max() < 300
    np.testing.assert_array_equal(replace(dataset).ids(500, 300), ids)


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_defaults_are_read_or_say_which_option_they_need(name: str) -> None:
    dataset = DATASETS[name]()
    assert dataset.name == name
    assert "\n" not in dataset.description
    assert all(f.kw_only for f in fields(dataset))
    reason = refusal_of(dataset.validate)
    assert not reason or reason.startswith(("dataset:", "dataset.")), reason
