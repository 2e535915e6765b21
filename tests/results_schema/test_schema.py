"""The schema against docs/metrics.md, the runtime, and what a real run and its sweep wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harmoeny.runtime.layer import recorder
from results_schema import files, manifest, tables
from results_schema.tables import TABLES, Column, Table
from tests import documented
from tests.smoke import SmokeRun

#: Column types of the schema as Arrow names them; how text is stored depends on the version of pandas.
ARROW = {
    "str": {pa.string(), pa.large_string()},
    "int64": {pa.int64()},
    "float64": {pa.float64()},
    "list[int64]": {pa.list_(pa.field("element", pa.int64()))},
    "list[float64]": {pa.list_(pa.field("element", pa.float64()))},
}


def written(smoke: SmokeRun, table: Table) -> list[pa.Table]:
    """Return a table of all points of the run that have it."""
    return [
        pq.read_table(path, partitioning=None) for folder in smoke.folders if (path := folder / table.file).exists()
    ]


def test_phases_are_those_of_the_runtime() -> None:
    assert tuple(phase.name.lower() for phase in recorder.PHASES) == tables.PHASES


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_documentation_has_the_same_columns_with_the_same_units(table: Table) -> None:
    units = {
        name: unit
        for cells, unit, _ in documented.table(f"`{table.file}`")
        for name in cells.replace("`", "").split(", ")
    }
    assert set(units) == set(table.column_names)
    assert len(set(table.column_names)) == len(table.columns)
    repeated = {"system", "round", "iteration", "backend", "device", "host_link"}  # "as above", where the unit stands
    assert {c.name: c.unit for c in table.columns if c.name not in repeated} == {
        name: unit for name, unit in units.items() if name not in repeated
    }


def test_documentation_has_the_same_fields() -> None:
    assert set(documented.names("`manifest.json`")) == set(manifest.MANIFEST_FIELDS)
    assert set(documented.names_in("`manifest.json`", "`systems`")) == set(manifest.SYSTEM_FIELDS)
    assert documented.names("`sweep.json`") == list(manifest.SWEEP_FIELDS)


@pytest.mark.ranks
class TestRealRun:
    @pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
    def test_tables(self, table: Table, smoke: SmokeRun) -> None:
        found = written(smoke, table)
        assert len(found) == len(smoke.folders) or not table.always
        assert found or table is tables.DECODE, "the smoke experiment measures no decode phase"
        for one in found:
            assert tuple(one.column_names) == table.column_names
            for column in table.columns:
                self.check(one, column)

    def check(self, table: pa.Table, column: Column) -> None:
        values = table.column(column.name)
        assert values.type in ARROW[column.dtype], column.name
        assert values.null_count == 0, column.name
        if column.values:
            assert set(values.to_pylist()) <= set(column.values), column.name

    def test_manifest(self, smoke: SmokeRun) -> None:
        for folder in smoke.folders:
            written = manifest.read_manifest(folder)
            assert manifest.is_finished(folder)
            assert set(manifest.REQUIRED_FIELDS) <= set(written) <= set(manifest.MANIFEST_FIELDS)
            for system in written["systems"].values():
                assert set(system) == set(manifest.SYSTEM_FIELDS) - {"threshold"}

    def test_sweep_and_names_of_files(self, smoke: SmokeRun) -> None:
        (path,) = smoke.results.glob(f"smoke/{files.SWEEPS}/*/{files.SWEEP}")
        assert tuple(json.loads(path.read_text())) == manifest.SWEEP_FIELDS
        for folder in smoke.folders:
            for name in (files.CONFIG, files.MANIFEST, files.SUMMARY):
                assert (folder / name).is_file()


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"status": "running"}', '{"status": "finished"}'])
def test_only_a_finished_run_counts_as_one(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / files.MANIFEST).write_text(text)
    assert manifest.is_finished(tmp_path) == (text is not None and "finished" in text)
