"""The command line: what an operator asks from outside of the application, a function for each command.

It only shows what `Cache` tells. Answers go to standard output, a line for each thing and never broken, so that they
can be searched in a log; colours only to a terminal. What is wrong with the question goes to standard error.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from enum import IntEnum
from typing import Annotated, Any, Final, TypeVar

import typer
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from asynccache.backends.report import Finding, Level, NodeReport
from asynccache.cache import Cache
from asynccache.errors import AsyncCacheError, ConfigurationError
from asynccache.inspection import Inspection, key_from_text
from asynccache.settings import Settings

T = TypeVar("T")

_DEFAULTS: Final = Settings()
_COLOURS: Final = {Level.OK: typer.colors.GREEN, Level.WARNING: typer.colors.YELLOW, Level.ERROR: typer.colors.RED}

app = typer.Typer(
    help="Look after the cache of an application that uses asynccache.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # a traceback as Python writes it: it shows no values, and so no passwords
)


ModelName = Annotated[str, typer.Argument(metavar="MODULE:MODEL", help="A cached class, like shop.models:Product")]
CacheName = Annotated[
    str, typer.Option(metavar="MODULE:CACHE", help="The application's Cache, with its models registered.")
]
EngineName = Annotated[str, typer.Option(metavar="MODULE:ENGINE", help="Its AsyncEngine.")]


class Exit(IntEnum):
    """The exit status."""

    USABLE = 0
    UNUSABLE = 1
    BAD_QUESTION = 2


@app.callback()
def asynccache() -> None:
    """Look after the cache of an application that uses asynccache.

    check needs no more than the URLs of cache servers. audit and inspect look at an application's rows: they import its
    Cache and its engine by their names, from the current folder or installed. None of them changes anything.
    """


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


@app.command()
def audit(
    model: ModelName,
    cache: CacheName,
    engine: EngineName,
    sample: Annotated[
        int, typer.Option(min=0, help="So many rows at random; 0 for every row, in the order of their keys.")
    ] = 1000,
    rate: Annotated[float, typer.Option(metavar="ROWS_PER_SECOND", help="How fast to go at most.")] = 500.0,
) -> None:
    """Compare what the cache would serve with what the database holds.

    It finds what no cache can prevent: rows that other programs, triggers or hands have changed without a word to the
    cache. A row that a commit is just changing is looked at again, and is no finding. Nothing is changed.

    Each finding is a line: how the cache is wrong, which row, and the attributes that differ. Values are not shown.

    The exit status is 0 if nothing was found; 1 if something was; 2 for names that lead nowhere.
    """
    try:
        found = asyncio.run(
            _audit(_named(cache, Cache), _named(engine, AsyncEngine), _named(model, type), sample or None, rate)
        )
    except AsyncCacheError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(Exit.BAD_QUESTION) from None
    if found:
        raise typer.Exit(Exit.UNUSABLE)


async def _audit(cache: Cache, engine: AsyncEngine, model: type[Any], sample: int | None, rate: float) -> int:
    found = 0
    async with cache, AsyncSession(engine) as session:
        async for mismatch in cache.audit(session, model, sample=sample, rows_per_second=rate):
            found += 1
            name = f"{mismatch.model.__qualname__} {mismatch.primary_key!r}"
            typer.echo(f"{mismatch.kind:<8}  {name}  {', '.join(mismatch.attributes)}".rstrip())
        typer.echo(f"{cache.stats.audited} rows looked at, {found} found wrong")
    await engine.dispose()
    return found


@app.command()
def inspect(
    model: ModelName,
    key: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY",
            help="The row's primary key, a value for each of its columns; after -- if one begins with a minus.",
        ),
    ],
    cache: CacheName,
    engine: EngineName,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object, for machines.")] = False,
) -> None:
    """Show what the cache has of one row, in words.

    On which server it lies and under which key; the state of its slot and of its generation (a bucket of rows that are
    invalidated together); whether a session would be served from it and, if not, what it would do instead; the
    fingerprint of the columns that were stored, and each with its value.

    For example: python -m asynccache inspect shop.models:Product 42 --cache shop.db:cache --engine shop.db:engine

    Values are shown as they are stored. A column that a TypeDecorator converts both ways, as one that encrypts does,
    is shown in the form in which it is sent to the database: nothing is decrypted. Nothing is changed, and the
    database is asked for no more than its name.

    The exit status is 0 if the row, or that there is none, would be served; 1 if not; 2 for names that lead nowhere.
    """
    try:
        found = asyncio.run(_inspect(_named(cache, Cache), _named(engine, AsyncEngine), _named(model, type), key))
    except (AsyncCacheError, InvalidRequestError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(Exit.BAD_QUESTION) from None
    typer.echo(json.dumps(_inspection_as_plain(found), indent=2) if as_json else _inspection_as_text(found))
    if not found.served:
        raise typer.Exit(Exit.UNUSABLE)


async def _inspect(cache: Cache, engine: AsyncEngine, model: type[Any], key: Sequence[str]) -> Inspection:
    try:
        async with cache:
            (found,) = await cache.inspect(model, key_from_text(model, key), scope=engine)
    finally:
        await engine.dispose()
    return found


def _inspection_as_plain(found: Inspection) -> dict[str, Any]:
    columns = None if found.columns is None else {name: _plain_value(each) for name, each in found.columns.items()}
    return {
        **{field.name: getattr(found, field.name) for field in fields(found)},
        "model": found.model.__qualname__,
        "primary_key": [_plain_value(each) for each in found.primary_key],
        **{
            name: {**asdict(slot), "locked_until": [until.isoformat() for until in slot.locked_until]}
            for name, slot in (("row", found.row), ("generation", found.generation))
        },
        "columns": columns,
    }


def _plain_value(value: Any) -> Any:
    """As JSON has it: bytes in hex, and whatever JSON knows no form of as Python writes it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return value.hex() if isinstance(value, bytes) else str(value)


def _inspection_as_text(found: Inspection) -> str:
    name = f"{found.model.__qualname__} {found.primary_key!r}"
    served = "served" if found.served else "NOT SERVED"
    colour = _COLOURS[Level.OK if found.served else Level.WARNING]
    lines = [
        f"{typer.style(name, bold=True)}: {typer.style(served, fg=colour)}",
        _field("verdict", found.verdict),
        _field("database", found.database),
        _field("node", found.node),
        *(
            _field(name, slot.found + (f", of generation {slot.nonce}" if slot.nonce else ""), slot.key)
            for name, slot in (("row", found.row), ("generation", found.generation))
        ),
    ]
    if found.schema is not None:
        known = "that of this application" if found.schema_known else "of another version, or of another model"
        lines.append(_field("schema", f"{found.schema}, {known}"))
    lines += [_field(column, repr(value)) for column, value in (found.columns or {}).items()]
    return "\n".join(lines)


def _field(topic: str, *values: str) -> str:
    first, *more = values
    return "\n".join([f"  {topic:<13}  {first}", *(f"{'':<17}{value}" for value in more)])


def _named(path: str, kind: type[T]) -> T:
    """What `module:attribute` names, from the current folder or installed."""
    module, _, name = path.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"{path!r} leads nowhere: {error}; give module:name, like shop.db:cache") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(found, kind):
        raise ConfigurationError(f"{path!r} is no {kind.__name__} but {found!r}")
    return found


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
