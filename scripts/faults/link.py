"""A link between two hosts that is cut: network namespaces that stand for hosts, with a cable between them."""

from __future__ import annotations

import time
from contextlib import ExitStack
from random import Random

import psutil

from scripts.faults.fault import Fault, NotHereError, Planted, end, fault, is_running, moment
from scripts.faults.sweep import SKEWS, TinySweep
from tests.cluster.hosts import ADDRESSES, NoHostsError, two_hosts

_TIMEOUT_S = 8


@fault
class CutLink(Fault):
    """Packets are lost from some moment on, and nobody is told."""

    name = "cut link"
    backends = ("ranks",)

    def plant(self, sweep: TinySweep, rng: Random) -> Planted:
        """Start one rank on each host with torchrun and cut the cable."""
        planted = Planted("cable cut", statuses=(1,), torchrun=True)
        planted.errors = (rf"rank [01] on harmoeny-.* lost another rank.*\(timeout_s is {_TIMEOUT_S}\)",)
        when = moment(rng, points=len(SKEWS) - len(sweep.points()))
        try:
            with two_hosts() as hosts, ExitStack() as stack:
                commands = [
                    stack.enter_context(
                        sweep.start(f"timeout_s={_TIMEOUT_S}", launcher=_torchrun(host), prefix=hosts.on(host))
                    )
                    for host in range(2)
                ]
                # Before ranks are there torchrun waits for a quarter of an hour, and nothing of ours runs.
                first = psutil.Process(commands[0].pid)
                while "building the model" not in commands[0].output() and is_running(first):
                    time.sleep(0.1)
                if when(commands[0]):
                    planted.before = sweep.finished()
                    hosts.cut()
                    planted.struck = True
                planted.ended += [end(command) for command in commands]
        except NoHostsError as error:
            raise NotHereError(str(error)) from error
        return planted


def _torchrun(host: int) -> tuple[str, ...]:
    return (
        *("-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(host), "--nproc-per-node", "1"),
        *("--master-addr", ADDRESSES[0], "--master-port", "29500"),
    )
