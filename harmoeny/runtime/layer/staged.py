"""The exchange in stages, by groups of ranks or as a plan divides rows, each stage's executed on arrival.

Shape letters: S rows sent, R rows received, K top_k, W ranks, E experts, H hidden size, G stages, C columns of what is
sent: destinations, or destinations and stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harmoeny.lines import Stages, stage_tokens
from harmoeny.placement import IntArray
from harmoeny.plan import Plan
from harmoeny.runtime.exchange.comm import Communicator, PeerCopies
from harmoeny.runtime.exchange.gather import Gathering, add_rows, weighted_sum
from harmoeny.runtime.exchange.order import Assignments, by_expert
from harmoeny.runtime.kernels.base import Results
from harmoeny.runtime.layer.executor import Executor, LayerInput, LayerResult
from harmoeny.runtime.memory.waves import Schedule, Wave


class _Part(NamedTuple):
    """What goes where at one stage.

    Attributes:
        sent: by target, where its rows stand among all that this rank sends.
        sources: ranks that send this one rows, which may be itself.
        received_WE: int64 ``[sources, E]``, rows of every source and expert.
    """

    sent: dict[int, slice]
    sources: list[int]
    received_WE: IntArray


@dataclass(eq=False)
class _Stage:
    """What is exchanged at once.

    Attributes:
        sent: by target, which gets rows and returns results, where they stand among all that this rank sends.
        received: by source, which sends rows and gets results, where they stand among the stage's rows on arrival.
        rows: where the stage's rows stand among all that this rank executes.
        grouping: int64 ``[rows of the stage]`` on the device, the arrived row at every position in the order of work;
            None: they arrive in it.
        unfinished: slices of it that were not executed yet.
        arriving: its rows on their way; None once they were waited for.
    """

    sent: dict[int, slice]
    received: dict[int, slice]
    rows: slice
    grouping: Tensor | None
    unfinished: int
    arriving: PeerCopies | None = None


def execute_in_stages(executor: Executor, given: LayerInput, counts: IntArray, plan: Plan) -> LayerResult:
    """Exchange tokens in stages, and execute each stage's as soon as they are there.

    All rows are on their way from the start, in the order of the stages. Results of a stage go back when all of it was
    executed, while the next stage's rows are computed.

    With :attr:`Plan.source_groups` stage i sends to the i-th group after this rank's own and receives from the i-th
    group before it; a rank's own rows, which are first, need no exchange. With :attr:`Plan.stages` every stage brings
    its rows from all ranks.

    Source: groups of ranks: He et al., PPoPP 2022, doi 10.1145/3503221.3508418, section 5. Groups of experts: EPS-MoE,
    arXiv 2410.12247.

    Args:
        executor: of the system, which is in the phase ``plan``.
        given: this rank's tokens.
        counts: int64 ``[world_size, num_experts]``, what was planned.
        plan: the same on all ranks.
    """
    comm, recorder, fetcher = executor.comm, executor.recorder, executor.planner.fetcher
    kernel, rank = executor.kernels[given.layer], comm.rank
    sent_EC = plan.tokens[rank]
    if plan.stages is None:
        parts = _by_source(rank, plan)
    else:
        sent_EC, parts = _by_stage(rank, plan, plan.stages)
    schedule = executor.begin(given.layer, plan, np.stack([part.received_WE.sum(axis=0) for part in parts]))
    recorder.mark()  # dispatch
    stages = _make_stages(parts, schedule if kernel.grouped else None, comm.device)
    assignments = Assignments(given.expert_ids_TK, counts[rank], given.numbers_TK)
    gathering = Gathering(given.hidden_TH, assignments, sent_EC)
    exchange = _Exchange(comm, plan, gathering.rows_SH, stages)
    # What is exchanged first is on its way while the rest is gathered.
    for columns, gathered in _in_turn(stages, rank, sent_EC.shape[1], by_stage=plan.stages is not None):
        gathering.gather(columns)
        exchange.send(gathered)
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
    # What comes last is on its way while the rest is added up.
    returned_SH = exchange.await_all_but_the_last(results.rows())
    last = exchange.last_rows
    output_TH = weighted_sum(returned_SH, given.routing_weights_TK, gathering.sent, last)
    exchange.await_the_last()
    if last:
        output_TH = add_rows(returned_SH, given.routing_weights_TK, gathering.sent, output_TH, last)
    return LayerResult(output_TH, gathering.sent.assignment_S, fetch)


def _by_source(rank: int, plan: Plan) -> list[_Part]:
    """Return what a rank exchanges in turn with the groups of ranks; at first it is its own."""
    groups = plan.source_groups or []
    own = next(i for i, group in enumerate(groups) if rank in group)
    partners: list[tuple[list[int], list[int]]] = [([rank], [rank])]
    for i in range(len(groups)):
        targets, sources = (groups[(own + d) % len(groups)] for d in (i, -i))
        partners.append(([r for r in targets if r != rank], [r for r in sources if r != rank]))
    sent = _slices(range(plan.world_size), plan.tokens[rank].sum(axis=0))
    return [
        _Part({target: sent[target] for target in targets}, sources, plan.tokens[sources, :, rank])
        for targets, sources in partners
    ]


def _by_stage(rank: int, plan: Plan, stages: Stages) -> tuple[IntArray, list[_Part]]:
    """Return what a rank sends to every rank at every stage, and what it exchanges in turn with all, itself included.

    The first is int64 ``[E, num_stages * W]``: rows are sent by stage, destination and expert.
    """
    everyone, executed_EW = list(range(plan.world_size)), plan.executed()
    bounds = stages.bounds(executed_EW)
    sent_GEW = stage_tokens(plan.tokens[rank], bounds, executed_EW)
    received_GWE = stage_tokens(plan.tokens[:, :, rank], bounds[:, None, :, rank], executed_EW[:, rank])
    sent_EC = sent_GEW.transpose(1, 0, 2).reshape(plan.num_experts, -1)
    slices = _slices(range(sent_EC.shape[1]), sent_EC.sum(axis=0))
    num_stages = stages.num_stages
    sent = [{dst: slices[stage * plan.world_size + dst] for dst in everyone} for stage in range(num_stages)]
    return sent_EC, [_Part(*part) for part in zip(sent, [everyone] * num_stages, received_GWE, strict=True)]


def _in_turn(stages: list[_Stage], rank: int, num_columns: int, *, by_stage: bool) -> list[tuple[range, list[_Stage]]]:
    """Return what is gathered and then exchanged, one after the other: the first rows that travel, and the rest.

    Args:
        stages: in order.
        rank: this one.
        num_columns: destinations of what is sent, as many of every stage.
        by_stage: rows are sent stage after stage.
    """
    travels = [
        any(part.start < part.stop for parts in (stage.sent, stage.received) for r, part in parts.items() if r != rank)
        for stage in stages
    ]
    first = travels.index(True) + 1 if by_stage and any(travels) else len(stages)
    end = first * num_columns // len(stages)
    turns = [(range(end), stages[:first]), (range(end, num_columns), stages[first:])]
    return [(columns, gathered) for columns, gathered in turns if gathered]


def _make_stages(parts: list[_Part], schedule: Schedule | None, device: torch.device) -> list[_Stage]:
    """Return the stages in order.

    Args:
        parts: what goes where.
        schedule: what orders the rows; None: they are ordered by expert.
        device: where the rows are.
    """
    stages, start = [], 0
    for index, part in enumerate(parts):
        received = _slices(part.sources, part.received_WE.sum(axis=1))
        order = None if schedule is None else schedule.experts_by_row(stage=index)
        rows = slice(start, start + int(part.received_WE.sum()))
        grouping = by_expert(part.received_WE, device, order)
        num_slices = int(np.count_nonzero(part.received_WE.any(axis=0)))
        stages.append(_Stage(part.sent, received, rows, grouping, num_slices))
        start = rows.stop
    return stages


@dataclass
class _Exchange:
    """The rows of one layer on their way to where they are executed and back.

    Attributes:
        comm: the ranks.
        plan: what goes where.
        sent_SH: ``[S, H]``, this rank's rows, those of a stage once they were gathered.
        stages: the exchanges in order.
        rows_RH: ``[R, H]``, rows to execute, those of a stage once they were waited for.
    """

    comm: Communicator
    plan: Plan
    sent_SH: Tensor
    stages: list[_Stage]
    rows_RH: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Make room for all rows."""
        hidden_size, pairs = self.sent_SH.shape[1], self.plan.tokens.sum(axis=1)
        # Rows one way and results the other share what two ranks have between them.
        row_bytes = hidden_size * self.sent_SH.element_size()
        self.comm.reserve(int((pairs + pairs.T).max()) * row_bytes, 2 * len(self.stages))
        self.rows_RH = self.sent_SH.new_empty((self.stages[-1].rows.stop, hidden_size))
        self._returned_SH = torch.empty_like(self.sent_SH)
        self._sending: list[PeerCopies] = []
        self._returning: list[PeerCopies] = []
        self._travelling = [stage for stage in self.stages if {*stage.sent, *stage.received} != {self.comm.rank}]

    def send(self, stages: list[_Stage]) -> None:
        """Start to send and to receive the rows of the stages that are next."""
        for stage in stages:
            if stage in self._travelling:
                stage.arriving = self.comm.copy_between_peers(
                    self._parts(self.sent_SH, stage.sent), self._parts(self.rows_RH[stage.rows], stage.received)
                )
                self._sending.append(stage.arriving)
        for stage in stages:
            self._take_own(stage)

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
        while len(self._returning) < len(self._travelling):
            stage = self._travelling[len(self._returning)]
            if stage.unfinished:
                return
            results = _as_arrived(results_RH[stage.rows], stage)
            self._returning.append(
                self.comm.copy_between_peers(
                    self._parts(results, stage.received), self._parts(self._returned_SH, stage.sent)
                )
            )
            self._return_own(stage, results)

    def await_all_but_the_last(self, results_RH: Tensor) -> Tensor:
        """Return ``[S, H]``, the results of :attr:`sent_SH` but for :attr:`last_rows`; all stages must be finished."""
        self.return_finished(results_RH)
        for stage in self.stages:
            if stage not in self._travelling:
                self._return_own(stage, _as_arrived(results_RH[stage.rows], stage))
        _await(works for copies in self._returning[: self._num_before()] for works in copies.receiving)
        return self._returned_SH

    @cached_property
    def last_rows(self) -> list[slice]:
        """The rows of :attr:`sent_SH` whose results travel last, behind those of other stages."""
        if len(self._travelling) < 2:
            return []
        parts: list[slice] = []
        for part in sorted(self._travelling[-1].sent.values(), key=lambda part: part.start):
            if parts and parts[-1].stop == part.start:
                parts[-1] = slice(parts[-1].start, part.stop)
            else:
                parts.append(part)
        return [part for part in parts if part.start < part.stop]

    def await_the_last(self) -> None:
        """Wait for all results, and until what was sent may be overwritten."""
        _await(works for copies in self._returning[self._num_before() :] for works in copies.receiving)
        _await(copies.sending for copies in (*self._sending, *self._returning))

    def _num_before(self) -> int:
        """Return how many exchanges of results are waited for before any is added up."""
        return len(self._returning) - bool(self.last_rows)

    def _take_own(self, stage: _Stage) -> None:
        """Copy what this rank sends itself to where it is executed, or to where the rest of the stage arrives."""
        rank = self.comm.rank
        if rank not in stage.sent:
            return
        own, rows = self.sent_SH[stage.sent[rank]], self.rows_RH[stage.rows]
        if stage in self._travelling:
            rows[stage.received[rank]] = own
        else:
            self.rows_RH[stage.rows] = _grouped(own, stage)

    def _return_own(self, stage: _Stage, results: Tensor) -> None:
        """Take the results of what this rank sent itself, of the stage's in the order in which they arrived."""
        rank = self.comm.rank
        if rank in stage.sent:
            self._returned_SH[stage.sent[rank]] = results[stage.received[rank]]

    def _parts(self, rows: Tensor, parts: Mapping[int, slice]) -> list[tuple[Tensor, int]]:
        """Return the rows for or from each other rank; two ranks with nothing between them exchange nothing."""
        return [(rows[part], r) for r, part in parts.items() if r != self.comm.rank and part.start < part.stop]


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


def _await(groups: Iterable[Iterable[Any]]) -> None:
    """Wait once for each of these; NCCL hands out the same one for several tensors."""
    for work in {id(work): work for group in groups for work in group}.values():
        work.wait()
