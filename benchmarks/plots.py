"""The figures as pictures: SVG, the same bytes for the same figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Final

import matplotlib as mpl
from matplotlib.figure import Figure as Picture

from benchmarks.contenders import OURS, OURS_MEMCACHED, PLAIN, in_order
from benchmarks.figures import MICROSECONDS, MILLISECONDS, PER_SECOND, Figures
from benchmarks.workloads import crowd, hits, many, misses, size, web

OURS_COLOUR: Final = "#2563a6"
PLAIN_COLOUR: Final = "#8a5a2b"
OTHERS_COLOUR: Final = "#9aa3ad"

BARS: Final = {
    "hit-same-session": (hits.SAME, MICROSECONDS),
    "hit-fresh-session": (hits.FRESH, MICROSECONDS),
    "many": (many.MANY, MICROSECONDS),
    "miss": (misses.MISS, MICROSECONDS),
    "crowd-kept": (crowd.KEPT, PER_SECOND),
    "crowd-reading": (crowd.READING, PER_SECOND),
    "crowd-writing": (crowd.OFTEN, PER_SECOND),
    "web": (web.WEB, PER_SECOND),
    "web-p99": (web.P99, MILLISECONDS),
}
"""By the name of the file."""


def draw(figures: Figures, folder: Path) -> list[Path]:
    """Write a picture of each workload that was run. Give the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with mpl.rc_context({"svg.hashsalt": "asynccache", "svg.fonttype": "none", "font.size": 9}):
        for name, (workload, unit) in BARS.items():
            contenders = in_order(figures.contenders(workload, unit))
            if contenders:
                rounds = [figures.rounds(workload, each, unit) for each in contenders]
                drawn.append(_save(_bars(f"{workload}, {unit}", contenders, rounds), folder / f"{name}.svg"))
        if figures.contenders(size.HIT, MICROSECONDS):
            drawn.append(_save(_by_entries(figures), folder / "entries.svg"))
    return drawn


def _bars(title: str, names: Sequence[str], rounds: Sequence[Sequence[float]]) -> Picture:
    """Medians as bars, the middle half as a line over each."""
    lows, medians, highs = zip(*(quantiles(each, n=4, method="inclusive") for each in rounds), strict=True)
    picture = Picture(figsize=(8, 0.6 + 0.32 * len(names)), layout="constrained")
    axes = picture.subplots()
    spread = [
        [middle - low for middle, low in zip(medians, lows, strict=True)],
        [high - middle for high, middle in zip(highs, medians, strict=True)],
    ]
    bars = axes.barh(range(len(names)), medians, xerr=spread, color=[_colour(name) for name in names], capsize=2)
    axes.bar_label(bars, labels=[f" {each:,.0f}" if each >= 100 else f" {each:.1f}" for each in medians], padding=6)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    if max(medians) > 50 * min(medians):
        title += " (logarithmic)"
        axes.set_xscale("log")
        axes.set_xlim(1, 3 * max(highs))
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return picture


def _by_entries(figures: Figures) -> Picture:
    picture = Picture(figsize=(8, 3), layout="constrained")
    axes = picture.subplots()
    for workload, colour in ((size.HIT, OURS_COLOUR), (size.STORE, OTHERS_COLOUR)):
        names = figures.contenders(workload, MICROSECONDS)
        entries = [int(name.split()[0].replace(",", "")) for name in names]
        of = [quantiles(figures.rounds(workload, name, MICROSECONDS), n=4, method="inclusive") for name in names]
        lows, medians, highs = zip(*of, strict=True)
        axes.plot(entries, medians, marker="o", color=colour, label=workload)
        axes.fill_between(entries, lows, highs, color=colour, alpha=0.2)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("entries in memory")
    axes.set_ylabel(MICROSECONDS)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return picture


def _colour(name: str) -> str:
    if name in (OURS, OURS_MEMCACHED):
        return OURS_COLOUR
    return PLAIN_COLOUR if name == PLAIN else OTHERS_COLOUR


def _save(picture: Picture, path: Path) -> Path:
    picture.savefig(path, metadata={"Date": None})
    return path
