"""Which statements are a get in disguise: by their structure, and none by guess."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    BinaryExpression,
    Integer,
    String,
    and_,
    bindparam,
    cast,
    func,
    insert,
    lambda_stmt,
    literal,
    not_,
    or_,
    select,
    text,
    true,
)
from sqlalchemy.orm import Bundle, aliased, defer, load_only, selectinload, with_loader_criteria
from sqlalchemy.sql import operators

from asynccache.orm.pk_select import primary_key_select
from tests.models import Author, Book, Country, Editor, Novel, Publication, Staff, Stock, Tag

Make = Callable[[], Any]


def recognised(statement: Any, params: Any = None) -> tuple[type[Any], tuple[Any, ...]] | None:
    found = primary_key_select(statement, params)
    return (found.mapper.class_, found.primary_key) if found is not None else None


IS_A_GET: dict[str, tuple[Make, tuple[type[Any], tuple[Any, ...]]]] = {
    "where": (lambda: select(Author).where(Author.id == 5), (Author, (5,))),
    "filter": (lambda: select(Author).filter(Author.id == 5), (Author, (5,))),
    "filter_by": (lambda: select(Author).filter_by(id=5), (Author, (5,))),
    "the other way round": (lambda: select(Author).where(literal(5) == Author.id), (Author, (5,))),
    "a column of the table": (lambda: select(Author).where(Author.__table__.c.id == 5), (Author, (5,))),
    "text": (lambda: select(Country).where(Country.code == "de"), (Country, ("de",))),
    "and_": (lambda: select(Stock).where(and_(Stock.isbn == "a", Stock.shop == 1)), (Stock, (1, "a"))),
    "&": (lambda: select(Stock).where((Stock.shop == 1) & (Stock.isbn == "a")), (Stock, (1, "a"))),
    "two conditions": (lambda: select(Stock).where(Stock.shop == 1, Stock.isbn == "a"), (Stock, (1, "a"))),
    "where twice": (lambda: select(Stock).where(Stock.shop == 1).where(Stock.isbn == "a"), (Stock, (1, "a"))),
    "filter_by two": (lambda: select(Stock).filter_by(shop=1, isbn="a"), (Stock, (1, "a"))),
    "a joined subclass": (lambda: select(Editor).where(Editor.id == 5), (Editor, (5,))),
    "a joined subclass by its base": (lambda: select(Editor).where(Staff.id == 5), (Editor, (5,))),
    "a single table subclass": (lambda: select(Novel).where(Publication.id == 5), (Novel, (5,))),
    "options that are none": (
        lambda: select(Author).options().execution_options().where(Author.id == 5),
        (Author, (5,)),
    ),
    "a bind with a value": (lambda: select(Author).where(Author.id == bindparam("x", 5)), (Author, (5,))),
}


@pytest.mark.parametrize("name", IS_A_GET)
def test_a_get_in_disguise(name: str) -> None:
    make, expected = IS_A_GET[name]
    assert recognised(make()) == expected


def test_a_statement_that_was_executed_before_is_recognised_as_well() -> None:
    statement = select(Author).where(Author.id == 5)
    statement._generate_cache_key()
    assert statement.compile() is not None
    assert len(statement.selected_columns) == 2
    assert recognised(statement) == (Author, (5,))


BY_PARAMETER = select(Author).where(Author.id == bindparam("x"))
OF_TWO = select(Stock).where(Stock.shop == bindparam("shop"), Stock.isbn == bindparam("isbn", "a"))


@pytest.mark.parametrize(
    ("statement", "params", "expected"),
    [
        (BY_PARAMETER, {"x": 5}, (Author, (5,))),
        (OF_TWO, {"shop": 1}, (Stock, (1, "a"))),
        (OF_TWO, {"shop": 1, "isbn": "b"}, (Stock, (1, "b"))),
        (BY_PARAMETER, None, None),
        (BY_PARAMETER, {}, None),
        (BY_PARAMETER, {"x": 5, "y": 6}, None),
        (BY_PARAMETER, [{"x": 5}], None),
        (BY_PARAMETER, [{"x": 5}, {"x": 6}], None),
        (select(Author).where(Author.id == 5), {"id_1": 6}, None),
    ],
)
def test_parameters_are_what_the_statement_names(
    statement: Any, params: Any, expected: tuple[type[Any], tuple[Any, ...]] | None
) -> None:
    assert recognised(statement, params) == expected


def author_and(change: Callable[[Any], Any]) -> Make:
    return lambda: change(select(Author).where(Author.id == 5))


alias = aliased(Author)

IS_ANOTHER: dict[str, Make] = {
    "all": lambda: select(Author),
    "another column": lambda: select(Author).where(Author.name == "Ann"),
    "one of two key columns": lambda: select(Stock).where(Stock.shop == 1),
    "the same twice": lambda: select(Author).where(Author.id == 5, Author.id == 5),
    "one more column": lambda: select(Author).where(Author.id == 5, Author.name == "Ann"),
    "one more condition": lambda: select(Author).where(true(), Author.id == 5),
    "another model's key": lambda: select(Author).where(Tag.id == 5),
    "a subclass's key": lambda: select(Staff).where(Editor.id == 5),
    "not": lambda: select(Author).where(not_(Author.id == 5)),
    "!=": lambda: select(Author).where(Author.id != 5),
    ">": lambda: select(Author).where(Author.id > 5),
    "is": lambda: select(Author).where(Author.id.is_(5)),
    "is not distinct": lambda: select(Author).where(Author.id.is_not_distinct_from(5)),
    "= with modifiers": lambda: select(Author).where(
        BinaryExpression(Author.__table__.c.id, bindparam("x", 5, Integer()), operators.eq, modifiers={"x": 1})
    ),
    "null": lambda: select(Author).where(Author.id == None),  # noqa: E711
    "or": lambda: select(Stock).where(or_(Stock.shop == 1, Stock.isbn == "a")),
    "in": lambda: select(Author).where(Author.id.in_([5])),
    "like": lambda: select(Country).where(Country.code.like("de")),
    "collation": lambda: select(Country).where(Country.code.collate("NOCASE") == "de"),
    "an expression": lambda: select(Author).where(Author.id == Author.id + 1),
    "a function": lambda: select(Author).where(func.abs(Author.id) == 5),
    "a cast": lambda: select(Author).where(Author.id == cast(5, BigInteger)),
    "a literal of another type": lambda: select(Author).where(Author.id == literal("5", String())),
    "a value of another type": lambda: select(Author).where(Author.id == "five"),
    "a bind of another type": lambda: select(Author).where(Author.id == bindparam("x", 5, BigInteger())),
    "a callable": lambda: select(Author).where(Author.id == bindparam("x", callable_=lambda: 5)),
    "a literal that is rendered": lambda: select(Author).where(Author.id == bindparam("x", 5, literal_execute=True)),
    "another column's value": lambda: select(Author).where(Author.id == Book.author_id),
    "a subquery": lambda: select(Author).where(Author.id == select(Book.author_id).scalar_subquery()),
    "text": lambda: select(Author).where(text("id = 5")),
    "an alias": lambda: select(alias).where(alias.id == 5),
    "an alias by the model": lambda: select(alias).where(Author.id == 5),
    "the model by an alias": lambda: select(Author).where(alias.id == 5),
    "a column": lambda: select(Author.name).where(Author.id == 5),
    "two entities": lambda: select(Author, Tag).where(Author.id == 5),
    "a bundle": lambda: select(Bundle("b", Author.id)).where(Author.id == 5),
    "a table": lambda: select(Author.__table__).where(Author.id == 5),
    "no columns": author_and(lambda each: each.with_only_columns(Author.id)),
    "limit": author_and(lambda each: each.limit(1)),
    "offset": author_and(lambda each: each.offset(1)),
    "fetch": author_and(lambda each: each.fetch(1)),
    "order": author_and(lambda each: each.order_by(Author.id)),
    "group": author_and(lambda each: each.group_by(Author.id)),
    "having": author_and(lambda each: each.having(true())),
    "distinct": author_and(lambda each: each.distinct()),
    "join": author_and(lambda each: each.join(Author.books)),
    "outer join": author_and(lambda each: each.outerjoin(Author.books)),
    "another from": author_and(lambda each: each.select_from(Book)),
    "the same from": author_and(lambda each: each.select_from(Author)),
    "lock": author_and(lambda each: each.with_for_update()),
    "hint": author_and(lambda each: each.with_hint(Author, "USE INDEX (x)")),
    "statement hint": author_and(lambda each: each.with_statement_hint("x")),
    "prefix": author_and(lambda each: each.prefix_with("/* x */")),
    "suffix": author_and(lambda each: each.suffix_with("/* x */")),
    "cte": author_and(lambda each: each.add_cte(select(Tag).cte())),
    "correlate": author_and(lambda each: each.correlate(Book)),
    "execution option": author_and(lambda each: each.execution_options(populate_existing=True)),
    "selectinload": author_and(lambda each: each.options(selectinload(Author.books))),
    "load_only": author_and(lambda each: each.options(load_only(Author.id))),
    "defer": author_and(lambda each: each.options(defer(Author.name))),
    "criteria": author_and(lambda each: each.options(with_loader_criteria(Author, Author.name == "Ann"))),
    "from statement": lambda: select(Author).from_statement(text("SELECT * FROM author WHERE id = 5")),
    "union": lambda: select(Author).where(Author.id == 5).union(select(Author).where(Author.id == 6)),
    "subquery": lambda: select(select(Author).where(Author.id == 5).subquery()),
    "lambda": lambda: lambda_stmt(lambda: select(Author).where(Author.id == 5)),
    "insert": lambda: insert(Author),
    "text statement": lambda: text("SELECT 1"),
}


@pytest.mark.parametrize("name", IS_ANOTHER)
def test_another_statement(name: str) -> None:
    assert recognised(IS_ANOTHER[name]()) is None


def test_what_a_later_version_may_say_about_a_statement_makes_it_another() -> None:
    statement = select(Author).where(Author.id == 5)
    statement.__dict__["_something_new"] = "said"
    assert recognised(statement) is None
