"""Compose thousands of random configurations, right and wrong: each is a checked point, or an error of one line.

Overrides are drawn from all groups, components and options, with values of their type, of other types, out of range,
and in odd spelling; single runs and sweeps. Nothing is run. Every configuration has a seed of its own. The exit
status is 1 where one gave a traceback, took too long, or gave an error that does not name what was set.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from random import Random
from typing import Any, get_type_hints

import psutil
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from experiments.compose.choices import check_choices
from experiments.compose.help import CONF, choices, groups
from experiments.compose.load import load_point
from experiments.compose.messages import explain, explain_hydra
from experiments.compose.schema import register_options
from experiments.compose.swept import leave_out_absent, sweep_points
from experiments.point.options import Options
from experiments.point.point import Point
from experiments.registry import GROUPS, discover
from experiments.routers.base import SkippedPoint
from harmoeny.hardware import Hardware
from results_schema.printing import print_anything

#: What one configuration may take, and all of them, so that a size without a bound is an error and no full machine.
_TIMEOUT_S = 30
_MEMORY_BYTES = 12 * 2**30

_NUMBERS = (
    "0", "1", "2", "3", "4", "8", "64", "-1", "-8", "1.5", "0.5", "0.0", "-0.0", "1e-300", "1e308", "1e3", "nan", "inf",
    "-inf", "999", "65536", "2147483648", "9223372036854775808", "-9223372036854775809", "1" + 30 * "0", "0x10",
    "1_000",
)  # fmt: skip
_OTHERS = (
    "null", "true", "false", "''", '""', "' '", "abc", "a.b", "a/b", "/", "/dev/null", "/etc/passwd", "/no/such", "~",
    ".", "..", "README.md", "é", "名前", "'🦀'", "'a\tb'", "'a\nb'", "'a\x07b'", "'\udcff'", "x" * 300,
    "x" * 5000, "'it\\'s'", '"q"',
    "%s", "{x}", "'{x}'", "a:b", "a\\,b", "???", "${seed}", "${x}", "${tag}", "${oc.env:HOME}", "${oc.env:NO_SUCH}",
    "${oc.decode:${tag}}", "'${'", "[]", "[1,2]", "[1,[2,3]]", "[null]", "[a,a]", "{}", "{a:1}", "{a:{b:[1,{c:2}]}}",
    "{1:2}", "{_target_:builtins.dict}", "{_target_:no.such}", "[{_target_:builtins.list}]",
)  # fmt: skip
_SYNTAX = (
    "", "=", "==", "=1", "x", "x=", "a b=1", "seed", "seed=", "seed=[1", "seed={a:1", "seed='", 'seed="', "seed=1=2",
    "seed=1,2", "seed=1,", "seed=,", "seed=choice(1,2)", "seed=range(0,3)", "seed=range(0,3,0)", "seed=interval(0,1)",
    "seed=glob(*)", "seed=sort(2,1)", "seed=shuffle(1,2)", "seed=int(3.5)", "seed=int(x)", "seed=str(3)",
    "seed=nope(1)",
    "seed=choice()", "@seed=1", "seed@x=1", "model@dataset=pydoc", "model@systems=switch_tiny", "system@model=drop",
    "+seed=1", "++seed=1", "~seed", "~seed=0", "~seed=7", "~nope", "~model", "~system", "~systems", "~systems.drop",
    "+x=1", "+x.y=1", "+systems.x=1", "+systems.x={}", "+systems.drop.x=1", "+model.x=1", "++model.x.y=1", "+model=x",
    "~router.skew", "~wandb", "~trace.record", "systems=null", "systems={}", "systems=[]", "model=null", "model=[]",
    "dataset=null", "router=[skew,zipf]", "router={}", "hardware=null", "system=null", "system=[]", "system=all",
    "system=[harmoeny,harmoeny]", "system={}", "system=[[drop]]", "system=drop", "hydra=x", "hydra.mode=x",
    "hydra.sweeper=null", "hydra.sweeper.params=1", "+hydra.sweeper.params.seed='1,2'", "hydra/launcher=x",
    "hydra/sweeper=x", "hydra.run.dir=/no/such", "hydra.job.chdir=true", "-seed=1", "--seed=1", "seed:1", "1=1", ".=1",
    "seed.x=1", "router..skew=1", ".seed=1", "seed.=1", "router.skew.x=1", "systems..x=1", "requests=closed",
    "trace=x.parquet", "requests={}", "wandb=null", "simulator.software.x.layer_s=1", "+simulator.software.x={}",
    "+simulator.software.drop.layer_s=-1", "+simulator.batch_size.drop=0", "+simulator.batch_size.drop={0:x}",
    "defaults=[]", "+defaults=[]", "_target_=x", "experiment=null", "+experiment=smoke", "+experiment=nope", "local=x",
)  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """A command line of run.py.

    Attributes:
        overrides: its arguments.
        multirun: whether it sweeps.
    """

    overrides: tuple[str, ...]
    multirun: bool

    def __str__(self) -> str:
        """Return the command."""
        return shlex.join(["python", "run.py", *(["--multirun"] if self.multirun else []), *self.overrides])


class Generator:
    """Draws configurations; what there is to set comes from the schema."""

    def __init__(self) -> None:
        self._groups = {name: sorted(choices(name)) for name in groups()}
        self._components = {group: discover(group)[0] for group in GROUPS}
        # Where results go is made when it is checked: the fuzzer's own choice.
        self._own = [(name, hint) for name, hint in _leaves(Options) if name != "results_dir"]

    def draw(self, seed: int) -> Configuration:
        """Return the configuration of a seed."""
        rng = Random(seed)  # noqa: S311  (no secret)
        overrides = [text for _ in range(rng.choice((1, 1, 2, 2, 3, 4))) for text in self._some(rng)]
        multirun = rng.random() < 0.15
        return Configuration(tuple(overrides), multirun)

    def _some(self, rng: Random) -> list[str]:
        kind = rng.random()
        if kind < 0.2:
            return [rng.choice(_SYNTAX)]
        if kind < 0.4:
            group = rng.choice(sorted(self._groups))
            return [f"{group}={self._choice(rng, group)}"]
        if kind < 0.65:
            return [self._set(rng, *rng.choice(self._own))]
        if kind < 0.75:
            hints = get_type_hints(Hardware)
            name = rng.choice([field.name for field in fields(Hardware)])
            return [self._set(rng, f"hardware.{name}", hints[name])]
        group = rng.choice(sorted(self._components))
        name, cls = rng.choice(sorted(self._components[group].items()))
        place = GROUPS[group].package.format(name=name)
        options = [(f"{place}.{f.name}", get_type_hints(cls)[f.name]) for f in fields(cls)]
        selected = f"system=[{name}]" if group == "system" else f"{group}={name}"
        options = options or [(f"{place}.no_such", int)]
        return [selected, *(self._set(rng, *rng.choice(options)) for _ in range(rng.randint(1, 2)))]

    def _choice(self, rng: Random, group: str) -> str:
        names = self._groups[group] or ["x"]
        if group == "system" and rng.random() < 0.7:
            return f"[{','.join(rng.choices(names, k=rng.randint(1, 4)))}]"
        return rng.choice(names) if rng.random() < 0.8 else rng.choice(_OTHERS + _NUMBERS)

    def _set(self, rng: Random, name: str, hint: Any) -> str:
        values = _NUMBERS if any(t in str(hint) for t in ("int", "float")) and rng.random() < 0.75 else _OTHERS
        sign = rng.choice(("", "", "", "", "", "", "+", "++", "~"))
        if sign == "~" and rng.random() < 0.5:
            return f"~{name}"
        value = rng.choice(values)
        if rng.random() < 0.05:
            value = ",".join(rng.choices(values, k=rng.randint(2, 3)))
        return f"{sign}{name}={value}"


def _leaves(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint) and isinstance(hint, type):
            yield from _leaves(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


class TooLongError(BaseException):
    """A configuration took longer than it may; nothing that catches exceptions may swallow it."""


class Composer:
    """Composes and checks as run.py does, without running anything."""

    def __init__(self, results: Path) -> None:
        self._results = f"results_dir={results}"

    def problem(self, configuration: Configuration) -> str | None:
        """Return what is wrong with how a configuration is answered; None: nothing is."""
        try:
            with _limited():
                for point in self._points(configuration):
                    _write_down(point)
        except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
            # run.py shows what load_point raises as it is, and explains the rest.
            return _wrong_line(explain(error), configuration)
        except SkippedPoint:
            return None
        except TooLongError:
            return f"took longer than {_TIMEOUT_S} s"
        except Exception as error:  # noqa: BLE001  (that is what is looked for)
            line = explain_hydra(error, configuration.overrides)
            return traceback.format_exc() if line is None else _wrong_line(line, configuration)
        return None

    def _points(self, configuration: Configuration) -> list[Point]:
        mode = RunMode.MULTIRUN if configuration.multirun else RunMode.RUN
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        overrides = [self._results, *configuration.overrides]
        check_choices(overrides)
        config = hydra.compose_config("config", overrides, mode, with_log_configuration=False)
        if config.hydra.mode != RunMode.MULTIRUN:
            return [load_point(config)]
        leave_out_absent(config)
        return [point for point, _ in sweep_points(config)[0]]


def _write_down(point: Point) -> None:
    """Make what a run writes before it begins."""
    yaml.safe_dump(point.config, sort_keys=False)
    json.dumps([point.run_id, point.labels()])


def _wrong_line(line: str, configuration: Configuration) -> str | None:
    """Return what is wrong with an error's line; None: it is one line and names one of the options that were set."""
    if len(line.splitlines()) != 1:
        return f"not one line: {line!r}"
    if len(line) > 12_000:
        return f"a line of {len(line)} characters: {line[:200]}"
    if "\udcff" not in line and not line.isprintable() and "\t" not in line:
        return f"control characters: {line!r}"
    named = [name for text in configuration.overrides for name in _names(text)]
    if not any(name in line for name in named):
        return f"names nothing that was set: {line}"
    return None


def _names(override: str) -> list[str]:
    """Return what an error about an override may call it: the override, its option, or a part of that option's name."""
    key = override.partition("=")[0].lstrip("+~").partition("@")[0]
    return [override, repr(override), *(part for part in key.replace("/", ".").split(".") if part)]


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_TIMEOUT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(seeds: Sequence[int], results: Path) -> Iterator[tuple[int, Configuration, str | None]]:
    """Compose the configurations of seeds.

    Args:
        seeds: of the configurations.
        results: where results would go; nothing may be left there.

    Yields:
        By seed, the configuration and what is wrong with how it is answered.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    register_options()
    generator, composer = Generator(), Composer(results)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for seed in seeds:
            configuration = generator.draw(seed)
            yield seed, configuration, composer.problem(configuration)


def main() -> None:
    """Fuzz and report."""
    print_anything()
    parser = argparse.ArgumentParser(
        prog="python -m scripts.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=10_000, help="of configurations (default: 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next ones count on (default: 0)")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    begin_s, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="harmoeny-fuzz-") as folder:
        results = Path(folder, "results")
        for seed, configuration, problem in fuzz(range(arguments.seed, arguments.seed + arguments.number), results):
            if problem is not None:
                failed += 1
                print(f"seed {seed}: {configuration}\n    {problem}", flush=True)
        left = [path for path in results.rglob("*") if path.is_file()]
    children = psutil.Process().children(recursive=True)
    print(f"{arguments.number} configurations in {time.monotonic() - begin_s:.0f} s, {failed} answered wrongly")
    if failed or left or children:
        sys.exit(f"error: {failed} answered wrongly; left: {[*map(str, left), *children]}")


if __name__ == "__main__":
    main()
