"""What is measured: a model of Qwen3-30B-A3B's layers, and one small enough to rehearse with on a CPU."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from harmoeny.models.base import DTYPES


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of what it is given.

    Attributes:
        hidden_size: width of a token.
        intermediate_size: width of every (gated) expert.
        num_experts: experts of a layer.
        top_k: experts of a token.
        num_layers: layers, all of them MoE.
        num_heads: attention heads.
        layer_tokens: tokens of the layer measured alone.
        prefill: sequences and tokens of each.
        decode_sequences: sequences that a decode step extends by one token.
        dtype: of weights and activations.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_layers: int
    num_heads: int
    layer_tokens: int
    prefill: tuple[int, int]
    decode_sequences: int
    dtype: str


SHAPES = {
    "qwen3": Shape(2048, 768, 128, 8, 4, 32, 4096, (8, 512), 32, "bfloat16"),
    "tiny": Shape(64, 32, 8, 2, 2, 4, 64, (2, 16), 4, "bfloat16"),
}


@dataclass(frozen=True)
class Measurement:
    """What a measuring module was asked for.

    Attributes:
        shape: the sizes.
        device: where.
        rounds: measured rounds.
        json: where the numbers go.
    """

    shape: Shape
    device: torch.device
    rounds: int
    json: Path

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return DTYPES[self.shape.dtype]


def parse_measurement(module: str, description: str | None, arguments: list[str] | None = None) -> Measurement:
    """Read the command line of a measuring module."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3", help="sizes (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, required=True, help="write the numbers to this file")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    return Measurement(SHAPES[given.shape], torch.device(given.device), given.rounds, given.json)
