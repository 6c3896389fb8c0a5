"""The processes: each a real `Cache` and a real SQLAlchemy engine, over clients of the simulated servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import AsyncAdaptedQueuePool

from asynccache import AsyncCachedSession, Cache, protocol
from asynccache.orm.entity import Scope
from asynccache.protocol import Slot
from asynccache.settings import Settings
from tests.simulation.backend import Server, SimulatedMemcached
from tests.simulation.database import Client, Database, Value
from tests.simulation.history import History

ROWS: Mapping[int, Value] = {0: 100, 1: 101, 2: None}
"""What there is in the beginning."""

PROCESSES = 2
BUCKETS = 3  # rows 0 and 1 are in one, row 2 is in another


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    __mapper_args__ = {"confirm_deleted_rows": False}

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(unique=True)


@dataclass(eq=False)
class Process:
    """What takes long to make, and so plays many histories. Each has an event loop and a pool of its own."""

    number: int
    cache: Cache
    memcached: SimulatedMemcached
    database: Client
    engine: AsyncEngine
    sessions: async_sessionmaker[AsyncCachedSession]

    @classmethod
    def start(cls, number: int) -> Process:
        memcached, client = SimulatedMemcached(number), Client()
        cache = Cache(memcached, buckets=BUCKETS)
        cache.register(Item, unique=["value"])
        cache._checked = True  # what the servers say about themselves is not simulated
        engine = create_async_engine("simulated:///database", connect_args={"client": client}, pool_size=3)
        sessions = async_sessionmaker(engine, class_=AsyncCachedSession, cache=cache)
        return cls(number, cache, memcached, client, engine, sessions)

    def enter(self, history: History, server: Server, database: Database) -> None:
        """Begin a history, knowing nothing of those before."""
        self.memcached.start_over(server)
        self.database.database = database
        self.cache.settings = Settings(
            buckets=BUCKETS,
            retry_min_s=0.2,  # a debt that is not due is looked at as often
            hold_off_s=history.hold_off_s,
            on_lock_failure=history.on_lock_failure,
            slots_max=history.slots_max,
            repairs_max=history.repairs_max,
        )
        self.engine.sync_engine.dispose(close=False)

    @cached_property
    def scope(self) -> Scope:
        scope = self.cache.scope_of(self.engine.sync_engine)
        assert scope is not None
        return scope

    def slot(self, key: int) -> Slot:
        """Where a row is cached."""
        entity = self.scope.entity(Item)
        assert entity is not None
        slot = entity.row((key,))
        assert slot is not None
        return slot

    def slot_of_value(self, value: int) -> Slot:
        """Where it is cached which row has this value."""
        entity = self.scope.entity(Item)
        assert entity is not None
        slots = self.scope.key_slots(entity.hierarchy, self.cache.models.unique_key(Item, ["value"]))
        slot = slots.slot([value])
        assert slot is not None
        return slot

    def value_of(self, record: bytes) -> Value:
        """What is stored in a slot."""
        if record == protocol.MISSING:
            return None
        entity = self.scope.entity(Item)
        assert entity is not None
        value: int = entity.stored_values(record)["value"]
        return value

    def doubts(self, slot: Slot) -> bool:
        """Whether it knows that this slot may hold an old value."""
        doubtful = self.cache._store._doubtful
        return slot.key in doubtful or slot.generation in doubtful

    @property
    def has_doubts(self) -> bool:
        return bool(self.cache._store._doubtful)

    @property
    def leftovers(self) -> Sequence[str]:
        """What should not be there when all is quiet."""
        bound, pool = self.cache.bound(), self.engine.pool
        assert isinstance(pool, AsyncAdaptedQueuePool)
        counts = {
            "debts": len(bound.repairs),
            "doubts": len(self.cache._store._doubtful),
            "flights": len(bound.reads._flights.flights),
            "tasks in the background": len(bound.background._tasks),
            "connections checked out": pool.checkedout(),
        }
        return [f"process {self.number} has {count} {what} left" for what, count in counts.items() if count]
