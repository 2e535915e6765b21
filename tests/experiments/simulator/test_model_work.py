from __future__ import annotations

import pytest

from experiments.compose.compose import compose_point
from experiments.simulator.model_work import TracedModel
from harmoeny.models.moe_stack import MoEStack
from harmoeny.models.switch import Switch


def test_a_stack_computes_its_routers_and_nothing_else_outside_its_experts() -> None:
    config = MoEStack(num_experts=8, top_k=2, hidden_size=16, intermediate_size=32, num_layers=3, gated=True)
    work = TracedModel(config, seq_len=10).work(2)
    assert [table[:, 0].sum() for table in work.route] == [2 * 20 * 16 * 8] * 3
    assert [table[:, 0].sum() for table in work.dense] == [0.0] * 4
    assert work.expert_bytes == 4 * 3 * 16 * 32
    assert work.flops_per_token == 2 * 3 * 16 * 32
    assert work.inner_width == 2 * 32
    assert work.dense_bytes == 4 * (8192 * 16 + 3 * 16 * 8)
    # The first thing read are the ids and their rows of the embedding, and hidden states are written.
    assert work.dense[0][0, 1] == 8 * 20 + 2 * 4 * 20 * 16


def test_a_switch_transformers_products_are_those_of_its_layers() -> None:
    hidden, inner, tokens, batch, seq_len, vocab = 32, 2 * 16, 3 * 24, 3, 24, 1024
    config = Switch(
        num_experts=4, hidden_size=hidden, intermediate_size=64, num_layers=2, num_decoder_layers=1, num_heads=2,
        head_size=16, sparse_step=1, vocab_size=vocab,
    )  # fmt: skip
    work = TracedModel(config, seq_len).work(batch)
    assert work.layer_tokens == [tokens, tokens, batch]
    attention = 4 * 2 * tokens * hidden * inner + 2 * 2 * batch * seq_len * seq_len * inner
    assert [work.dense[i][:, 0].sum() for i in (0, 1)] == [attention, attention]
    own = 4 * 2 * batch * hidden * inner + 2 * 2 * batch * inner
    cross = 2 * 2 * (batch + tokens) * hidden * inner + 2 * 2 * batch * seq_len * inner
    assert work.dense[2][:, 0].sum() == own + cross
    assert work.dense[3][:, 0].sum() == pytest.approx(2 * batch * hidden * vocab)


def test_the_papers_qwen_is_qwen_without_its_shared_expert_and_head() -> None:
    whole, paper = (
        TracedModel(
            compose_point(
                "experiment=paper_qwen", f"model={name}", "model.num_layers=2", "model.dtype=float32",
                "model.random_weights=true",
            ).model,
            16,
        ).work(3)
        for name in ("qwen15_moe", "qwen15_moe_paper")
    )  # fmt: skip
    for same in ("num_experts", "hidden_size", "inner_width", "expert_bytes", "flops_per_token"):
        assert getattr(whole, same) == getattr(paper, same), same
    flops = [sum(float(table[:, 0].sum()) for table in (*work.dense, *work.route)) for work in (whole, paper)]
    shared = 2 * 3 * 2048 * 5632 + 2 * 2048  # three matrices and its gate, per token and layer
    assert flops[0] - flops[1] == 2 * (3 * 16) * shared + 3 * 2 * 2048 * (151936 - 1)
