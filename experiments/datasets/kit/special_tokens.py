"""Tokens that stand for no text; their places are the ids that T5 and Switch expect."""

from __future__ import annotations

SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>"]
#: Ends a document.
END_ID = SPECIAL_TOKENS.index("</s>")
