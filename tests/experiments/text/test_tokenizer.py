from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from experiments.datasets.kit.special_tokens import END_ID
from experiments.text.tokenizer import MIN_VOCAB_SIZE, check_vocab_size, load_tokenizer
from harmoeny.models.base import TokenizerFile
from tests.strategies import examples

TEXT = "The quick brown fox isn't 42 years old: caf\xe9, \u4f60\u597d, \U0001f512!\n\tdef f(x):  return x\r\n"


@cache
def loaded(vocab_size: int) -> Tokenizer:
    return load_tokenizer(vocab_size)


@pytest.mark.parametrize("vocab_size", [MIN_VOCAB_SIZE, 512])
@examples()
@given(text=st.text())
@example(text=TEXT)
@example(text="  \n\n\x00 \u2028")
@example(text="<unk></s>")
def test_text_comes_back_and_ids_are_in_range(vocab_size: int, text: str) -> None:
    tokenizer = loaded(vocab_size)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < vocab_size for i in ids)


def test_special_tokens_have_the_ids_that_the_models_expect() -> None:
    tokenizer = load_tokenizer(512)
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert END_ID == 1


@pytest.mark.parametrize("vocab_size", [MIN_VOCAB_SIZE, 512])
def test_vocabulary_has_the_size_asked_for(vocab_size: int) -> None:
    assert load_tokenizer(vocab_size).get_vocab_size() == vocab_size


def test_merges_make_english_shorter() -> None:
    text = "This function returns the value of the given object."
    assert len(load_tokenizer(MIN_VOCAB_SIZE).encode(text).ids) == len(text)
    assert len(load_tokenizer(512).encode(text).ids) < 0.7 * len(text)


def test_trained_again_it_is_the_same(session_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_tokenizer(512)
    for text in session_cache.glob("pydoc-*"):
        (tmp_path / text.name).symlink_to(text)
    monkeypatch.setenv("HARMOENY_CACHE", str(tmp_path))
    assert load_tokenizer(512).to_str() == first.to_str()
    assert list(tmp_path.glob("tokenizer-512-*.json"))


def test_second_call_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_tokenizer(512)
    monkeypatch.setattr("experiments.text.tokenizer.trainers.BpeTrainer", lambda **_: pytest.fail("trained again"))
    assert load_tokenizer(512).to_str() == first.to_str()


def test_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    check_vocab_size(259)
    with pytest.raises(ValueError, match=r"^model\.vocab_size: 258, must be at least 259 \(all bytes\)$"):
        load_tokenizer(258)


@pytest.mark.parametrize("content", ["", "{", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"])
def test_a_damaged_tokenizer_of_a_model_is_named_with_the_remedy(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^model\.local_path: '.*/tokenizer\.json' is no readable tokenizer \(.*lfs"):
        load_tokenizer(512, TokenizerFile(path, 1))
