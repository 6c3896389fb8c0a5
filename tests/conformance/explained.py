"""Tests of SQLAlchemy's that end otherwise with our sessions, and why each of them may."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from tests.conformance.sessions import Mode

EXPLAINED: Mapping[Mode, Mapping[str, str]] = {
    Mode.SWAPPED: {},
    Mode.FORCED: {},
}
"""By mode: a test, or a pattern of tests, and the reason."""


def reason_for(test: str, mode: Mode) -> str | None:
    """Why a test may end otherwise; None if that is not known."""
    return next((reason for pattern, reason in EXPLAINED[mode].items() if fnmatchcase(test, pattern)), None)
