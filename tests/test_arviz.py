"""What is exported is what ArviZ, of either major, reads; its diagnostics are ArviZ's own.

This file needs no torch, so that it can be run wherever an ArviZ is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pytest
from scipy import stats

from inference import arviz

IS_TREE = int(az.__version__.split(".")[0]) >= 1
CHAINS, DRAWS, YEARS = 3, 50, 6


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def groups_of(generator: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    def normal(*shape: int) -> np.ndarray:
        return generator.normal(size=shape)

    return {
        "posterior": {
            "mu": normal(CHAINS, DRAWS),
            "theta": normal(CHAINS, DRAWS, YEARS),
            "z": generator.integers(3, size=(CHAINS, DRAWS, YEARS)),
        },
        "sample_stats": {"lp": normal(CHAINS, DRAWS), "diverging": generator.random((CHAINS, DRAWS)) < 0.1},
        "log_likelihood": {"y": normal(CHAINS, DRAWS, YEARS)},
        "observed_data": {"y": normal(YEARS, 2)},
        "constant_data": {"x": np.arange(YEARS)},
        "prior": {"mu": normal(1, 20)},
        "prior_predictive": {"y": normal(1, 20, YEARS, 2)},
        "posterior_predictive": {"y": normal(CHAINS, DRAWS, YEARS, 2)},
        "warmup_posterior": {"mu": normal(CHAINS, 10)},
        "warmup_sample_stats": {"lp": normal(CHAINS, 10)},
    }


def exported(generator: np.random.Generator) -> Any:
    dims = {"theta": ["year"], "z": ["year"], "y": ["year", "y_dim_1"], "x": ["year"]}
    years = np.arange(1851, 1851 + YEARS)
    return arviz.export(groups_of(generator), {"year": years}, dims, {"inference_library": "pyro-genmodels", "seed": 7})


def names_of(data: Any) -> list[str]:
    return list(data.children) if IS_TREE else list(data.groups())


def test_every_group_has_the_arrays_under_their_dimensions(generator: np.random.Generator) -> None:
    data = exported(generator)
    groups = groups_of(np.random.default_rng(0))
    assert sorted(names_of(data)) == sorted(groups)
    for group, arrays in groups.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(data[group][name].values, array)
            assert data[group][name].dtype == array.dtype
    assert data["posterior"]["theta"].dims == ("chain", "draw", "year")
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "year")
    assert data["observed_data"]["y"].dims == ("year", "y_dim_1")
    assert data["constant_data"]["x"].coords["year"].values.tolist() == list(range(1851, 1851 + YEARS))


def test_groups_without_arrays_are_left_out() -> None:
    data = arviz.export({"posterior": {"mu": np.zeros((1, 5))}, "observed_data": {}})
    assert names_of(data) == ["posterior"]


def test_a_file_of_netcdf_holds_everything(generator: np.random.Generator, tmp_path: Path) -> None:
    data = exported(generator)
    arviz.write(data, tmp_path / "run.nc")
    read = az.from_netcdf(tmp_path / "run.nc")
    for group, arrays in groups_of(np.random.default_rng(0)).items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(read[group][name].values, array)
            assert read[group][name].dtype == array.dtype
    assert read["posterior"].attrs["inference_library"] == "pyro-genmodels"
    assert read.attrs["seed"] == 7
    assert "created_at" in read.attrs
    if hasattr(read, "close"):
        read.close()


def test_attributes_are_what_netcdf_can_hold(tmp_path: Path) -> None:
    attrs = {"none": None, "flag": True, "table": {"a": [1, None]}, "long": 2**64, "real": np.float32(0.5), "word": ""}
    data = arviz.export({"posterior": {"mu": np.zeros((1, 5))}}, attrs=attrs)
    arviz.write(data, tmp_path / "run.nc")
    found = data.attrs
    assert "none" not in found
    assert (found["flag"], found["long"], found["real"], found["word"]) == (1, str(2**64), 0.5, "")
    assert json.loads(found["table"]) == {"a": [1, None]}


def test_names_that_netcdf_or_xarray_would_refuse_are_changed(tmp_path: Path) -> None:
    zeros = np.zeros((2, 5, 4, 4))
    arrays = {"net/weight": zeros, "draw": zeros[:, :, 0, 0], "year": zeros[:, :, 0], "corr": zeros}
    data = arviz.export({"posterior": arrays}, dims={"year": ["year"], "corr": ["k", "k"]})
    arviz.write(data, tmp_path / "run.nc")
    assert data["posterior"]["net.weight"].dims == ("chain", "draw", "net.weight_dim_0", "net.weight_dim_1")
    assert data["posterior"]["draw_"].dims == ("chain", "draw")
    assert data["posterior"]["year"].dims == ("chain", "draw", "year_")
    assert data["posterior"]["corr"].dims == ("chain", "draw", "k", "k_")


def test_one_dimension_name_never_stands_for_two_sizes() -> None:
    arrays = {"a": np.zeros((1, 5, 3)), "b": np.zeros((1, 5, 4))}
    data = arviz.export({"posterior": arrays}, {"year": np.arange(3)}, {"a": ["year"], "b": ["year"]})
    assert data["posterior"]["a"].dims == ("chain", "draw", "year")
    assert data["posterior"]["b"].dims == ("chain", "draw", "b_dim_0")


def test_too_few_names_of_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dims names 1 dimensions of 'a' \(year\), but it has 2"):
        arviz.export({"posterior": {"a": np.zeros((1, 5, 3, 3))}}, dims={"a": ["year"]})


def test_arviz_summarises_and_plots_an_export(generator: np.random.Generator) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    data = exported(generator)
    summary = az.summary(data, round_to="none" if not IS_TREE else None)
    assert len(summary) == 1 + 2 * YEARS
    mean = float(np.asarray(data["posterior"]["mu"]).mean())
    assert float(summary.loc["mu", "mean"]) == pytest.approx(mean, abs=1e-2)
    (az.plot_trace_dist if IS_TREE else az.plot_trace)(data, var_names=["mu", "theta"])
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("name", ["ess", "rhat", "mcse"])
def test_diagnostics_are_those_of_arviz_element_by_element(name: str, generator: np.random.Generator) -> None:
    values = generator.normal(size=(4, 100, 2, 3)).cumsum(1)
    found = getattr(arviz, name)(values)
    assert found.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        expected = getattr(az, name)(values[:, :, i, j])
        np.testing.assert_allclose(found[i, j], np.asarray(expected), rtol=1e-12)


def test_one_chain_is_judged_by_its_halves(generator: np.random.Generator) -> None:
    steady, drifting = generator.normal(size=(1, 1000)), generator.normal(size=(1, 1000)) + np.linspace(0, 3, 1000)
    assert arviz.rhat(steady) < 1.02 < 1.1 < arviz.rhat(drifting)


def test_too_few_draws_are_no_number() -> None:
    assert np.isnan(arviz.rhat(np.zeros((4, 3, 2)))).all()
    assert np.isnan(arviz.ess(np.zeros((4, 3)))).all()


@pytest.mark.parametrize("shape", [0.3, 0.9])
def test_the_tail_of_exact_pareto_weights_is_found(shape: float, generator: np.random.Generator) -> None:
    # The estimate from the M = 3√S largest has standard error (1 + k)/√M; four of them are passed once in 16,000.
    size = 50_000
    tail = 3 * size**0.5
    found = arviz.pareto_k(-shape * np.log(generator.random(size)))
    assert abs(found - shape) < 4 * (1 + shape) / tail**0.5


def test_weights_without_a_tail_have_none(generator: np.random.Generator) -> None:
    assert arviz.pareto_k(np.full(1000, -3.0)) == -np.inf
    assert arviz.pareto_k(-3.0 + 1e-13 * generator.normal(size=1000)) == -np.inf
    assert np.isnan(arviz.pareto_k(np.zeros(10)))


def test_a_few_weights_that_dwarf_the_rest_are_a_heavy_tail(generator: np.random.Generator) -> None:
    assert arviz.pareto_k(1000 * generator.normal(size=1000)) > 1.0


def test_weights_of_zero_do_not_count_in_the_tail(generator: np.random.Generator) -> None:
    weights = generator.normal(size=1000)
    assert arviz.pareto_k(np.append(weights, -np.inf)) == arviz.pareto_k(weights)


def test_importance_finds_a_guide_that_is_too_narrow(generator: np.random.Generator) -> None:
    # Target Exponential(a), guide Exponential(b): the weights are exactly Pareto with k = 1 - a/b. From 40,000 draws
    # the standard error is (1 + k)/√600: k = 0.97 is found below 0.7 once in 2,500 times, k = 0.5 above once in 1,800.
    uniform = generator.random(40_000)
    narrow, wide = (-shape * np.log(uniform) for shape in (0.97, 0.5))
    assert "k-hat of the guide" in arviz.importance(narrow)[0]
    assert arviz.importance(wide) == []
    assert arviz.importance(np.zeros(1000)) == []
    assert "2 of 1000" in arviz.importance(np.r_[np.zeros(998), np.nan, np.inf])[0]


def test_loo_of_a_normal_model_is_its_closed_form(generator: np.random.Generator) -> None:
    # μ ~ N(0, 10²), y_n ~ N(μ, 1): leaving y_n out, y_n ~ N(m, 1 + v) with 1/v = 1/100 + (N - 1), m = v Σ_{others} y.
    y = generator.normal(size=20)
    precision = 1 / 100 + len(y)
    mu = generator.normal(y.sum() / precision, precision**-0.5, size=(4, 2000))
    pointwise = stats.norm.logpdf(y, mu[..., None], 1.0)
    variance = 1 / (precision - 1)
    exact = stats.norm.logpdf(y, variance * (y.sum() - y), (1 + variance) ** 0.5).sum()
    # Each term is -log mean(1/p); the standard error of a sum is at most the sum of theirs: four, once in 16,000 times.
    ratios = np.exp(-pointwise).reshape(-1, len(y))
    error = (ratios.std(0) / ratios.mean(0)).sum() / len(ratios) ** 0.5
    found = arviz.loo(pointwise, {"mu": mu})
    assert abs(found.elpd - exact) < 4 * error
    assert found.pareto_k.shape == (20,) and found.pareto_k.max() < 0.7
    same = az.loo(arviz.export({"posterior": {"mu": mu}, "log_likelihood": {"y": pointwise}}))
    assert found.elpd == float(same.elpd if IS_TREE else same.elpd_loo)


def test_convergence_has_nothing_to_say_about_independent_draws(generator: np.random.Generator) -> None:
    # R-hat of 4 x 1,000 independent draws passed 1.005 in none of 1,500 runs, and ESS never fell below 3,000.
    quantities = {
        "a": generator.normal(size=(4, 1000)),
        "b": generator.normal(size=(4, 1000, 5)),
        "c": np.ones((4, 1000)),
    }
    assert arviz.convergence(quantities) == []


def test_convergence_names_the_worst_element(generator: np.random.Generator) -> None:
    values = generator.normal(size=(4, 1000, 2, 3))
    values[0, :, 1, 2] += 5.0
    values[1, :, 0, 1] += 1.0
    rhat, size = arviz.convergence({"a": generator.normal(size=(4, 1000)), "b": values})
    assert rhat.startswith("R-hat of 'b[1, 2]' is") and "1 more above 1.01" in rhat
    assert size.startswith("The effective sample size of 'b[1, 2]' is")


def test_convergence_sees_a_slow_chain(generator: np.random.Generator) -> None:
    # AR(1) with ρ = 0.98 has an effective size of n (1 - ρ)/(1 + ρ) = 40 in 4 x 1,000 draws, ten times too few.
    values = generator.normal(size=(4, 1000))
    for t in range(1, 1000):
        values[:, t] = 0.98 * values[:, t - 1] + (1 - 0.98**2) ** 0.5 * values[:, t]
    assert any("less than 100 per chain" in finding for finding in arviz.convergence({"a": values}))


def test_chains_that_stand_still_at_different_places_disagree() -> None:
    values = np.broadcast_to(np.arange(4.0)[:, None], (4, 100))
    assert "R-hat of 'a' is" in arviz.convergence({"a": values})[0]


def test_convergence_counts_what_is_not_finite(generator: np.random.Generator) -> None:
    values = generator.normal(size=(4, 1000))
    values[2, 3:5] = np.nan, np.inf
    (finding,) = arviz.convergence({"a": values})
    assert finding.startswith("2 of the 4000 drawn values of 'a' are NaN or infinite")
    assert "too few" in arviz.convergence({"a": values[:, :3]})[0]
