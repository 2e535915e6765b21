"""Data sets as token ids: tokenised once into a cached array, cut into sequences, dealt out to ranks."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from experiments.console import say
from experiments.datasets.base import Dataset
from experiments.datasets.kit.special_tokens import END_ID
from experiments.datasets.synthetic import Synthetic
from experiments.files import kept_file
from experiments.point.source import component_digest
from experiments.text.tokenizer import load_tokenizer
from harmoeny.models.base import TokenizerFile
from harmoeny.placement import IntArray

_DOCUMENTS_PER_CALL = 512


@dataclass(frozen=True)
class TokenFile:
    """A tokenised data set.

    Attributes:
        path: int32 array ``[num_tokens]`` in NumPy's format.
        num_tokens: tokens, end-of-document tokens included.
        sha256: digest of the array's bytes.
    """

    path: Path
    num_tokens: int
    sha256: str

    def check(self, seq_len: int) -> None:
        """Refuse a text that is shorter than one sequence.

        Raises:
            ValueError: fewer than ``seq_len`` tokens.
        """
        if self.num_tokens < seq_len:
            raise ValueError(
                f"seq_len: {seq_len}, must be at most {self.num_tokens}, the tokens of the data set; "
                "use a longer text or a smaller seq_len"
            )

    def fresh_batches(self, *, sequences_per_batch: int, seq_len: int) -> int:
        """Return how many global batches the text gives before it starts again from the beginning."""
        return self.num_tokens // seq_len // sequences_per_batch

    def batch(self, *, index: int, rank: int, world_size: int, batch_size: int, seq_len: int) -> IntArray:
        """Return one rank's share of a global batch.

        Sequences are consecutive pieces of the text; batch ``index`` takes the next ``world_size * batch_size``, rank
        after rank, and the text starts again when it is used up.

        Returns:
            int64 ``[batch_size, seq_len]``.
        """
        tokens = np.load(self.path, mmap_mode="r", allow_pickle=False)
        num_sequences = self.num_tokens // seq_len
        first = (index * world_size + rank) * batch_size
        rows = [(first + i) % num_sequences for i in range(batch_size)]
        return np.stack([tokens[row * seq_len : (row + 1) * seq_len] for row in rows]).astype(np.int64)


def prepare_tokens(
    dataset: Dataset, vocab_size: int, own: TokenizerFile | None = None, num_tokens: int | None = None
) -> TokenFile:
    """Tokenise a data set, or find it in the cache.

    Args:
        dataset: the text.
        vocab_size: tokens that the model knows.
        own: the tokenizer that the model brings; None: one of ours.
        num_tokens: how many a run needs: all that is prepared of a data set that is ``partial``.

    Raises:
        ValueError: the data set or the vocabulary is not usable.
    """
    limit = num_tokens if dataset.partial else None
    source = f"{dataset.fingerprint()}{component_digest(dataset, Dataset)}"
    if isinstance(dataset, Synthetic):
        assert limit is not None, "there is no end of synthetic tokens"
        identity = f"{source}{vocab_size} {limit}"
        return _cached(dataset.name, identity, lambda: dataset.ids(limit, vocab_size))
    tokenizer, end_id = load_tokenizer(vocab_size, own), own.end_id if own else END_ID

    def tokenise() -> npt.NDArray[np.int32]:
        say(f"tokenising the text of {dataset.name!r}; it is kept for later runs")
        size = _DOCUMENTS_PER_CALL if limit is None else _DOCUMENTS_PER_CALL // 16
        return np.fromiter(islice(_ids(dataset.documents(), tokenizer, end_id, size), limit), dtype=np.int32)

    amount = "" if limit is None else f" {limit}"
    return _cached(dataset.name, f"{source}{tokenizer.to_str()}{end_id}{amount}", tokenise)


def _cached(name: str, identity: str, make: Callable[[], npt.NDArray[np.int32]]) -> TokenFile:
    """Return the tokens from the cache; make them and write them there first if they are not in it."""
    path = kept_file(f"tokens-{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npy", lambda: _npy(make()))
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return TokenFile(path=path, num_tokens=len(array), sha256=hashlib.sha256(array.tobytes()).hexdigest())


def _npy(ids: npt.NDArray[np.int32]) -> bytes:
    file = io.BytesIO()
    np.save(file, ids, allow_pickle=False)
    return file.getvalue()


def _ids(documents: Iterator[str], tokenizer: Tokenizer, end_id: int, documents_per_call: int) -> Iterator[int]:
    while group := list(islice(documents, documents_per_call)):
        for encoding in tokenizer.encode_batch(group, add_special_tokens=False):
            yield from encoding.ids
            yield end_id
