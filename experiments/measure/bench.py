"""What measuring on one rank needs: what all points of a group share, and what each has of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.console import PointProgress
from experiments.measure.batch import Batch, make_batch
from experiments.measure.clock import RankClock
from experiments.measure.fit import fit
from experiments.measure.yardstick import Yardstick
from experiments.point.point import Point
from experiments.routers.base import WARM_UP_BATCH
from experiments.text.tokens import TokenFile
from harmoeny.choices import Exchange
from harmoeny.models.base import MoEModel
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.layer.system import System
from harmoeny.runtime.memory.sharing import share_model
from harmoeny.runtime.start import start_rank

#: Batches that policies rehearse at most: those that place anew do so more often.
_MOST_REHEARSED = 32


@dataclass
class Rig:
    """One rank as all points of a group are measured with it: one model, one calibration, one clock.

    Attributes:
        model: the model, attached to ``engine``.
        engine: executes its MoE layers.
        progress: told of every forward pass.
        clock: this rank's, compared with rank 0's and watched.
        yardstick: what the machine's speed is seen by.
        clock_offset_s: seconds from this rank's clock to rank 0's in this round, see :meth:`begin_round`.
    """

    model: MoEModel
    engine: ExpertParallel
    progress: PointProgress
    clock: RankClock
    yardstick: Yardstick
    clock_offset_s: float = 0.0

    @classmethod
    def set_up(cls, point: Point, comm: Communicator, progress: PointProgress) -> Rig:
        """Build the model and start the runtime; all ranks do it together.

        Args:
            point: any of the group.
            comm: the ranks.
            progress: told of every forward pass.
        """
        clock = RankClock(comm)
        progress.say("building the model")
        model = build_model(point, comm)
        engine = start_rank(
            model.experts, comm, point.hardware, exchange=_exchange(point), host_threads=point.options.host_threads
        )
        model.connect(engine)
        return cls(model, engine, progress, clock, Yardstick(engine.comm))

    @property
    def comm(self) -> Communicator:
        """The ranks."""
        return self.engine.comm

    def begin_round(self) -> None:
        """Find out how far this rank's clock is from rank 0's; clocks drift. All ranks do it together.

        Raises:
            ClockError: this rank's clock jumped in the round before.
        """
        self.clock.check()
        self.clock_offset_s = self.clock.offset_s()

    def close(self) -> None:
        """Let the runtime go, when all ranks have come to here."""
        self.comm.barrier()
        self.engine.close()


@dataclass
class Bench:
    """One rank's share of a point, ready to measure.

    Attributes:
        rig: shared with the other points of its group.
        point: the point.
        systems: the systems to compare, which have met nothing of other points; those that fail their check leave it.
        batches: one per measured round; of the same texts for all points of a group.
        warm_up: for the checks and the warm-up, never measured.
        tokens: the text.
    """

    rig: Rig
    point: Point
    systems: Sequence[System]
    batches: list[Batch]
    warm_up: Batch
    tokens: TokenFile

    @classmethod
    def set_up(cls, rig: Rig, point: Point, tokens: TokenFile) -> Bench:
        """Prepare batches and systems; all ranks do it together."""
        model, engine, comm = rig.model, rig.engine, rig.comm
        indices = [*range(point.options.rounds), WARM_UP_BATCH]
        *batches, warm_up = (make_batch(point, model, tokens, i, comm.rank, comm.device) for i in indices)
        systems = [
            engine.build_system(name, fit(policy.calibrated(engine.memory.cost), point, model, tokens, comm))
            for name, policy in point.systems.items()
        ]
        return cls(rig, point, systems, batches, warm_up, tokens)

    @property
    def model(self) -> MoEModel:
        """The model, attached to the engine."""
        return self.rig.model

    @property
    def engine(self) -> ExpertParallel:
        """What executes the model's MoE layers."""
        return self.rig.engine

    @property
    def comm(self) -> Communicator:
        """The ranks."""
        return self.rig.comm

    @property
    def progress(self) -> PointProgress:
        """Told of every forward pass."""
        return self.rig.progress

    def batch(self, round_index: int) -> Batch:
        """Return a round's batch, which is made now where it comes after those that were asked for.

        Args:
            round_index: the round, in order; negative: a warm-up.
        """
        if round_index == len(self.batches):
            comm = self.comm
            self.batches.append(make_batch(self.point, self.model, self.tokens, round_index, comm.rank, comm.device))
        return self.warm_up if round_index < 0 else self.batches[round_index]

    def begin_loop(self) -> None:
        """Let all systems forget what they saw: none may have learned from what is measured now.

        Before that they rehearse: nothing that policies do only now and then may have to be compiled while it is timed.
        """
        for system in self.systems:
            system.planner.rehearse(min(self.point.most_rounds, _MOST_REHEARSED))
            system.planner.reset()


def _exchange(point: Point) -> str:
    """Return the exchange to ask for: ranks on one GPU have no other way to send each other anything."""
    return Exchange.PUT if point.options.ranks_per_gpu > 1 else point.options.exchange


def build_model(point: Point, comm: Communicator) -> MoEModel:
    """Build the model once per host and share its weights; all ranks call it together."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    model = point.model.build(point.options.seed, "cpu" if local_rank == 0 or comm.world_size == 1 else "meta")
    share_model(model, comm, local_rank)
    return model
