"""Names of the files and folders that one side writes and the other reads; a table's file is ``Table.file``."""

from __future__ import annotations

#: In a run's folder, ``<results_dir>/<experiment>/<run_id>``.
CONFIG = "config.yaml"
MANIFEST = "manifest.json"
SUMMARY = "summary.json"

#: In a sweep's folder, ``<results_dir>/<experiment>/sweeps/<sweep_id>``.
SWEEPS = "sweeps"
SWEEP = "sweep.json"

#: Environment variable with the folder of the sweep that is being run.
SWEEP_DIR_VARIABLE = "HARMOENY_SWEEP_DIR"
