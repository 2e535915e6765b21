"""What H200s were seen to take, ours and others', with sizes that are known; every figure has its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.simulator.model_work import LayerShape

#: One NVIDIA H200, driver 580, PyTorch 2.11.0+cu130, medians, 2026-11-26; a layer written by hand around
#: ``grouped_mm`` and puts through symmetric memory, under MPS where ranks share the chip.
OWN = "measured by this project on one H200, 2026-11-26"
LLEP = "github.com/SalesforceAIResearch/LeastLoadedEP, revision 0349746, assets/speedup.png (arXiv 2601.17111)"

QWEN3 = LayerShape(128, 2048, 768, 8)


@dataclass(frozen=True)
class Products:
    """Both matrix products of equally loaded experts, with the activation between them.

    Attributes:
        shape: of the experts.
        rows: over all of them.
        ms: what they took.
    """

    shape: LayerShape
    rows: int
    ms: float


#: The hardware's rates were fitted to all of these.
PRODUCTS = (
    Products(LayerShape(128, 768, 3072, gated=False), 8192, 0.49),
    Products(LayerShape(16, 768, 3072, gated=False), 2048, 0.11),
    Products(LayerShape(60, 2048, 1408), 16384, 0.89),
    Products(LayerShape(128, 2048, 768), 16384, 0.51),
    Products(LayerShape(8, 4096, 14336), 8192, 4.89),
    Products(LayerShape(128, 2048, 768), 256, 0.47),
    Products(LayerShape(128, 2048, 768), 32768, 0.89),
)


@dataclass(frozen=True)
class Layer:
    """A layer of Qwen3-30B-A3B's shape on ranks of one H200.

    Attributes:
        num_ranks: ranks that share it.
        num_tokens: tokens per rank.
        ms: what it took.
        skew: share of the assignments that go to expert 0.
        balanced: whether every rank holds that expert, and keeps its own assignments to it.
        fitted: whether a constant was fitted to it.
    """

    num_ranks: int
    num_tokens: int
    ms: float
    skew: float = 0.0
    balanced: bool = False
    fitted: bool = False


LAYERS = (
    Layer(1, 32, 0.82, fitted=True),
    Layer(1, 4096, 1.83),
    Layer(2, 4096, 3.41, fitted=True),
    Layer(2, 4096, 4.19, 0.5),
    Layer(2, 4096, 3.34, 0.5, balanced=True),
    Layer(2, 4096, 5.07, 0.9),
    Layer(2, 4096, 3.63, 0.9, balanced=True),
    Layer(4, 4096, 7.64, fitted=True),
    Layer(4, 4096, 11.2, 0.5),
    Layer(4, 4096, 7.70, 0.5, balanced=True),
    Layer(4, 4096, 15.1, 0.9),
    Layer(4, 4096, 7.90, 0.9, balanced=True),
)


@dataclass(frozen=True)
class SpeedUps:
    """How many times as fast as static expert parallelism LLEP computed a layer on 8 H200.

    Attributes:
        model: whose layer.
        shape: of the layer.
        num_tokens: per GPU.
        num_hot: experts that share the hot tokens, all at home on the first GPU.
        values: by the share of the tokens that go to them; 0 is of balanced routing, which has no hot
            experts and is among the values of one number of them.
    """

    model: str
    shape: LayerShape
    num_tokens: int
    num_hot: int
    values: Mapping[float, float]


#: LLEP's planning was fitted to this model's layers; the others are predicted.
FITTED_MODEL = "gpt-oss-120b"
_GPT_OSS = (FITTED_MODEL, LayerShape(128, 2880, 2880, 4), 32768)
_DEEPSEEK = ("DeepSeek-R1", LayerShape(256, 7168, 2048, 8), 16384)
_KIMI = ("Kimi-K2", LayerShape(384, 7168, 2048, 8), 16384)
SPEED_UPS = (
    SpeedUps(*_GPT_OSS, 16, {0: 1.07, 0.3: 1.73, 0.5: 2.85, 0.8: 4.37, 0.95: 5.19}),
    SpeedUps(*_GPT_OSS, 4, {0.3: 2.09, 0.5: 3.05, 0.8: 4.47, 0.95: 5.22}),
    SpeedUps(*_GPT_OSS, 1, {0.3: 2.41, 0.5: 3.48, 0.8: 5.26, 0.95: 6.11}),
    SpeedUps(*_DEEPSEEK, 16, {0: 0.92, 0.3: 1.69, 0.5: 2.65, 0.8: 3.83, 0.95: 4.59}),
    SpeedUps(*_DEEPSEEK, 4, {0.3: 1.76, 0.5: 2.83, 0.8: 3.64, 0.95: 4.64}),
    SpeedUps(*_DEEPSEEK, 1, {0.3: 1.96, 0.5: 2.77, 0.8: 4.23, 0.95: 5.13}),
    SpeedUps(*_KIMI, 16, {0: 1.03, 0.3: 1.8, 0.5: 2.73, 0.8: 4.01, 0.95: 4.83}),
    SpeedUps(*_KIMI, 4, {0.3: 1.94, 0.5: 2.85, 0.8: 3.96, 0.95: 4.67}),
    SpeedUps(*_KIMI, 1, {0.3: 1.48, 0.5: 2.74, 0.8: 4.09, 0.95: 5.03}),
)
