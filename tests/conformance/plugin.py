"""A pytest plugin beside SQLAlchemy's own: `-p tests.conformance.plugin --sessions swapped --outcomes FILE`."""

from __future__ import annotations

import gc
import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from tests.conformance.sessions import Mode, SyncSession, TestedCache, take_place

TESTS_PER_COLLECTION: Final = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sessions", type=Mode, default=Mode.BASE)
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    mode: Mode = config.option.sessions
    take_place(mode)
    judge = Judge(config.option.outcomes)
    # Models that cannot be cached are many here, and meant.
    config.addinivalue_line("filterwarnings", "ignore::asynccache.AsyncCacheWarning")
    config.pluginmanager.register(judge)
    logging.getLogger("asynccache").addHandler(judge.logged)


class Messages(logging.Handler):
    """What was logged, by test."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.test = ""
        self.by_test: dict[str, list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.by_test.setdefault(self.test, []).append(self.format(record))


class Judge:
    """Notes how each test ends, and what the cache did meanwhile. Each test has a cache of its own: rows are put into
    the database between tests by connections that no session knows."""

    def __init__(self, path: Path) -> None:
        self.logged = Messages()
        self._path = path
        self._counts: Counter[str] = Counter()
        self._outcomes: dict[str, str] = {}
        self._errors: dict[str, str] = {}

    def pytest_sessionstart(self) -> None:
        # SQLAlchemy terminates a connection that is found as garbage, and here all tests share the one to a database
        # in memory: it would be gone, with all tables, whenever the collector happens to run.
        gc.disable()

    def pytest_runtest_logfinish(self) -> None:
        if len(self._outcomes) % TESTS_PER_COLLECTION == 0:  # by now the test's connections are given back
            gc.collect()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        SyncSession.tested = TestedCache()
        self.logged.test = test_of(item.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        self._counts += SyncSession.tested.counts()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = test_of(report.nodeid)
        if report.failed:
            self._outcomes[test] = "failed"
            self._errors.setdefault(test, f"{report.when}: {report.longreprtext}")
        elif report.skipped or report.when == "call":
            self._outcomes.setdefault(test, report.outcome)

    def pytest_sessionfinish(self) -> None:
        found = {
            "outcomes": self._outcomes,
            "errors": self._errors,
            "counts": self._counts,
            "logged": self.logged.by_test,
        }
        self._path.write_text(json.dumps(found))


def test_of(nodeid: str) -> str:
    """A test's name without that of the database, which SQLAlchemy's plugin puts into it."""
    return re.sub(r"_sqlite\+\w+(?=::)", "", nodeid.removeprefix("test/"))
