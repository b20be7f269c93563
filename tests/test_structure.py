"""What an object can do is asked by its attributes, however they come, on every version of Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from inference.contract import Guessing, Guided, Persistent, Prepared, Programmed
from inference.fingerprint import source
from inference.noising import Curve, Denoises, SimpleLoss, Weighting
from pyro_genmodels.diffusion import EDM


class Whole(nn.Module):
    """All that is asked for is held by torch: a guide that is a module, buffers, a denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.guide = AutoNormal(self.model)
        self.denoiser = nn.Linear(1, 1)
        self.register_buffer("particles", torch.zeros(1))
        self.register_buffer("log_step", torch.zeros(()))
        self.prepare = None

    def model(self) -> None: ...


@pytest.mark.parametrize(
    ("kind", "holds"),
    [(Programmed, True), (Guided, True), (Denoises, True), (Persistent, True), (Guessing, False), (Prepared, False)],
)
def test_submodules_and_buffers_are_seen(kind: Any, holds: bool) -> None:
    assert isinstance(Whole(), kind) == holds


def test_a_class_that_follows_a_structure_is_its_own() -> None:
    class Own(Guided):
        def guide(self, *args: Any, **kwargs: Any) -> Any: ...

    class Other:
        def guide(self, *args: Any, **kwargs: Any) -> Any: ...

    assert isinstance(Own(), Own) and not isinstance(Other(), Own)
    assert isinstance(Other(), Guided) and not isinstance(nn.Linear(1, 1), Guided)


def test_calls_and_attributes_of_curves_are_asked_for() -> None:
    assert isinstance(EDM(), Curve) and not isinstance(SimpleLoss(), Curve)
    assert isinstance(SimpleLoss().weighting, Weighting) and not isinstance(object(), Weighting)


def test_a_source_that_is_not_where_it_is_said_to_be_is_no_error(tmp_path: Path) -> None:
    """Of code that was made from a text, as in README's own test: what stands in the file of that name may be no Python."""
    file = tmp_path / "page.md"
    file.write_text("It's a page.\n" * 3, encoding="utf-8")
    found: dict[str, Any] = {}
    exec(compile("\n\ndef program():\n    return 0\n", str(file), "exec"), found)
    assert isinstance(source(found["program"]), str)  # and no error of what reads Python
    assert source(test_submodules_and_buffers_are_seen).startswith("@pytest")
