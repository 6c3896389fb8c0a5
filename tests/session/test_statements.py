"""What is read off a statement before it is executed: the tables that it writes, and the rows if it names them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import ClauseElement, Column, ForeignKey, Integer, MetaData, Table, Text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, mapped_column
from sqlalchemy.sql.compiler import SQLCompiler

from asynccache.orm.statements import NOTHING, UNKNOWN, Effect, TableWrite, effect_of
from asynccache.orm.writes import cascades


class Base(DeclarativeBase):
    pass


class Owner(Base):
    __tablename__ = "owner"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    pet_id: Mapped[int | None]


class Seat(Base):
    __tablename__ = "seat"

    row: Mapped[int] = mapped_column("row_no", primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    taken: Mapped[bool]


owner, seat = Base.metadata.tables["owner"], Base.metadata.tables["seat"]
log = Table("log", MetaData(), Column("line", Text))  # no primary key


@pytest.fixture(params=[sqlite.dialect, postgresql.asyncpg.dialect], ids=["sqlite", "postgresql"])
def dialect(request: pytest.FixtureRequest) -> Dialect:
    made: Dialect = request.param(paramstyle="named")
    return made


UPSERTS: Mapping[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}

Parameters = Mapping[str, Any]


def effect(statement: ClauseElement, dialect: Dialect, *parameter_sets: Parameters, **options: Any) -> Effect:
    return effect_of(_compile(statement, dialect, *parameter_sets, **options), "")


def the_write(statement: ClauseElement, dialect: Dialect, *parameter_sets: Parameters, **options: Any) -> TableWrite:
    (write,) = effect(statement, dialect, *parameter_sets, **options).writes
    return write


def rows(
    statement: ClauseElement, dialect: Dialect, *parameter_sets: Parameters, **options: Any
) -> list[tuple[Any, ...]] | None:
    """The primary keys that a statement names, from its parameters as the driver gets them."""
    compiled = _compile(statement, dialect, *parameter_sets, **options)
    (write,) = effect_of(compiled, "").writes
    if write.rows is None:
        return None
    return write.rows.keys(
        [column.name for column in write.table.primary_key] or ["line"],
        [compiled.construct_expanded_state(each, escape_names=False).parameters for each in parameter_sets or [{}]],
        dialect,
    )


def _compile(statement: ClauseElement, dialect: Dialect, *parameter_sets: Parameters, **options: Any) -> SQLCompiler:
    # As `Connection.execute` does it.
    keys = list(parameter_sets[0]) if parameter_sets else None
    compiled = statement.compile(dialect=dialect, column_keys=keys, **options)
    assert isinstance(compiled, SQLCompiler)
    return compiled


# -------------------------------------------------------------------------------------------------- statements and rows

one, two = {"key": 1}, {"key": 2}


@pytest.mark.parametrize(
    ("statement", "parameter_sets", "expected"),
    [
        (sa.update(owner).where(owner.c.id == 1).values(name="x"), [], [(1,)]),
        (sa.update(Owner).where(Owner.id == 1).values(name="x"), [], [(1,)]),
        (sa.delete(owner).where(owner.c.id == 1), [], [(1,)]),
        (sa.delete(Owner).where(Owner.id.in_([1, 2, 3])), [], [(1,), (2,), (3,)]),
        (sa.update(owner).where(owner.c.id == 1, owner.c.name == "y").values(name="x"), [], [(1,)]),
        (
            sa.update(owner).where(sa.or_(owner.c.name == "y", owner.c.id == 2), owner.c.id == 1).values(name="x"),
            [],
            [(1,)],
        ),
        (sa.update(owner).where(owner.c.id == sa.bindparam("key")).values(name="x"), [one, two], [(1,), (2,)]),
        (sa.update(owner).where(owner.c.id == sa.bindparam("key")), [{"key": 1, "name": "x"}], [(1,)]),
        (sa.update(owner).where(owner.c.id == seat.c.number, owner.c.id == 1).values(name="x"), [], [(1,)]),
        (sa.update(owner).where(owner.c.id == 1).ordered_values((owner.c.name, "x")), [], [(1,)]),
        (sa.update(owner).where(owner.c.id == 1).values(pet_id=owner.c.pet_id + 1), [], [(1,)]),
        (sa.delete(seat).where(seat.c.row_no == 1, seat.c.number == 2), [], [(1, 2)]),
        (sa.delete(Seat).where(Seat.number == 2, Seat.row == 1), [], [(1, 2)]),
        (sa.insert(owner).values(id=1, name="x"), [], [(1,)]),
        (sa.insert(owner), [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}], [(1,), (2,)]),
        (sa.insert(seat).returning(seat.c.taken), [{"row_no": 1, "number": 2, "taken": True}], [(1, 2)]),
        (sa.insert(owner).values([{"id": 1, "name": "x"}, {"id": 2, "name": "y"}]), [], [(1,), (2,)]),
        (sa.delete(seat).where(seat.c.row_no == 1, seat.c.number.in_([2, 3])), [], [(1, 2), (1, 3)]),
        (sa.update(owner).where(owner.c.id == 1).values(id=2), [], [(1,), (2,)]),
        (sa.update(owner).where(owner.c.id == 1).ordered_values((owner.c.id, 2)), [], [(1,), (2,)]),
        (sa.update(owner).where(owner.c.id == sa.bindparam("key")), [{"key": 1, "id": 2}], [(1,), (2,)]),
        (sa.update(Seat).where(Seat.row == 1, Seat.number == 2).values(row=3), [], [(1, 2), (3, 2)]),
    ],
    ids=str,
)
def test_a_statement_that_binds_the_primary_key_names_its_rows(
    statement: ClauseElement, parameter_sets: list[Parameters], expected: list[tuple[Any, ...]], dialect: Dialect
) -> None:
    assert rows(statement, dialect, *parameter_sets) == expected


other = aliased(Owner)
subquery = sa.select(seat.c.number).where(seat.c.row_no == 1)


@pytest.mark.parametrize(
    ("statement", "parameter_sets"),
    [
        (sa.update(owner).values(name="x"), []),
        (sa.update(owner).where(owner.c.name == "y").values(name="x"), []),
        (sa.update(owner).where(sa.or_(owner.c.id == 1, owner.c.name == "y")).values(name="x"), []),
        (sa.update(owner).where(sa.not_(owner.c.id == 1)).values(name="x"), []),
        (sa.update(owner).where(owner.c.id != 1).values(name="x"), []),
        (sa.update(owner).where(owner.c.id > 1).values(name="x"), []),
        (sa.update(owner).where(owner.c.id.not_in([1, 2])).values(name="x"), []),
        (sa.update(owner).where(owner.c.id.in_(subquery)).values(name="x"), []),
        (sa.update(owner).where(owner.c.id == subquery.scalar_subquery()).values(name="x"), []),
        (sa.update(owner).where(owner.c.id == owner.c.pet_id).values(name="x"), []),
        (sa.update(owner).where(owner.c.id + 1 == 2).values(name="x"), []),
        (sa.update(owner).where(owner.c.id.is_(None)).values(name="x"), []),
        (sa.update(owner).where(sa.text("id = 1")).values(name="x"), []),
        (sa.update(owner).where(other.id == 1, other.pet_id == owner.c.id).values(name="x"), []),
        (sa.update(owner).where(seat.c.number == 1, seat.c.number == owner.c.id).values(name="x"), []),
        (sa.update(owner).where(owner.c.id == 1).values({owner.c.id: owner.c.id + 1}), []),
        (sa.update(owner).where(owner.c.id == 1).values(id=sa.bindparam("other", 2)), []),
        (sa.update(owner).where(owner.c.id == sa.bindparam("id")).values(id=owner.c.id + 1), [{"id": 1}]),
        (
            sa.update(owner).where(owner.c.id == sa.bindparam("id")).values(id=sa.bindparam("other")),
            [{"id": 1, "other": 2}],
        ),
        (sa.delete(seat).where(seat.c.row_no.in_([1, 2]), seat.c.number.in_([1, 2])), []),
        (sa.insert(owner).values([{"id": 1, "name": "x"}, {"id": owner.c.id + 1, "name": "y"}]), []),
        (sa.delete(seat).where(seat.c.row_no == 1), []),
        (sa.delete(log), []),
        (sa.insert(owner).values(name="x"), []),
        (sa.insert(owner).values(id=subquery.scalar_subquery(), name="x"), []),
        (sa.insert(owner).values(id=sa.select(owner.c.pet_id).where(owner.c.id == 7).scalar_subquery()), []),
        (sa.insert(owner).from_select(["id", "name"], sa.select(seat.c.number, sa.literal("x"))), []),
        (sa.insert(owner).prefix_with("OR REPLACE").values(id=1, name="x"), []),
    ],
    ids=str,
)
def test_a_statement_that_may_touch_other_rows_names_none(
    statement: ClauseElement, parameter_sets: list[Parameters], dialect: Dialect
) -> None:
    assert rows(statement, dialect, *parameter_sets) is None


def test_an_upsert_names_the_row_that_it_inserts_or_finds_in_its_place(dialect: Dialect) -> None:
    insert = UPSERTS[dialect.name](owner).values(id=1, name="x")
    assert rows(insert.on_conflict_do_nothing(), dialect) == [(1,)]
    assert rows(insert.on_conflict_do_nothing(index_elements=["name"]), dialect) == [(1,)]
    for target in ("id", owner.c.id, Owner.id):
        assert rows(insert.on_conflict_do_update(index_elements=[target], set_={"name": "y"}), dialect) == [(1,)]
    if dialect.name == "postgresql":
        by_constraint = insert.on_conflict_do_update(constraint=owner.primary_key, set_={"name": "y"})
        assert rows(by_constraint, dialect) == [(1,)]


def test_an_upsert_that_may_find_a_row_of_another_key_names_none(dialect: Dialect) -> None:
    insert = UPSERTS[dialect.name](owner).values(id=1, name="x")
    assert rows(insert.on_conflict_do_update(index_elements=["name"], set_={"name": "y"}), dialect) is None
    assert rows(insert.on_conflict_do_update(index_elements=["id"], set_={"id": 2}), dialect) is None
    partial = insert.on_conflict_do_update(index_elements=["id"], index_where=owner.c.name == "x", set_={"name": "y"})
    assert rows(partial, dialect) is None
    half = UPSERTS[dialect.name](seat).values(row_no=1, number=2)
    assert rows(half.on_conflict_do_update(index_elements=["row_no"], set_={"taken": True}), dialect) is None
    if dialect.name == "postgresql":
        assert rows(insert.on_conflict_do_update(constraint="owner_name", set_={"name": "y"}), dialect) is None


@pytest.mark.parametrize(
    "statement",
    [
        sa.insert(owner).values(name="x"),
        sa.insert(Owner).values(name="x").returning(Owner),
        sa.insert(Owner).values(name="x").returning(Owner.name, Owner.id),
        sa.update(Owner).where(Owner.name == "y").values(name="x").returning(Owner.id),
        sa.delete(owner).where(owner.c.name == "y").returning(owner),
    ],
    ids=str,
)
def test_an_answer_tells_the_rows_that_a_statement_does_not_name(statement: ClauseElement, dialect: Dialect) -> None:
    assert rows(statement, dialect) is None or isinstance(statement, sa.Insert)
    assert the_write(statement, dialect).tells(["id"])


def test_a_key_that_an_expression_makes_is_told_where_the_database_returns_it(dialect: Dialect) -> None:
    by_expression = sa.insert(owner).values(id=subquery.scalar_subquery(), name="x")
    assert the_write(by_expression, dialect).tells(["id"]) == (dialect.name == "postgresql")


@pytest.mark.parametrize(
    "statement",
    [
        sa.insert(owner).from_select(["name"], sa.select(sa.literal("x"))),
        sa.insert(owner).values([{"name": "x"}, {"name": "y"}]),
        sa.insert(owner).values(name="x").returning(owner.c.name),
        sa.insert(owner).prefix_with("OR REPLACE").values(name="x").returning(owner.c.id),
        sa.update(owner).values(name="x").returning(owner.c.name),
        sa.update(owner).values(id=owner.c.id + 1).returning(owner.c.id),
        sa.delete(owner).returning((owner.c.id + 1).label("id")),
        sa.delete(owner).returning(sa.literal_column("id")),
        sa.delete(owner),
    ],
    ids=str,
)
def test_an_answer_tells_nothing_of_keys_that_it_does_not_hold_or_that_have_moved(
    statement: ClauseElement, dialect: Dialect
) -> None:
    assert not the_write(statement, dialect).tells(["id"])


def test_values_that_were_written_into_the_sql_are_not_seen(dialect: Dialect) -> None:
    statement = sa.delete(owner).where(owner.c.id == 1)
    assert rows(statement, dialect, compile_kwargs={"literal_binds": True}) is None


def test_one_analysis_serves_all_executions_of_a_compiled_statement(dialect: Dialect) -> None:
    compiled = _compile(sa.delete(owner).where(owner.c.id == sa.bindparam("key")), dialect)
    first = effect_of(compiled, "")
    assert effect_of(compiled, "") is first
    assert first.writes[0].rows is not None
    assert first.writes[0].rows.keys(["id"], [{"key": 5}], dialect) == [(5,)]


# ----------------------------------------------------------------------------------------- what it does to other rows


def test_an_update_tells_which_columns_it_sets(dialect: Dialect) -> None:
    by_id = sa.update(owner).where(owner.c.id == 1)
    assert _set(the_write(by_id.values(name="x"), dialect)) == {"name"}
    assert _set(the_write(by_id.values({owner.c.pet_id: owner.c.id}), dialect)) == {"pet_id"}
    assert _set(the_write(by_id.ordered_values((owner.c.name, "x")), dialect)) == {"name"}
    assert _set(the_write(by_id, dialect, {"name": "x"})) == {"name"}
    assert _set(the_write(sa.update(Seat).values(row=3), dialect)) == {"row_no"}


def _set(write: TableWrite) -> set[str]:
    assert not write.deletes
    assert write.updates is not None
    return {name for name in write.updates if name in write.table.columns}


def test_a_delete_deletes_an_insert_leaves_other_rows_alone_and_an_upsert_does_not(dialect: Dialect) -> None:
    deleted = the_write(sa.delete(owner), dialect)
    assert (deleted.deletes, deleted.updates) == (True, frozenset())
    inserted = the_write(sa.insert(owner), dialect)
    assert (inserted.deletes, inserted.updates) == (False, frozenset())
    upsert = UPSERTS[dialect.name](owner)
    ignored = the_write(upsert.on_conflict_do_nothing(), dialect)
    assert (ignored.deletes, ignored.updates) == (False, frozenset())
    upserted = the_write(upsert.on_conflict_do_update(index_elements=["id"], set_={Owner.name: "x"}), dialect)
    assert (upserted.deletes, upserted.updates) == (False, frozenset({"name"}))
    replaced = the_write(sa.insert(owner).prefix_with("OR REPLACE"), dialect)
    assert (replaced.deletes, replaced.updates) == (True, None)


def test_statements_within_a_statement_are_seen(dialect: Dialect) -> None:
    written = sa.update(owner).where(owner.c.id == 1).values(name="x").returning(owner.c.id).cte()
    beside = sa.delete(owner).where(owner.c.id == 1).cte()
    for statement, tables in [
        (sa.select(written), [owner]),
        (sa.insert(seat).from_select(["row_no"], sa.select(written)), [seat, owner]),
        (
            sa.update(seat).where(seat.c.row_no == 1, seat.c.number == 1).values(taken=True).add_cte(beside),
            [seat, owner],
        ),
        (sa.select(seat).add_cte(beside), [owner]),
    ]:
        writes = effect(statement, dialect).writes
        assert {write.table.name for write in writes} == {table.name for table in tables}, statement
        assert not any(write.tells(["id"]) for write in writes)


def test_statements_within_a_statement_may_name_rows_if_they_have_a_where_clause(dialect: Dialect) -> None:
    inserted = sa.insert(seat).values(row_no=1, number=1).returning(seat.c.number).cte()
    deleted = sa.delete(owner).where(owner.c.id == 1).cte()
    moved = sa.update(owner).where(owner.c.id == 2).values(id=3).cte()
    compiled = _compile(sa.select(inserted).add_cte(deleted, moved), dialect)
    found = {
        write.table.name + ("" if write.deletes else " is updated"): write.rows
        and write.rows.keys(key, [compiled.params], dialect)
        for write in effect_of(compiled, "").writes
        for key in [[column.name for column in write.table.primary_key]]
    }
    assert found == {"seat is updated": None, "owner": [(1,)], "owner is updated": None}


def test_a_select_does_nothing(dialect: Dialect) -> None:
    chosen = sa.select(Owner).where(Owner.id == 1)
    for statement in (
        chosen,
        chosen.with_for_update(),
        sa.select(chosen.cte()),
        sa.union_all(chosen.limit(1), chosen),
        sa.select(sa.func.count()).select_from(owner),
        sa.select(Owner).from_statement(sa.text("select * from owner")),
        sa.text("select * from owner"),
    ):
        compiled = _compile(statement, dialect)
        assert effect_of(compiled, str(compiled)) == NOTHING, statement


def test_instances_from_text_are_judged_by_the_text(dialect: Dialect) -> None:
    compiled = _compile(sa.select(Owner).from_statement(sa.text("update owner set name = 'x' returning *")), dialect)
    assert effect_of(compiled, str(compiled)) == UNKNOWN


# --------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    "sql",
    [
        "select * from owner",
        "  SELECT 1",
        "(select 1) union (select 2)",
        "-- first\n-- second\nselect 1",
        "/* update */ select 1",
        "/* of\nmany\nlines */\n-- and one\nselect 1",
        "with a as (select 1) select * from a",
        "values (1, 2)",
        "table owner",
        "show work_mem",
        "explain select 1",
        "savepoint one",
        "release savepoint one",
        "rollback to savepoint one",
        "prepare transaction 'one'",
        "lock table owner",
        "listen news",
        "notify news",
        "select updated, deleted from owner",
    ],
)
def test_text_that_does_nothing_to_rows(sql: str) -> None:
    assert effect_of(None, sql) == NOTHING


def test_no_parameter_is_asked_for_its_value(dialect: Dialect) -> None:
    """SQLAlchemy asks `callable_` once for each execution; who asks once more makes it give another value."""
    counter = itertools.count()
    value: sa.BindParameter[str] = sa.bindparam(None, callable_=lambda: str(next(counter)))
    for statement in (
        sa.update(owner).where(owner.c.id == 1).values(name=value),
        sa.insert(owner).values(id=1, name=value),
        sa.delete(owner).where(owner.c.name == value),
    ):
        effect_of(statement.compile(dialect=dialect), "")
    assert next(counter) == 0


@pytest.mark.parametrize(
    ("sql", "lasts"),
    [
        ("set work_mem = '4MB'", True),
        ("reset all", True),
        ("SET LOCAL role x", False),
        ("pragma foreign_keys = on", False),
    ],
)
def test_text_that_changes_settings(sql: str, *, lasts: bool) -> None:
    assert effect_of(None, sql) == Effect(changes_settings=True, settings_last=lasts)


@pytest.mark.parametrize(
    "sql",
    [
        "update owner set name = 'x'",
        "INSERT INTO owner VALUES (1)",
        "delete from owner",
        "merge into owner using seat on true when matched then delete",
        "truncate owner",
        "copy owner from stdin",
        "call a_procedure()",
        "do $$ begin end $$",
        "execute prepared",
        "drop table owner",
        "-- select\nupdate owner set name = 'x'",
        "/* select */ delete from owner",
        "/* /* nested */ select */ delete from owner",
        "with a as (delete from owner returning *) select * from a",
        "(with a as (delete from owner returning *) select * from a)",
        "WITH a AS (SELECT 1) UPDATE owner SET name = 'x'",
        "explain analyze update owner set name = 'x'",
        "selected",
        "",
    ],
)
def test_all_other_text_may_have_written_anything(sql: str) -> None:
    assert effect_of(None, sql) == UNKNOWN
    compiled = sa.text(sql).compile()
    assert effect_of(compiled, str(compiled)) == UNKNOWN


# ----------------------------------------------------------------------------------------------------------- cascades


def _family() -> MetaData:
    """grandparent <- parent <- child, each by another rule; a stranger that no rule ties to them."""
    metadata = MetaData()
    Table("grandparent", metadata, Column("id", Integer, primary_key=True), Column("code", Text, unique=True))
    Table(
        "parent",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("grandparent_id", ForeignKey("grandparent.id", ondelete="CASCADE")),
        Column("code", ForeignKey("grandparent.code", onupdate="cascade")),
    )
    Table(
        "child",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("parent_id", ForeignKey("parent.id", ondelete="SET NULL", onupdate="RESTRICT")),
    )
    Table("stranger", metadata, Column("grandparent_id", ForeignKey("grandparent.id", ondelete="NO ACTION")))
    return metadata


def deleted_with(table: Table) -> set[str]:
    return {name for _, name in cascades(table, deletes=True, updates=frozenset())}


def updated_with(table: Table, *columns: str) -> set[str]:
    return {name for _, name in cascades(table, deletes=False, updates=frozenset(columns))}


def test_cascades_are_followed_from_table_to_table() -> None:
    tables = _family().tables
    assert deleted_with(tables["grandparent"]) == {"parent", "child"}
    assert deleted_with(tables["parent"]) == {"child"}
    assert deleted_with(tables["child"]) == set()
    assert deleted_with(tables["stranger"]) == set()
    assert updated_with(tables["grandparent"], "code") == {"parent"}


def test_only_columns_that_others_copy_lead_to_others() -> None:
    tables = _family().tables
    assert updated_with(tables["grandparent"], "id") == set()
    assert updated_with(tables["parent"], "id", "code") == set()
    assert {name for _, name in cascades(tables["grandparent"], deletes=False, updates=None)} == {"parent"}


def test_what_is_set_to_null_is_not_deleted_but_may_be_copied() -> None:
    metadata = _family()
    Table("toy", metadata, Column("child_id", ForeignKey("child.id", ondelete="CASCADE")))
    Table("drawing", metadata, Column("parent_id", ForeignKey("child.parent_id", onupdate="CASCADE")))
    tables = metadata.tables
    assert deleted_with(tables["child"]) == {"toy"}
    assert deleted_with(tables["parent"]) == {"child", "drawing"}


def test_a_circle_of_foreign_keys_ends() -> None:
    metadata = MetaData()
    Table(
        "hen", metadata, Column("id", Integer, primary_key=True), Column("e", ForeignKey("egg.id", ondelete="CASCADE"))
    )
    Table(
        "egg", metadata, Column("id", Integer, primary_key=True), Column("h", ForeignKey("hen.id", ondelete="CASCADE"))
    )
    assert deleted_with(metadata.tables["hen"]) == {"hen", "egg"}


def test_a_table_that_is_defined_later_is_found() -> None:
    metadata = _family()
    grandparent = metadata.tables["grandparent"]
    before = deleted_with(grandparent), updated_with(grandparent, "id")
    late = ForeignKey("grandparent.id", ondelete="CASCADE", onupdate="SET DEFAULT")
    Table("late", metadata, Column("grandparent_id", late), schema="elsewhere")
    assert deleted_with(grandparent) == before[0] | {"late"}
    assert updated_with(grandparent, "id") == before[1] | {"late"}


def test_a_foreign_key_to_a_table_that_is_not_defined_may_refer_to_any() -> None:
    metadata = _family()
    lost = ForeignKey("nowhere.id", ondelete="CASCADE", onupdate="CASCADE")
    Table("lost", metadata, Column("nowhere_id", Integer, lost))
    assert "lost" in deleted_with(metadata.tables["child"])
    assert (
        updated_with(metadata.tables["child"], "id") == updated_with(metadata.tables["child"], "parent_id") == {"lost"}
    )
