"""A report is one self-contained page that says what was asked, what came out, and how far it can be trusted."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pages
from inference import EM, SVI, Gibbs, JSONLines, Posterior
from inference.fingerprint import source
from pyro_genmodels import cli, plots
from pyro_genmodels.comparison import METHODS
from pyro_genmodels.page import Page

SECTIONS = ["Findings", "Run", "Program", "Plan", "Estimates", "Intervals", "Traces", "Ranks", "Effective sample sizes"]
PROGRAM = """
import pyro, pyro.distributions as dist, torch

def levels(group, weight):
    level = pyro.sample("level", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("rows", len(group)):
        pyro.sample("x", dist.Normal(level[group], 1.0), obs=weight)

number = 3
class Made: pass
"""


def levels(group: Tensor, weight: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("rows", len(group)):
        pyro.sample("x", dist.Normal(level[group], 1.0), obs=weight)


GROUP = torch.arange(40) % 2
WEIGHT = torch.linspace(-1.0, 1.0, 40, dtype=torch.float64) + 3.0 * GROUP


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of folders: what each kind of back-end saves, and a log."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "coal.py").write_text(PROGRAM)
    for backend in (Gibbs(chains=3, warmup=5, draws=60), EM(steps=20), SVI(steps=60, draws=40)):
        quiet: Any = dataclasses.replace(
            backend, seed=0, progress=False, callbacks=(JSONLines(folder / "curve" / "log.jsonl"),)
        )
        quiet.fit(levels, GROUP, WEIGHT).save(folder / type(backend).__name__)
    return folder


def run(*argv: str) -> int:
    try:
        return cli.main(["report", *argv])
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


# ------------------------------------------------------------------------------------------------- pages
def test_text_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&amp;\"'"
    page = Page(evil, evil)
    page.section(evil)
    page.heading(evil)
    page.text(evil)
    page.findings([evil])
    page.code(evil)
    page.table([evil, evil], [[evil, evil]])
    page.write(tmp_path / "page.html")
    parsed = pages.check(tmp_path / "page.html")
    for tag in ("h1", "h2", "h3", "p", "li", "pre", "th", "td", "title"):
        assert "".join(text for name, text in parsed.texts if name == tag).startswith(evil), tag


def test_sections_of_one_title_have_names_of_their_own(tmp_path: Path) -> None:
    page = Page("Twice")
    for _ in range(2):
        page.section("Twice, said")
    page.write(tmp_path / "page.html")
    assert [attrs["id"] for attrs in pages.check(tmp_path / "page.html").all("h2")] == ["twice-said", "twice-said-2"]


def test_a_page_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")

    def full(self: Path, text: str, **options: Any) -> None:
        with self.open("w") as file:
            file.write(text[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"Cannot write '.*page.html': No space left on device"):
        Page("A page").write(path)
    assert path.read_text() == "before" and [*tmp_path.iterdir()] == [path]


def test_a_picture_must_be_one() -> None:
    with pytest.raises(ValueError, match="is no PNG"):
        Page("A page").picture(b"<svg onload=alert(1)>", "a trap")


# --------------------------------------------------------------------------------------------- posteriors
def test_a_sampled_posterior_has_every_section(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert run(str(saved / "Gibbs"), "--model", f"{saved / 'coal.py'}:levels", "--out", str(out)) == 0
    assert capsys.readouterr().out == f"Gibbs on levels: {out}\n"
    page = pages.check(out)
    assert [title for title in page.said("h2") if title in SECTIONS] == SECTIONS
    assert page.said("h2")[-3:] == ["Growth of effective sizes", "Learning curves", "Predictive check"]
    assert len(page.all("img")) == 7
    assert 'pyro.sample("x", dist.Normal(level[group], 1.0), obs=weight)' in page.said("pre")[0]
    posterior = Posterior.load(saved / "Gibbs")
    assert posterior.plan is not None
    update = posterior.plan["level"]
    assert {"level", update.update, f"{update.certificate:.1e}"} <= {*page.said("td"), *page.said("th")}
    assert page.said("li")[-1] == (posterior.diagnose() or ["No finding: nothing speaks against these draws."])[-1]
    means = posterior.draws["level"].mean((0, 1)).tolist()
    assert {f"{mean:.4g}" for mean in means} <= {*page.said("td")}


@pytest.mark.parametrize("name", ["EM", "SVI"])
def test_what_has_no_chains_has_no_traces(name: str, saved: Path, tmp_path: Path) -> None:
    assert run(str(saved / name), "--out", str(tmp_path / "page.html")) == 0
    page = pages.check(tmp_path / "page.html")
    titles = page.said("h2")
    assert "Estimates" in titles and "Learning curves" in titles and "Traces" not in titles
    assert ("Intervals" in titles) == (name == "SVI")
    assert "def levels(group: Tensor, weight: Tensor) -> None:" in page.said("pre")[0]  # saved with the draws
    assert any("give --model MODULE:NAME" in text for text in page.said("p"))


def test_the_page_lies_beside_the_folder_and_replaces_only_itself(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Posterior.load(saved / "EM").save(tmp_path / "fit")
    assert run(str(tmp_path / "fit")) == 0 and run(str(tmp_path / "fit")) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"fit", "fit.html"}
    (tmp_path / "fit.html").write_text("<html>years of work</html>")
    assert run(str(tmp_path / "fit")) == 2
    assert "is no page of pyro-genmodels" in capsys.readouterr().err
    assert run(str(tmp_path / "fit"), "--out", str(tmp_path / "fit" / "page.html")) == 2
    assert "put the page beside it" in capsys.readouterr().err
    Posterior.load(tmp_path / "fit").save(tmp_path / "fit")  # nothing stands in its way


def test_a_fit_of_the_command_line_is_checked_against_its_data(tmp_path: Path) -> None:
    out = str(tmp_path / "fit")
    argv = ["fit", "gmm", "--data", "faithful", "--method", "svi", "--steps", "20", "--draws", "60", "--quiet"]
    assert cli.main([*argv, "--out", out]) == 0
    assert run(out) == 0
    page = pages.check(tmp_path / "fit.html")
    assert any("Data and replications" in attrs["alt"] for attrs in page.all("img"))
    assert {"means[0, eruptions]", "gmm", "faithful"} <= {*page.said("th"), *page.said("td")}


def test_a_comparison_is_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "gibbs", Gibbs(chains=2, warmup=2, draws=40))
    monkeypatch.setitem(METHODS, "em", EM(steps=10))
    argv = ["compare", "linear", "--data", "faithful", "--labels", "waiting", "--method", "em,gibbs", "--quiet"]
    assert cli.main([*argv, "--out", str(tmp_path / "both")]) == 0
    assert run(str(tmp_path / "both")) == 0
    page = pages.check(tmp_path / "both.html")
    assert page.said("h1")[0].startswith("linear(") and page.said("h3").count("gibbs") >= 3
    assert {"coefficients[eruptions]", "wall time, s"} <= {*page.said("th")}
    alts = [attrs["alt"] for attrs in page.all("img")]
    assert {"Data and replications of em", "Data and replications of gibbs", "Traces of em and gibbs"} <= {*alts}
    # The findings of the run, which know of exchangeable labels, and not those of its copy.
    recorded = json.loads((tmp_path / "both" / "comparison.json").read_text())["results"]
    assert {*recorded} == {"em", "gibbs"} and "def model(self" in recorded["em"]["info"]["source"]
    for finding in recorded["gibbs"]["findings"]:
        assert finding in page.said("li")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("rm -rf", "the folder does not say which model of this version it is about."),
        ({"model": "os.system"}, "the folder does not say which model of this version it is about."),
        ({"model": "gmm", "options": {"location": 3}}, "its options are none of gmm."),
        ({"model": "gmm", "options": {"components": "two"}, "data": "faithful"}, "its options do not make a gmm"),
        ({"model": "gmm", "options": {"components": 2}, "data": "nowhere.csv"}, "There is no file nowhere.csv"),
        ({"model": "gmm", "options": {"components": 2}, "data": "faithful", "labels": "y"}, "gmm learns from no labels"),
        (
            {"model": "gmm", "options": {"components": 2}, "data": "faithful"},
            "The data of 'x' are not those that were fitted",
        ),
    ],
)
def test_a_command_that_cannot_be_repeated_costs_the_check_alone(
    command: Any, sentence: str, saved: Path, tmp_path: Path
) -> None:
    posterior = Posterior.load(saved / "EM")
    dataclasses.replace(posterior, info={**posterior.info, "command": command}).save(tmp_path / "fit")
    assert run(str(tmp_path / "fit")) == 0
    said = pages.check(tmp_path / "fit.html").said("p")
    assert any(text.startswith("The data cannot be replicated: ") and sentence in text for text in said)


# ------------------------------------------------------------------------------------------------- others
def test_a_training_run_shows_its_log_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "vae")
    argv = ["train", "vae", "--data", "digits", "--epochs", "2", "--features", "2", "--batch", "50", "--quiet"]
    assert cli.main([*argv, "--out", out]) == 0
    assert run(out) == 0
    page = pages.check(tmp_path / "vae.html")
    assert page.said("h2") == ["Findings", "Run", "Program", "Learning curves (log.jsonl)", "Samples"]
    assert len(page.all("img")) == 2 and page.said("li")[-1] == "The run went to its end."
    assert run(f"{out}/model") == 2 and "give its folder" in capsys.readouterr().err
    (tmp_path / "vae" / "model").rename(tmp_path / "model")
    assert run(out) == 0
    assert "--resume goes on with it" in pages.check(tmp_path / "vae.html").said("li")[-1]


def test_a_log_alone_is_enough_and_its_last_line_may_be_cut(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text((saved / "curve" / "log.jsonl").read_text() + '{"step": 80, "sec')
    assert run(str(log)) == 0
    page = pages.check(tmp_path / "log.jsonl.html")
    assert len(page.all("img")) == 1 and any("to step 60" in text for text in page.said("figcaption"))
    log.write_text('{"step": 20}\nnonsense\n{"step": 40}\n')
    assert run(str(log)) == 2 and "see its line 2" in capsys.readouterr().err


def test_sites_that_come_and_go_are_reported(tmp_path: Path) -> None:
    draws = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws[:, ::3, 2] = torch.nan
    long = torch.randn(2, 50, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    Posterior(draws={"z": draws, "w": long}, info={"structure": "changing", "kind": "samples"}).save(tmp_path / "fit")
    assert run(str(tmp_path / "fit")) == 0
    page = pages.check(tmp_path / "fit.html")
    assert any("many elements" in text and text.endswith(": w.") for text in page.said("p"))
    assert {"Traces", "Ranks"} <= {*page.said("h2")}


# ---------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["nowhere"], "There is no folder 'nowhere'"),
        (["."], "holds no result itself, but EM, Gibbs, SVI and curve do"),
        (["coal.py"], "'coal.py' holds no result. Give a folder"),
        (["EM", "--out", "page.pdf"], "must end in .html"),
        (["EM", "--out", "SVI.html/"], "which is a folder"),
        (["EM", "--model", "levels"], "must be MODULE:NAME or FILE.py:NAME"),
        (["EM", "--model", "nowhere:levels"], "'nowhere', which cannot be imported"),
        (["EM", "--model", "nowhere.py:levels"], "'nowhere.py', which cannot be imported"),
        (["EM", "--model", "coal.py:level"], "'coal.py' has no 'level'"),
        (["EM", "--model", "coal.py:number"], "which is int and no program"),
        (["EM", "--model", "coal.py:Made"], "names the class 'Made': name an object of it"),
        (["curve/log.jsonl", "--model", "coal.py:levels"], "A log has no draws"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    argv: list[str], sentence: str, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(saved)
    (saved / "SVI.html").mkdir(exist_ok=True)
    assert run(*argv) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and sentence in said and said.count("\n") == 1 and said.startswith("genmodels")


def test_other_data_or_another_program_are_refused(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.py"
    other.write_text(PROGRAM.replace("(group, weight)", "(group, weight, sizes)"))
    assert run(str(saved / "EM"), "--model", f"{other}:levels", "--out", str(tmp_path / "page.html")) == 2
    assert "The program takes 'weight', which cannot be told from what was saved" in capsys.readouterr().err
    other.write_text(PROGRAM.replace('"x"', '"y"'))
    assert run(str(saved / "EM"), "--model", f"{other}:levels", "--out", str(tmp_path / "page.html")) == 2
    assert "The model observes ['y'], but the saved one ['x']" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("methods"),
        lambda found: found.update(options=[]),
        lambda found: found.update(format="another"),
        lambda found: found.update(methods={"../EM/posterior": ""}),
        lambda found: found["results"].update(em={"plan": [{"sites": 3}]}),
    ],
)
def test_a_record_that_was_tampered_with_is_refused(
    change: Any, tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "em.nc").write_bytes((saved / "EM" / "posterior.nc").read_bytes())
    found = {"format": "pyro-genmodels comparison", "files": ["em.nc"], "model": "gmm", "options": {}, "data": "faithful"}
    found |= {"held_out": 0.1, "seed": 0, "methods": {"em": "EM()"}, "results": {}}
    change(found)
    (folder / "comparison.json").write_text(json.dumps(found))
    assert run(str(folder)) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and said.count("\n") == 1 and not (tmp_path / "both.html").exists()


# ----------------------------------------------------------------------------------------------- pictures
def test_ranks_of_independent_draws_stay_in_the_band() -> None:
    draws = torch.randn(4, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figure = plots.ranks(Posterior(draws={"a": draws, "b": draws + torch.arange(4.0)[:, None]}))
    inside, outside = 0, 0
    for axis, holds in zip(figure.axes, (True, False)):
        low, high = axis.patches[0].get_y(), axis.patches[0].get_y() + axis.patches[0].get_height()
        counts = np.concatenate([patch.get_data().values for patch in axis.patches[1:]])
        assert counts.sum() == 800  # every draw has its rank
        share = ((counts >= low) & (counts <= high)).mean()
        # 40 counts, each inside with 0.99 or more: fewer than 34 once in 10⁹ runs
        assert (share >= 34 / 40) == holds
        inside, outside = inside + holds, outside + (not holds)
    assert (inside, outside) == (1, 1)


def test_a_program_that_is_true_covers_its_data_and_another_does_not() -> None:
    def replicated(shift: float) -> float:
        """The share of bins in which the data lie within the band of 90 %."""
        posterior = EM(steps=20, seed=0, progress=False).fit(levels, GROUP, WEIGHT)
        moved = {"level": posterior.draws["level"] + shift}
        (axis,) = plots.predictive_check(dataclasses.replace(posterior, draws=moved), draws=60).axes
        wide, _, data = (patch.get_data() for patch in axis.patches)
        is_inside = (data.values >= np.broadcast_to(wide.baseline, data.values.shape) - 1e-9) & (
            data.values <= wide.values + 1e-9
        )
        return float(is_inside.mean())

    assert replicated(0.0) > 0.8 > replicated(6.0)


def test_intervals_are_quantiles() -> None:
    draws = torch.randn(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (axis,) = plots.forest(Posterior(draws={"a": draws})).axes
    thin, thick, dot = (line.get_xdata() for line in axis.lines)
    expected = np.quantile(draws.numpy(), [0.05, 0.25, 0.5, 0.75, 0.95])
    assert np.allclose([thin[0], thick[0], dot[0], thick[1], thin[1]], expected)


def test_columns_of_different_units_have_panels_of_their_own() -> None:
    draws = torch.zeros(1, 3, 2, 2)
    draws[..., 1] = 80.0
    coords = {"feature": np.array(["minutes", "metres"])}
    posterior = Posterior(draws={"means": draws, "w": draws[..., 0]}, dims={"means": ("k", "feature")}, coords=coords)
    assert len(plots.forest(posterior).axes) == 3


@pytest.mark.parametrize("made", ["ranks", "effective_growth", "log_curves", "forest"])
def test_what_cannot_be_drawn_says_so(made: str) -> None:
    nothing: Any = (
        [{"step": 1}] if made == "log_curves" else Posterior(draws={} if made == "forest" else {"a": torch.zeros(1, 3)})
    )
    with pytest.raises(ValueError, match=r"There (is|are) no"):
        getattr(plots, made)(nothing)


def test_the_text_of_a_program_is_found_through_handlers() -> None:
    handled = poutine.mask(functools.partial(poutine.condition(levels, data={}), GROUP), mask=True)
    assert source(handled) == source(levels) and source(levels).startswith("def levels(group")
    made: dict[str, Any] = {}
    exec("def typed_at_a_prompt(): pass", made)
    assert source(made["typed_at_a_prompt"]) == ""


# ------------------------------------------------------------------------------------------- in a browser
def test_a_browser_shows_every_picture_and_has_no_complaint(saved: Path, tmp_path: Path) -> None:
    if pages.BROWSER is None:
        pytest.skip("There is no Chromium: Debian's package chromium brings one.")
    out = tmp_path / "page.html"
    assert run(str(saved / "Gibbs"), "--model", f"{saved / 'coal.py'}:levels", "--out", str(out)) == 0
    count, broken, sticking_out, console = pages.look(out, tmp_path)
    assert (count, broken, sticking_out, console) == (7, 0, 0, "")
    assert not re.search(r"https?://", out.read_text(encoding="utf-8"))
