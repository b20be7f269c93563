"""Damaged files: a value or one of our sentences, no file lost or changed, no code run. See ``fuzzing``."""

from __future__ import annotations

import os
import pickle
import random
from collections import Counter
from pathlib import Path

import pytest

from fuzzing import CASES, Case, damaged, fuzz

FEW, MANY = 9, 200


@pytest.fixture(autouse=True)
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here concerns graphs, which take seconds to make."""
    monkeypatch.setenv("PYRO_GENMODELS_RUNG", "vmapped")


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_damaged_file_is_read_or_refused_in_words(case: Case, count: int, tmp_path: Path) -> None:
    outcomes = [*fuzz(case, count, tmp_path)]
    assert [outcome.defect for outcome in outcomes if outcome.defect] == []
    assert Counter(outcome.kind for outcome in outcomes)["refused"] >= count // 4  # the damage is no trifle
    assert len(outcomes) == count


def test_what_a_reader_must_not_do_is_noticed(tmp_path: Path) -> None:
    """The checks of ``fuzz`` themselves: readers that lose a file, run code, or fail in words of others."""

    def make(folder: Path) -> None:
        (folder / "file").write_text("3.5,2")

    def deletes(folder: Path) -> None:
        (folder / "file").unlink()

    def writes_elsewhere(folder: Path) -> None:
        (folder.parent / "elsewhere").write_text("1")

    def unpickles(folder: Path) -> None:
        pickle.loads(pickle.dumps(os.getcwd))

    def stumbles(folder: Path) -> None:
        if (folder / "file").read_bytes() != b"3.5,2":
            raise IndexError("3")

    def mumbles(folder: Path) -> None:
        if (folder / "file").read_bytes() != b"3.5,2":
            raise ValueError("no good")

    for read, word in (
        (writes_elsewhere, "code was run"),
        (unpickles, "code was run"),
        (stumbles, "IndexError: 3"),
        (mumbles, "no file is named"),
    ):
        folder = tmp_path / read.__name__
        folder.mkdir()
        assert any(word in outcome.defect for outcome in fuzz(Case(read.__name__, make, "file", read), 5, folder))

    def deletes_what_is_damaged(folder: Path) -> None:
        if (folder / "file").read_bytes() != b"3.5,2":
            deletes(folder)

    folder = tmp_path / "deletes"
    folder.mkdir()
    outcomes = fuzz(Case("deletes", make, "file", deletes_what_is_damaged), 5, folder)
    assert any("lost or changed file" in outcome.defect for outcome in outcomes)


def test_the_damage_of_a_seed_is_the_same(tmp_path: Path) -> None:
    data = b'{"a": [1, 2, {"b": null}], "c": "text"}'
    made = [[damaged(data, "a.json", random.Random(i), tmp_path) for i in range(20)] for _ in range(2)]
    assert made[0] == made[1] and len({*made[0]}) > 15
