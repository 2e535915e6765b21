"""Fixtures that several folders share."""

from __future__ import annotations

import fcntl
import gc
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from hypothesis import Phase, settings

from harmoeny.cores import usable_cores
from tests.programs import Programs

# What takes seconds to import is imported by the fixtures: pytest-xdist's own process, which only hands tests out,
# reads this file, too.
if TYPE_CHECKING:
    from omegaconf import DictConfig

    from experiments.compose.compositions import Compositions
    from experiments.compose.load import Components
    from experiments.point.point import Point
    from tests.smoke import SmokeRun

ROOT = Path(__file__).resolve().parent.parent
#: What takes longest, mostly waiting, and is therefore first where nothing is known of how long files take.
LONGEST = tuple(ROOT / "tests" / name for name in ("cluster", "docs/test_runs.py", "scripts/test_faults.py"))
#: What tests are marked as that take one of these fixtures.
MARKS = {"smoke": "ranks", "joined_smoke": "ranks", "programs": "programs"}
_seconds: defaultdict[str, float] = defaultdict(float)
#: New objects before the youngest are looked through, and how often until the others are; Python's are 700, 10, 10.
_GARBAGE = (100_000, 50, 100)
#: Of the cases of a test that is marked `many`, `make check` runs the first and every so many after it; a prime, so
#: that of options which are combined it meets all.
_EVERY = 5
_PROGRAMS = pytest.StashKey[Programs]()
Compose: TypeAlias = "Callable[..., DictConfig]"
Load: TypeAlias = "Callable[..., Point]"
#: A tenth of the examples, for `make check`; tests.strategies.examples applies it.
settings.register_profile("quick", max_examples=10)
#: For scripts.planted: that a test fails is all that counts, and a smaller example may take minutes to find.
settings.register_profile("unshrunk", phases=(Phase.explicit, Phase.generate))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Start a worker more than there are cores where tests wait for ranks: a worker imports for seconds."""
    return usable_cores().number + int("not ranks" not in config.option.markexpr)


def pytest_configure(config: pytest.Config) -> None:
    """Look for garbage seldom, while tests are collected, too; keep a worker that starts nothing on one core.

    Its threads take turns anyway, and wake slowly across cores.
    """
    gc.set_threshold(*_GARBAGE)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    starts_nothing = {"not ranks", "not programs"} <= set(config.option.markexpr.split(" and "))
    if worker and starts_nothing and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what starts ranks or programs through a fixture; begin with what took longest, so that no worker idles.

    Under the profile `quick`, leave out cases of tests that are marked `many`.
    """
    if config.getoption("hypothesis_profile") == "quick":
        _leave_out(config, items)
    for item in items:
        if isinstance(item, pytest.Function):
            for mark in {MARKS[name] for name in item.fixturenames if name in MARKS}:
                item.add_marker(mark)
    seconds = _seconds_before(config)

    def order(item: pytest.Item) -> float:
        file = _file(item.nodeid)
        if file in seconds:
            return -seconds[file]
        return -math.inf if any(item.path.is_relative_to(path) for path in LONGEST) else 0.0

    items.sort(key=order)


def _leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    numbers: Counter[str] = Counter()
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        test = item.nodeid.partition("[")[0]
        left = "many" in item.keywords and numbers[test] % _EVERY > 0
        (others if left else kept).append(item)
        numbers[test] += 1
    config.hook.pytest_deselected(items=others)
    items[:] = kept


def pytest_sessionstart() -> None:
    """Let programs under test notice Ctrl-C, which a shell lets what it runs in the background ignore."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell pytest-xdist's workers what files took: all have to collect in one order."""
    node.workerinput["seconds"] = _seconds_before(node.config)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up what every file takes."""
    _seconds[_file(report.nodeid)] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep that for the next call."""
    cache = _cache(session.config)
    if not hasattr(session.config, "workerinput") and cache is not None:
        cache.set(_seconds_key(session.config), _seconds_before(session.config) | _seconds)


def _seconds_before(config: pytest.Config) -> dict[str, float]:
    """Return what every file took at last when the same tests were selected."""
    if hasattr(config, "workerinput"):
        return dict(config.workerinput["seconds"])
    cache = _cache(config)
    found: dict[str, float] = {} if cache is None else cache.get(_seconds_key(config), {})
    return found


def _cache(config: pytest.Config) -> pytest.Cache | None:
    """Return what pytest keeps between calls; None with ``-p no:cacheprovider``, where even its name is missing."""
    return getattr(config, "cache", None)


def _seconds_key(config: pytest.Config) -> str:
    return f"seconds/{config.option.markexpr or 'all'}"


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Fork the process that starts programs; let the collected modules cost no time later."""
    starts_programs = any("programs" in getattr(item, "fixturenames", ()) for item in session.items)
    quickly = ExitStack()
    if "matplotlib" in sys.modules or starts_programs:
        from tests.quick_figures import draw_once, drawn_quickly

        quickly.enter_context(drawn_quickly())
    if "hydra" in sys.modules or starts_programs:
        from tests.quick_hydra import nothing_twice

        quickly.enter_context(nothing_twice())
    session.config.add_cleanup(quickly.close)
    if starts_programs:
        _load_compilers()
        draw_once()
        _freeze()
        session.config.stash[_PROGRAMS] = Programs()
    _freeze()
    if "torch" in sys.modules:
        _compute_alone(sys.modules["torch"])
    if "harmoeny.runtime.calibrate" in sys.modules:
        # What small experts cost is not what tests look at, and to empty the caches takes most of their calibration.
        sys.modules["harmoeny.runtime.calibrate"].__dict__["_SCRATCH_BYTES"] = 2**16
    if "not programs" in session.config.option.markexpr:
        quickly.enter_context(_no_other_program())


@contextmanager
def _no_other_program() -> Iterator[None]:
    """Let a test fail that starts a program in this block; Git says the revision, though, and uname the processor."""
    start = subprocess.Popen.__init__

    def started(process: subprocess.Popen[Any], args: Any, *others: Any, **named: Any) -> None:
        assert args[0] in ("git", "uname"), f"this test is to be marked `programs`: it starts {args}"
        start(process, args, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", started)
        yield


def _freeze() -> None:
    """Look no more for garbage among a million objects of imported modules, here and in programs."""
    gc.collect()
    gc.freeze()


def _compute_alone(torch: Any) -> None:
    """Compute on one thread for good: workers share the cores, and threads of several burn them while they wait.

    The code under test asks for as many as a rank has cores. Processes that tests start have as many as they ask for.
    """
    torch.set_num_threads(1)
    torch.set_num_threads = lambda _: None


def _load_compilers() -> None:
    """Load numba's compiler, PyTorch's, and what ranks import, so that no program has to, which takes a second each.

    PyTorch loads its own where a model is traced on ``meta``, and compiles nothing.
    """
    import numba

    for name in ("torch._dynamo", "experiments.launch.preload", "pyarrow.dataset"):
        import_module(name)
    numba.njit(lambda x: x)(1)


@pytest.fixture(scope="session")
def programs(pytestconfig: pytest.Config) -> Iterator[Programs]:
    """Starts programs without the seconds that their imports take."""
    with pytestconfig.stash[_PROGRAMS] as started:
        yield started


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this session share, where there are several."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def session_cache(shared_folder: Path) -> Iterator[Path]:
    """One cache of texts and tokenizers for all tests, filled by the code under test and never by an earlier one."""
    path = shared_folder / "cache"
    path.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARMOENY_CACHE", str(path))
        yield path


@pytest.fixture(scope="session")
def smoke(shared_folder: Path) -> SmokeRun:
    """The smoke experiment on two ranks that it started itself; made once for all that look at results."""
    from tests.smoke import run_smoke

    made = shared_folder / "smoke.pickle"
    with (shared_folder / "smoke.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            folder = shared_folder / "smoke"
            folder.mkdir()
            made.write_bytes(pickle.dumps(run_smoke(folder)))
        run: SmokeRun = pickle.loads(made.read_bytes())
        return run


@pytest.fixture(scope="session")
def registered_options() -> None:
    """Everything that conf/config.yaml refers to is known to Hydra."""
    from experiments.compose.schema import register_options

    register_options()


def _composed(*overrides: str, multirun: bool = False) -> DictConfig:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    mode = RunMode.MULTIRUN if multirun else RunMode.RUN
    return hydra.compose_config("config", list(overrides), mode, with_log_configuration=False)


@pytest.fixture
def compose(registered_options: None) -> Iterator[Compose]:
    """Compose the configuration of a run or of a multirun as run.py does, with its ``hydra`` node."""
    from hydra import initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield _composed


@pytest.fixture(scope="session")
def compositions(registered_options: None) -> Compositions:
    """What `load` has composed for all tests."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from experiments.compose.compositions import Compositions

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        return Compositions(hydra.config_loader, lambda overrides: _composed(*overrides))


@pytest.fixture(scope="session")
def components() -> Components:
    """What `load` has built for all tests."""
    from experiments.compose.load import Components

    return Components()


@pytest.fixture
def load(compose: Compose, compositions: Compositions, components: Components, tmp_path: Path) -> Load:
    """Load a point from overrides; its results would go to the test's own folder."""
    from experiments.compose.load import load_point

    def loaded(*overrides: str) -> Point:
        config = compositions.compose([f"results_dir={tmp_path / 'results'}", *overrides])
        return load_point(config, components=components)

    return loaded
