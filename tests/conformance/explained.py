"""Tests of SQLAlchemy's that end otherwise with our sessions, and why each of them may."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from tests.conformance.sessions import Mode

_AS_SWAPPED: Mapping[str, str] = {
    "orm/test_session.py::SessionInterface::test_*": (
        "asks Session.__dict__ for the public methods; those that a subclass inherits are not in it"
    ),
}

EXPLAINED: Mapping[Mode, Mapping[str, str]] = {
    Mode.SWAPPED: _AS_SWAPPED,
    Mode.FORCED: {
        **_AS_SWAPPED,
        **{
            f"orm/test_events.py::MapperEventsTest::{test}": (
                "counts load events; here the SELECT and the cache fire one each"
            )
            for test in ("test_basic", "test_inheritance", "test_inheritance_subclass_deferred", "test_merge")
        },
        **{
            f"orm/test_merge.py::MergeTest::{test}_cascade": "counts load events, of its get as well; as above"
            for test in ("test_attribute", "test_many_to_many", "test_one_to_many", "test_one_to_one", "test_unsaved")
        },
    },
}
"""By mode: a test, or a pattern of tests, and the reason."""


def reason_for(test: str, mode: Mode) -> str | None:
    """Why a test may end otherwise; None if that is not known."""
    return next((reason for pattern, reason in EXPLAINED[mode].items() if fnmatchcase(test, pattern)), None)
