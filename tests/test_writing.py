"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moec.errors import MoecError
from moec.writing import check_writable, write_text


def test_text_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    write_text(path, "one")
    write_text(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "zwei ü"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.txt"]


def test_permissions_are_those_of_any_new_file_or_of_the_old_one(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "out"
    plain.write_text("")
    write_text(path, "")
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o600)
    write_text(path, "again")
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.txt"
    write_text(path, "old")

    def interrupted(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.txt"]


@pytest.mark.parametrize(("name", "says"), [("", "is a folder"), ("absent/out.txt", "there is no folder")])
def test_places_that_cannot_be_written(tmp_path: Path, name: str, says: str) -> None:
    for attempt in (check_writable, lambda path: write_text(path, "x")):
        with pytest.raises(MoecError, match=says) as caught:
            attempt(tmp_path / name)
        assert caught.value.code == "MOEC607"


def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MoecError, match="No space left on device"):
        write_text(tmp_path / "out.txt", "x")
    assert list(tmp_path.iterdir()) == []
