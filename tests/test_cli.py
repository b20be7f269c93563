"""The command line does the main job, refuses bad input in one sentence before the first step, and loses nothing."""

from __future__ import annotations

import csv
import dataclasses
import errno
import itertools
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import h5netcdf
import numpy as np
import pytest
import torch
from torch import Tensor

from inference import EM, HMC, NUTS, SVI, Backend, Gibbs, MetropolisHastings, Posterior
from parameters import quick
from pyro_genmodels import GMM, cli, comparison, datasets
from pyro_genmodels.comparison import METHODS, MODELS, Comparison, Folder, split

SMALL: dict[str, Backend[Any, Any]] = {
    "svi": SVI(steps=20, draws=30),
    "em": EM(steps=20),
    "gibbs": Gibbs(chains=2, warmup=5, draws=30),
    "mh": MetropolisHastings(chains=2, warmup=20, draws=30),
    "hmc": HMC(chains=2, warmup=20, draws=30),
    "nuts": NUTS(chains=2, warmup=20, draws=30, max_depth=4),
}
FILES = {"table.csv", "density.png", "traces.png", "effective_sizes.png", "comparison.json", *(f"{m}.nc" for m in SMALL)}
MAIN_JOB = ["compare", "gmm", "--data", "faithful", "--components", "2", "--quiet"]


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> dict[str, Backend[Any, Any]]:
    """The table of settings, small, and this test's own."""
    for name, backend in SMALL.items():
        monkeypatch.setitem(METHODS, name, backend)
    return METHODS


def explode(step: int, info: Any) -> NoReturn:
    raise AssertionError("A step was taken, although the input is bad.")


@pytest.fixture
def no_step(methods: dict[str, Backend[Any, Any]]) -> None:
    """Fails a test that takes a step."""
    for name, backend in methods.items():
        methods[name] = dataclasses.replace(backend, callbacks=(explode,))


def stop_at(count: int) -> Any:
    """A callback that presses Ctrl-C in the step with this number."""

    def callback(step: int, info: Any) -> None:
        if step == count:
            raise KeyboardInterrupt

    return callback


# --------------------------------------------------------------------------------------- the main job
@pytest.fixture(scope="module")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    """Folder, stdout and stderr of one small run of the main job, over the folder of an earlier one."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    folder = tmp_path_factory.mktemp("runs") / "a" / "faithful"
    Folder(folder, {}).write("old.nc", lambda path: path.write_text("old"))
    with pytest.MonkeyPatch.context() as patch:
        for name, backend in SMALL.items():
            patch.setitem(METHODS, name, backend)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main([*MAIN_JOB, "--out", str(folder)])
    assert status == 0
    yield folder, out.getvalue(), err.getvalue()


@pytest.mark.slow  # .ci/run has it as a step of its own
def test_the_main_job_prints_a_column_for_every_back_end(main_job: tuple[Path, str, str]) -> None:
    _, printed, _ = main_job
    lines = printed.splitlines()
    assert lines[2].split() == list(SMALL)
    for name in ("wall time", "held-out", "worst R-hat", "least ESS", "weights[0]", "means[1, waiting]", "posterior sd"):
        row = next(line for line in lines if name in line)
        assert len(re.split(r"\s{2,}", row.strip())) == 1 + len(SMALL), row
    for section in ("Findings", "Agreement", "Monte-Carlo standard errors", "of the data's standard deviation"):
        assert section in printed
    assert max(map(len, lines[:18])) <= 125


def test_the_main_job_writes_its_files_and_replaces_an_earlier_one(main_job: tuple[Path, str, str]) -> None:
    folder, _, _ = main_job
    assert {file.name for file in folder.iterdir()} == FILES
    assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in FILES if name.endswith(".png"))
    record = json.loads((folder / "comparison.json").read_text())
    assert {*record["files"], "comparison.json"} == FILES
    assert record["data"] == "faithful"


def test_every_back_end_leaves_a_netcdf_file_that_others_can_read(main_job: tuple[Path, str, str]) -> None:
    folder, _, _ = main_job
    for name in SMALL:
        with h5netcdf.File(folder / f"{name}.nc", "r") as file:
            posterior = file.groups["posterior"]
            assert posterior.variables["means"].dimensions == ("chain", "draw", "components", "features")
            assert [name.decode() for name in posterior.variables["features"][:]] == ["eruptions", "waiting"]
            assert {"posterior", "sample_stats", "log_likelihood", "observed_data"} <= set(file.groups)


def test_the_table_is_saved_in_full(main_job: tuple[Path, str, str]) -> None:
    folder, _, _ = main_job
    with (folder / "table.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    quantities = 5 + 2 + 4 + 8  # of the run; weights, means, covariances
    assert [row["method"] for row in rows] == [name for name in SMALL for _ in range(quantities)]
    by_name = {(row["method"], row["quantity"]): row for row in rows}
    for name in SMALL:
        weights = [float(by_name[name, f"weights[{i}]"]["value"]) for i in (0, 1)]
        assert sum(weights) == pytest.approx(1.0, abs=1e-5)
        assert (by_name[name, "means[0, waiting]"]["standard_error"] == "") == (name == "em")


def test_quiet_is_quiet(main_job: tuple[Path, str, str]) -> None:
    assert main_job[2] == ""


def test_list_names_all_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in (*MODELS, *METHODS, *datasets.names()):
        assert f"  {name} " in printed


def test_every_cell_of_the_list_is_a_method() -> None:
    for entry in MODELS.values():
        assert set(entry.methods) <= set(METHODS)
        assert {*entry.shown, *entry.dims} <= {*entry.judged}


def test_fit_prints_plan_summary_and_findings_and_saves(
    methods: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    argv = ["fit", "gmm", "--data", "faithful", "--method", "gibbs", "--components", "3", "--covariance", "diagonal"]
    options = ["--draws", "12", "--warmup", "3", "--chains", "3", "--seed", "5", "--threads", "2"]
    assert cli.main([*argv, *options, "--out", str(tmp_path / "fit")]) == 0
    printed, progress = capsys.readouterr()
    for part in ("Dirichlet", "weights[2]", "means[0, eruptions]", "Findings", "r_hat"):
        assert part in printed
    assert "Gibbs" in progress  # the bar
    posterior = Posterior.load(tmp_path / "fit")
    assert posterior.draws["covariances"].shape == (3, 12, 3, 2)
    assert posterior.info["seed"] == 5
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("method", ["svi", "em"])
def test_fit_sums_up_what_has_no_chains(method: str, methods: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "gmm", "--data", "galaxies", "--method", method, "--steps", "10", "--quiet"]) == 0
    assert "means[0, velocity]" in capsys.readouterr().out


# --------------------------------------------------------------------------------- the other models
SHEET = """height,weight,goals,kind,colour,level,grade
1.2,3.1,0,0,1,2.5,0
0.8,2.7,2,0,0,2.0,1
1.9,3.9,1,1,2,3.1,2
1.4,3.3,0,1,1,2.4,0
0.2,2.1,4,0,0,1.3,1
2.3,4.4,1,1,2,3.6,2
1.1,2.9,3,0,1,2.2,0
0.5,2.2,0,0,0,1.6,1
2.0,4.1,1,1,2,3.3,2
1.7,3.4,2,1,0,2.8,0
"""
RUNS = {
    "mixture": (["--columns", "normal,normal,poisson,bernoulli,categorical,normal,poisson"], "rates[0, 0]"),
    "naive_bayes": (["--labels", "kind", "--columns", "gaussian,gaussian,poisson,categorical,gaussian,poisson"], "share[0]"),
    "linear": (["--labels", "level"], "coefficients[intercept]"),
    "logistic": (["--labels", "kind"], "coefficients[weight]"),
    "softmax": (["--labels", "grade"], "coefficients[2, height]"),
    "margin": (["--labels", "kind", "--cost", "2.0"], "coefficients[0]"),
    "ppca": (["--factors", "2"], "location[goals]"),
    "factors": ([], "covariance[0, 1]"),
    "hmm": (["--states", "2", "--emission", "diagonal"], "transitions[0, 1]"),
    "lda": (["--components", "2"], "topics[0, colour]"),
}


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    """A table with a column of every kind."""
    path = tmp_path / "sheet.csv"
    path.write_text(SHEET)
    return path


@pytest.fixture
def tally(tmp_path: Path) -> Path:
    """A table of counts."""
    path = tmp_path / "tally.csv"
    rows = [",".join(row.split(",")[i] for i in (2, 3, 4, 6)) for row in SHEET.split()]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_every_model_is_run_below() -> None:
    assert {"gmm", *RUNS} == {*MODELS}


@pytest.mark.parametrize("model", quick(RUNS, ("linear", "hmm", "naive_bayes")))
def test_every_model_is_fitted_by_its_name(
    model: str, methods: dict[str, Any], sheet: Path, tally: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, element = RUNS[model]
    data = tally if model == "lda" else sheet
    assert cli.main(["fit", model, "--data", str(data), "--method", "gibbs", "--quiet", *options]) == 0
    printed = capsys.readouterr().out
    assert element in printed and "Findings" in printed and "10 rows" in printed


COMPARED = ["linear", "softmax", *(pytest.param(name, marks=pytest.mark.slow) for name in ("naive_bayes", "ppca", "hmm"))]


@pytest.mark.parametrize("model", COMPARED)
def test_back_ends_are_compared_on_every_kind_of_model(
    model: str, methods: dict[str, Any], sheet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compare", model, "--data", str(sheet), "--method", "em,gibbs", "--quiet", *RUNS[model][0]]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert RUNS[model][1] in printed and "failed" not in printed
    held_out = next(line for line in printed.splitlines() if "held-out" in line and "density" in line).split()[-2:]
    assert (held_out == ["-", "-"]) == (model == "hmm")
    assert ("10 rows fitted" in printed) == (model == "hmm")
    assert {"em.nc", "gibbs.nc", "table.csv", "traces.png"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_labels_may_lie_beside_the_table(methods: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["fit", "naive_bayes", "--data", "digits", "--labels", "y", "--columns", "poisson", "--method", "em", "--quiet"]
    assert cli.main(argv) == 0
    assert "naive_bayes(classes=10, columns=poisson) on digits: EM, 1797 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["naive_bayes"], "naive_bayes learns from labels: give --labels COLUMN, one of height, weight"),
        (["naive_bayes", "--labels", "size"], "There is no column 'size'; there are height, weight"),
        (
            ["naive_bayes", "--labels", "level"],
            "Labels must be whole numbers from 0 on, or -1 where they are not known, but",
        ),
        (["logistic", "--labels", "height"], "Labels must be whole numbers from 0 on, but 'height' is 1.2 in row 0"),
        (["logistic", "--labels", "grade"], "LogisticRegression tells 2 classes apart, labelled 0 and 1, but there are 3"),
        (["gmm", "--labels", "kind"], "gmm learns from no labels: leave --labels out"),
        (["ppca", "--components", "3"], "ppca has no option --components; it has --factors"),
        (["linear", "--labels", "level", "--factors", "3"], "linear has no option --factors; it has none"),
        (["lda"], "lda counts words, so that every entry must be a whole number from 0 on, but row 0 of the table has 1.2"),
        (["mixture", "--columns", "poisson"], "Column 0 is of the kind 'poisson' and must hold whole numbers from 0 on"),
        (["mixture", "--columns", "round"], "kinds holds 'round', but each must be one of bernoulli"),
        (["mixture", "--columns", "normal,poisson"], "x has 7 columns, but this Mixture was built for 2"),
        (["ppca", "--factors", "7"], "factors is 7 and there are 7 columns"),
        (["hmm", "--emission", "poisson"], "hmm with poisson emissions reads one column, but the table has 7"),
        (["margin", "--labels", "kind", "--kernel", "cubic"], "kernel is 'cubic', but must be one of linear, rbf"),
        (["margin", "--labels", "kind", "--cost", "-1"], "cost is -1.0, but must be positive"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "compare"])
def test_a_table_that_a_model_cannot_read_is_refused_in_one_sentence(
    command: str, argv: list[str], sentence: str, no_step: None, sheet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, argv[0], "--data", str(sheet), "--method", "gibbs", *argv[1:]]) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and sentence in said and said.count("\n") == 1 and said.startswith("genmodels: ")


def test_rows_that_cannot_be_scored_alone_are_not_held_out(
    no_step: None, sheet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", "hmm", "--data", str(sheet), "--held-out", "0.2"]) == 2
    assert capsys.readouterr().err == "genmodels: hmm does not score rows one by one: leave --held-out out.\n"


# ---------------------------------------------------------------------------------------- comparisons
def posterior(seed: int, kind: str = "samples", shuffled: bool = False) -> Posterior:
    """Independent draws around a known point; labels at random if asked."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.tensor([[2.0, 54.0], [4.3, 80.0]], dtype=torch.float64)
    shape = (4, 250)

    def noise(*own: int) -> Tensor:
        return torch.randn(*shape, *own, generator=generator, dtype=torch.float64)

    share = 0.35 + 0.03 * noise()
    draws = {
        "weights": torch.stack([share, 1.0 - share], -1),
        "means": means + torch.tensor([0.03, 0.6]) * noise(2, 2),
        "covariances": torch.diag_embed(torch.tensor([0.1, 30.0]) * (0.1 * noise(2, 2)).exp()),
    }
    if shuffled:
        order = torch.rand(*shape, 2, generator=generator).argsort(-1)
        draws = {
            site: values.gather(2, order.reshape(*shape, 2, *[1] * (values.dim() - 3)).expand(values.shape))
            for site, values in draws.items()
        }
    return Posterior(
        draws=draws,
        stats={"lp": noise()},
        info={"kind": kind, "sampling_time": 2.0, "backend": "Gibbs"},
        dims={"weights": ("weights_dim_0",), "means": ("components", "means_dim_1"), "x": ("rows", "x_dim_1")},
        observed={"x": torch.zeros(5, 2)},
        symmetry={"weights": 0, "means": 0, "covariances": 0},
    )


def compared(posteriors: Mapping[str, Posterior]) -> Comparison:
    x = datasets.load("faithful").x
    found = Comparison(entry=MODELS["gmm"], model=GMM(2), x=x, test=x[:20], columns=("eruptions", "waiting"))
    for name, one in posteriors.items():
        found.add(name, one)
    return found


def test_labels_of_all_are_those_of_the_first_by_weight() -> None:
    found = compared({"a": posterior(0, shuffled=True), "b": posterior(1), "c": posterior(2, shuffled=True)})
    for method in "abc":
        estimates = found.estimates(method, ["weights", "means"])
        assert estimates["weights[0]"].mean == pytest.approx(0.65, abs=5 * 0.03 / math.sqrt(1000))
        assert estimates["means[0, waiting]"].mean == pytest.approx(80.0, abs=5 * 0.6 / math.sqrt(1000))
        assert estimates["means[0, waiting]"].deviation == pytest.approx(0.6, rel=0.15)


def test_the_error_is_that_of_the_mean() -> None:
    estimate = compared({"a": posterior(0)}).estimates("a", ["weights"])["weights[0]"]
    assert estimate.error == pytest.approx(estimate.deviation / math.sqrt(1000), rel=0.2)  # independent draws


def test_agreement_counts_standard_errors_between_samplers_and_shares_of_the_spread_elsewhere() -> None:
    shifted = posterior(1, kind="variational")
    shifted.draws["means"][..., 1] += 0.1 * datasets.load("faithful").x[:, 1].std()
    samplers, others = compared({"a": posterior(0), "b": posterior(3), "q": shifted}).agreement()
    # six elements of one pair: |difference| beyond 4 standard errors once in 2600 runs
    assert float(samplers.split("at most ")[1].split()[0]) < 4.0
    share = float(others.split("at most ")[1].split("%")[0])
    assert share == pytest.approx(10.0, abs=100 * 5 * 0.6 * math.sqrt(1 / 1000 + 1 / 2000) / 13.6)
    assert "waiting" in others and "weights" in others


def test_what_cannot_be_known_is_left_out_of_the_table() -> None:
    point = posterior(0, kind="point")
    point = dataclasses.replace(
        point, draws={s: v[:1, :1] for s, v in point.draws.items()}, stats={"lp": point.stats["lp"][:1, :1]}
    )
    found = compared({"em": point})
    assert found.agreement() == []
    assert all(math.isnan(found.summary("em")[name]) for name in ("worst R-hat", "least ESS", "least ESS per second"))
    assert "nan" not in found.table()


def test_a_back_end_that_fails_does_not_cost_the_others() -> None:
    entry, x = MODELS["gmm"], datasets.load("faithful").x
    bad = Gibbs(chains=2, warmup=2, draws=4, progress=False, start={"nonsense": torch.zeros(1)})
    good = SVI(steps=3, draws=5, progress=False, seed=0)
    found = comparison.compare(entry, entry.options, x, ("a", "b"), {"gibbs": bad, "svi": good})
    assert [*found.posteriors] == ["svi"]
    assert any("gibbs: failed" in line and "nonsense" in line for line in found.findings())
    with pytest.raises(ValueError, match="nonsense"):
        comparison.compare(entry, entry.options, x, ("a", "b"), {"gibbs": bad})


@pytest.mark.parametrize(("rows", "share"), [(272, 0.1), (10, 0.0), (3, 0.34), (2, 0.5)])
def test_a_split_loses_no_row_and_depends_on_the_seed_alone(rows: int, share: float) -> None:
    x = torch.arange(float(rows))[:, None]
    training, test = split(x, share, seed=4)
    assert torch.equal(torch.cat([training, test]).sort(0).values, x)
    assert len(test) == round(share * rows)
    assert torch.equal(split(x, share, seed=4)[1], test)
    if rows == 272:
        assert not torch.equal(split(x, share, seed=5)[1], test)


# ------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["compare", "gnn", "--data", "faithful"], "There is no model 'gnn'; there are gmm, mixture"),
        (["fit", "gnn", "--data", "faithful", "--method", "em"], "There is no model 'gnn'"),
        (["compare", "gmm", "--data", "fathful"], "There is no data set 'fathful'; there are faithful, galaxies"),
        (["compare", "gmm", "--data", "nowhere.csv"], "There is no file nowhere.csv"),
        (["compare", "gmm", "--data", "table.xls"], "table.xls"),
        (["compare", "gmm", "--data", "coal"], "'coal' is no table of observations: take its years, counts"),
        (["compare", "gmm", "--data", "faithful", "--method", "em,gips"], "There is no method 'gips'; there are svi, em"),
        (["fit", "gmm", "--data", "faithful", "--method", "smc"], "There is no method 'smc'"),
        (["fit", "gmm", "--data", "faithful", "--method", "em", "--draws", "5"], "em has no --draws: leave it out"),
        (["fit", "gmm", "--data", "faithful", "--method", "hmc", "--steps", "5"], "hmc has no --steps"),
        (["fit", "gmm", "--data", "faithful"], "--method"),
        (["fit", "gmm", "--method", "em"], "--data"),
        (["compare", "gmm", "--data", "faithful", "--components", "two"], "'two' is no integer of at least 1"),
        (["compare", "gmm", "--data", "faithful", "--components", "0"], "'0' is no integer of at least 1"),
        (["compare", "gmm", "--data", "faithful", "--seed", "-1"], "'-1' is no integer of at least 0"),
        (["compare", "gmm", "--data", "faithful", "--held-out", "1"], "must be at least 0 and less than 1"),
        (["compare", "gmm", "--data", "faithful", "--held-out", "0.999"], "leaves none to fit"),
        (["compare", "gmm", "--data", "faithful", "--held-out", "some"], "invalid float value: 'some'"),
        (
            ["compare", "gmm", "--data", "faithful", "--covariance", "round"],
            "covariance is 'round', but must be one of full",
        ),
        (["compare", "gmm", "--data", "galaxies", "--components", "80"], "80 components, but x has only 74 rows"),
        (["fit", "gmm", "--data", "faithful", "--method", "gibbs", "--draws", "0"], "'0' is no integer of at least 1"),
        ([], "list | fit | compare"),
        (["fits"], "fits"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    argv: list[str], sentence: str, no_step: None, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(argv)
    except SystemExit as stop:  # argparse
        status = stop.code  # type: ignore[assignment]
    printed, said = capsys.readouterr()
    assert (status, printed) == (2, "")
    assert sentence in said
    assert said.count("\n") == 1 and said.startswith("genmodels") and "Error" not in said


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a,b\n1.0,2.0\n3.0\n", "row 3 has 1 cells, but there are 2 columns"),
        ("a,b\n1.0,2.0\n3.0,\n", "row 3, column 'b': the value is missing"),
        ("a,b\n1.0,2.0\n3.0,tall\n", "row 3, column 'b': 'tall' is not a number"),
        ("a,b\n1.0,inf\n3.0,2.0\n", "row 2, column 'b': 'inf' is not finite"),
        ("", "is empty"),
    ],
)
def test_a_bad_cell_is_named_by_row_and_column(
    text: str, sentence: str, no_step: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.csv"
    table.write_text(text)
    assert cli.main(["compare", "gmm", "--data", str(table), "--out", str(tmp_path / "out")]) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and sentence in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["fit", "compare"])
@pytest.mark.parametrize("obstacle", ["something else", "file", "below a file", "no permission", "other record"])
def test_a_folder_that_cannot_be_used_is_refused_before_the_first_step(
    command: str, obstacle: str, no_step: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    out = tmp_path / "out"
    expected = "holds something else ('thesis.tex')"
    if obstacle == "something else":
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    elif obstacle == "other record":
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
        for record in ("comparison.json", "checkpoint.json"):
            (out / record).write_text('{"format": "of another program", "files": ["thesis.tex"]}')
        expected = "holds something else"
    elif obstacle == "file":
        out.write_text("years of work")
        expected = "is a file"
    elif obstacle == "below a file":
        (tmp_path / "table").write_text("")
        out = tmp_path / "table" / "out" / "deeper"
        expected = "Cannot write to folder"
    else:  # root may write anywhere

        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        expected = "Permission denied. Choose another one."
    before = sorted((p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())
    argv = [command, "gmm", "--data", "faithful", *(["--method", "gibbs"] if command == "fit" else [])]
    assert cli.main([*argv, "--out", str(out)]) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and expected in said and said.count("\n") == 1
    assert sorted((p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()) == before


def test_a_disk_that_fills_up_does_not_cost_the_table(
    methods: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(data: Any, path: Path) -> NoReturn:
        path.write_text("half a")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli.arviz, "write", full)
    argv = ["compare", "gmm", "--data", "faithful", "--method", "svi", "--quiet", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    printed, said = capsys.readouterr()
    assert "weights[0]" in printed
    assert "svi.nc': No space left on device" in said
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"table.csv", "density.png", "comparison.json"}


# --------------------------------------------------------------------------------------------- Ctrl-C
def test_ctrl_c_while_drawing_saves_what_there_is(
    methods: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods["mh"] = dataclasses.replace(SMALL["mh"], callbacks=(stop_at(20 + 9),))
    methods["hmc"] = dataclasses.replace(SMALL["hmc"], callbacks=(explode,))
    argv = ["compare", "gmm", "--data", "faithful", "--method", "svi,mh,hmc", "--quiet", "--out", str(tmp_path)]
    assert cli.main(argv) == 130
    printed, said = capsys.readouterr()
    assert "mh: Stopped by Ctrl-C after 10 of 30 draws." in printed
    assert said == "genmodels: Stopped by Ctrl-C during mh; the above is what there is so far, and it is saved.\n"
    assert {"svi.nc", "mh.nc", "table.csv", "density.png", "traces.png"} <= {file.name for file in tmp_path.iterdir()}
    with h5netcdf.File(tmp_path / "mh.nc", "r") as file:
        assert file.groups["posterior"].dimensions["draw"].size == 10


def test_ctrl_c_before_the_first_draw_leaves_an_earlier_result_alone(
    methods: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods["mh"] = dataclasses.replace(SMALL["mh"], callbacks=(stop_at(2),))
    Folder(tmp_path, {}).write("mh.nc", lambda path: path.write_text("earlier"))
    argv = ["compare", "gmm", "--data", "faithful", "--quiet", "--out", str(tmp_path), "--method", "mh"]
    assert cli.main(argv) == 130
    assert capsys.readouterr() == ("", "genmodels: Stopped by Ctrl-C during mh: there is nothing to show yet.\n")
    assert (tmp_path / "mh.nc").read_text() == "earlier"


@pytest.mark.parametrize("is_drawing", [True, False])
def test_ctrl_c_during_a_fit_saves_what_there_is(
    is_drawing: bool, methods: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods["mh"] = dataclasses.replace(SMALL["mh"], callbacks=(stop_at(20 + 9 if is_drawing else 2),))
    argv = ["fit", "gmm", "--data", "faithful", "--method", "mh", "--quiet", "--out", str(tmp_path / "fit")]
    assert cli.main(argv) == 130
    printed, said = capsys.readouterr()
    if is_drawing:
        assert "Stopped by Ctrl-C after 10 of 30 draws" in printed and "it is saved" in said
        assert Posterior.load(tmp_path / "fit").draws["weights"].shape[:2] == (2, 10)
    else:
        assert printed == "" and "no draws yet" in said and not (tmp_path / "fit").exists()


# --------------------------------------------------------------------------------------------- folder
def test_a_file_of_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    folder = Folder(tmp_path / "out", {})
    folder.write("a.txt", lambda path: path.write_text("whole"))
    with pytest.raises(KeyboardInterrupt):
        folder.write("a.txt", half)
    assert (tmp_path / "out" / "a.txt").read_text() == "whole"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"a.txt", "comparison.json"}


def test_nothing_is_made_before_there_is_something_to_write(tmp_path: Path) -> None:
    Folder(tmp_path / "a" / "b", {})
    assert not (tmp_path / "a").exists()


def test_settings_of_the_table_are_valid_and_seeded_alike() -> None:
    args = cli._parser().parse_args(["compare", "gmm", "--data", "faithful", "--seed", "3", "--quiet"])
    backends = [cli._backend(name, args) for name in METHODS]
    assert {(backend.seed, backend.progress) for backend in backends} == {(3, False)}
    assert len({type(backend) for backend in backends}) == len(METHODS)
    assert np.unique([cli._settings(a) == cli._settings(b) for a, b in itertools.combinations(backends, 2)]).tolist() == [
        False
    ]


# ---------------------------------------------------------------------------------------------------------- diagnose
def test_a_saved_posterior_is_diagnosed_in_words(
    methods: dict[str, Backend[Any, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it prints is what the posterior itself says: plan, summary, findings."""
    folder = tmp_path / "fit"
    argv = ["fit", "gmm", "--data", "faithful", "--components", "2", "--method", "gibbs", "--quiet"]
    assert cli.main([*argv, "--out", str(folder)]) == 0
    fitted = capsys.readouterr().out
    assert cli.main(["diagnose", str(folder)]) == 0
    printed = capsys.readouterr().out
    posterior = Posterior.load(folder)
    assert printed.startswith("Gibbs on GMM, 2 x 30 draws\n") and str(posterior.plan) in printed
    findings = posterior.diagnose()
    assert findings and all(finding in printed for finding in findings)
    assert fitted.split("\nFindings")[1].split("\nSaved")[0].strip() == printed.split("\nFindings")[1].strip()
    assert "weights[0]" in printed and "Not shown, with more than 50 elements: z" in printed


def test_a_folder_that_holds_no_posterior_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, empty, damaged = tmp_path / "missing", tmp_path / "empty", tmp_path / "damaged"
    empty.mkdir()
    damaged.mkdir()
    (damaged / "checkpoint.json").write_text("{}")
    (damaged / "tensors.safetensors").write_bytes(b"")
    for folder, reason in [(missing, "There is no folder"), (empty, "holds no checkpoint"), (damaged, "is damaged")]:
        assert cli.main(["diagnose", str(folder)]) == 2
        out, said = capsys.readouterr()
        assert not out and said.startswith("genmodels: ") and said.count("\n") == 1 and reason in said, said
