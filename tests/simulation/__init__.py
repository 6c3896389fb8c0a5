"""Deterministic simulation: the whole library, played under a clock and a scheduler that a test controls.

What is real: `Cache`, `AsyncCachedSession`, `cached_get`, `cached_get_many`, flights, leases, locks, repairs,
SQLAlchemy's sessions, unit of work, engines and pools. What is simulated, and so can be delayed, lost and replayed:

    loop.py       the event loop: its time jumps from timer to timer, its ready callbacks run in a chosen order
    chance.py     who is at work, and what the decisions of a history hold in store for each of its calls
    backend.py    a memcached: slots with versions and times to live, which are evicted, and forgotten in a restart
    database.py   a database under READ COMMITTED, with row locks, savepoints, and COMMITs that are late or not answered
    history.py    a history as plain data: the operations, when each begins, what happens to its calls
    world.py      plays a history, and checks what it promises
    strategies.py histories for Hypothesis to draw and shrink

A history decides everything: played twice it gives the same trace (in another process, too, if `PYTHONHASHSEED` is the
same, since the library iterates over sets of slots). What happens "to a task at any await" is that its answer is late,
lost or an error, and that it is cancelled, before the answer or in the same moment. The idea is that of
FoundationDB's simulation and TigerBeetle's VOPR; the choice among ready callbacks is that of a concurrency fuzzer.
"""
