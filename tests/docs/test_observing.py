"""What the page on observing lists is what there is: events with their fields, metrics with their names."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, get_args

import pytest

from asynccache.adapters.instruments import INSTRUMENTS, Counter, Duration, Instrument
from asynccache.events import DropReason, Event
from tests.docs.pages import ROOT

pytestmark = pytest.mark.without_sqlalchemy

PAGE = (ROOT / "docs" / "observing.md").read_text()


def test_the_table_has_each_event_with_its_fields() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|", PAGE, re.MULTILINE)
    kinds: tuple[Any, ...] = get_args(Event)
    assert {name: re.findall(r"\w+", row) for name, row in rows} == {
        kind.__name__: [field.name for field in fields(kind)] for kind in kinds
    }


def test_all_reasons_of_a_dropped_fill_are_named() -> None:
    (row,) = re.findall(r"^\| `FillDropped` .*$", PAGE, re.MULTILINE)
    assert [reason for reason in get_args(DropReason) if f"`{reason}`" not in row] == []


def test_metrics_that_are_named_exist() -> None:
    instruments = {each for instruments in INSTRUMENTS.values() for each in instruments}
    suffixes: dict[type[Instrument], str] = {Counter: "_total", Duration: "_seconds"}
    known = {f"asynccache_{each.name}{suffixes.get(type(each), '')}" for each in instruments}
    known |= {f"asynccache.{each.name}" for each in instruments}
    named = set(re.findall(r"asynccache_\w+|(?<=`)asynccache\.\w+(?=`)", PAGE))
    assert named - known - {"asynccache.testing"} == set()
    assert all(f"asynccache_{each.name}_seconds" in named for each in instruments if isinstance(each, Duration))
