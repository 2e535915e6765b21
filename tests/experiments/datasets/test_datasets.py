import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.datasets import pydoc
from experiments.datasets.kit.special_tokens import END_ID
from experiments.datasets.local import Local
from experiments.datasets.pydoc import PyDoc
from experiments.files import cache_dir, kept_file
from experiments.text.tokenizer import MIN_VOCAB_SIZE, load_tokenizer
from experiments.text.tokens import TokenFile, prepare_tokens
from results_schema.atomic import atomic_path
from tests.strategies import examples

VOCAB_SIZE = 512
# Modules that do something when they are imported, or that nothing here needs.
NEVER_IMPORTED = ("antigravity", "this", "idlelib", "turtle", "tkinter", "lib2to3", "smtplib", "xmlrpc")
COLLECT = f"""
import hashlib, json, sys
from experiments.datasets.pydoc import PyDoc
digest = hashlib.sha256(json.dumps(list(PyDoc().documents())).encode()).hexdigest()
print(json.dumps([digest, [name for name in {NEVER_IMPORTED} if name in sys.modules]]))
"""


class TestPyDoc:
    @pytest.mark.programs
    def test_another_process_collects_the_same_and_imports_no_source(self, tmp_path: Path) -> None:
        here = PyDoc().documents()
        environment = os.environ | {"HARMOENY_CACHE": str(tmp_path), "PYTHONHASHSEED": "17"}
        there = subprocess.run([sys.executable, "-c", COLLECT], env=environment, capture_output=True, check=True)
        digest, imported = json.loads(there.stdout)
        assert digest == _digest(list(here))
        assert imported == []

    def test_some_megabytes_of_english(self) -> None:
        documents = list(PyDoc().documents())
        text = "\n".join(documents)
        assert 1_000_000 < len(text) < 20_000_000
        assert sum(c.isascii() for c in text) > 0.99 * len(text)
        (first, _), *_ = Counter(text.lower().split()).most_common(1)
        assert first == "the"  # as in all English
        assert len(set(documents)) == len(documents)
        assert all(document.strip() for document in documents)

    def test_known_texts_are_there(self) -> None:
        documents = set(PyDoc().documents())
        assert any(d.startswith("Heap queue algorithm") for d in documents)  # a module
        assert any(d.startswith('The "if" statement') for d in documents)  # a topic of help()

    def test_second_call_reads_the_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = list(PyDoc().documents())
        monkeypatch.setattr(pydoc, "_sources", lambda: pytest.fail("sources were read again"))
        assert list(PyDoc().documents()) == before

    def test_python_without_docstrings_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HARMOENY_CACHE", str(tmp_path))
        monkeypatch.setattr(pydoc, "_sources", list)
        with pytest.raises(ValueError, match=r"^dataset: 'pydoc' found too little text.*dataset=local"):
            list(PyDoc().documents())
        assert list(tmp_path.iterdir()) == []

    def test_sources_that_are_no_python_are_passed_over(self, tmp_path: Path) -> None:
        broken, good = tmp_path / "broken.py", tmp_path / "good.py"
        broken.write_text("def (")
        good.write_text('"""A text."""\nraise RuntimeError\ndef f():\n    """Another."""\n')
        assert list(pydoc._texts(broken)) == []
        assert list(pydoc._texts(good)) == ["A text.", "Another."]


def _digest(documents: list[str]) -> str:
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()


class TestLocal:
    def test_paragraphs_are_documents(self, tmp_path: Path) -> None:
        path = tmp_path / "text"
        path.write_text("\n\n one\ntwo \n \t\nthree\n\n\n")
        Local(path=str(path)).validate()
        assert list(Local(path=str(path)).documents()) == ["one\ntwo", "three"]

    def test_what_is_not_utf8_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "latin1"
        path.write_bytes("caf\xe9".encode("latin1"))
        Local(path=str(path)).validate()
        assert list(Local(path=str(path)).documents()) == ["caf\ufffd"]

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda _: "", r"^dataset\.path: '', must be a file or a folder with text"),
            (lambda p: str(p / "no"), r"^dataset\.path: '.*no' does not exist, must be a file or a folder"),
            (str, r"^dataset\.path: '.*' has no files, must be a file or a folder"),
            (lambda _: "/dev/null", r"^dataset\.path: '/dev/null' is no file, must be a file or a folder"),
            (lambda p: _written(p, ""), r"^dataset\.path: '.*' is empty, must hold text$"),
            (lambda p: _written(p, " \n\t\n"), r"^dataset\.path: '.*' is empty, must hold text$"),
            # A file that root cannot read either.
            (lambda _: "/proc/self/mem", r"^dataset\.path: '/proc/self/mem' cannot be read \(Input/output error\)$"),
            (lambda p: str(p / ("x" * 300)), r"^dataset\.path: '.*' cannot be read \(File name too long\)$"),
        ],
    )
    def test_unusable_files_are_named(self, make: Callable[[Path], str], message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            Local(path=make(tmp_path)).validate()

    def test_fingerprint_follows_the_text_and_not_the_path(self, tmp_path: Path) -> None:
        one, same, other = (tmp_path / name for name in ("one", "same", "other"))
        one.write_text("text")
        same.write_text("text")
        other.write_text("Text")
        prints = [Local(path=str(path)).fingerprint() for path in (one, same, other)]
        assert prints[0] == prints[1] != prints[2]


def _written(folder: Path, text: str) -> str:
    path = folder / "file"
    path.write_text(text)
    return str(path)


class TestTokens:
    def test_documents_are_tokenised_in_order_and_each_is_ended(self, tmp_path: Path) -> None:
        documents = [
            f"Paragraph {i} of the text, caf\xe9 \U0001f600." for i in range(1100)
        ]  # more than one call's worth
        source = Local(path=_written(tmp_path, "\n\n".join(documents)))
        tokens = prepare_tokens(source, VOCAB_SIZE)
        ids = np.load(tokens.path)
        assert tokens.num_tokens == len(ids)
        assert ids.max() < VOCAB_SIZE
        ends = np.flatnonzero(ids == END_ID)
        tokenizer = load_tokenizer(VOCAB_SIZE)
        found = [tokenizer.decode(ids[a + 1 : b].tolist()) for a, b in pairwise([-1, *ends.tolist()])]
        assert found == documents

    def test_cached_by_text_and_vocabulary(self, tmp_path: Path) -> None:
        source = Local(path=_written(tmp_path, "some text"))
        first = prepare_tokens(source, VOCAB_SIZE)
        written = first.path.stat().st_mtime_ns
        assert prepare_tokens(source, VOCAB_SIZE) == first
        assert first.path.stat().st_mtime_ns == written
        assert prepare_tokens(source, MIN_VOCAB_SIZE).path != first.path
        _written(tmp_path, "some other text")
        assert prepare_tokens(source, VOCAB_SIZE).path != first.path

    @examples()
    @given(
        world_size=st.integers(1, 4),
        batch_size=st.integers(1, 4),
        seq_len=st.integers(1, 9),
        num_batches=st.integers(1, 4),
        extra=st.integers(0, 60),
    )
    def test_sequences_are_consecutive_and_dealt_to_ranks(
        self,
        token_file: Callable[[int], TokenFile],
        world_size: int,
        batch_size: int,
        seq_len: int,
        num_batches: int,
        extra: int,
    ) -> None:
        tokens = token_file(seq_len + extra)
        pieces = [
            tokens.batch(index=i, rank=rank, world_size=world_size, batch_size=batch_size, seq_len=seq_len)
            for i in range(num_batches)
            for rank in range(world_size)
        ]
        assert all(piece.shape == (batch_size, seq_len) and piece.dtype == np.int64 for piece in pieces)
        # The text is 0, 1, 2, ...: all sequences together must count up, and start again after the last whole one.
        wraps_at = tokens.num_tokens // seq_len * seq_len
        found = np.concatenate(pieces).ravel()
        assert (found == np.arange(found.size) % wraps_at).all()

    @given(world_size=st.integers(1, 4), batch_size=st.integers(1, 4), num_sequences=st.integers(1, 40))
    def test_fresh_batches_repeat_nothing(self, world_size: int, batch_size: int, num_sequences: int) -> None:
        tokens = TokenFile(Path("unused"), num_sequences * 8 + 7, "")
        fresh = tokens.fresh_batches(sequences_per_batch=world_size * batch_size, seq_len=8)
        assert fresh * world_size * batch_size <= num_sequences < (fresh + 1) * world_size * batch_size

    def test_text_shorter_than_a_sequence_is_refused(self, tmp_path: Path) -> None:
        tokens = prepare_tokens(Local(path=_written(tmp_path, "ab")), VOCAB_SIZE)
        tokens.check(tokens.num_tokens)
        with pytest.raises(ValueError, match=rf"^seq_len: 9, must be at most {tokens.num_tokens}, the tokens of the"):
            tokens.check(9)


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], TokenFile]:
    folder = tmp_path_factory.mktemp("tokens")

    def make(num_tokens: int) -> TokenFile:
        path = folder / f"{num_tokens}.npy"
        np.save(path, np.arange(num_tokens, dtype=np.int32))
        return TokenFile(path, num_tokens, "")

    return make


def _write_half(path: Path) -> None:
    path.write_text("half of the next")
    raise OSError("disk is full")


class TestCache:
    def test_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HARMOENY_CACHE", str(tmp_path / "chosen" / "deep"))
        assert cache_dir() == tmp_path / "chosen" / "deep"
        assert cache_dir().is_dir()
        monkeypatch.delenv("HARMOENY_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_dir() == tmp_path / "xdg" / "harmoeny"
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert cache_dir() == tmp_path / "home" / ".cache" / "harmoeny"

    def test_folder_that_cannot_be_made_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("HARMOENY_CACHE", str(tmp_path / "file" / "below"))
        with pytest.raises(ValueError, match=r"^HARMOENY_CACHE: '.*below' cannot be created \(Not a directory\)"):
            cache_dir()

    def test_file_appears_complete_or_not_at_all(self, tmp_path: Path) -> None:
        target = tmp_path / "new" / "file.txt"
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            assert not target.exists()
            temporary.write_text("whole")
        assert target.read_text() == "whole"
        with pytest.raises(OSError, match="full"), atomic_path(target) as temporary:
            _write_half(temporary)
        assert target.read_text() == "whole"
        assert list(target.parent.iterdir()) == [target]

    def test_file_without_a_home_or_a_place_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        (tmp_path / "cache" / "name").mkdir(parents=True)
        monkeypatch.setenv("HARMOENY_CACHE", str(tmp_path / "cache"))
        with pytest.raises(ValueError, match=r"^HARMOENY_CACHE: '.*/cache/name' cannot be read .*; set HARMOENY_CACHE"):
            kept_file("name", lambda: b"")
        for name in ("x" * 250, "x" * 300):
            with pytest.raises(ValueError, match=r"^HARMOENY_CACHE: '.*' cannot be .* \(File name too long\); set HA"):
                kept_file(name, lambda: b"")
        monkeypatch.delenv("HARMOENY_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
        with pytest.raises(ValueError, match=r"^HARMOENY_CACHE: not set, and this user has no home folder; set"):
            cache_dir()

    def test_a_full_disk_is_one_line_and_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Full(type(tmp_path)):  # type: ignore[misc]
            def open(self, *_: object) -> object:
                return Path("/dev/full").open("wb", buffering=0)

        @contextmanager
        def full(target: Path) -> Iterator[Path]:
            with atomic_path(target) as temporary:
                yield Full(temporary)

        monkeypatch.setenv("HARMOENY_CACHE", str(tmp_path))
        monkeypatch.setattr("experiments.files.atomic_path", full)
        with pytest.raises(ValueError, match=r"^HARMOENY_CACHE: '.*/name' cannot be written \(No space left on"):
            kept_file("name", lambda: b"content")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "damage",
        [
            lambda _: b"",
            lambda content: content[:10],
            lambda content: content[:-1],
            lambda content: content + b"\n",
            lambda content: bytes([content[0] ^ 1]) + content[1:],
            lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        ],
        ids=["empty", "torn", "cut", "longer", "flipped", "wrong checksum"],
    )
    def test_damaged_files_of_every_kind_are_made_anew(
        self,
        damage: Callable[[bytes], bytes],
        session_cache: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        text = Local(path=_written(tmp_path, "some text"))
        first = prepare_tokens(text, MIN_VOCAB_SIZE)
        cache = tmp_path / "cache"
        cache.mkdir()
        kinds = ("pydoc-", f"tokenizer-{MIN_VOCAB_SIZE}-", first.path.name)
        for path in session_cache.iterdir():
            if path.name.startswith(kinds):
                (cache / path.name).write_bytes(damage(path.read_bytes()))
        assert len(list(cache.iterdir())) == 3
        monkeypatch.setenv("HARMOENY_CACHE", str(cache))
        monkeypatch.setattr(pydoc, "_collected", lambda: json.dumps(["a text"]).encode())
        again = prepare_tokens(text, MIN_VOCAB_SIZE)
        assert again.num_tokens == first.num_tokens
        assert np.load(again.path).tolist() == np.load(first.path).tolist()
        assert capsys.readouterr().err.count("is damaged and is made anew") == 3
        prepare_tokens(text, MIN_VOCAB_SIZE)
        assert not capsys.readouterr().err
