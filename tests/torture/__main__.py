"""Torture the cache with real servers: `python -m tests.torture --help`, or `nox -s torture -- --help`.

Without arguments each fault has a run of its own, then all are mixed, in both failure modes. The exit status is 1 if a
promise was broken, and 2 if a run proves nothing: the naive cache beside ours was not stale either, a fault never
happened, or a mutation was not caught.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.live import Live

from asynccache.settings import OnLockFailure
from tests.servers import Postgres
from tests.torture.mixes import ALL, CATCHES, Fault, Mix
from tests.torture.report import markdown_of, progress_of, table_of
from tests.torture.run import Result, run

MODES: Final[dict[str, tuple[OnLockFailure, ...]]] = {
    "commit": ("commit",),
    "raise": ("raise",),
    "both": ("commit", "raise"),
}
INTERRUPTED: Final = 130
LOG_COLUMNS: Final = 160


def faults_of(text: str) -> frozenset[Fault]:
    """Read `all`, `none`, or names with `+` between them."""
    if text in ("all", "none"):
        return ALL if text == "all" else frozenset()
    try:
        return frozenset(Fault(name) for name in text.split("+"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; there are: none, {', '.join(Fault)}, all") from error


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    each = [frozenset[Fault](), *(frozenset({fault}) for fault in Fault), ALL]
    parser.add_argument(
        "--fault",
        type=faults_of,
        nargs="+",
        default=each,
        metavar="NAME[+NAME...]",
        help=f"one run for each: none, {', '.join(Fault)}, all, or some with + between them",
    )
    parser.add_argument("--mode", choices=MODES, default="both", help="on_lock_failure")
    parser.add_argument("--seconds", type=float, default=15, help="of each run, at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--mutation",
        choices=[*CATCHES, "all"],
        default="",
        help="leave a part of the protocol out, under the faults that are known to show it, until it is caught",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found; - is the standard output")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    return parser.parse_args(arguments)


def mixes_of(options: argparse.Namespace) -> list[Mix]:
    if options.mutation:
        names = list(CATCHES) if options.mutation == "all" else [options.mutation]
        return [Mix(CATCHES[name], "raise", options.seconds, options.seed, name, until_stale=True) for name in names]
    modes = MODES[options.mode]
    return [Mix(faults, mode, options.seconds, options.seed) for faults in options.fault for mode in modes]


def verdict(result: Result) -> tuple[int, list[str]]:
    """The exit status, and why. Of a mutant it is expected that it is found stale."""
    if not result.mix.mutation:
        return result.status, result.broken + result.proves_nothing
    if result.counts.stale:
        return 0, []
    return 2, [f"{result.mix.mutation} was not caught in {result.seconds} s", *result.broken]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(stderr=options.json == Path("-"))
    if not console.is_terminal:
        console = Console(stderr=console.stderr, width=LOG_COLUMNS)
    results: list[Result] = []
    # Also where this was started with SIGINT ignored, as a shell does in the background, and when a CI gives up.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with Postgres() as postgres, Live(console=console, refresh_per_second=4, transient=True) as live:
            for mix in mixes_of(options):
                results.append(run(mix, postgres, lambda progress: live.update(progress_of(progress))))
                status, why = verdict(results[-1])
                live.console.print(f"{['ok', 'BROKEN', 'proves nothing'][status]}: {mix.name}", *why, sep="\n    ")
    except KeyboardInterrupt:
        console.print("interrupted")
    console.print(table_of(results))
    found = json.dumps([result.as_json() for result in results], indent=1)
    if options.json == Path("-"):
        sys.stdout.write(found + "\n")
    elif options.json:
        options.json.write_text(found)
    if options.markdown:
        options.markdown.write_text(markdown_of(results) + "\n")
    statuses = {verdict(result)[0] for result in results}
    if len(results) < len(mixes_of(options)):
        return INTERRUPTED
    return 1 if 1 in statuses else max(statuses, default=0)


if __name__ == "__main__":
    sys.exit(main())
