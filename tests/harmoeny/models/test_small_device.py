"""Models that are loaded with less device memory than they have weights, against the unmodified model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import harmoeny
from tests.harmoeny.models.saved import save, unmodified

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_model_with_room_for_half_its_experts_generates_what_it_always_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save("qwen3_moe", tmp_path)
    model = unmodified(folder)
    prompt = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    wanted = model.generate(prompt, **options)
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    others = sum(p.nbytes for p in model.parameters()) - experts
    memory = int((others + 0.5 * experts) * 8 / 7) + 2**10
    with harmoeny.load(folder, device_memory=memory) as session:
        num_experts = session.engine.memory.store.layers[0].num_experts
        assert f"harmoeny: {num_experts // 2} of {num_experts} experts" in session.choice
        assert session.choice in capsys.readouterr().err
        assert torch.equal(session.model.generate(prompt, **options), wanted)
        held = sum(len(layer.slots) for layer in session.engine.memory.pool.layers)
        assert held * session.engine.memory.store.layers[0].expert_bytes <= 0.5 * experts + 1
    with harmoeny.load(folder, device_memory=100 * memory) as session:
        assert "all experts of a rank are on its device" in session.choice
        assert torch.equal(session.model.generate(prompt, **options), wanted)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path)
    with pytest.raises(ValueError, match="device_memory: '8GiB', must be None with a policy"):
        harmoeny.load(folder, harmoeny.HarMoEny(), device_memory="8GiB")
    with pytest.raises(ValueError, match="host_threads: -1, must be at least 0"):
        harmoeny.load(folder, host_threads=-1)
    with pytest.raises(ValueError, match=r"device_memory: 1 KiB, must be at least .* KiB: "):
        harmoeny.load(folder, device_memory=1024)
