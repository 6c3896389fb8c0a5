"""A run as tables: for the terminal, for docs/benchmarks.md, and as JSON from which both can be made again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

from benchmarks import commits
from benchmarks.bars import Bar, bars_of
from benchmarks.claims import Claims
from benchmarks.contenders import NAMES, PLAIN, in_order
from benchmarks.figures import (
    BYTES,
    FAILED,
    MICROSECONDS,
    MILLISECONDS,
    PER_SECOND,
    READS,
    SECONDS,
    SELECTS,
    STALE,
    SUMMARIES,
    Figures,
    ratios,
)
from benchmarks.table import markdown, print_table, shown
from benchmarks.workloads import committing, crowd, fleet, herd, hits, many, misses, size, web

BEGIN: Final = "<!-- Written by `nox -s bench -- --write-docs`: begin -->"
END: Final = "<!-- Written by `nox -s bench -- --write-docs`: end -->"

FORMS: Final = {MICROSECONDS: ",.1f", MILLISECONDS: ",.2f", PER_SECOND: ",.0f", SECONDS: ".2f", BYTES: ",.0f"}


@dataclass(frozen=True, slots=True)
class Report:
    """A run. absent: why a contender did not take part."""

    conditions: str
    figures: Figures
    claims: Mapping[str, Claims]
    absent: Mapping[str, str]

    @property
    def bars(self) -> list[Bar]:
        return bars_of(self.figures, self.claims)

    def to_json(self) -> str:
        figures = [{**asdict(each), "value": each.value} for each in self.figures]
        bars = [{**asdict(bar), "value": bar.value, "holds": bar.holds} for bar in self.bars]
        claims = {name: asdict(claim) for name, claim in self.claims.items()}
        parts: dict[str, Mapping[str, object] | Sequence[object]] = {
            "absent": dict(self.absent),
            "claims": claims,
            "bars": bars,
            "figures": figures,
        }
        # A line for each figure, so that the differences between two runs can be read.
        written = [json.dumps(self.conditions), *(_lines(part) for part in parts.values())]
        names = ["conditions", *parts]
        return "{" + ",\n".join(f'"{name}": {each}' for name, each in zip(names, written, strict=True)) + "}\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        held = json.loads(text)
        figures = Figures()
        for each in held["figures"]:
            for value in each["rounds"]:
                figures.add(each["workload"], each["contender"], each["unit"], value)
        claims = {name: Claims(**claim) for name, claim in held["claims"].items()}
        return cls(held["conditions"], figures, claims, held["absent"])


def _lines(part: Mapping[str, object] | Sequence[object]) -> str:
    if isinstance(part, Mapping):
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(each)}" for key, each in part.items()) + "\n}"
    return "[\n" + ",\n".join(json.dumps(each) for each in part) + "\n]"


class Table(NamedTuple):
    title: str
    headings: list[str]
    rows: list[list[str]]
    pictures: tuple[str, ...] = ()
    """Names of files, without their ending."""
    texts: int = 1
    """So many columns are text, the others figures."""


class Column(NamedTuple):
    """Figures of one workload; or, with `under`, their ratio to SQLAlchemy alone in that workload, round by round."""

    heading: str
    workload: str
    unit: str
    under: str = ""


def tables_of(report: Report) -> list[Table]:
    """All tables of which anything was measured."""

    def contended(title: str, columns: Sequence[Column], *pictures: str) -> Table:
        return _by_contender(report, title, columns, pictures)

    crowds = [
        column
        for workload, mix in crowd.MIXES.items()
        for column in (
            Column(f"{workload.removeprefix('64 tasks').strip(', ')}, 1/s", workload, PER_SECOND),
            *([Column("stale reads", workload, STALE)] if mix.writes else []),
        )
    ]
    tables = [
        _claims(report),
        contended(
            "One task that hits",
            [
                Column("same session, µs", hits.SAME, MICROSECONDS),
                Column("/ PostgreSQL, fresh session", hits.SAME, MICROSECONDS, hits.FRESH),
                Column("fresh session, µs", hits.FRESH, MICROSECONDS),
                Column("/ PostgreSQL, fresh session", hits.FRESH, MICROSECONDS, hits.FRESH),
                Column("same session, SQLite, µs", hits.SAME + hits.ON_SQLITE, MICROSECONDS),
                Column("fresh session, SQLite, µs", hits.FRESH + hits.ON_SQLITE, MICROSECONDS),
            ],
            "hit-same-session",
            "hit-fresh-session",
        ),
        contended("64 tasks, keys by Zipf's law", crowds, "crowd-kept", "crowd-reading", "crowd-writing"),
        contended(
            "100 at once",
            [
                Column("same session, µs", many.MANY, MICROSECONDS),
                Column("/ SELECT ... IN", many.MANY, MICROSECONDS, many.MANY),
            ],
            "many",
        ),
        contended(
            "A miss",
            [
                Column("fresh session, µs", misses.MISS, MICROSECONDS),
                Column("/ SQLAlchemy alone", misses.MISS, MICROSECONDS, misses.MISS),
            ],
            "miss",
        ),
        contended(
            "Herds on one cold key",
            [
                Column("one process: SELECTs", herd.HERD, SELECTS),
                Column("until all have it, s", herd.HERD, SECONDS),
                Column("several processes: SELECTs", fleet.FLEET, SELECTS),
                Column("until all have it, s", fleet.FLEET, SECONDS),
                Column("failed gets", fleet.FLEET, FAILED),
            ],
        ),
        _plain(
            report,
            "What a commit takes",
            [Column(f"{committing.changing(n)}, ms", committing.changing(n), MILLISECONDS) for n in (1, commits.ROWS)],
        ),
        _plain(
            report,
            "Many entries in memory",
            [
                Column("hit, µs", size.HIT, MICROSECONDS),
                Column("storing one more, µs", size.STORE, MICROSECONDS),
                Column("bytes each", size.SIZE, BYTES),
            ],
            "entries",
        ),
        _plain(
            report,
            "A web request: 5 gets, 1 update",
            [Column("requests, 1/s", web.WEB, PER_SECOND), Column("99th percentile, ms", web.P99, MILLISECONDS)],
            "web",
            "web-p99",
        ),
        _bars(report.bars),
    ]
    return [table for table in tables if table.rows]


def print_tables(report: Report) -> None:
    for table in tables_of(report):
        print_table(table.headings, table.rows, "", title=table.title)
    print_table([], [], report.conditions)


def write_docs(report: Report, page: Path, folder: Path) -> None:
    """Put the tables between the marks of `page`, with the pictures in `folder`. Raises ValueError without marks."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no line {BEGIN!r} with a line {END!r} after it, between which tables could go")
    parts = [report.conditions, ""]
    for table in tables_of(report):
        parts += [f"### {table.title}", "", markdown(table.headings, table.rows, texts=table.texts).strip(), ""]
        for picture in table.pictures:
            parts += [f"![{table.title}: {picture}]({folder.relative_to(page.parent)}/{picture}.svg)", ""]
    page.write_text("\n".join([before + begin, "", *parts]) + end + after)


def _by_contender(report: Report, title: str, columns: Sequence[Column], pictures: tuple[str, ...]) -> Table:
    """All who were measured, in the same order everywhere. Columns without a figure are out."""
    columns = [column for column in columns if report.figures.contenders(column.workload, column.unit)]
    measured = {name: None for each in columns for name in report.figures.contenders(each.workload, each.unit)}
    names = in_order(measured)
    rows = [[name, *(_cell(report.figures, column, name) for column in columns)] for name in names]
    return Table(title, ["", *(column.heading for column in columns)], rows, pictures)


def _plain(report: Report, title: str, columns: Sequence[Column], *pictures: str) -> Table:
    names = {name: None for each in columns for name in report.figures.contenders(each.workload, each.unit)}
    rows = [[name, *(_cell(report.figures, column, name) for column in columns)] for name in names]
    return Table(title, ["", *(column.heading for column in columns)], rows, pictures)


def _cell(figures: Figures, column: Column, name: str) -> str:
    rounds = figures.rounds(column.workload, name, column.unit)
    if not rounds:
        return ""
    if column.under:
        alone = figures.rounds(column.under, PLAIN, column.unit)
        return _ratio(median(ratios(rounds, alone))) if name != PLAIN or column.under != column.workload else ""
    if column.unit in (SELECTS, FAILED):
        return f"{SUMMARIES[column.unit](rounds):,.0f}"
    if column.unit == STALE:
        return f"{sum(rounds):,.0f} of {sum(figures.rounds(column.workload, name, READS)):,.0f}"
    return shown(rounds, FORMS[column.unit])


def _ratio(value: float) -> str:
    return f"1/{1 / value:.0f}" if value < 0.1 else f"{value:.2f}"


def _claims(report: Report) -> Table:
    headings = [
        *("", "persistent instance", "values as loaded", "values of its own", "one SELECT for a herd"),
        *("invalidated", "no stale fill"),
    ]
    rows = []
    for name in NAMES:
        claim = report.claims.get(name)
        if claim is not None:
            coalesced = _yes(claim.coalesced)
            in_fleet = report.figures.rounds(fleet.FLEET, name, SELECTS)
            if claim.coalesced and in_fleet:
                coalesced = "in all processes" if max(in_fleet) == 1 else "in each process"
            instance = [_yes(claim.persistent), _yes(claim.faithful), _yes(claim.isolated)]
            rows.append([name, *instance, coalesced, claim.invalidated or "", _yes(claim.fresh)])
        elif name in report.absent:
            rows.append([name, f"does not run: {report.absent[name]}", *[""] * (len(headings) - 2)])
    return Table("What each does, found out by trying", headings, rows if report.claims else [], texts=len(headings))


def _yes(claim: bool | None) -> str:
    return "" if claim is None else "yes" if claim else "no"


def _bars(bars: Sequence[Bar]) -> Table:
    rows = [
        [
            bar.aim,
            f"{'at most' if bar.at_most else 'at least'} {bar.written(bar.limit)}",
            bar.written(bar.value),
            "yes" if bar.holds else "**missed**",
        ]
        for bar in bars
    ]
    return Table("What is aimed at, and what is reached", ["", "bar", "measured", "holds"], rows)
