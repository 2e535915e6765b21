import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import HydraException

from experiments.compose.help import CONF, choices
from experiments.compose.load import load_point
from experiments.compose.messages import explain
from experiments.compose.sweep_callback import ValidateSweep
from experiments.compose.swept import sweep_points
from experiments.registry import GROUPS, discover
from experiments.routers.base import SkippedPoint
from tests.conftest import ROOT, Compose, Load
from tests.programs import Programs
from tests.strategies import few_points


@pytest.mark.many
@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_is_valid_at_all_its_points(
    path: Path, compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(f"experiment={path.stem}", f"results_dir={tmp_path}", multirun=True)
    few_points(config)
    try:
        points, axes = sweep_points(config)
    except SkippedPoint as reason:
        pytest.skip(str(reason))
    assert {point.options.experiment for point, _ in points} == {
        path.stem
    }  # else its results would go to another's folder
    swept = dict(config.hydra.sweeper.params or {})
    assert set(axes) <= set(swept)
    for point, values in points:
        assert set(values) == set(axes)
        options = {axis: value for axis, value in values.items() if axis != "router"}  # which may be a preset's name
        assert all(point.labels().get(axis, value) == value for axis, value in options.items())


@pytest.mark.parametrize("sweeper", ["basic", "pairs", "star"])
def test_the_grid_goes_with_every_sweeper(sweeper: str, compose: Compose) -> None:
    config = compose("experiment=grid", f"hydra/sweeper={sweeper}", multirun=True)
    assert set(config.hydra.sweeper.params) == {"machine", "model", "seq_len", "router", "spare_slots"}


#: In the paper's experiments `harmoeny` is the paper's.
OF_ANY_SYSTEMS = [
    path.stem for path in sorted((CONF / "experiment").glob("*.yaml")) if not path.stem.startswith("paper_")
]


@pytest.mark.many
@pytest.mark.parametrize("experiment", OF_ANY_SYSTEMS)
def test_an_experiment_takes_any_systems(experiment: str, compose: Compose) -> None:
    config = compose(f"experiment={experiment}", "system=[harmoeny,harmoeny_tokens]", multirun=True)
    targets = {name: node["_target_"] for name, node in config.systems.items()}
    assert targets["harmoeny"] == "harmoeny.timed.HarMoEny"
    assert targets["harmoeny_tokens"] == "harmoeny.rebalance.TokenHarMoEny"


PRESETS = [path for path in sorted(CONF.rglob("*/*.yaml")) if path.parent.name not in ("experiment", "local")]


@pytest.mark.many
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: str(path.relative_to(CONF).with_suffix("")))
def test_every_preset_is_valid(path: Path, load: Load) -> None:
    group = path.parent.relative_to(CONF)
    # The weights of models from the hub are not on every machine.
    text = path.read_text(encoding="utf-8")
    drawn = ["model.random_weights=true"] if "hub_name:" in text else []
    # Only simulated: no tokenizer has a vocabulary of one token.
    drawn += ["backend=simulator", "hardware=dgx1_v100"] if "vocab_size: 1\n" in text else []
    # What is different of recorded routing has nothing to change elsewhere.
    drawn += ["experiment=advise"] if str(group) == "what_if" else []
    load(f"system=[{path.stem}]" if str(group) == "system" else f"{group}={path.stem}", *drawn)


#: Limits of MLPerf Inference in ms (inference_policies, ac93e89): TTFT and TPOT, of 99 % of the requests.
MLPERF_MS = {
    "mixtral_8x7b": (2000, 200),
    "deepseek_r1": (2000, 80),
    "deepseek_r1_interactive": (1500, 15),
    "gpt_oss_120b": (3000, 80),
    "gpt_oss_120b_interactive": (2000, 20),
}


def test_mlperfs_limits_are_those_that_it_publishes(load: Load) -> None:
    presets = {path.stem.removeprefix("mlperf_") for path in (CONF / "slo").glob("mlperf_*.yaml")}
    assert presets == set(MLPERF_MS)
    for name, (ttft_ms, tpot_ms) in MLPERF_MS.items():
        slo = load(f"slo=mlperf_{name}").options.slo
        assert slo.limits == {"ttft_s": ttft_ms / 1e3, "tpot_s": tpot_ms / 1e3}
        assert slo.share == 0.99


def test_limits_by_name_go_before_an_experiments_and_single_ones_before_both(load: Load) -> None:
    assert load("experiment=serving_rates").options.slo.limits == {"ttft_s": 1.0, "tpot_s": 0.2}
    named = load("experiment=serving_rates", "slo=mlperf_gpt_oss_120b", "slo.tpot_s=0.5").options.slo
    assert (named.limits, named.share) == ({"ttft_s": 3.0, "tpot_s": 0.5}, 0.99)


@pytest.mark.many
@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in discover(group)[0]])
def test_every_component_is_valid_as_it_is_or_says_which_option_it_needs(group: str, name: str, load: Load) -> None:
    try:
        load(f"system=[{name}]" if group == "system" else f"{group}={name}")
    except ValueError as error:
        message = str(error)
        of_another = r"systems\.\w+: must go with a model that .*: model\.\w+=.* for moe_stack"
        assert re.match(rf"({group}\.\w+: (null|'')|host_threads: 0), must be |{of_another}", message), message


class TestSweep:
    @pytest.fixture
    def results(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("HARMOENY_SWEEP_DIR", "")  # so that it is taken back afterwards
        return tmp_path / "results"

    @pytest.fixture
    def small(self, results: Path) -> list[str]:
        """A text and a vocabulary that are quickly prepared."""
        text = results.parent / "text"
        text.write_text("A short text. " * 500)
        return [f"results_dir={results}", "model.vocab_size=512", "dataset=local", f"dataset.path={text}"]

    def start(self, compose: Compose, *overrides: str) -> None:
        ValidateSweep().on_multirun_start(compose(*overrides, multirun=True))

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("seed=range(0,3,0)", "seed=range(0,3,0): range() arg 3 must not be zero"),
            ("seed=range(0,0)", "seed=range(0,0), must have at least one value"),
            ("hydra.sweeper=null", "hydra.sweeper: None, must be left to the choice of hydra/sweeper"),
            ("hydra.launcher=3", "hydra.launcher: 3, must be left to the choice of hydra/launcher"),
        ],
    )
    def test_what_hydra_would_not_name_is_named(
        self, override: str, said: str, compose: Compose, small: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            self.start(compose, "experiment=smoke", override, *small)
        assert capsys.readouterr().err == f"error: {said}\n"

    def test_writes_down_its_runs(self, compose: Compose, results: Path, small: list[str]) -> None:
        self.start(compose, "experiment=smoke", "router.skew=0,0.5,0.5", "model.num_experts=4,8", *small)
        sweep_dir = Path(os.environ["HARMOENY_SWEEP_DIR"])
        assert sweep_dir.parent == results / "smoke" / "sweeps"
        sweep = json.loads((sweep_dir / "sweep.json").read_text())
        assert sweep["axes"] == ["router.skew", "model.num_experts"]
        assert sweep["values"] == [
            {"router.skew": skew, "model.num_experts": n} for skew in (0, 0.5) for n in (4, 8)
        ]  # fmt: skip
        point = load_point(compose("experiment=smoke", "router.skew=0.5", "model.num_experts=8", *small))
        assert sweep["run_ids"][-1] == point.run_id
        assert len(set(sweep["run_ids"])) == 4

    @pytest.mark.parametrize(
        ("overrides", "axes", "num_points"),
        [
            (["router=zipf"], [], 1),
            (["router=zipf", "router.exponent=0,1,2"], ["router.exponent"], 3),
            (["router=uniform,skew"], ["router"], 2),  # one of them has no skew to sweep over
            (["router=paper_skew"], ["router.skew"], 3),
            (["router=skew", "router.skew=0,1"], ["router.skew"], 2),
        ],
    )
    def test_an_experiment_sweeps_only_what_the_chosen_components_have(
        self,
        overrides: list[str],
        axes: list[str],
        num_points: int,
        compose: Compose,
        small: list[str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.start(compose, "experiment=skew_sweep", "system=[static_ep]", *small, *overrides)
        sweep = json.loads(Path(os.environ["HARMOENY_SWEEP_DIR"], "sweep.json").read_text())
        assert (sweep["axes"], len(sweep["run_ids"])) == (axes, num_points)
        left_out = "router.skew: not swept, as router=" in capsys.readouterr().err
        assert left_out == ("router.skew" not in axes)

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            (
                "system=harmoeny,static_ep",
                "system=harmoeny,static_ep: 2 jobs one after another, unpaired; to compare these systems round by "
                "round, name them in one list: 'system=[harmoeny,static_ep]'",
            ),
            ("system=[harmoeny,drop],[drop,ideal]", "name them in one list: 'system=[harmoeny,drop,ideal]'"),
            ("system=[harmoeny,static_ep]", ""),
        ],
    )
    def test_a_sweep_over_systems_is_named(
        self, override: str, said: str, compose: Compose, small: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.start(compose, "experiment=smoke", "router.skew=0.5", override, *small)
        lines = capsys.readouterr().err.splitlines()
        assert any(said in line for line in lines)
        assert any("unpaired" in line for line in lines) == bool(said)

    def test_capped_shares_are_said_once_before_anything_runs(
        self, compose: Compose, small: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = ["experiment=smoke", "model=moe_stack", "model.top_k=2", "model.num_experts=4", "router=zipf"]
        self.start(compose, *options, "router.exponent=0,2,2", *small)
        lines = capsys.readouterr().err.splitlines()
        assert len([line for line in lines if line.startswith("router=zipf: shares are capped at 0.5 ")]) == 1

    @pytest.mark.parametrize("multirun", [True, False])
    def test_a_dry_run_only_says_what_would_be_run(
        self, multirun: bool, compose: Compose, results: Path, small: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        swept = ["experiment=smoke", "router.skew=0,0.5"] if multirun else ["router.skew=0.5"]
        config = compose(*small, *swept, "dry_run=true", multirun=multirun)
        start = ValidateSweep().on_multirun_start if multirun else ValidateSweep().on_run_start
        with pytest.raises(SystemExit) as caught:
            start(config)
        assert caught.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == (4 if multirun else 2)
        assert ("2 to run together, time unknown" if multirun else "1 to run, time unknown") in lines[-1]
        assert not list(results.rglob("*.*"))
        config = compose(*small, "router.skew=7", "dry_run=true", multirun=multirun)
        with pytest.raises(SystemExit) as caught:
            start(config)
        assert caught.value.code == 2, "it checks as the run would"

    def test_what_was_asked_for_is_never_left_out(
        self, compose: Compose, small: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            self.start(compose, "experiment=skew_sweep", "router=zipf", "router.skew=0,1", *small)
        assert "error: router.skew: no such field, must be one of exponent" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("router.skew=0,1.5", r"error: router\.skew: 1\.5, must be 0 to 1"),
            ("system=[harmoeny],[nonsense]", "error: system: 'nonsense', must be one of"),
            ("router=uniform,nonsense", "error: router: 'nonsense', must be one of"),
            (
                "router.skew=0,0.5 trace.record=routing.parquet",
                r"error: trace\.record: 'routing\.parquet' for 2 points, must be a file of each point's own, such as "
                r"'trace\.record=routing-\$\{router\.skew\}\.parquet'$",
            ),
            ("seq_len=32,100000000", r"error: seq_len: 100000000, must be at most \d+, the tokens of the data set"),
        ],
    )
    def test_one_bad_point_stops_it(
        self,
        override: str,
        message: str,
        compose: Compose,
        results: Path,
        small: list[str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            self.start(compose, "model=switch_tiny", *small, *override.split())
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.match(message, line), line
        assert not list(results.rglob("*.json"))

    def test_every_point_may_record_into_a_file_of_its_own(
        self, compose: Compose, results: Path, small: list[str]
    ) -> None:
        record = f"trace.record={results.parent}/routing-${{router.skew}}.parquet"
        self.start(compose, "model=switch_tiny", "router.skew=0,0.5", record, *small)
        assert len(json.loads(Path(os.environ["HARMOENY_SWEEP_DIR"], "sweep.json").read_text())["run_ids"]) == 2

    def test_a_defect_in_the_check_stops_it_too(
        self, compose: Compose, small: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("experiments.compose.swept.load_swept_point", lambda *_: 1 / 0)
        with pytest.raises(SystemExit) as caught:
            self.start(compose, "experiment=smoke", *small)
        assert caught.value.code == 1


COMMANDS = {
    "help": ["--help"],
    "systems": ["system=harmoeny,static_ep"],
    "system": ["system=[nonsense]"],
    "twice": ["experiment=paper_threshold", "system=[harmoeny]"],
    "dataset": ["dataset=local", "dataset.path=/nonexistent"],
    "sweep": ["--multirun", "router.skew=0,1.5"],
}


@pytest.fixture(scope="module")
def answers(
    programs: Programs, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, subprocess.CompletedProcess[str]]:
    """What run.py answers to every command."""
    results = tmp_path_factory.mktemp("results")
    done = {name: programs.run("run.py", *arguments, f"results_dir={results}") for name, arguments in COMMANDS.items()}
    assert not list(results.rglob("*.json")), "something ran"
    return done


Answers = dict[str, "subprocess.CompletedProcess[str]"]


class TestCommandLine:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("system", r"error: system: 'nonsense', must be one of .*drop.*harmoeny.*static_ep"),
            ("twice", r"error: system: this experiment has harmoeny_tokens under the name of another system .*must be"),
            ("dataset", r"error: dataset\.path: '/nonexistent' does not exist, must be a file or a folder"),
            ("sweep", r"error: router\.skew: 1\.5, must be 0 to 1"),
            ("systems", r"error: system: several values, must be a list .*'system=\[harmoeny,static_ep\]'$"),
        ],
    )
    def test_error_is_one_line(self, name: str, message: str, answers: Answers) -> None:
        answer = answers[name]
        assert answer.returncode == 2
        (line,) = answer.stderr.splitlines()
        assert re.match(message, line), line
        assert answer.stdout == ""

    def test_help_explains_every_choice(self, answers: Answers) -> None:
        answer = answers["help"]
        assert answer.returncode == 0
        assert answer.stderr == ""
        lines = [line.strip() for line in answer.stdout.splitlines()]
        for group in ("system", "model", "router", "dataset"):
            assert any(line.startswith(f"{group}: ") for line in lines)
            for name, component in discover(group)[0].items():
                assert f"{name:<16} {component.description}" in lines
        for path in CONF.glob("*/*.yaml"):
            assert any(line.split()[:1] == [path.stem] for line in lines), path
        examples = [line for line in lines if line.startswith("python run.py ")]
        assert len(examples) >= 4

    def test_examples_in_the_help_work(self, answers: Answers, load: Load, tmp_path: Path) -> None:
        (tmp_path / "FILE").write_text("text")
        for line in answers["help"].stdout.splitlines():
            if line.startswith("python run.py "):
                overrides = re.split(r"\s{2,}", line)[0].split()[2:]
                overrides = [o.replace("=FILE", f"={tmp_path / 'FILE'}") for o in overrides]
                # One point of a sweep stands for all: the sweep itself is composed elsewhere.
                load(*(re.sub(r"^(router\.skew=[^,]*),.*", r"\1", o) for o in overrides))


@pytest.mark.programs
def test_started_elsewhere_it_says_where_to_go(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, ROOT / "run.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert answer.returncode == 1
    assert answer.stderr == f"error: run.py must be started in the repository's root: cd {ROOT} && python run.py ...\n"


def test_choices_with_a_missing_dependency_are_named_with_the_reason(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "experiments.compose.messages.unavailable", lambda _: {"absent_moe": "No module named 'absent'"}
    )
    for choice, message in {
        "absent_moe": r"^system: 'absent_moe' is unavailable here \(No module named 'absent'\), must be one ",
        "nonsense": r"; unavailable here: absent_moe \(No module named 'absent'\)$",
    }.items():
        with pytest.raises(HydraException) as caught:
            load(f"system=[{choice}]")
        assert re.search(message, explain(caught.value))


def test_choices_hold_components_and_presets(load: Load) -> None:
    assert choices("model").keys() == {*discover("model")[0], *(path.stem for path in (CONF / "model").glob("*.yaml"))}
    assert "measured" in choices("hardware")
    assert choices("nonsense") == {}
