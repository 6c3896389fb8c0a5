"""What all servers need: a process that does not outlive the tests, a port, a user, a folder for what is downloaded."""

from __future__ import annotations

import fcntl
import functools
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypedDict

HOST = "127.0.0.1"

# A line on its standard input says that the server was stopped in good order. An end of file before that says that the
# tests are gone, be it by SIGKILL, so that the server and its folder must go too. (PR_SET_PDEATHSIG does not do: it
# fires when the *thread* that started the server ends, and exists on Linux only.)
_WATCHDOG = """
read -r _ && exit
kill -s "$1" -- "-$2"
for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$2" && sleep 0.1; done
[ -z "$3" ] || rm -rf -- "$3"
"""


class Identity(TypedDict, total=False):
    """The user that a child process becomes, as `subprocess` takes it. Empty: the user of this process."""

    user: int
    group: int
    extra_groups: list[int]


def unprivileged() -> Identity:
    """Give the user that servers run as: PostgreSQL and memcached refuse to be root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Give a folder of this name that is kept between runs and that the user of the servers can read.

    make: fills the empty folder that it is given. Called when there is none yet.
    """
    if os.geteuid() == 0:  # whose home is closed to that user
        cache = Path("/var/cache/asynccache-tests")
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asynccache-tests"
    folder = cache / name
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    cache.chmod(0o755)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker of pytest-xdist makes it, the others wait
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                half = Path(scratch) / name
                half.mkdir()
                half.chmod(0o755)
                make(half)
                half.rename(folder)
    return folder


def in_memory() -> Path | None:
    """Give where to put what need not outlive the tests and should not wait for a disk: memory where there is room
    (docker gives 64 MiB by default), else None, for the usual place."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30
    return memory if roomy else None


PORTS: Final = range(20_000, 32_000)
"""Below those that the kernel gives to outgoing connections: no client takes one whose server is down, or connects
to itself."""

_ports: Final[set[int]] = set()
"""Those of this process."""


@functools.cache
def _locks() -> int:
    """Open the file in which a process locks one byte for each port that it has, at the port's number. When it ends,
    however it does, the kernel unlocks them."""
    return os.open(f"{tempfile.gettempdir()}/asynccache-tests-{os.getuid()}.ports", os.O_RDWR | os.O_CREAT, 0o600)


def free_port() -> int:
    """Give a port that nobody listens on, and that no other test gets until it is given back, its server up or down."""
    while True:
        port = random.choice(PORTS)
        if port in _ports:
            continue
        try:
            fcntl.lockf(_locks(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
        except OSError:
            continue  # of another process
        _ports.add(port)
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind((HOST, port))
            except OSError:
                give_back_port(port)
                continue
        return port


def give_back_port(port: int) -> None:
    _ports.discard(port)
    fcntl.lockf(_locks(), fcntl.LOCK_UN, 1, port)


class Process:
    """A running server, with the processes that it starts.

    identity: the user that it runs as. None: one without privileges.
    folder: what to delete if the tests are killed before they could.
    stop_signal: what ends it at once, since nothing that it holds is worth saving.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        identity: Identity | None = None,
        folder: Path | None = None,
        stop_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self._command = command
        self._stop_signal = stop_signal
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `stop`)
        # A session of its own, so that Ctrl-C reaches the tests alone, which then stop the server.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=folder or "/",
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            **(unprivileged() if identity is None else identity),
        )
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, "watchdog", stop_signal.name[3:], str(self._process.pid), folder or ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait_until(self, ready: Callable[[], bool], timeout_s: float = 20) -> None:
        """Wait until the server answers. Raises RuntimeError, with its log, when it died or took too long."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            died = self._process.poll() is not None
            if died or time.monotonic() > deadline:
                log = self.log().strip() or "(nothing)"
                fate = f"ended with status {self._process.returncode}" if died else f"was not ready in {timeout_s} s"
                self.stop()
                raise RuntimeError(f"{' '.join(self._command)} {fate}. It wrote:\n{log}")
            time.sleep(0.01)

    @property
    def log_bytes(self) -> int:
        """How much it has written so far."""
        return os.fstat(self._log.fileno()).st_size

    def log(self, start: int = 0) -> str:
        """Give what it has written, from this byte on."""
        # Not by `seek`, which would move the place at which it goes on writing.
        return os.pread(self._log.fileno(), self.log_bytes - start, start).decode(errors="replace")

    def terminate(self) -> None:
        """Ask it to end in good order."""
        self._process.terminate()

    def wait(self, timeout_s: float = 20) -> int:
        """Wait until it has ended, and give its status. Raises subprocess.TimeoutExpired."""
        return self._process.wait(timeout_s)

    def pause(self) -> None:
        """Freeze the server: it takes connections and bytes, as the kernel does so for it, and never answers."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)  # until all of its threads stand still

    def resume(self) -> None:
        """Let a paused server go on. Does nothing to one that runs."""
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the server, paused or not."""
        self._signal(self._stop_signal)
        self.resume()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._watchdog.communicate(b"\n")
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self._process.pid, number)
