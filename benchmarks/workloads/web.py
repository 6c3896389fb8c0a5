"""A request as a web application makes it: 5 products are read, 1 is changed. Starlette under uvicorn, one process.

Each way to cache is a server of its own; they take turns. Who asks is another process (`benchmarks.visitors`).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Final

from benchmarks.contenders import OURS, OURS_MEMCACHED, PLAIN
from benchmarks.figures import MILLISECONDS, PER_SECOND, Figures
from benchmarks.stage import Stage
from tests.servers.process import HOST, free_port

WEB: Final = "a web request: 5 gets, 1 update"
P99: Final = "a web request, 99th percentile"
START_TIMEOUT_S: Final = 30.0


async def run(stage: Stage) -> None:
    async with AsyncExitStack() as stack:
        ports: dict[str, int] = {}
        for name, cache_url in {PLAIN: "", OURS: "memory://", OURS_MEMCACHED: stage.server.url}.items():
            stage.tell(f"web: starting the server of {name}")
            ports[name] = await stack.enter_async_context(_server(stage.postgres_url, cache_url))
        visitors = await stack.enter_async_context(_process("-m", "benchmarks.visitors", stdin=PIPE, stdout=PIPE))
        assert visitors.stdin is not None
        assert visitors.stdout is not None
        for number in range(stage.effort.web_rounds + 1):
            stage.tell(f"web, round {number} of {stage.effort.web_rounds}")
            figures = stage.figures if number else Figures()
            for name, port in ports.items():
                asked = {"url": f"http://{HOST}:{port}", "seconds": stage.effort.web_s}
                visitors.stdin.write(json.dumps(asked).encode() + b"\n")
                answer = json.loads(await visitors.stdout.readline())
                figures.add(WEB, name, PER_SECOND, answer["requests_per_s"])
                figures.add(P99, name, MILLISECONDS, answer["p99_s"] * 1e3)


@asynccontextmanager
async def _server(database_url: str, cache_url: str) -> AsyncGenerator[int]:
    port = free_port()
    command = ["-m", "uvicorn", "--factory", "benchmarks.webapp:application", "--host", HOST, "--port", str(port)]
    settings = {"BENCH_DATABASE_URL": database_url, "BENCH_CACHE_URL": cache_url}
    async with _process(*command, "--log-level", "warning", "--no-access-log", environment=settings) as process:
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                if process.returncode is not None:
                    raise RuntimeError(f"uvicorn ended with status {process.returncode}; it says why above")
                with suppress(OSError):
                    _, writer = await asyncio.open_connection(HOST, port)
                    writer.close()
                    break
                await asyncio.sleep(0.05)
        yield port


@asynccontextmanager
async def _process(
    *arguments: str, environment: Mapping[str, str] | None = None, stdin: int | None = None, stdout: int | None = None
) -> AsyncGenerator[Process]:
    environment = {**os.environ, **(environment or {})}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env=environment, stdin=stdin, stdout=stdout
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
