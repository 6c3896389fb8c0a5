"""A memcached server: from PATH, else fetched with apt into a folder of our own, which needs no root."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from tests.servers.process import HOST, Process, cached, free_port, give_back_port, unprivileged

if TYPE_CHECKING:
    from trustme import CA, LeafCert  # the benchmarks do without it

HOW_TO_GET_IT = (
    "no memcached for the tests: `apt-get install memcached` (Debian, Ubuntu), `dnf install memcached` (Fedora) "
    "or `brew install memcached` (macOS)"
)


class Memcached:
    """A memcached server of our own, for as long as the `with` block.

    arguments: more of its command line, like "-o", "temporary_ttl=60".
    certificate: with it the server speaks TLS, and nothing else.
    clients: who must have signed its clients' certificates. None: clients need none.
    users: names and passwords. With them it answers only who authenticates.
    host, port, url: where it listens, the same after a restart. The URL has no user and password.

    Raises RuntimeError when there is no memcached, or with the server's log when it does not come up.
    """

    def __init__(
        self,
        *arguments: str,
        certificate: LeafCert | None = None,
        clients: CA | None = None,
        users: Mapping[str, str] | None = None,
    ) -> None:
        self.host = HOST
        self.port = free_port()
        self._arguments = arguments
        self._certificate = certificate
        self._clients = clients
        self._users = users
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._binary = _binary()
        self._process: Process | None = None

    @property
    def url(self) -> str:
        return f"{'memcacheds' if self._certificate else 'memcached'}://{self.host}:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        give_back_port(self.port)

    def start(self) -> None:
        """Start it, empty, unless it runs."""
        if self._process is not None:
            return
        listen = ["-l", self.host, "-p", str(self.port), "-U", "0"]
        environment = {"LD_LIBRARY_PATH": self._binary.libraries} if self._binary.libraries else None
        arguments = [*listen, *self._secrets(), *self._arguments]
        folder = Path(self._folder.name) if self._folder else None
        self._process = Process([str(self._binary.path), *arguments], environment=environment, folder=folder)
        try:
            self._process.wait_until(self._answers)
        except RuntimeError:
            self._process = None
            self.stop()
            raise

    def stop(self) -> None:
        """End it, paused or not: who connects is refused. Does nothing when it does not run."""
        if self._process is not None:
            self._process.stop()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def restart(self) -> None:
        """Lose everything that it held and all connections."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it: it takes connections and commands and never answers."""
        self._running().pause()

    def resume(self) -> None:
        """Let it go on after `pause`: what was sent to it meanwhile is answered now."""
        self._running().resume()

    def flush(self) -> None:
        """Empty it at once, leaving connections alone."""
        answer = self._command(b"flush_all\r\n")
        if answer != b"OK\r\n":
            raise RuntimeError(f"the memcached on port {self.port} did not flush: {answer!r}")

    def revive(self) -> None:
        """Make it run, empty and awake, whatever a test did to it."""
        self.start()
        self.resume()
        self.flush()

    def _running(self) -> Process:
        if self._process is None:
            raise RuntimeError(f"the memcached on port {self.port} does not run: start() it first")
        return self._process

    def _answers(self) -> bool:
        try:
            return self._command(b"version\r\n").startswith(b"VERSION")
        except OSError:
            return False

    def _command(self, command: bytes) -> bytes:
        with self.connect() as connection:
            connection.sendall(command)
            return connection.recv(64)

    def connect(self) -> socket.socket:
        """Connect without any client, over TLS and authenticated where it must be. Raises OSError."""
        connection = socket.create_connection((self.host, self.port), timeout=5)
        try:
            if self._certificate is not None:
                trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                trusting.check_hostname = False
                trusting.verify_mode = ssl.CERT_NONE
                self._certificate.configure_cert(trusting)
                connection = trusting.wrap_socket(connection)
            for user, password in [*(self._users or {}).items()][:1]:
                value = f"{user} {password}".encode()
                connection.sendall(b"set auth 0 0 %d\r\n%b\r\n" % (len(value), value))
                if connection.recv(64) != b"STORED\r\n":
                    raise ConnectionRefusedError(f"{user} was refused")
        except BaseException:
            connection.close()
            raise
        return connection

    def _secrets(self) -> list[str]:
        """Write down keys and passwords, for the server's user alone to read, and give the arguments that name them."""
        if self._certificate is None and self._users is None:
            return []
        self._folder = tempfile.TemporaryDirectory(prefix="asynccache-memcached-")
        folder, arguments = Path(self._folder.name), []
        if self._certificate is not None:
            (folder / "key").write_bytes(self._certificate.private_key_pem.bytes())
            (folder / "chain").write_bytes(b"".join(pem.bytes() for pem in self._certificate.cert_chain_pems))
            arguments += ["-Z", "-o", f"ssl_key={folder}/key,ssl_chain_cert={folder}/chain"]
        if self._clients is not None:
            (folder / "clients").write_bytes(self._clients.cert_pem.bytes())
            arguments += ["-o", f"ssl_verify_mode=2,ssl_ca_cert={folder}/clients"]
        if self._users is not None:
            (folder / "users").write_text("".join(f"{user}:{password}\n" for user, password in self._users.items()))
            arguments += ["-Y", f"{folder}/users"]
        owner = unprivileged()
        for path in (folder, *folder.iterdir()):
            os.chown(path, owner.get("user", -1), owner.get("group", -1))  # -1: as it is
        return arguments


class Binary(NamedTuple):
    """A program and, where they are not the system's, the folders of its libraries as LD_LIBRARY_PATH takes them."""

    path: Path
    libraries: str


def _binary() -> Binary:
    if found := shutil.which("memcached"):
        return Binary(Path(found), libraries="")
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RuntimeError(HOW_TO_GET_IT)
    system = platform.freedesktop_os_release()
    try:
        folder = cached(f"memcached-{system['ID']}-{system.get('VERSION_ID', 'rolling')}-{platform.machine()}", _fetch)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{HOW_TO_GET_IT}; fetching it failed: {error}\n{error.stderr}") from error
    libraries = {str(library.parent) for library in folder.rglob("lib*.so*")}
    return Binary(folder / "usr" / "bin" / "memcached", os.pathsep.join(sorted(libraries)))


def _fetch(into: Path) -> None:
    """Unpack memcached and its libraries, installing nothing. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as scratch:
        for package in _download(Path(scratch)):
            _run("dpkg-deb", "-x", str(package), str(into))


def _download(scratch: Path) -> list[Path]:
    apt = ["-o", "APT::Sandbox::User=root"]  # the user that apt would become cannot write to our folder
    try:
        _run("apt-get", *apt, "download", *_packages(apt), cwd=scratch)
    except subprocess.CalledProcessError:  # no package lists, or old ones: get new ones of our own
        for name in ("state", "cache"):
            (scratch / name).mkdir()
        apt += ["-o", f"Dir::State={scratch}/state", "-o", f"Dir::Cache={scratch}/cache"]
        apt += ["-o", "Dir::State::status=/var/lib/dpkg/status"]
        _run("apt-get", *apt, "update")
        _run("apt-get", *apt, "download", *_packages(apt), cwd=scratch)
    return list(scratch.glob("*.deb"))


def _packages(apt: list[str]) -> list[str]:
    """Name memcached and the libraries that it needs: libevent-2.1-7 on one system is libevent-2.1-7t64 on the next."""
    depends = _run("apt-cache", *apt, "depends", "memcached")
    return ["memcached", *re.findall(r"^\s*Depends: (lib(?!c6$)\S+)$", depends, re.MULTILINE)]


def _run(*command: str, cwd: Path | None = None) -> str:
    """Give what a command printed, in English whatever the machine's language."""
    english = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=cwd, env=english
    ).stdout
