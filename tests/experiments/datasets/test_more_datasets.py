"""Files with rows, data sets of the hub without a network, mixes and synthetic tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.datasets.base import Dataset
from experiments.datasets.bookcorpus import BookCorpus
from experiments.datasets.cocktail import Cocktail
from experiments.datasets.hub import Hub
from experiments.datasets.kit.special_tokens import END_ID
from experiments.datasets.local import Local
from experiments.datasets.synthetic import FIRST_ID, Constant, Random, SkewedTokens, Synthetic
from experiments.registry import discover
from experiments.text.prepare import prepare_point
from experiments.text.tokens import prepare_tokens
from tests.conftest import Load
from tests.experiments.datasets.test_datasets import VOCAB_SIZE
from tests.strategies import examples

ROWS = [{"id": i, "text": f"Text {i}.\n\nSecond paragraph.", "translation": {"en": f"Word {i}"}} for i in range(3)]
WRITERS: dict[str, Callable[[Path], object]] = {
    "jsonl": lambda path: path.write_text("".join(f"{json.dumps(row)}\n\n" for row in ROWS)),
    "parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "csv": lambda path: path.write_text(
        "id,text\n" + "".join(f'{row["id"]},"{row["text"]}"\n' for row in ROWS)
    ),
    "tsv": lambda path: path.write_text("id\ttext\n" + "".join(f'{row["id"]}\t"{row["text"]}"\n' for row in ROWS)),
}  # fmt: skip


def written(folder: Path, kind: str) -> str:
    path = folder / f"rows.{kind}"
    WRITERS[kind](path)
    return str(path)


class TestFiles:
    @pytest.mark.parametrize("kind", WRITERS)
    def test_every_row_is_a_document(self, kind: str, tmp_path: Path) -> None:
        data = Local(path=written(tmp_path, kind))
        data.validate()
        assert list(data.documents()) == [row["text"] for row in ROWS]

    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    def test_a_field_inside_a_field(self, kind: str, tmp_path: Path) -> None:
        data = Local(path=written(tmp_path, kind), text_field="translation.en")
        assert list(data.documents()) == ["Word 0", "Word 1", "Word 2"]
        assert data.fingerprint() != Local(path=data.path).fingerprint()

    def test_a_folder_is_read_file_by_file(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "last.txt").write_text("last")
        (tmp_path / "a.txt").write_text("one\n\ntwo")
        (tmp_path / ".hidden").write_text("never")
        written(tmp_path, "jsonl")
        (tmp_path / "rows.jsonl").rename(tmp_path / "b" / "first.jsonl")
        data = Local(path=str(tmp_path))
        data.validate()
        assert list(data.documents()) == ["one", "two", *(row["text"] for row in ROWS), "last"]
        before = data.fingerprint()
        (tmp_path / "a.txt").write_text("one\n\nthree")
        assert data.fingerprint() != before

    @pytest.mark.parametrize(
        ("kind", "field", "message"),
        [
            ("jsonl", "body", r"dataset\.text_field: 'body', must be a field with text; row 1 of .* has id, text, "),
            ("parquet", "id", r"dataset\.text_field: 'id', must be a field with text; row 1 of .* has id, text"),
            ("csv", "translation.en", r"dataset\.text_field: 'translation\.en', must be a field with text; row 1 of"),
        ],
    )
    def test_a_field_without_text_is_named(self, kind: str, field: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            Local(path=written(tmp_path, kind), text_field=field).validate()

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.jsonl", b'{"text": "a"}\n{"text": "b', r"dataset\.path: line 2 of .* is no JSON"),
            ("x.parquet", b"PAR1", r"dataset\.path: .* is no readable Parquet file"),
        ],
    )
    def test_a_damaged_file_is_named(self, name: str, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"^{message}"):
            list(Local(path=str(tmp_path / name)).documents())


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

    def test_what_is_asked_for_counts(self) -> None:
        prints = [
            BookCorpus().fingerprint(), BookCorpus(revision="a").fingerprint(), BookCorpus(split="test").fingerprint(),
        ]  # fmt: skip
        assert len(set(prints)) == 3
        assert BookCorpus().fingerprint() == BookCorpus().fingerprint()


class TestCocktail:
    def test_one_document_of_each_in_turn(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("a1\n\na2\n\na3")
        (tmp_path / "b").write_text("b1")
        data = Cocktail(parts=[str(tmp_path / "a"), str(tmp_path / "b")])
        data.validate()
        assert list(data.documents()) == ["a1", "b1", "a2", "a3"]

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ([], r"dataset\.parts: \[\], must name some of bookcorpus"),
            (["no"], r"dataset\.parts: 'no', must be one of"),
        ],
    )
    def test_parts_are_checked(self, parts: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            Cocktail(parts=parts).validate()


class TestSynthetic:
    @examples()
    @given(n=st.integers(1, 2000), vocab=st.integers(FIRST_ID + 2, 300), share=st.floats(0, 1))
    def test_share_of_the_one_token_is_exact(self, n: int, vocab: int, share: float) -> None:
        ids = SkewedTokens(share=share, token=vocab - 1).ids(n, vocab)
        assert len(ids) == n
        assert np.count_nonzero(ids == vocab - 1) == round(n * share)
        assert ids.min() >= FIRST_ID
        assert ids.max() < vocab

    def test_the_others_are_alike(self) -> None:
        ids = SkewedTokens(share=0.5, token=7).ids(100_000, 53)
        counts = np.bincount(ids, minlength=53)
        others = np.delete(counts[FIRST_ID:], 7 - FIRST_ID)
        assert (abs(others - 50_000 / 49) < 200).all()
        # Spread over the whole text, so that every rank gets its share.
        assert (abs((ids.reshape(10, -1) == 7).mean(axis=1) - 0.5) < 0.03).all()
        counts = np.bincount(Random().ids(100_000, 53), minlength=53)
        assert (abs(counts[FIRST_ID:] - 2000) < 250).all()
        assert set(Constant(token=5).ids(10, 53).tolist()) == {5}

    @pytest.mark.parametrize("data", [Random(), Constant(), SkewedTokens()])
    def test_deterministic_and_without_special_tokens(self, data: Synthetic) -> None:
        tokens = prepare_tokens(data, VOCAB_SIZE, num_tokens=1000)
        ids = np.load(tokens.path)
        np.testing.assert_array_equal(ids, data.ids(1000, VOCAB_SIZE))
        assert tokens.num_tokens == 1000
        assert END_ID not in ids

    def test_bad_values(self) -> None:
        bad: list[tuple[Dataset, str]] = [
            (SkewedTokens(share=1.5), r"dataset\.share: 1\.5, must be 0 to 1"),
            (SkewedTokens(token=-1), r"dataset\.token: -1, must be at least 0"),
            (Constant(token=-1), r"dataset\.token: -1, must be at least 0"),
        ]
        for data, message in bad:
            with pytest.raises(ValueError, match=f"^{message}"):
                data.validate()
        with pytest.raises(ValueError, match=r"^dataset\.token: 600, must be below 512, the model's vocabulary"):
            prepare_tokens(Constant(token=600), VOCAB_SIZE, num_tokens=10)

    def test_a_run_gets_as_many_as_it_needs_and_no_rank_reads_anothers(self, load: Load) -> None:
        point = load("dataset=random", "model=moe_stack", "world_size=2", "batch_size=3", "seq_len=16", "rounds=4")
        tokens = prepare_point(point)
        assert tokens.num_tokens == 5 * 2 * 3 * 16, "checks and warm-up have a batch of their own"
        pieces = [
            tokens.batch(index=i, rank=r, world_size=2, batch_size=3, seq_len=16) for i in range(5) for r in range(2)
        ]
        np.testing.assert_array_equal(np.concatenate(pieces).ravel(), np.load(tokens.path))


def test_documents_of_large_files_are_read_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large").write_text("\n\n".join(f"paragraph {i}" for i in range(5000)))
    data = Local(path=str(tmp_path / "large"))
    assert not data.partial
    whole = prepare_tokens(data, VOCAB_SIZE, num_tokens=100)
    monkeypatch.setattr("experiments.datasets.local._LARGE_BYTES", 1000)
    part = prepare_tokens(data, VOCAB_SIZE, num_tokens=100)
    assert part.num_tokens == 100 < whole.num_tokens
    assert list(islice(np.load(part.path), 100)) == list(islice(np.load(whole.path), 100))
