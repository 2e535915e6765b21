"""The tokenizer of a model: its own, or byte-level BPE that is trained once on the pydoc text and cached."""

from __future__ import annotations

import hashlib
import os

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.console import say
from experiments.datasets.kit.special_tokens import SPECIAL_TOKENS
from experiments.datasets.pydoc import PyDoc
from experiments.files import kept_content, kept_file
from harmoeny.models.base import TokenizerFile

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary without room for every byte.

    Raises:
        ValueError: fewer tokens than bytes and special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"model.vocab_size: {vocab_size}, must be at least {MIN_VOCAB_SIZE} (all bytes)")


def load_tokenizer(vocab_size: int, own: TokenizerFile | None = None) -> Tokenizer:
    """Return a tokenizer whose ids are all below ``vocab_size``: the model's own, or one that the first call trains.

    Raises:
        ValueError: the vocabulary has no room for all bytes, or for the model's own tokenizer, or that is damaged.
    """
    if own is not None:
        return _load_own(own, vocab_size)
    check_vocab_size(vocab_size)
    source = PyDoc()
    key = hashlib.sha256(f"{source.fingerprint()}:{tokenizers.__version__}".encode()).hexdigest()[:16]
    path = kept_file(f"tokenizer-{vocab_size}-{key}.json", lambda: _train(vocab_size, source))
    return Tokenizer.from_str(kept_content(path).decode())


def _load_own(own: TokenizerFile, vocab_size: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(own.path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"model.local_path: {str(own.path)!r} is no readable tokenizer ({' '.join(str(error).split())}); "
            "get the file again (git lfs pull, where it is a pointer)"
        ) from error
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if max(size, own.end_id + 1) > vocab_size:
        raise ValueError(f"model.vocab_size: {vocab_size}, must be at least {size}, the tokens of {own.path}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _train(vocab_size: int, source: PyDoc) -> bytes:
    """Return a new tokenizer as JSON."""
    say(f"training a tokenizer of {vocab_size} tokens; it is kept for later runs")
    # Ranks and test processes fork later; the library's own threads would warn about it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(source.documents(), trainer)
    return tokenizer.to_str().encode()
