"""Pictures show what they say they show, of any posterior, and leave matplotlib's global state alone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.contour
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from inference import Posterior, arviz
from pyro_genmodels import GMM, plots

CHAINS, DRAWS = 3, 120


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(covariance: str = "full", features: int = 2, **changes: Any) -> Posterior:
    """Draws of a two-component mixture near w = (0.3, 0.7), means 0 and 8, covariances about 1."""
    g, shape, kind = generator(), (CHAINS, DRAWS), {"dtype": torch.float64}
    share = 0.3 + 0.02 * torch.randn(*shape, generator=g, **kind)
    centres = torch.tensor([0.0, 8.0])[:, None].expand(2, features)
    own = {"full": (2, features), "tied": (features,), "diagonal": (2, features), "spherical": (2,)}[covariance]
    variances = (0.1 * torch.randn(*shape, *own, generator=g, **kind)).exp()
    given: dict[str, Any] = {
        "draws": {
            "weights": torch.stack([share, 1.0 - share], -1),
            "means": centres + 0.1 * torch.randn(*shape, 2, features, generator=g, **kind),
            "covariances": torch.diag_embed(variances) if covariance in ("full", "tied") else variances,
            "z": torch.zeros(*shape, 50, dtype=torch.long),
        },
        "stats": {"lp": torch.randn(*shape, generator=g, **kind)},
        "history": {"lp": torch.randn(200, CHAINS, generator=g, **kind)},
        "info": {"kind": "samples", "backend": "Gibbs", "sampling_time": 4.0},
        "dims": {"z": ("rows",), "means": ("components", "means_dim_1"), "x": ("rows", "x_dim_1")},
        "observed": {"x": torch.zeros(50, features)},
        "symmetry": {"weights": 0, "means": 0, "covariances": 0, "z": None},
    }
    return Posterior(**{**given, **changes})


def point(posterior: Posterior) -> Posterior:
    draws = {site: values[:1, :1] for site, values in posterior.draws.items()}
    history = {"log_joint": torch.linspace(-900.0, -800.0, 30)}
    return dataclasses.replace(posterior, draws=draws, history=history, info={**posterior.info, "kind": "point"})


def rows(features: int, count: int = 200) -> Tensor:
    labels = (torch.rand(count, generator=generator(1)) < 0.7).double()[:, None]
    return 8.0 * labels + torch.randn(count, features, generator=generator(2), dtype=torch.float64)


@pytest.fixture(autouse=True)
def nothing_is_left_open(tmp_path: Path) -> Any:
    yield
    assert plt.get_fignums() == []


def saved(figure: Figure, folder: Path) -> bytes:
    figure.savefig(folder / "picture.png")
    return (folder / "picture.png").read_bytes()


@pytest.mark.parametrize("features", [1, 2, 4])
@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
def test_contours_are_drawn_for_every_mixture(covariance: str, features: int, tmp_path: Path) -> None:
    posterior = mixture(covariance, features)
    figure = plots.density_contours(GMM(2, covariance), rows(features), {"a": posterior, "b": point(posterior)})
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    assert saved(figure, tmp_path)[:4] == b"\x89PNG"


def test_contours_hold_the_mass_they_name() -> None:
    posterior = point(mixture())
    figure = plots.density_contours(GMM(2), rows(2), posterior)
    filled = next(c for c in figure.axes[0].collections if isinstance(c, matplotlib.contour.ContourSet) and c.filled)
    draws = {site: values[:, 0] for site, values in posterior.draws.items()}
    g = generator(3)
    z = torch.multinomial(draws["weights"][0], 20_000, replacement=True, generator=g)
    factor = torch.linalg.cholesky(draws["covariances"][0])[z]
    noise = torch.randn(20_000, 2, 1, generator=g, dtype=torch.float64)
    x = draws["means"][0][z] + (factor @ noise).squeeze(-1)
    densities = GMM(2).score_samples(x, draws)
    grid = torch.cartesian_prod(*(torch.linspace(-4.0, 12.0, 400, dtype=torch.float64) for _ in range(2)))
    top = GMM(2).score_samples(grid, draws).max()
    shares = [float(((densities - top).exp() > level).double().mean()) for level in filled.levels[:3]]
    # standard error of a share 0.0035; a grid of 120 points a side adds about as much
    assert shares == pytest.approx([0.95, 0.8, 0.5], abs=0.025)


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
def test_ellipses_are_two_standard_deviations(covariance: str) -> None:
    posterior = point(mixture(covariance))
    figure = plots.density_contours(GMM(2, covariance), rows(2), posterior)
    outlines = [line.get_xydata() for line in figure.axes[0].lines]
    assert len(outlines) == 2
    variances = posterior.draws["covariances"][0, 0]
    if covariance in ("full", "tied"):
        variances = variances.diagonal(dim1=-2, dim2=-1)
    variances = (variances[:, None] if covariance == "spherical" else variances).expand(2, 2)
    for outline, mean, variance in zip(outlines, posterior.draws["means"][0, 0], variances):
        distance = ((torch.as_tensor(np.asarray(outline)) - mean) ** 2 / variance).sum(-1).sqrt()
        assert torch.allclose(distance, torch.full_like(distance, 2.0), rtol=1e-6)


def test_a_model_without_components_is_drawn_in_two_dimensions() -> None:
    class Normal:
        def score_samples(self, x: Tensor, draws: Any) -> Tensor:
            return -0.5 * (x - draws["mu"].mean(0)).square().sum(-1)

    mu = 0.1 * torch.randn(2, 50, 3, generator=generator(), dtype=torch.float64)
    figure = plots.density_contours(Normal(), rows(2), Posterior(draws={"mu": mu[..., :2]}), ["length", "width"])
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("length", "width")
    with pytest.raises(ValueError, match="x has 3 features"):
        plots.density_contours(Normal(), rows(3), Posterior(draws={"mu": mu}))
    with pytest.raises(ValueError, match="must be a table"):
        plots.density_contours(GMM(2), rows(1)[:, 0], mixture())


def test_a_constant_column_is_drawn(tmp_path: Path) -> None:
    x = rows(2)
    x[:, 1] = 8.0
    assert saved(plots.density_contours(GMM(2), x, mixture()), tmp_path)


def test_elements_are_named_by_coordinates_and_leave_rows_out() -> None:
    named = mixture(dims={"means": ("components", "features"), "x": ("rows",), "z": ("rows",)})
    named = dataclasses.replace(named, coords={"features": np.array(["length", "width"])})
    found = plots.elements(named)
    assert [label for label in found if label.startswith("means")] == [
        "means[0, length]", "means[0, width]", "means[1, length]", "means[1, width]"
    ]  # fmt: skip
    assert not any(label.startswith("z") for label in found)
    assert np.array_equal(found["means[1, length]"], named.draws["means"][:, :, 1, 0].numpy())
    with pytest.raises(ValueError, match="sites names 'mu', but there are weights"):
        plots.elements(named, ["mu"])


def test_traces_show_every_draw_of_every_chain() -> None:
    posterior = mixture()
    figure = plots.traces({"gibbs": posterior, "em": point(posterior)}, ["weights"])
    assert len(figure.axes) == 2  # elements; em has no chain
    lines = figure.axes[0].lines
    assert len(lines) == CHAINS
    assert np.array_equal(np.array([line.get_ydata() for line in lines]), posterior.draws["weights"][..., 0].numpy())


def test_effective_sizes_are_those_of_sorted_components() -> None:
    posterior = mixture()
    figure = plots.effective_sizes(posterior, ["means"])
    least = arviz.ess(posterior.draws["means"].sort(2).values.numpy()).min()
    sizes, rates = ([patch.get_width() for patch in axis.patches] for axis in figure.axes)
    assert sizes == pytest.approx([least])
    assert rates == pytest.approx([least / 4.0])


def test_colours_of_a_posterior_are_the_same_in_every_picture() -> None:
    posteriors = {"em": point(mixture()), "gibbs": mixture()}
    curve = plots.learning_curve(posteriors).axes[1].lines[0].get_color()
    bar = plots.effective_sizes(posteriors, ["means"]).axes[0].patches[0].get_facecolor()
    assert matplotlib.colors.to_hex(bar) == curve


def test_learning_curves_show_what_was_reported(tmp_path: Path) -> None:
    loss = 100.0 + 900.0 * torch.exp(-torch.arange(400.0) / 40.0)
    guide = mixture(history={"loss": loss})
    figure = plots.learning_curve({"svi": guide, "em": point(mixture()), "gibbs": mixture()})
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "log-joint", "log-density"]
    assert np.array_equal(figure.axes[0].lines[0].get_ydata(), loss.double().numpy())
    assert len(figure.axes[2].lines) == CHAINS
    assert saved(figure, tmp_path)


def test_what_has_nothing_to_show_is_refused() -> None:
    lonely = point(mixture())
    with pytest.raises(ValueError, match="no posterior has Markov chains"):
        plots.traces(lonely)
    with pytest.raises(ValueError, match="no posterior has Markov chains"):
        plots.effective_sizes(lonely)
    with pytest.raises(ValueError, match="no posterior has a history"):
        plots.learning_curve(mixture(history={}))


def test_matplotlib_is_imported_only_where_it_is_used() -> None:
    code = "import sys, pyro_genmodels.cli, pyro_genmodels.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_grid_shows_each_picture_and_what_is_missing() -> None:
    grey = torch.zeros(3, 4, 5)
    grey[0, 0, 0], grey[1, 2, 3] = 1.0, torch.nan
    figure = plots.images({"grey": grey, "colour": torch.ones(2, 3, 4, 5)})
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(shown) == 5 and len(figure.axes) == 6
    assert shown[0][0, 0].tolist() == [0.0] * 3 and shown[0][1, 1].tolist() == [1.0] * 3
    assert shown[1][2, 3].tolist() == list(plots.pictures._MISSING)


def test_the_latent_plane_shows_every_row_on_its_principal_axes() -> None:
    z = torch.randn(30, 3, generator=generator()) * torch.tensor([1.0, 5.0, 0.1])
    figure = plots.latent_scatter({"two": z[:, :2], "three": z}, torch.arange(30) % 4)
    two, three = (np.asarray(axis.collections[0].get_offsets()) for axis in figure.axes)
    assert np.allclose(two, z[:, :2].numpy())
    assert abs(np.corrcoef(three[:, 0], z[:, 1].numpy())[0, 1]) > 0.99


def test_a_manifold_and_traversals_ask_the_decoder_where_they_say() -> None:
    asked = []

    def mean(z: Tensor) -> Tensor:
        asked.append(z)
        return z.mean(1)[:, None, None].expand(-1, 2, 3)

    plots.manifold(mean, size=3, spread=0.5)
    corner = float(torch.special.ndtri(torch.tensor(0.75)))
    torch.testing.assert_close(asked[0][0], torch.tensor([-corner, corner]))  # up is up
    assert len(asked[0]) == 9
    plots.traversals(mean, torch.tensor([0.1, 0.2]), size=5, reach=2.0)
    torch.testing.assert_close(asked[2], torch.stack([torch.full((5,), 0.1), torch.linspace(-2.0, 2.0, 5)], 1))


@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (lambda: plots.images({}), "at least one row of pictures"),
        (lambda: plots.images({"flat": torch.zeros(3, 4)}), "'flat' has shape"),
        (lambda: plots.latent_scatter({}), "at least one model"),
        (lambda: plots.latent_scatter({"line": torch.zeros(5, 1)}), "'line' has shape"),
        (lambda: plots.manifold(lambda z: z, size=1), "size must be at least 2"),
        (lambda: plots.traversals(lambda z: z, torch.zeros(2, 2)), "where one row is"),
    ],
)
def test_pictures_of_nothing_are_refused(draw: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        draw()


def test_a_site_of_one_number_is_an_element() -> None:
    draws = {"scale": torch.rand(2, 5), "mean": torch.rand(2, 5, 3)}
    found = plots.elements(Posterior(draws=draws, stats={"lp": torch.zeros(2, 5)}, info={"kind": "samples"}))
    assert found["scale"].shape == (2, 5) and (found["scale"] == draws["scale"].double().numpy()).all()
    assert len(found) == 4
