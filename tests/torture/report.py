"""What a person sees of a run, and what a program does."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from tests.torture.run import Progress, Result


def progress_of(progress: Progress) -> Table:
    """How far a run is, in two lines."""
    counts = progress.counts
    table = Table.grid(padding=(0, 2))
    table.add_row(
        f"[bold]{progress.mix.name}[/]",
        f"{progress.seconds:.0f} of {progress.mix.seconds:.0f} s",
        f"{counts.reads:,} reads",
        f"{counts.hits / max(counts.reads, 1):.0%} hits",
        f"{counts.commits:,} commits",
        f"[{'red' if counts.stale else 'green'}]{counts.stale} stale[/]",
        f"naive: {counts.naive_stale} of {counts.naive_reads:,} stale",
    )
    table.add_row("", *(f"{fault} {count:,}" for fault, count in sorted(progress.injected.items())))
    return table


HEADINGS = ("faults", "reads/s", "hits", "commits", "stale", "no lock", "for ever", "naive", "for ever", "injected")


def table_of(results: Sequence[Result]) -> Table:
    table = Table(
        title="Reads that were older than a commit acknowledged before they began, and for how long at most",
        caption=(
            "no lock: such reads, and the commits whose slots could not be locked, or not be looked at after COMMIT; "
            "for ever: rows that were still old when all had ended"
        ),
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("faults", "injected") else "right")
    for result in results:
        table.add_row(*row_of(result), style={0: "", 1: "red", 2: "yellow"}[result.status])
    return table


def row_of(result: Result) -> list[str]:
    counts = result.counts
    evictions = [f"{result.evictions:,} evictions"] if result.evictions else []
    return [
        result.mix.name,
        f"{counts.reads / result.seconds:,.0f}",
        f"{result.hit_rate:.0%}",
        f"{counts.commits:,}",
        _stale(counts.stale, counts.worst_lag_us),
        _stale(counts.unsecured_stale, counts.worst_unsecured_lag_us, counts.unlocked + counts.unverified),
        f"{counts.forever_stale + counts.killed_forever_stale}",
        _stale(counts.naive_stale, counts.worst_naive_lag_us, counts.naive_reads),
        f"{counts.naive_forever_stale}",
        ", ".join([f"{fault} {count:,}" for fault, count in sorted(result.injected.items()) if count] + evictions),
    ]


def markdown_of(results: Sequence[Result]) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row_of(result) for result in results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _stale(reads: int, lag_us: int, of: int | None = None) -> str:
    share = f"{reads:,}" if of is None else f"{reads:,} of {of:,}"
    return share + (f", {lag_us / 1000:,.0f} ms" if lag_us else "")
