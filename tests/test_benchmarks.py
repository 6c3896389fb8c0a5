"""`nox -s bench`: its smallest part runs, and what it reports can be read, checked and written into the docs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as bench
from benchmarks.claims import AT_COMMIT, Claims
from benchmarks.contenders import NAMES, OURS, OURS_MEMCACHED, PLAIN
from benchmarks.figures import MICROSECONDS, READS, SELECTS, STALE, Figures
from benchmarks.plots import draw
from benchmarks.report import BEGIN, END, Report, tables_of, write_docs
from benchmarks.workloads import crowd, herd, hits

ROOT = Path(__file__).parent.parent
YES = Claims(persistent=True, faithful=True, isolated=True, coalesced=True, invalidated=AT_COMMIT, fresh=True)


def report(*, ours_us: float = 10.0, more: int = 0) -> Report:
    """A run in which all bars hold, unless `ours_us` is too much; with so many more counts in each next round."""
    figures = Figures()
    for number in range(3):
        for name, us in {PLAIN: 1_300.0, OURS: ours_us, "cashews + merge, memory": 100.0}.items():
            figures.add(hits.SAME, name, MICROSECONDS, us + number)
            figures.add(hits.FRESH, name, MICROSECONDS, us + number)
        figures.add(herd.HERD, OURS, SELECTS, 1 + more * number)
        figures.add(crowd.READING, OURS, STALE, more * number)
        figures.add(crowd.READING, OURS, READS, 100)
    return Report("somewhere", figures, {OURS: YES, "cashews + merge, memory": YES}, {"sqlacache, memcached": "no"})


@pytest.mark.timeout(240)  # a few seconds on a machine that has nothing else to do
def test_its_smallest_part_measures_everybody_on_real_servers(tmp_path: Path) -> None:
    written = tmp_path / "bench.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "hits", "--json", str(written)]
    run = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(written.read_text())
    measured = {(each["workload"], each["contender"]): each["rounds"] for each in found["figures"]}
    here = [name for name in NAMES if name not in found["absent"]]
    in_memory = [name for name in here if "memcached" not in name]
    wanted = {(workload, name) for workload in (hits.SAME, hits.FRESH) for name in here}
    wanted |= {(workload + hits.ON_SQLITE, name) for workload in (hits.SAME, hits.FRESH) for name in in_memory}
    assert measured.keys() == {*wanted, (hits.SAME, hits.RAW)}
    assert all(value > 0 for rounds in measured.values() for value in rounds)
    assert {PLAIN, OURS, OURS_MEMCACHED} <= {*here}
    assert len(found["bars"]) == 3
    assert found["absent"].keys() == {"cashews + merge, memcached", "sqlacache, memcached"}


def test_a_report_is_the_same_when_it_is_read_again() -> None:
    text = report().to_json()
    assert Report.from_json(text).to_json() == text


def test_counts_are_of_the_worst_round_or_of_all_and_other_figures_are_medians() -> None:
    values = {(each.workload, each.contender, each.unit): each.value for each in report(more=1).figures}
    assert values[hits.SAME, PLAIN, MICROSECONDS] == 1_301
    assert values[herd.HERD, OURS, SELECTS] == 3
    assert values[crowd.READING, OURS, STALE] == 3


def test_bars_are_the_medians_of_ratios_within_a_round() -> None:
    bars = {bar.aim: bar for bar in report().bars}
    hit = bars["hit in memory, same session / PostgreSQL get, fresh session"]
    assert hit.rounds == (10 / 1_300, 11 / 1_301, 12 / 1_302)
    assert hit.value == 11 / 1_301
    assert hit.holds


def test_strict_fails_when_a_bar_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tmp_path / "held.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--from-json", str(held), "--strict"])
    held.write_text(report().to_json())
    assert bench.main() == 0
    held.write_text(report(ours_us=50).to_json())
    assert bench.main() == 1
    assert "missed" in capsys.readouterr().out


def test_the_docs_get_tables_and_pictures_between_their_marks(tmp_path: Path) -> None:
    page, folder = tmp_path / "page.md", tmp_path / "pictures"
    page.write_text(f"before\n{BEGIN}\nyesterday\n{END}\nafter\n")
    drawn = draw(report().figures, folder)
    write_docs(report(), page, folder)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "yesterday" not in text
    assert all(table.title in text for table in tables_of(report()))
    assert "does not run: no" in text
    assert folder / "hit-same-session.svg" in drawn
    assert all(path.read_text().lstrip().startswith("<?xml") for path in drawn)
    again = draw(report().figures, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in drawn]


def test_the_docs_have_their_marks() -> None:
    page = bench.PAGE.read_text()
    assert page.count(BEGIN) == page.count(END) == 1


def test_a_page_without_marks_is_refused_by_name(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing to see here")
    with pytest.raises(ValueError, match=r"page\.md has no line"):
        write_docs(report(), page, tmp_path)
