"""The command line: what an operator asks from outside of the application, a function for each command.

It only shows what `Cache` tells. Answers go to standard output, a line for each thing and never broken, so that they
can be searched in a log; colours only to a terminal. What is wrong with the question goes to standard error.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from enum import IntEnum
from typing import Annotated, Any, Final

import typer

from asynccache.backends.report import Finding, Level, NodeReport
from asynccache.cache import Cache
from asynccache.errors import ConfigurationError
from asynccache.settings import Settings

_DEFAULTS: Final = Settings()
_COLOURS: Final = {Level.OK: typer.colors.GREEN, Level.WARNING: typer.colors.YELLOW, Level.ERROR: typer.colors.RED}

app = typer.Typer(
    help="Look after the cache of an application that uses asynccache.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # a traceback as Python writes it: it shows no values, and so no passwords
)


class Exit(IntEnum):
    """The exit status."""

    USABLE = 0
    UNUSABLE = 1
    BAD_QUESTION = 2


@app.callback()
def asynccache() -> None:
    """Look after the cache of an application that uses asynccache."""


@app.command()
def check(
    urls: Annotated[
        list[str],
        typer.Argument(
            metavar="URL",
            help="Caches, as the application names them: memcached://host:port[,host:port...], or memcached+unix:///path",
        ),
    ],
    lock_ttl_s: Annotated[
        float,
        typer.Option(
            "--lock-ttl",
            metavar="SECONDS",
            help="The application's lock_ttl. Locks live for up to twice as long and a second, "
            "and for so long the server must not evict them.",
        ),
    ] = _DEFAULTS.lock_ttl_s,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON array with an object for each server, for machines.")
    ] = False,
) -> None:
    """Ask cache servers how they are, and say what to do about it.

    For each server: whether it can be reached and how fast, its version, whether it compares before it sets (cas),
    whether locks are safe from eviction, how large a row may be, and how much memory and how many connections are left.

    Nothing is stored or changed. A server that does not answer is given up after the time-outs in its URL.

    The exit status is 0 if every server can be used, warnings or not; 1 if one of them cannot; 2 for a bad URL.
    """
    try:
        caches = [_cache(url, lock_ttl_s) for url in urls]
    except ConfigurationError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(Exit.BAD_QUESTION) from None
    reports = asyncio.run(_check(caches))
    if as_json:
        typer.echo(json.dumps([_plain(report) for report in reports], indent=2))
    else:
        typer.echo("\n\n".join(map(_shown, reports)))
    if not all(report.usable for report in reports):
        raise typer.Exit(Exit.UNUSABLE)


def _cache(url: str, lock_ttl_s: float) -> Cache:
    # A lock_timeout that no lock_ttl is too short for, as nothing is locked here.
    return Cache(url, lock_ttl=lock_ttl_s, lock_timeout=min(_DEFAULTS.lock_timeout_s, max(lock_ttl_s, 0) / 2))


async def _check(caches: Sequence[Cache]) -> list[NodeReport]:
    async def one(cache: Cache) -> Sequence[NodeReport]:
        async with cache:
            return await cache.check()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(cache)) for cache in caches]
    return [report for task in tasks for report in task.result()]


def _plain(report: NodeReport) -> dict[str, Any]:
    """A report as JSON has it: its fields, and whether the node is usable."""
    findings = [{**asdict(finding), "level": finding.level.value} for finding in report.findings]
    return {"node": report.node, "usable": report.usable, **asdict(report), "findings": findings}


def _shown(report: NodeReport) -> str:
    """A report as people read it: a headline, then what was found, each with what to do beneath it."""
    warnings = sum(finding.level is Level.WARNING for finding in report.findings)
    if not report.usable:
        verdict = typer.style("CANNOT BE USED", fg=_COLOURS[Level.ERROR], bold=True)
    elif warnings:
        verdict = typer.style(f"usable, {warnings} warning{'s'[: warnings > 1]}", fg=_COLOURS[Level.WARNING])
    else:
        verdict = typer.style("usable", fg=_COLOURS[Level.OK])
    return "\n".join([f"{typer.style(report.node, bold=True)}: {verdict}", *map(_line, report.findings)])


def _line(finding: Finding) -> str:
    level = typer.style(f"{finding.level.value:<7}", fg=_COLOURS[finding.level])
    line = f"  {finding.topic:<13}  {level}  {finding.found}"
    return f"{line}\n{'':<26}{finding.way_out}" if finding.way_out else line
