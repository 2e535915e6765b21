"""Synthetic data sets: token ids without text, as many as a run needs."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from experiments.datasets.base import Dataset
from experiments.datasets.kit.special_tokens import SPECIAL_TOKENS

Ids = npt.NDArray[np.int32]
#: Ids below this are padding and other special tokens of most models.
FIRST_ID = len(SPECIAL_TOKENS)


@dataclass(kw_only=True)
class Synthetic(Dataset):
    """Token ids that are drawn."""

    @property
    def partial(self) -> bool:
        """There are as many as a run needs."""
        return True

    def fingerprint(self) -> str:
        """Digest the options."""
        return hashlib.sha256(json.dumps([self.name, asdict(self)]).encode()).hexdigest()[:16]

    def documents(self) -> Iterator[str]:
        """Never called: there is no text."""
        raise NotImplementedError(f"dataset={self.name} has tokens and no text")

    @abstractmethod
    def ids(self, num_tokens: int, vocab_size: int) -> Ids:
        """Return int32 ``[num_tokens]``, from ``FIRST_ID`` to ``vocab_size - 1``."""


@dataclass(kw_only=True)
class Random(Synthetic):
    """Every token alike.

    Attributes:
        seed: of the draw.
    """

    name: ClassVar[str] = "random"
    description: ClassVar[str] = "tokens drawn at random from the whole vocabulary"

    seed: int = 0

    def ids(self, num_tokens: int, vocab_size: int) -> Ids:
        """Draw."""
        return np.random.default_rng(self.seed).integers(FIRST_ID, vocab_size, num_tokens, dtype=np.int32)


@dataclass(kw_only=True)
class Constant(Synthetic):
    """One token only: the model's own routers then send all to the same experts, up to what positions change.

    Attributes:
        token: its id.
    """

    name: ClassVar[str] = "constant"
    description: ClassVar[str] = "one token again and again"

    token: int = FIRST_ID

    def validate(self) -> None:
        """Check the token.

        Raises:
            ValueError: a negative id.
        """
        _check_token(self.token)

    def ids(self, num_tokens: int, vocab_size: int) -> Ids:
        """Repeat.

        Raises:
            ValueError: an id that the model does not know.
        """
        _check_token(self.token, vocab_size)
        return np.full(num_tokens, self.token, dtype=np.int32)


@dataclass(kw_only=True)
class SkewedTokens(Synthetic):
    """One token has a share of all, the others are alike.

    Attributes:
        share: of the one token; exact up to rounding.
        token: its id.
        seed: of the order.
    """

    name: ClassVar[str] = "skewed_tokens"
    description: ClassVar[str] = "a share of all tokens is one and the same, the others are random"

    share: float = 0.5
    token: int = FIRST_ID
    seed: int = 0

    def validate(self) -> None:
        """Check the share and the token.

        Raises:
            ValueError: a share outside 0 to 1 or a negative id.
        """
        if not 0 <= self.share <= 1:
            raise ValueError(f"dataset.share: {self.share}, must be 0 to 1")
        _check_token(self.token)

    def ids(self, num_tokens: int, vocab_size: int) -> Ids:
        """Draw the others, then the order.

        Raises:
            ValueError: an id that the model does not know.
        """
        _check_token(self.token, vocab_size)
        rng = np.random.default_rng(self.seed)
        others = np.setdiff1d(np.arange(FIRST_ID, vocab_size, dtype=np.int32), [self.token])
        ids = rng.choice(others, num_tokens)
        ids[: round(num_tokens * self.share)] = self.token
        return rng.permutation(ids)


def _check_token(token: int, vocab_size: int | None = None) -> None:
    if token < 0 or (vocab_size is not None and token >= vocab_size):
        limit = "at least 0" if vocab_size is None else f"below {vocab_size}, the model's vocabulary"
        raise ValueError(f"dataset.token: {token}, must be {limit}")
