"""Options: every wrong value is one clear error with a code and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from moec.errors import MoecError
from moec.options import BACKENDS, MODES, Options


def test_defaults_change_nothing() -> None:
    options = Options.make()
    assert options == Options()
    assert options.backend == "auto"
    assert options.verify
    for name in ("inplace", "pack", "free_original", "training", "strict", "measure"):
        assert getattr(options, name) is False


def test_options_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Options.make().pack = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        ({"backend": "trton"}, "MOEC502", 'did you mean "triton"?'),
        ({"backend": "Reference"}, "MOEC502", 'did you mean "reference"?'),
        ({"backend": "cuda"}, "MOEC502", "known: auto, onnxruntime, reference, triton"),
        ({"backend": None}, "MOEC502", "backend=None is not one of"),
        ({"mode": "fast"}, "MOEC502", "mode='fast' is not one of"),
        ({"quantize": "int4"}, "MOEC502", 'did you mean "int8"?'),
        ({"quantize": True}, "MOEC502", "quantize=True is not one of int8"),
        ({"pack": 1}, "MOEC502", "pack=1 must be True or False"),
        ({"strict": "yes"}, "MOEC502", "strict='yes' must be True or False"),
        ({"passes": 3}, "MOEC502", "passes=3 must be text or a list of passes"),
        ({"passes": [3]}, "MOEC502", "must be text or a list of passes"),
        ({"free_original": True}, "MOEC502", "frees what was packed"),
        ({"inplce": True}, "MOEC501", 'did you mean "inplace"?'),
        ({"mesh": object()}, "MOEC503", "device mesh does not exist yet"),
        ({"plan": object()}, "MOEC503", "plans do not exist yet"),
    ],
)
def test_wrong_values(given: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(MoecError) as caught:
        Options.make(**given)
    assert caught.value.code == code
    assert caught.value.hint
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["mesh", "plan"])
def test_what_is_planned_may_be_none(name: str) -> None:
    assert Options.make(**{name: None}) == Options()


def test_what_works_is_taken() -> None:
    for name, choices in (("backend", BACKENDS), ("mode", MODES)):
        for choice in (choice for choice, missing in choices.items() if missing is None):
            assert getattr(Options.make(**{name: choice}), name) == choice
    assert Options.make(quantize="int8").quantize == "int8"
    assert Options.make(pack=True, free_original=False, training=False).pack


def test_passes_as_text_names_or_objects() -> None:
    def keep(region: object, log: object) -> object:
        return region

    assert Options.make(passes="fuse-experts").passes == "fuse-experts"
    assert Options.make(passes=["fuse-experts", keep]).passes == ("fuse-experts", keep)
    assert Options.make(passes=[]).passes == ()
