"""Data sets of the hub, without a network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from experiments.datasets.bookcorpus import BookCorpus
from experiments.datasets.hub import Hub
from experiments.registry import discover
from experiments.text.prepare import prepare_point
from experiments.text.tokens import prepare_tokens
from tests.conftest import Load
from tests.experiments.datasets.row_files import ROWS, written
from tests.experiments.datasets.test_datasets import VOCAB_SIZE


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that refuses connections, and an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "empty")


HUB = sorted(name for name, cls in discover("dataset")[0].items() if issubclass(cls, Hub) and cls is not Hub)


class TestHub:
    def test_the_papers_data_sets_are_there(self) -> None:
        assert {"bookcorpus", "wikitext", "wmt19", "arxiver"} <= set(HUB)

    @pytest.mark.usefixtures("no_network")
    @pytest.mark.parametrize("name", [*HUB, "cocktail"])
    def test_without_network_one_error_says_so_at_once(self, name: str, load: Load) -> None:
        point = load(f"dataset={name}")  # composed and checked without asking the hub
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"is not on this machine, and the hub cannot be reached; .*dataset=local"):
            prepare_point(point)
        assert time.monotonic() - start < 60  # its own client would go on for longer

    @pytest.mark.usefixtures("no_network")
    def test_rows_of_a_folder_are_streamed(self, tmp_path: Path) -> None:
        folder = tmp_path / "data"
        folder.mkdir()
        written(folder, "jsonl")
        assert list(Hub(hub_name=str(folder)).documents()) == [row["text"] for row in ROWS]
        with pytest.raises(
            ValueError, match=r"^dataset\.text_field: 'body', must be a field with text; row 0 of .* has"
        ):
            list(Hub(hub_name=str(folder), text_field="body").documents())
        with pytest.raises(ValueError, match=r"^dataset: 'hub' .* cannot be read \(Bad split: nonsense"):
            list(Hub(hub_name=str(folder), split="nonsense").documents())

    @pytest.mark.usefixtures("no_network")
    def test_rows_without_text_are_passed_over(self, tmp_path: Path) -> None:
        folder = tmp_path / "data"
        folder.mkdir()
        (folder / "rows.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": " "}\n{"text": "two"}\n')
        assert list(Hub(hub_name=str(folder)).documents()) == ["one", "two"]

    def test_no_more_is_read_than_a_run_needs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[int] = []

        def rows(_: Hub) -> Iterator[dict[str, str]]:
            for i in range(100_000):
                read.append(i)
                yield {"text": f"word {i}"}

        monkeypatch.setattr(Hub, "_rows", rows)
        tokens = prepare_tokens(Hub(hub_name=str(tmp_path)), VOCAB_SIZE, num_tokens=500)
        assert tokens.num_tokens == 500
        assert len(read) < 1000
        longer = prepare_tokens(Hub(hub_name=str(tmp_path)), VOCAB_SIZE, num_tokens=800)
        np.testing.assert_array_equal(np.load(longer.path)[:500], np.load(tokens.path))

    def test_the_files_of_a_folder_count(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
        before = Hub(hub_name=str(tmp_path)).fingerprint()
        assert Hub(hub_name=str(tmp_path)).fingerprint() == before
        (tmp_path / "rows.jsonl").write_text('{"text": "two"}\n')
        assert Hub(hub_name=str(tmp_path)).fingerprint() != before

    def test_what_is_asked_for_counts(self) -> None:
        prints = [
            BookCorpus().fingerprint(), BookCorpus(revision="a").fingerprint(), BookCorpus(split="test").fingerprint(),
        ]  # fmt: skip
        assert len(set(prints)) == 3
        assert BookCorpus().fingerprint() == BookCorpus().fingerprint()
