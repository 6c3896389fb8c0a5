"""What a contributor runs: `pip install nox`, then `nox` for everything that CI checks, or `nox -s tests -- -k hit`."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"  # and pip, which reads the machine's configuration as uv does not
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "docs", "package", "tests"]

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
SQLALCHEMYS = ["2.1", "2.0"]


def install(session: nox.Session, *groups: str, sqlalchemy: str = SQLALCHEMYS[0]) -> None:
    """Install the project with its drivers, one version of SQLAlchemy, and groups of dependencies."""
    needed = nox.project.dependency_groups(PROJECT, *groups)
    session.install("-e", ".[cli,sqlite,postgresql]", f"sqlalchemy[asyncio]=={sqlalchemy}.*", *needed)


def pytest(session: nox.Session, sqlalchemy: str) -> None:
    """On all processors; `-- -n0` runs the tests one after another, as `--pdb` and `-s` want it."""
    groups = ("tests", "fastapi-users") if sqlalchemy == "2.0" else ("tests",)
    install(session, *groups, sqlalchemy=sqlalchemy)
    command = ("pytest", "--numprocesses=auto", "--dist=loadgroup", "--durations=10")
    if sqlalchemy == SQLALCHEMYS[0]:
        session.run(*command, *session.posargs)
    else:  # 5: what the arguments select touches no SQLAlchemy
        wanted = ("-m", "not without_sqlalchemy and not once and not search")
        session.run(*command, *wanted, *session.posargs, success_codes=[0, 5])


@nox.session
def quickstart(session: nox.Session) -> None:
    """Run the README's example as its reader would: `nox -s quickstart -- URL …`."""
    session.install(".[sqlite,postgresql]", *nox.project.dependency_groups(PROJECT, "examples"))
    session.run("python", "examples/quickstart.py", *session.posargs)


@nox.session
@nox.parametrize("sqlalchemy", SQLALCHEMYS)
def tests(session: nox.Session, sqlalchemy: str) -> None:
    """Run all tests on the newest SQLAlchemy, and on the older one those that touch it."""
    pytest(session, sqlalchemy)


@nox.session(name="tests-all", python=PYTHONS)
@nox.parametrize("sqlalchemy", SQLALCHEMYS)
def tests_all(session: nox.Session, sqlalchemy: str) -> None:
    """Run the tests on every Python that is here; one that is missing is reported as skipped."""
    pytest(session, sqlalchemy)


@nox.session
@nox.parametrize("sqlalchemy", SQLALCHEMYS)
def conformance(session: nox.Session, sqlalchemy: str) -> None:
    """Run SQLAlchemy's own tests with our sessions in the place of its own, and compare. Takes some minutes."""
    install(session, "tests", sqlalchemy=sqlalchemy)
    show = "import sqlalchemy; print(sqlalchemy.__version__)"
    version = str(session.run("python", "-c", show, silent=True)).strip()
    source = Path(session.create_tmp(), f"sqlalchemy-{version}.tar.gz")
    if not source.exists():
        wanted = ("--no-deps", "--no-binary", "sqlalchemy", f"sqlalchemy=={version}")
        session.run("pip", "download", "--quiet", "--dest", str(source.parent), *wanted)
    session.run("python", "-m", "tests.conformance", str(source), *session.posargs)


@nox.session
def search(session: nox.Session) -> None:
    """Search the larger worlds of the protocol for an interleaving that breaks a promise. Takes many minutes."""
    install(session, "tests")
    session.run("pytest", "tests/test_protocol_search.py", "-m", "search", "-s", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the format, the rules of ruff, and that imports point downwards."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "format", "--check")
    session.run("ruff", "check")
    session.run("lint-imports")


@nox.session
@nox.parametrize("sqlalchemy", SQLALCHEMYS)
def types(session: nox.Session, sqlalchemy: str) -> None:
    """Check the types of the package and its tests, with mypy and with pyright."""
    install(session, "types", sqlalchemy=sqlalchemy)
    session.run("mypy")
    session.run("pyright")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into build/site; a link that leads nowhere is an error. `-- serve` shows it while you write."""
    session.install(*nox.project.dependency_groups(PROJECT, "docs"))
    command = session.posargs or ["build", "--strict"]
    session.run("mkdocs", *command, env={"NO_MKDOCS_2_WARNING": "1"})
    if not session.posargs:
        session.run("python", "website/check.py", "build/site")


@nox.session
def package(session: nox.Session) -> None:
    """Build the wheel and the sdist into dist/, check them, and use the wheel where nothing else is installed."""
    session.install(*nox.project.dependency_groups(PROJECT, "package"))
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", "dist", silent=True)
    (wheel,) = Path("dist").glob("*.whl")
    (sdist,) = Path("dist").glob("*.tar.gz")
    session.run("twine", "check", "--strict", str(wheel), str(sdist))
    session.run("check-wheel-contents", str(wheel))
    session.run("python", "tests/package/contents.py", str(wheel), str(sdist))
    clean = Path(session.create_tmp(), "clean")
    session.run("python", "-m", "venv", "--clear", str(clean))
    python = str(next(each for each in (clean / "bin/python", clean / "Scripts/python.exe") if each.exists()))
    for extras in ("sqlite", "sqlite,cli"):
        session.run(python, "-m", "pip", "install", "--quiet", f"{wheel}[{extras}]", external=True)
        # From elsewhere, so that it is the wheel that is imported.
        program = Path("tests/package/smoke.py").resolve()
        session.run(python, "-I", str(program), extras, external=True)


@nox.session
def examples(session: nox.Session) -> None:
    """Run every example that ends, and those that serve under each of their servers, on PostgreSQL and memcached."""
    install(session, "tests")
    for example in sorted(Path("examples").glob("*.py")):
        session.run("python", str(example))
    session.run("pytest", "--numprocesses=auto", "--dist=loadgroup", "tests/test_examples.py", "tests/applications")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure it against the other ways to cache rows: `nox -s bench -- --quick`, or `-- --write-docs --strict`."""
    install(session, "benchmarks")
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session(name="bench-memcached")
def bench_memcached(session: nox.Session) -> None:
    """Measure how fast slots are read from memcached, against aiomcache as it is."""
    install(session, "benchmarks")
    session.run("python", "-m", "benchmarks.memcached", *session.posargs)


@nox.session(name="bench-commits")
def bench_commits(session: nox.Session) -> None:
    """Measure what the cache adds to a commit, against SQLAlchemy as it is."""
    install(session, "benchmarks")
    session.run("python", "-m", "benchmarks.commits", *session.posargs)


@nox.session(name="bench-eviction")
def bench_eviction(session: nox.Session) -> None:
    """Compare which rows the memory backend keeps with what libraries would keep."""
    install(session, "benchmarks")
    session.install("cachetools", "cachebox", "moka-py", "theine")
    session.run("python", "-m", "benchmarks.eviction", *session.posargs)


@nox.session
def torture(session: nox.Session) -> None:
    """Look for stale reads under faults, on real servers: `nox -s torture -- --seconds 600`, or `-- --mutation all`."""
    install(session, "tests")
    session.run("python", "-m", "tests.torture", *session.posargs)


@nox.session
def nightly(session: nox.Session) -> None:
    """Everything that takes hours: larger worlds, more histories, every fault for ten minutes, every mutation."""
    install(session, "tests")
    session.run("pytest", "tests/test_protocol_search.py", "-m", "search", "-s")
    session.run("pytest", "tests/test_simulation.py", env={"HISTORIES": "500000"})
    session.run("python", "-m", "tests.torture", "--mode", "both", "--seconds", "600")
    session.run("python", "-m", "tests.torture", "--mutation", "all")


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the tests and show which lines and branches they do not reach."""
    install(session, "coverage")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "report")
