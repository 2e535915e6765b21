"""A finished run is kept exactly as long as it answers the question that is asked now."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.compose.load import load_point
from experiments.point.point import Point
from experiments.results.kept import is_done, is_kept, remarks, replaced
from experiments.results.manifest import new_manifest
from experiments.text.prepare import prepare_point
from results_schema.checksums import checksums
from results_schema.manifest import Status
from tests.conftest import ROOT, Load

#: As the run of an earlier version in tests/data/stored_point was started.
STORED = (
    "device=cpu", "model=moe_stack", "model.hidden_size=32", "model.intermediate_size=64", "model.num_experts=8",
    "model.vocab_size=1024", "batch_size=2", "seq_len=16", "rounds=3", "dataset=random", "wandb.mode=disabled",
    "system=[harmoeny,static_ep]", "router.skew=0.5",
)  # fmt: skip
POLICY = '''"""A policy of a user's."""
from dataclasses import dataclass
from typing import ClassVar

from baselines.static_ep import StaticEP
from {package}.helper import first


@dataclass(kw_only=True)
class Mine(StaticEP):
    """Like Static EP."""

    name: ClassVar[str] = "mine"
    description: ClassVar[str] = "of a user's"
    knows: ClassVar = frozenset({{"exact"}})

    def plan(self, counts, placement):
        return first(super().plan(counts, placement))
'''
DATASET = '''"""A data set of a user's."""
from dataclasses import dataclass
from typing import ClassVar

from experiments.datasets.local import Local


@dataclass(kw_only=True)
class Mine(Local):
    """Nobody thinks of the fingerprint."""

    name: ClassVar[str] = "mine"
    description: ClassVar[str] = "of a user's"

    def documents(self):
        yield from ["one two " * 200] * 5
'''


def finish(point: Point) -> None:
    """Write what a finished run leaves, as far as it matters here."""
    point.folder.mkdir(parents=True, exist_ok=True)
    manifest = new_manifest(point) | {"status": Status.FINISHED, "inputs": point.inputs()}
    (point.folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_of_an_earlier_version_is_kept(load: Load) -> None:
    point = load(*STORED)
    stored = ROOT / "tests" / "data" / "stored_point"
    assert point.run_id == json.loads((stored / "manifest.json").read_text())["run_id"]
    shutil.copytree(stored, point.folder)
    assert is_kept(point)
    assert "does not say of which code" in remarks(point)
    assert "revision dd5384a2ebb3 (now " in remarks(point)


def test_a_run_of_which_a_file_is_damaged_is_measured_again(load: Load) -> None:
    point = load(*STORED)
    finish(point)
    table = point.folder / "layers.parquet"
    table.write_bytes(b"rows")
    manifest = json.loads((point.folder / "manifest.json").read_text())
    (point.folder / "manifest.json").write_text(json.dumps(manifest | {"checksums": checksums(point.folder)}))
    assert is_kept(point)
    table.write_bytes(b"rowz")
    assert not is_kept(point)


def test_force_measures_again_in_the_same_folder(load: Load) -> None:
    point, forced = load(*STORED), load(*STORED, "force=true")
    finish(point)
    assert forced.run_id == point.run_id
    assert is_kept(point)
    assert is_done(forced)
    assert not is_kept(forced)


class TestPolicy:
    @pytest.fixture
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        package = tmp_path / f"of_user_{tmp_path.name}"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "helper.py").write_text("def first(plan):\n    return plan\n")
        (package / "policy.py").write_text(POLICY.format(package=package.name))
        monkeypatch.syspath_prepend(str(tmp_path))
        yield package
        for name in [name for name in sys.modules if name.startswith(package.name)]:
            del sys.modules[name]

    def point(self, load: Load, package: Path) -> Point:
        return load("system=[static_ep]", f"+systems.mine={{_target_:{package.name}.policy.Mine}}", *STORED[:-2])

    def change(self, file: Path, old: str, new: str) -> None:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    @pytest.mark.parametrize(
        ("file", "old", "new"),
        [
            ("policy.py", "return first(super", "raise RuntimeError(super"),
            ("helper.py", "return plan", "return plan or plan"),
        ],
    )
    def test_an_edited_policy_is_measured_again(self, file: str, old: str, new: str, load: Load, package: Path) -> None:
        point = self.point(load, package)
        finish(point)
        assert is_done(point)
        self.change(package / file, old, new)
        again = self.point(load, package)
        assert again.run_id == point.run_id
        assert not is_done(again)

    def test_comments_and_docstrings_do_not_matter(self, load: Load, package: Path) -> None:
        point = self.point(load, package)
        finish(point)
        self.change(package / "policy.py", "Like Static EP.", "As Static EP does.")
        self.change(package / "helper.py", "return plan", "return plan  # as it is")
        assert is_done(self.point(load, package))

    def test_its_executor_and_the_router_and_the_model_count(self, load: Load) -> None:
        sources = load("system=[static_ep,fastermoe]", "router=zipf").sources()
        assert set(sources) == {"systems.static_ep", "systems.fastermoe", "router", "model", "dataset"}
        assert len(set(sources.values())) == 5
        assert "dataset" not in load("backend=simulator", "hardware=dgx1_v100").sources(), "nobody reads it"

    def test_what_it_imports_from_a_folder_beside_its_own_counts(self, load: Load, package: Path) -> None:
        common = package / "common"
        common.mkdir()
        (common / "__init__.py").write_text("")
        (common / "rules.py").write_text("LIMIT = 1\n")
        own = package / "policies"
        own.mkdir()
        (own / "__init__.py").write_text("")
        text = POLICY.format(package=package.name)
        (own / "mine.py").write_text(f"import {package.name}.common.rules as rules\n{text}")
        node = f"+systems.mine={{_target_:{package.name}.policies.mine.Mine}}"
        point = load("system=[static_ep]", node, *STORED[:-2])
        finish(point)
        self.change(common / "rules.py", "1", "2")
        assert not is_done(load("system=[static_ep]", node, *STORED[:-2]))

    def test_a_function_that_makes_it_counts(self, load: Load, package: Path) -> None:
        (package / "make.py").write_text(
            "from baselines.static_ep import StaticEP\n\n\ndef make():\n    return StaticEP(placement='contiguous')\n"
        )
        node = f"+systems.mine={{_target_:{package.name}.make.make}}"
        point = load("system=[static_ep]", node, *STORED[:-2])
        finish(point)
        self.change(package / "make.py", "contiguous", "round_robin")
        again = load("system=[static_ep]", node, *STORED[:-2])
        assert again.run_id == point.run_id
        assert not is_done(again)
        assert replaced(again).startswith("in place of the finished run, as the code or a file of systems.mine has")

    def test_an_edited_data_set_is_read_and_measured_again(self, load: Load, package: Path) -> None:
        (package / "data.py").write_text(DATASET)

        def point() -> Point:
            config = [argument for argument in STORED if argument != "dataset=random"]
            return load(
                *config, "dataset=local", f"dataset.path={__file__}", f"dataset._target_={package.name}.data.Mine"
            )

        before = point()
        finish(before)
        tokens = prepare_point(before).sha256
        assert is_done(before)
        for name in [name for name in sys.modules if name.startswith(package.name)]:
            del sys.modules[name]
        self.change(package / "data.py", "one two", "three four")
        again = load_point(before.config)  # a process of its own would have built nothing of it before
        assert again.run_id == before.run_id
        assert not is_done(again)
        assert "a file of dataset has changed; tag=NAME measures beside it" in replaced(again)
        assert replaced(replace(again, options=replace(again.options, force=True))) == ""
        assert prepare_point(again).sha256 != tokens, "the cache may not answer"


def test_an_edited_placement_file_is_measured_again(load: Load, tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    point = load("system=[exflow]", f"systems.exflow.placement_file={file}")
    file.write_text("{}")  # as the run does that finds none
    finish(point)
    assert is_done(point)
    file.write_text("[]")
    assert not is_done(point)
    file.unlink()
    assert not is_done(point)


def test_edited_arrivals_are_another_run(load: Load, tmp_path: Path) -> None:
    file = tmp_path / "arrivals.txt"
    file.write_text("0\n1\n")
    before = load(f"requests.arrivals={file}").run_id
    assert load(f"requests.arrivals={file}").run_id == before
    file.write_text("0\n5\n")
    assert load(f"requests.arrivals={file}").run_id != before


def test_a_kept_run_tells_what_is_another_now(load: Load) -> None:
    point = load(*STORED)
    finish(point)
    assert remarks(point) == ""
    path = point.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["packages"]["torch"] = "1.0"
    manifest["host"] |= {"cpu": "CPU of another", "num_cores": 960}
    path.write_text(json.dumps(manifest))
    assert remarks(point).startswith("; measured with torch 1.0 (now ")
    assert "processor CPU of another (now " in remarks(point)
    assert "cores: 960 (now " in remarks(point)
