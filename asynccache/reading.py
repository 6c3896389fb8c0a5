"""The read path: look, take a lease, load, fill. It knows slots, records and flights, but neither SQL nor sockets.

read E and G (one round trip)
  a record under G's nonce        -> serve it
  nothing there                   -> join the key's flight, or lead it:
       take a lease               E becomes LEASE(token, G's nonce)
       load the row               on the session that asked, with the connection that it has
       share it with early waiters
  in the background:
       close the flight           nobody may join any more
       look at G, fill E          E becomes VALUE if the lease is untouched
       both as they were          -> certified: share with all who wait
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from asynccache import protocol
from asynccache.backends.base import UNREADABLE, Change, Key
from asynccache.background import Background
from asynccache.events import DropReason, Model
from asynccache.flights import Answer, Flight, FlightTable, Lead, LoadAlone, ReadAgain, Share, Waiter
from asynccache.protocol import MISSING, Lease, Slot
from asynccache.settings import Policy, Settings
from asynccache.store import Store
from asynccache.telemetry import Telemetry

LOST_RACES_MAX = 3
"""After so many leases lost to others in a row, load without one."""


class CachedModel(Protocol):
    """What the read path has to know of a model: what observers are told of, and how long its rows are served."""

    @property
    def model(self) -> Model: ...

    @property
    def policy(self) -> Policy: ...


class Ask(Protocol):
    """One row that one session wants."""

    @property
    def mapped(self) -> CachedModel: ...

    @property
    def slot(self) -> Slot: ...

    def serve(self, record: bytes) -> bool:
        """Take the record for the answer; False if it cannot be used (damaged, or of another schema)."""
        ...

    def certain(self, record: bytes) -> bytes:
        """What a lease on the slot says of a record that was loaded: it may be stored, and shared with who asks late.
        All of it, unless there is more in it than the slot is to hold."""
        ...


Load = Callable[[Sequence[Ask]], Awaitable[Sequence[bytes | None]]]
"""Load these rows in one SELECT, answer each ask, and give each row's record: None if it must not leave the session."""

Patience = Callable[[], float | None]
"""How many seconds a session may wait for others *now*; None: as long as it takes. Asked before each wait, since one
that has loaded something meanwhile holds a connection, for which the other may be queueing."""


@dataclass(slots=True)
class Miss:
    """An ask that the cache could not serve, and what was seen in its slots.

    look_s: how long the last look took, in seconds; 0 if nobody listens.
    """

    ask: Ask
    entity: bytes | None
    generation: bytes | None
    rejected: bytes | None = None
    look_s: float = 0.0

    def verdict(self) -> protocol.Verdict:
        return protocol.judge(self.entity, self.generation, self.rejected)


@dataclass(slots=True, eq=False)
class _Led:
    """A miss, and the flight of its key that its session leads."""

    miss: Miss
    flight: Flight[Key]


class _Wait:
    """A miss, and its place in the flight that another session leads."""

    def __init__(self, miss: Miss, flight: Flight[Key]) -> None:
        self.miss = miss
        self.answer: asyncio.Future[Answer[Key]] = asyncio.get_running_loop().create_future()
        self.waiter: Waiter[Key] = Waiter(self.answer.set_result)
        flight.join(self.waiter)


@dataclass(frozen=True, slots=True)
class _Fill:
    """A row on its way into the cache."""

    ask: Ask
    flight: Flight[Key]
    lease: Lease
    record: bytes


class ReadPath:
    """Reads rows through the cache for the sessions of one event loop."""

    def __init__(self, store: Store, settings: Settings, telemetry: Telemetry, background: Background) -> None:
        self.store = store
        self._settings = settings
        self._telemetry = telemetry
        self._stats = telemetry.stats
        self._background = background
        self._flights: FlightTable[Key] = FlightTable()

    async def look(self, asks: Sequence[Ask]) -> list[Miss]:
        """Answer what is in the cache, in one round trip; give the rest, for `load`.

        asks: of different rows of one model.
        """
        began_s = self._telemetry.began_s()
        generations = list(dict.fromkeys([ask.slot.generation for ask in asks]))
        slots = await self.store.read([ask.slot.key for ask in asks] + generations)
        found = dict(zip(generations, slots[len(asks) :], strict=True))
        hits, negative_hits = self._stats.hits, self._stats.negative_hits
        served = map(self.serve, asks, slots, [found[ask.slot.generation] for ask in asks])
        misses = [miss for miss in served if miss is not None]
        if began_s:
            self._tell_hits(asks[0], hits, negative_hits, self._telemetry.since(began_s))
        return misses

    def serve(
        self, ask: Ask, entity: bytes | None, generation: bytes | None, rejected: bytes | None = None
    ) -> Miss | None:
        """Answer this by what was read of its slots (of the `store`, by a hit's shortest way: `look` tells observers);
        give what is to `load` if that cannot be."""
        record = protocol.hit(entity, generation, rejected)
        if record is None:
            return Miss(ask, entity, generation, rejected)
        if not ask.serve(record):
            self._telemetry.garbage(ask.mapped.model)
            return Miss(ask, entity, generation, rejected=entity)
        if record == MISSING:
            self._stats.negative_hits += 1
        else:
            self._stats.hits += 1
        return None

    async def load(self, misses: Sequence[Miss], load: Load, *, may_fill: bool, patience: Patience) -> None:
        """Answer these misses of one `look`, from another task's load, or by `load`.

        may_fill: whether rows that this session reads may be stored and shared. A session that may not (old snapshot,
            own writes) waits for nobody either: what others share may be newer than what it is to see.
        patience: tells how long to wait for another task's load.
        Raises what `load` raises.
        """
        self._telemetry.missed(misses[0].ask.mapped.model, len(misses))
        if may_fill:
            await self._share_or_load(misses, load, patience)
        else:
            await self._load_alone(misses, load)

    async def discard(self, slot: Slot, record: bytes) -> None:
        """Have this record, which was found to be out of date, be served no more; if the server answers."""
        await self.store.apply([Change(slot.key, protocol.discard(record))])

    # ------------------------------------------------------------------------------------------------------------ look

    async def _look_again(self, misses: Sequence[Miss]) -> None:
        began_s = self._telemetry.began_s()
        keys = dict.fromkeys(key for miss in misses for key in (miss.ask.slot.key, miss.ask.slot.generation))
        slots = dict(zip(keys, await self.store.read(list(keys)), strict=True))
        look_s = self._telemetry.since(began_s)
        for miss in misses:
            miss.entity, miss.generation = slots[miss.ask.slot.key], slots[miss.ask.slot.generation]
            miss.look_s = look_s

    def _serve_hit(self, miss: Miss) -> bool:
        hits, negative_hits = self._stats.hits, self._stats.negative_hits
        left = self.serve(miss.ask, miss.entity, miss.generation, miss.rejected)
        if left is None:
            self._tell_hits(miss.ask, hits, negative_hits, miss.look_s)
            return True
        miss.rejected = left.rejected
        return False

    def _tell_hits(self, ask: Ask, hits: int, negative_hits: int, duration_s: float) -> None:
        """hits, negative_hits: how many had been counted before."""
        if self._telemetry.observers:
            stats = self._stats
            self._telemetry.hits(ask.mapped.model, stats.hits - hits, stats.negative_hits - negative_hits, duration_s)

    # ---------------------------------------------------------------------------------------------------- join or lead

    async def _share_or_load(self, misses: Sequence[Miss], load: Load, patience: Patience) -> None:
        led: list[_Led] = []
        waits: list[_Wait] = []
        for miss in misses:
            flight = self._flights.flights.get(miss.ask.slot.key)
            if flight is None:
                led.append(_Led(miss, self._flights.lead(miss.ask.slot.key)))
            else:
                waits.append(_Wait(miss, flight))
        alone: list[Miss] = []
        try:
            # What this session leads it ends before it waits for others: two that want [a, b] and [b, a] would
            # wait for each other.
            if led:
                await self._lead(led, load, poll=len(misses) == 1)
            while waits:
                await self._await_answer(waits[-1], patience())
                wait = waits.pop()
                if not await self._act_on_answer(wait, load):
                    alone.append(wait.miss)
        finally:
            for wait in waits:
                self._abandon(wait)
        if alone:
            await self._load_alone(alone, load)

    async def _await_answer(self, wait: _Wait, patience_s: float | None) -> None:
        # `asyncio.wait`, since it leaves the future alone when this task is cancelled: an answer that comes in
        # the same moment must not get lost.
        await asyncio.wait([wait.answer], timeout=patience_s)

    async def _act_on_answer(self, wait: _Wait, load: Load) -> bool:
        """Do what the flight told this waiter; False if it is to load for itself."""
        if not wait.answer.done():
            wait.waiter.leave()
            self._telemetry.bypassed(wait.miss.ask.mapped.model, "waited in vain")
            return False
        match wait.answer.result():
            case Share(record):
                if not wait.miss.ask.serve(record):
                    return False
                self._telemetry.coalesced(wait.miss.ask.mapped.model)
                return True
            case Lead(flight):
                await self._lead([_Led(wait.miss, flight)], load, poll=True, look=True)
                return True
            case ReadAgain():
                await self._look_again([wait.miss])
                return self._serve_hit(wait.miss)
            case LoadAlone():
                return False

    def _abandon(self, wait: _Wait) -> None:
        """Stop waiting; if this very moment made it the leader, pass that on."""
        if not wait.answer.done():
            wait.waiter.leave()
        elif isinstance(answer := wait.answer.result(), Lead):
            self._hand_over(answer.flight)

    async def _load_alone(self, misses: Sequence[Miss], load: Load) -> None:
        _ = await self._select([miss.ask for miss in misses], load)

    async def _select(self, asks: Sequence[Ask], load: Load) -> Sequence[bytes | None]:
        self._stats.loads += 1
        began_s = self._telemetry.began_s()
        records = await load(asks)
        if began_s:
            self._telemetry.loaded(asks[0].mapped.model, len(asks), self._telemetry.since(began_s))
        return records

    # ------------------------------------------------------------------------------------------------------------ lead

    async def _lead(self, led: Sequence[_Led], load: Load, *, poll: bool, look: bool = False) -> None:
        """Load these rows for all who wait for them.

        poll: wait for other processes that are loading the row, instead of loading it too without storing it.
        look: what was seen in the slots is old; look again first.
        """
        try:
            # One turn of the event loop, so that all who ask in this one join before the SELECT begins: a herd that
            # keeps the loop busy for longer than the lease lasts still makes one SELECT.
            await asyncio.sleep(0)
            led = await self._take_leases(led, poll=poll, look=look)
            if not led:
                return
            for each in led:
                each.flight.begin_load()
            records = await self._select([each.miss.ask for each in led], load)
        except asyncio.CancelledError:
            for each in led:
                self._hand_over(each.flight)
            raise
        except BaseException:
            # A leader's error is its own. Those who wait try for themselves, as one new flight.
            for each in led:
                self._fail(each.flight)
            raise
        fills = []
        for each, record in zip(led, records, strict=True):
            if record is None:
                self._fail(each.flight)
                continue
            each.flight.share_early(record)
            if each.flight.lease is None:
                each.flight.land(None)
            else:
                fills.append(_Fill(each.miss.ask, each.flight, each.flight.lease, each.miss.ask.certain(record)))
        if fills and self.store.answers_at_once:
            await self._background.finish(self._fill(fills), "fill")
        elif fills:
            # In the background, so that a leader that is cancelled from here on still serves its waiters.
            self._background.spawn(self._fill(fills), "fill")

    def _hand_over(self, flight: Flight[Key]) -> None:
        if not flight.hand_over():
            self._fail(flight)

    def _fail(self, flight: Flight[Key]) -> None:
        flight.land(None)
        if flight.lease is not None:
            self._give_back([(flight.key, flight.lease)])

    def _give_back(self, leases: Sequence[tuple[Key, Lease]]) -> None:
        async def work() -> None:
            await self.store.apply([Change(entity, protocol.give_back(lease)) for entity, lease in leases])

        if leases:
            self._background.spawn(work(), "give back a lease")

    # ----------------------------------------------------------------------------------------------------------- lease

    async def _take_leases(self, led: Sequence[_Led], *, poll: bool, look: bool) -> list[_Led]:
        """Take a lease for each row that nobody has locked or leased. Gives those that are still to be loaded: the
        others' values have appeared in the cache meanwhile."""
        to_load = list(led)
        open_ = [each for each in led if each.flight.lease is None]
        if look and open_:
            await self._look_again([each.miss for each in open_])
        poll_until = time.monotonic() + self._settings.lease_timeout_s
        poll_s = self._settings.poll_min_s
        lost_races = 0
        while True:
            generations: dict[Key, Change] = {}
            offers: list[tuple[_Led, Lease]] = []
            again: list[_Led] = []
            polled: list[_Led] = []
            for each in open_:
                miss = each.miss
                if self._serve_hit(miss):
                    each.flight.call_off()
                    to_load.remove(each)
                    continue
                match miss.verdict():
                    case protocol.Vacant(nonce):
                        offers.append((each, Lease(protocol.fresh_id(), nonce)))
                    case protocol.NoGeneration():
                        opening = protocol.open_generation(protocol.fresh_id())
                        generations[miss.ask.slot.generation] = Change(
                            miss.ask.slot.generation, opening, absent=miss.generation is None
                        )
                        again.append(each)
                    case protocol.Leased() if poll:
                        polled.append(each)
                    case _:
                        pass  # locked: load the row, store nothing
            again += await self._offer(offers, list(generations.values()))
            if again:
                lost_races += 1
                if lost_races > LOST_RACES_MAX:
                    again = []
            elif polled:
                if time.monotonic() > poll_until:
                    return to_load
                await asyncio.sleep(poll_s * random.uniform(0.5, 1.5))
                poll_s = min(poll_s * 1.5, self._settings.poll_max_s)
            open_ = again + polled
            if not open_:
                return to_load
            await self._look_again([each.miss for each in open_])

    async def _offer(self, offers: Sequence[tuple[_Led, Lease]], generations: Sequence[Change]) -> list[_Led]:
        """Ask for these leases, and open these generations, in one batch; give those whose race was lost."""
        if not offers and not generations:
            return []
        ttl_s = self._settings.lease_ttl_s
        changes = [
            Change(
                each.miss.ask.slot.key,
                protocol.take_lease(lease, ttl_s, each.miss.rejected),
                absent=each.miss.entity is None,
            )
            for each, lease in offers
        ]
        try:
            applied = await self.store.apply([*generations, *changes])
        except asyncio.CancelledError:
            # Some may have been placed. They are not handed over: a lease whose answer nobody saw may land late,
            # after a commit, and would then certify an old row.
            self._give_back([(each.miss.ask.slot.key, lease) for each, lease in offers])
            raise
        lost = []
        for (each, lease), result in zip(offers, applied[len(generations) :], strict=True):
            if not result.confirmed:
                continue  # no lease: see above
            if result.after == lease.encoded():
                each.flight.lease = lease
            else:
                lost.append(each)
        return lost

    # ------------------------------------------------------------------------------------------------------------ fill

    async def _fill(self, fills: Sequence[_Fill]) -> None:
        """Certify these leases and store their rows, in one batch. A value that is stored although its generation has
        changed meanwhile is none: nobody serves it."""
        trusted: list[_Fill] = []
        for each in fills:
            each.flight.close()
            if self.store.doubts(each.ask.slot):
                self._telemetry.fill_dropped(each.ask.mapped.model, "no answer")
            else:
                trusted.append(each)
        generations = list(dict.fromkeys([each.ask.slot.generation for each in trusted]))
        looks = [Change(generation, protocol.look) for generation in generations]
        stores = [Change(each.ask.slot.key, protocol.fill(each.lease, each.record, _ttl_s(each))) for each in trusted]
        refused: list[tuple[Key, Lease]] = []
        try:
            applied = await self.store.apply(looks + stores)
            seen = dict(zip(generations, applied[: len(looks)], strict=True))
            for each, result in zip(trusted, applied[len(looks) :], strict=True):
                lease, generation = each.lease, seen[each.ask.slot.generation].after
                stored = result.after == protocol.opened(lease.nonce) + each.record
                entity = lease.encoded() if stored else result.after  # what was there until then
                if self.store.doubts(each.ask.slot):  # by now: a commit of this process could not lock
                    entity = UNREADABLE
                certified = lease.is_intact(entity, generation)
                each.flight.land(each.record if certified else None)
                if stored and certified:
                    self._telemetry.filled(each.ask.mapped.model)
                    continue
                reason = _why_dropped(lease, entity, generation)
                self._telemetry.fill_dropped(each.ask.mapped.model, reason)
                if reason == "refused":
                    refused.append((each.ask.slot.key, lease))
        finally:
            for each in fills:
                each.flight.land(None)
        self._give_back(refused)


def _why_dropped(lease: Lease, entity: bytes | None, generation: bytes | None) -> DropReason:
    """What stands in the way of this lease's fill."""
    if UNREADABLE in (entity, generation):
        return "no answer"
    if protocol.owners_of(entity) is not None or protocol.owners_of(generation) is not None:
        return "locked"
    if generation != protocol.opened(lease.nonce):
        return "invalidated"
    return "refused" if entity == lease.encoded() else "lease lost"


def _ttl_s(fill: _Fill) -> float:
    policy = fill.ask.mapped.policy
    ttl_s = policy.negative_ttl_s if fill.record == MISSING else policy.ttl_s
    return ttl_s * (1 - policy.ttl_jitter * random.random())
