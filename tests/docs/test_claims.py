"""What the pages name exists: files, sections, tests, commands, extras, counters, methods."""

from __future__ import annotations

import ast
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

import asynccache
from asynccache import Cache, Stats
from asynccache.cli import app
from tests.docs.pages import PAGES, ROOT, name_of, text_without_blocks

pytestmark = pytest.mark.without_sqlalchemy

each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)

LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?!https?:)(?P<path>[^)#\s]*)(?:#(?P<section>[^)]+))?\)")


def included(page: Path) -> list[Path]:
    """The files that a page consists of: itself, or what it includes."""
    names = re.findall(r'^--8<-- "([^":]+)', page.read_text(), re.MULTILINE)
    return [page, *(ROOT / name for name in names)]


def sections(page: Path) -> set[str]:
    """The headings as links name them."""
    headings = [
        heading
        for each in included(page)
        for heading in re.findall(r"^#+ (.+)$", text_without_blocks(each), re.MULTILINE)
    ]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    nowhere: list[str] = []
    for link in LINK.finditer(text_without_blocks(page)):
        target = (page.parent / link["path"]) if link["path"] else page
        if not target.exists() or (link["section"] and link["section"] not in sections(target)):
            nowhere.append(link[0])
    assert nowhere == []


@each_page
def test_tests_that_are_named_exist(page: Path) -> None:
    missing: list[str] = []
    for link in LINK.finditer(text_without_blocks(page)):
        name = link["text"].strip("`").removesuffix(".py")
        if name.startswith("test_") and link["path"].endswith(".py") and name != Path(link["path"]).stem:
            source = (page.parent / link["path"]).read_text()
            if not re.search(rf"def {name}(_\w+)?\(", source):
                missing.append(link[0])
    assert missing == []


@each_page
def test_commands_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    sessions = set(re.findall(r"nox -s \"?([\w-]+)", text))
    assert sessions - nox_sessions() == set()
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    assert set(re.findall(r"python -m asynccache ([a-z]+)", text)) - commands == set()


@each_page
def test_extras_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"sqlalchemy-asynccache\[([\w,]+)\]", page.read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {extra for each in named for extra in each.split(",")} - set(project["optional-dependencies"]) == set()


@each_page
def test_counters_and_methods_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    assert set(re.findall(r"cache\.stats\.(\w+)", text)) - {field.name for field in fields(Stats)} == set()
    assert set(re.findall(r"\bcache\.(\w+)\(", text)) - set(dir(Cache)) == set()


def test_the_api_page_has_all_public_names_and_no_other() -> None:
    shown = re.findall(r"^::: asynccache\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(asynccache.__all__)


def nox_sessions() -> set[str]:
    names: set[str] = set()
    for function in ast.parse((ROOT / "noxfile.py").read_text()).body:
        if isinstance(function, ast.FunctionDef):
            for decorator in function.decorator_list:
                source = ast.unparse(decorator)
                if source.startswith("nox.session"):
                    given = re.search(r"name='([\w-]+)'", source)
                    names.add(given[1] if given else function.name)
    return names
