"""The tokens of a point."""

from __future__ import annotations

from experiments.point.point import Point
from experiments.text.tokens import TokenFile, prepare_tokens


def prepare_point(point: Point) -> TokenFile:
    """Tokenise what a point reads, or find it in the cache.

    Raises:
        ValueError: the data set is not usable, or shorter than a sequence.
    """
    tokens = prepare_tokens(point.dataset, point.model.vocab_size, point.model.tokenizer, point.num_tokens)
    tokens.check(point.options.seq_len)
    return tokens
