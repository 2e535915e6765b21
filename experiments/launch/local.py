"""Start the ranks of a point on this machine through torchelastic, and say why they ended if they failed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from experiments.config import load_point
from experiments.datasets.tokens import TokenFile
from experiments.worker import run_rank


class RanksError(RuntimeError):
    """A rank ended in error; the message is the first cause."""


def launch(values: dict[str, Any], tokens: TokenFile, folder: Path) -> None:
    """Run a point on ``world_size`` new processes and wait for them.

    Rank 0 keeps this process's output, the others write to ``logs`` in the run's folder.

    Args:
        values: the point's resolved configuration.
        tokens: its text.
        folder: where rank 0 writes the results.

    Raises:
        RanksError: a rank failed; all others were stopped.
        KeyboardInterrupt: this process was interrupted; all ranks were stopped.
    """
    # Ranks of one host need no other interface, and a host whose own name does not resolve would find none.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    quiet = dict.fromkeys(range(1, values["world_size"]), Std.ALL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=values["world_size"],
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=quiet),
    )
    try:
        elastic_launch(config, _entry)(values, tokens, str(folder))
    except ChildFailedError as error:
        raise RanksError(_first_cause(error, folder)) from error
    except SignalException as error:
        raise KeyboardInterrupt from error


@record
def _entry(values: dict[str, Any], tokens: TokenFile, folder: str) -> None:
    # Ctrl-C reaches the whole process group: a rank just goes, and the launcher does the talking.
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    run_rank(load_point(values), tokens, Path(folder))
    sys.stdout.flush()


def _first_cause(error: ChildFailedError, folder: Path) -> str:
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        reason = f"was killed by {signal.Signals(-failure.exitcode).name}"
    else:
        reason = f"failed with exit status {failure.exitcode}"
        message: Any = failure.message  # declared as text, but a dict where the rank wrote an error file
        reason += f": {message.get('message', '') if isinstance(message, dict) else message}"
    return f"rank {rank} (pid {failure.pid}) {reason}; all ranks were stopped; logs in {folder / 'logs'}"
