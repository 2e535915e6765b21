"""Entry point of the harness: compose a configuration with Hydra, check it, run it. See `python run.py --help`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
if Path.cwd() != ROOT:
    sys.exit(f"error: run.py must be started in the repository's root: cd {ROOT} && python run.py ...")

import hydra  # noqa: E402
from hydra.core.config_store import ConfigStore  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from experiments.config import Options  # noqa: E402
from experiments.discovery import register_components  # noqa: E402
from experiments.job import run_point  # noqa: E402

ConfigStore.instance().store(name="schema", node=Options)
register_components()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> str | None:
    """Run one point."""
    return run_point(config)


if __name__ == "__main__":
    main()
