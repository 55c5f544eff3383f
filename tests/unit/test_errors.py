"""The tree of errors: what each class promises to whoever meets it."""

from __future__ import annotations

import pytest

from pbkfs import errors

CLASSES = [cls for cls in errors.PbkfsError.__subclasses__() if cls.__module__ == errors.__name__]


def test_classes_are_told_apart() -> None:
    assert len(CLASSES) == 11
    for what in ("slug", "exit_code"):
        assert len({getattr(cls, what) for cls in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize("cls", CLASSES)
def test_error_has_a_hint_wherever_it_comes_from(cls: type[errors.PbkfsError]) -> None:
    hint = cls("it is so").hint
    assert hint is not None
    assert hint[0].isupper() or hint.startswith("pbkfs ")
    assert hint.endswith(".")
    assert cls("it is so", hint="Do that.").hint == "Do that."
