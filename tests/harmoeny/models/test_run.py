"""A saved model with its tokenizer, and a text file, through run.py on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.harmoeny.models.saved import save
from tests.programs import Programs
from tests.smoke import FIXED_COSTS


@pytest.mark.ranks
def test_saved_model_runs_on_a_local_text(programs: Programs, tmp_path: Path) -> None:
    folder = save("qwen2_moe", tmp_path)
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "expert", "token", "rank", "plan", "batch"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text("expert token rank\n\nplan batch batch expert\n\n" * 100)
    overrides = [
        *("model=transformers", f"model.local_path={folder}", "dataset=local", f"dataset.path={text}"),
        *("router=model", "system=[harmoeny,static_ep]", FIXED_COSTS, "world_size=2"),
        *("batch_size=2", "seq_len=16", "rounds=1", "warmup_rounds=0", f"results_dir={tmp_path}/results"),
        *("device=cpu", "wandb.mode=disabled"),
    ]
    answer = programs.run("run.py", *overrides, variables={"OMP_NUM_THREADS": "1"}, timeout_s=110)
    assert answer.returncode == 0, answer.stderr
    (manifest_path,) = (tmp_path / "results").glob("single/*/manifest.json")
    manifest = json.loads(manifest_path.read_text())
    assert manifest["status"] == "finished"
    assert (
        manifest["model"] | {"name": "transformers", "num_moe_layers": 2, "num_experts": 6, "top_k": 2}
        == (manifest["model"])
    )
    for system in ("harmoeny", "static_ep"):
        check = manifest["checks"][system]
        assert check["passed"]
        assert check["relative_error"] <= 1e-4
        assert check["kept_share"] == 1.0
    assert manifest["dataset"]["num_tokens"] == 100 * (3 + 1 + 4 + 1), "every paragraph ends with </s>"
