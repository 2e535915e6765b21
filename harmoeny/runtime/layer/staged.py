"""The exchange in stages between groups of ranks, each stage's rows executed on arrival: FasterMoE's smart scheduling.

Shape letters: S rows sent, R rows received, K top_k, W ranks, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmoeny.placement import IntArray
from harmoeny.plan import Plan
from harmoeny.runtime.exchange.comm import Communicator, PeerCopies
from harmoeny.runtime.exchange.gather import gather_rows, weighted_sum
from harmoeny.runtime.exchange.order import Assignments, by_expert
from harmoeny.runtime.kernels.base import Results
from harmoeny.runtime.layer.executor import Executor, LayerInput, LayerResult
from harmoeny.runtime.memory.waves import Schedule, Wave


@dataclass
class _Stage:
    """What is exchanged at once.

    Attributes:
        targets: ranks that this rank sends rows, and gets results from.
        sources: ranks that it gets rows from, and sends results.
        received_WE: int64 ``[sources, E]``, rows of every source and expert.
        rows: where the rows stand among all that this rank executes, by source on arrival, then in the order of work.
        grouping: int64 ``[rows of the stage]`` on the device, the arrived row at every position of that order; None:
            they arrive in it.
        unfinished: slices of it that were not executed yet.
        arriving: its rows on their way; None once they were waited for.
    """

    targets: list[int]
    sources: list[int]
    received_WE: IntArray
    rows: slice
    grouping: Tensor | None
    unfinished: int
    arriving: PeerCopies | None = None


def execute_in_stages(
    executor: Executor, given: LayerInput, counts: IntArray, plan: Plan, groups: Sequence[Sequence[int]]
) -> LayerResult:
    """Exchange tokens with one group of ranks after another, and execute each group's as soon as they are there.

    Stage i sends to the i-th group after this rank's own and receives from the i-th group before it. All rows are on
    their way from the start, in the order of the stages; a rank's own rows, which are first, need no exchange. Results
    of a stage go back when all of it was executed, while the next stage's rows are computed.

    Source: He et al., PPoPP 2022, doi 10.1145/3503221.3508418, section 5.

    Args:
        executor: of the system, which is in the phase ``plan``.
        given: this rank's tokens.
        counts: int64 ``[world_size, num_experts]``, what was planned.
        plan: the same on all ranks.
        groups: hold every rank once.
    """
    comm, recorder, fetcher = executor.comm, executor.recorder, executor.planner.fetcher
    kernel, rank = executor.kernels[given.layer], comm.rank
    partners = _partners(rank, groups)
    received_WE = plan.tokens[:, :, rank]
    executed_SE = np.stack([received_WE[sources].sum(axis=0) for _, sources in partners])
    schedule = executor.begin(given.layer, plan, executed_SE)
    recorder.mark()  # dispatch
    stages = _make_stages(partners, received_WE, schedule if kernel.grouped else None, comm.device)
    assignments = Assignments(given.expert_ids_TK, counts[rank], given.numbers_TK)
    sent_SH, sent = gather_rows(given.hidden_TH, assignments, plan.tokens[rank])
    exchange = _Exchange(comm, plan, sent_SH, stages)
    recorder.mark()  # compute
    results = Results(exchange.rows_RH)

    def execute(wave: Wave) -> None:
        stage = stages[wave.stage]
        exchange.await_rows(stage)
        kernel(wave, exchange.rows_RH, results)
        stage.unfinished -= len(wave.slots)
        exchange.return_finished(results.rows())

    fetch = fetcher.run(execute)
    recorder.mark()  # combine
    returned_SH = exchange.await_results(results.rows())
    output_TH = weighted_sum(returned_SH, given.routing_weights_TK, sent)
    return LayerResult(output_TH, sent.assignment_S, fetch)


def _partners(rank: int, groups: Sequence[Sequence[int]]) -> list[tuple[list[int], list[int]]]:
    """Return targets and sources of a rank's stages in order; at first it is its own."""
    own = next(i for i, group in enumerate(groups) if rank in group)
    partners = [([rank], [rank])]
    for i in range(len(groups)):
        targets, sources = (groups[(own + d) % len(groups)] for d in (i, -i))
        partners.append(([r for r in targets if r != rank], [r for r in sources if r != rank]))
    return partners


def _make_stages(
    partners: list[tuple[list[int], list[int]]], received_WE: IntArray, schedule: Schedule | None, device: torch.device
) -> list[_Stage]:
    """Return the stages in order.

    Args:
        partners: as :func:`_partners` returns them.
        received_WE: int64 ``[W, E]``, rows of every source and expert.
        schedule: what orders the rows; None: they are ordered by expert.
        device: where the rows are.
    """
    stages, start = [], 0
    for index, (targets, sources) in enumerate(partners):
        blocks = received_WE[sources]
        order = None if schedule is None else schedule.experts_by_row(stage=index)
        rows = slice(start, start + int(blocks.sum()))
        grouping, num_slices = by_expert(blocks, device, order), np.count_nonzero(blocks.any(axis=0))
        stages.append(_Stage(targets, sources, blocks, rows, grouping, int(num_slices)))
        start = rows.stop
    return stages


@dataclass
class _Exchange:
    """The rows of one layer on their way to where they are executed and back.

    Attributes:
        comm: the ranks.
        plan: what goes where.
        sent_SH: ``[S, H]``, this rank's rows by destination and expert.
        stages: the exchanges in order.
        rows_RH: ``[R, H]``, rows to execute, those of a stage once they were waited for.
    """

    comm: Communicator
    plan: Plan
    sent_SH: Tensor
    stages: list[_Stage]
    rows_RH: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start to send and to receive all rows."""
        rank, hidden_size = self.comm.rank, self.sent_SH.shape[1]
        #: By destination, where its rows stand in ``sent_SH``.
        self._sent = _slices(range(self.comm.world_size), self.plan.tokens[rank].sum(axis=0))
        pairs = self.plan.tokens.sum(axis=1)
        # Rows one way and results the other share what two ranks have between them.
        self.comm.reserve(int((pairs + pairs.T).max()) * hidden_size * self.sent_SH.element_size(), 2)
        self.rows_RH = self.sent_SH.new_empty((self.stages[-1].rows.stop, hidden_size))
        self._returned_SH = torch.empty_like(self.sent_SH)
        self._sending: list[PeerCopies] = []
        self._returning: list[PeerCopies] = []
        own, *others = self.stages
        self.rows_RH[own.rows] = _grouped(self.sent_SH[self._sent[rank]], own)
        for stage in others:
            stage.arriving = self.comm.copy_between_peers(
                _parts(self.sent_SH, self._sent, stage.targets),
                _parts(self.rows_RH[stage.rows], self._received(stage), stage.sources),
            )
            self._sending.append(stage.arriving)

    def await_rows(self, stage: _Stage) -> None:
        """Wait until the stage's rows are there, and group them by expert."""
        if stage.arriving is None:
            return
        _await(stage.arriving.receiving)
        stage.arriving = None
        if stage.grouping is not None:
            self.rows_RH[stage.rows] = _grouped(self.rows_RH[stage.rows], stage)

    def return_finished(self, results_RH: Tensor) -> None:
        """Start to send back the results, ``[R, H]``, of the stages that are finished, in the order of the stages.

        NCCL demands the same order on all ranks.
        """
        while len(self._returning) < len(self.stages) - 1:
            stage = self.stages[len(self._returning) + 1]
            if stage.unfinished:
                return
            results = _as_arrived(results_RH[stage.rows], stage)
            self._returning.append(
                self.comm.copy_between_peers(
                    _parts(results, self._received(stage), stage.sources),
                    _parts(self._returned_SH, self._sent, stage.targets),
                )
            )

    def await_results(self, results_RH: Tensor) -> Tensor:
        """Return ``[S, H]``, the results of :attr:`sent_SH`; all stages must be finished."""
        self.return_finished(results_RH)
        own = self.stages[0]
        self._returned_SH[self._sent[self.comm.rank]] = _as_arrived(results_RH[own.rows], own)
        _await(works for copies in self._returning for works in copies.receiving)
        # What was sent may be overwritten from here on.
        _await(copies.sending for copies in (*self._sending, *self._returning))
        return self._returned_SH

    def _received(self, stage: _Stage) -> dict[int, slice]:
        """Return where every source's rows stand among the stage's."""
        return _slices(stage.sources, stage.received_WE.sum(axis=1))


def _grouped(rows: Tensor, stage: _Stage) -> Tensor:
    """Return a stage's rows in the order of work."""
    return rows if stage.grouping is None else rows.index_select(0, stage.grouping)


def _as_arrived(rows: Tensor, stage: _Stage) -> Tensor:
    """Return a stage's rows in the order in which they arrived."""
    return rows if stage.grouping is None else torch.empty_like(rows).index_copy_(0, stage.grouping, rows)


def _slices(ranks: Iterable[int], lengths: IntArray) -> dict[int, slice]:
    """Return, by rank, consecutive slices of these lengths."""
    ends = np.cumsum(lengths)
    return {r: slice(int(e - n), int(e)) for r, n, e in zip(ranks, lengths, ends, strict=True)}


def _parts(rows: Tensor, parts: Mapping[int, slice], ranks: Iterable[int]) -> list[tuple[Tensor, int]]:
    """Return the rows for or from each rank; two ranks with nothing between them exchange nothing."""
    return [(rows[parts[r]], r) for r in ranks if parts[r].start < parts[r].stop]


def _await(groups: Iterable[Iterable[Any]]) -> None:
    """Wait once for each of these; NCCL hands out the same one for several tensors."""
    for work in {id(work): work for group in groups for work in group}.values():
        work.wait()
