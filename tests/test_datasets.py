"""The data sets that come with the package are those of the literature; a table that is none is refused in words."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_genmodels import datasets


@pytest.mark.parametrize("name", datasets.names())
def test_a_bundled_data_set_is_finite_and_says_what_it_is(name: str) -> None:
    data = datasets.load(name)
    assert data.name == name
    assert data.description and data.source
    assert len(data.columns) == (data.x.shape[1] if "x" in data.arrays else len(data.arrays))
    for array in data.arrays.values():
        assert array.isfinite().all() and array.is_contiguous()
        assert array.dtype == torch.float64 or not array.is_floating_point()


@pytest.mark.parametrize("name", datasets.names())
def test_what_is_written_into_a_data_set_does_not_reach_the_next_one(name: str) -> None:
    for array in datasets.load(name).arrays.values():
        array.fill_(-1)
    assert not any((array == -1).all() for array in datasets.load(name).arrays.values())


def test_the_bundled_files_are_small() -> None:
    files = list((resources.files("pyro_genmodels.datasets") / "files").iterdir())
    assert len(files) == len(datasets.names())
    assert sum(len(file.read_bytes()) for file in files) < 1_000_000


def test_an_unknown_name_is_answered_by_those_there_are() -> None:
    with pytest.raises(ValueError, match="no data set 'iris'; there are faithful, galaxies, eight_schools, coal,"):
        datasets.load("iris")


def test_old_faithful_has_the_moments_that_r_prints() -> None:
    x = datasets.old_faithful().x
    assert x.shape == (272, 2)
    torch.testing.assert_close(x.mean(0), x.new_tensor([3.487783, 70.897059]), rtol=0, atol=1e-6)
    torch.testing.assert_close(x.std(0), x.new_tensor([1.141371, 13.594974]), rtol=0, atol=1e-6)


def test_galaxies_are_the_82_velocities_as_published() -> None:
    x = datasets.galaxies().x
    assert x.shape == (82, 1)
    assert (x.diff(dim=0) > 0).all()
    assert (x.min().item(), x.max().item(), x[77].item()) == (9.172, 34.279, 26.96)


def test_eight_schools_pool_to_the_published_mean() -> None:
    schools = datasets.eight_schools()
    precision = schools["sigma"].pow(-2)
    assert schools["y"].shape == schools["sigma"].shape == (8,)
    # Bayesian Data Analysis, section 5.5: pooled estimate 7.7 with standard error 4.1.
    assert round((precision @ schools["y"] / precision.sum()).item(), 1) == 7.7
    assert round(precision.sum().pow(-0.5).item(), 1) == 4.1


def test_coal_mining_has_191_disasters_in_112_years() -> None:
    coal = datasets.coal_mining()
    torch.testing.assert_close(coal["years"], torch.arange(1851, 1963, dtype=torch.float64))
    assert coal["counts"].shape == (112,) and coal["counts"].sum() == 191
    # The rates before and after the change at about 1890, as in Carlin, Gelfand and Smith (1992).
    before = coal["years"] <= 1891
    assert round(coal["counts"][before].mean().item(), 1) == 3.1
    assert round(coal["counts"][~before].mean().item(), 1) == 0.9


def test_digits_are_those_of_scikit_learn() -> None:
    data = datasets.digits()
    assert data.x.shape == (1797, 64) and data["y"].dtype == torch.int64
    assert (data.x.min(), data.x.max()) == (0, 16)
    reference = pytest.importorskip("sklearn.datasets").load_digits()
    assert np.array_equal(data.x, reference.data) and np.array_equal(data["y"], reference.target)


def test_a_data_set_without_a_table_says_what_it_has() -> None:
    with pytest.raises(ValueError, match="'eight_schools' is no table of observations: take its y, sigma"):
        _ = datasets.eight_schools().x


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("eruptions,waiting\n3.6,79\n1.8,54\n", ("eruptions", "waiting")),
        ("3.6,79\n1.8,54", ("x1", "x2")),
        ("\ufeff eruptions , waiting \r\n\r\n3.6, 79\r\n1.8, 54\r\n\r\n", ("eruptions", "waiting")),
        ('"time, min","2nd"\n"3.6",7.9e1\n+1.8,54.\n', ("time, min", "2nd")),
    ],
    ids=["header", "no header", "spaces, blank lines and a byte-order mark", "quotes"],
)
def test_a_table_is_read_with_or_without_its_header(tmp_path: Path, text: str, columns: tuple[str, ...]) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode())
    data = datasets.read_table(path)
    assert (data.name, data.columns) == ("table", columns)
    assert torch.equal(data.x, torch.tensor([[3.6, 79.0], [1.8, 54.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "table.csv is empty"),
        ("\n \n", "table.csv is empty"),
        ("a,b\n", "table.csv has a header, but no rows"),
        ("a,b\n1,2\n3\n", "row 3 has 1 cells, but there are 2 columns"),
        ("a,b\n1,2,3\n", "row 2 has 3 cells, but there are 2 columns"),
        ("eruptions,waiting\n1,2\nabc,4\n", "row 3, column 'eruptions': 'abc' is not a number"),
        ("1,2\n3,4x\n", "row 2, column 'x2': '4x' is not a number"),
        ("1,b\n3,4\n", "row 1, column 'x2': 'b' is not a number"),
        ("a,b\n1,\n", "row 2, column 'b': the value is missing"),
        ("a,b\n1,2\n\nNA,2\n", "row 4, column 'a': the value is missing"),
        ("NA,NaN\n1,2\n", "row 1, column 'x1': the value is missing"),
        ("a,b\n1,-inf\n", "row 2, column 'b': '-inf' is not finite"),
        (",a\n1,2\n", "column 1 has no name in row 1"),
        ('a,b\n"1,2\n3,4\n', "is not comma-separated text"),
    ],
)
def test_a_csv_that_is_no_table_of_numbers_is_refused_by_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        datasets.read_table(path)


@pytest.mark.parametrize("dtype", ["float64", "float32", ">f8", "uint8", "bool"])
def test_arrays_of_every_real_type_become_the_same_table(tmp_path: Path, dtype: str) -> None:
    table = np.asfortranarray(np.array([[1, 0], [0, 1], [1, 1]], dtype=dtype))
    np.save(tmp_path / "only.npy", table)
    np.savez(tmp_path / "only.npz", anything=table)
    np.savez_compressed(tmp_path / "several.npz", x=table, y=np.arange(3))
    for name in ("only.npy", "only.npz", "several.npz"):
        data = datasets.read_table(tmp_path / name)
        assert data.columns == ("x1", "x2") and data.x.dtype == torch.float64
        assert np.array_equal(data.x, table.astype(float))


def test_an_array_of_one_dimension_is_one_column(tmp_path: Path) -> None:
    np.save(tmp_path / "velocity.npy", np.arange(5))
    assert datasets.read_table(str(tmp_path / "velocity.npy")).x.shape == (5, 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "has the arrays \\[\\]"),
        ({"a": np.ones(2), "b": np.ones(2)}, "has the arrays \\['a', 'b'\\]: call the table 'x'"),
        ({"x": np.ones((2, 3, 4))}, "shape \\(2, 3, 4\\), but a table has rows and columns"),
        ({"x": np.float64(1.0)}, "shape \\(\\), but"),
        ({"x": np.ones((0, 2))}, "is empty"),
        ({"x": np.array(["a"])}, "but a table has real numbers"),
        ({"x": np.ones(2, dtype=complex)}, "type complex128, but"),
        ({"x": np.array([{}])}, "cannot be read as numpy arrays"),
        ({"x": np.array([[1.0, 2.0], [3.0, np.nan]])}, "row 2, column 'x2': the value is missing"),
        ({"x": np.array([[1.0, 2.0], [-np.inf, 3.0]])}, "row 2, column 'x1': the value is not finite"),
    ],
)
def test_arrays_that_are_no_table_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "table.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        datasets.read_table(tmp_path / "table.npz")


@pytest.mark.parametrize("name", ["table.npz", "table.npy"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"no array"])
def test_a_file_that_only_looks_like_arrays_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read as numpy arrays"):
        datasets.read_table(tmp_path / name)


def test_a_file_that_is_absent_or_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file .*absent.csv"):
        datasets.read_table(tmp_path / "absent.csv")
    (tmp_path / "table.xlsx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"ends in '\.xlsx', but a table is read from \.csv, \.npz or \.npy"):
        datasets.read_table(tmp_path / "table.xlsx")
    (tmp_path / "table.csv").write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        datasets.read_table(tmp_path / "table.csv")


@pytest.mark.parametrize("name", datasets.PLANAR)
def test_shapes_in_the_plane_have_the_density_that_they_are_drawn_from(name: str) -> None:
    """It integrates to 1 on a grid of cells, and the log-density of 2,000 draws has the mean that this says (5 se)."""
    shape = datasets.planar(name)
    axis = torch.arange(-3.5, 3.5, 0.04) + 0.02
    cells = torch.cartesian_prod(axis, axis)
    mass = shape.log_prob(cells).exp() * 0.04**2
    assert float(mass.sum()) == pytest.approx(1.0, abs=2e-3)
    expected = float(torch.xlogy(mass, shape.log_prob(cells).exp()).sum())
    torch.manual_seed(0)
    found = shape.log_prob(shape.sample((2000,)))
    assert abs(float(found.mean()) - expected) < 5.0 * float(found.std()) / 2000**0.5 + 5e-3


def test_shapes_in_the_plane_say_which_there_are() -> None:
    with pytest.raises(ValueError, match="there are checkerboard, moons, ring, spirals"):
        datasets.planar("swiss roll")
    with pytest.raises(ValueError, match="must be positive"):
        datasets.planar("ring", 0.0)
