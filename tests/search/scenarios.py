"""The worlds that are searched: in each, every promise must hold."""

from __future__ import annotations

from dataclasses import replace

from tests.search.process import ENTITIES, GENERATION, SETTINGS, UNIQUES, Actor, Invalidator, Reader, Seeker, Writer
from tests.search.world import Faults, Scenario

SMALL: list[Scenario] = []
"""Each takes seconds at most."""

LARGE: list[Scenario] = []
"""These take minutes."""


def small(name: str, *processes: tuple[Actor, ...], **faults: int) -> Scenario:
    return note(Scenario(name, processes, Faults(**faults)))


def large(name: str, *processes: tuple[Actor, ...], **faults: int) -> Scenario:
    return note(Scenario(name, processes, Faults(**faults)), LARGE)


def note(scenario: Scenario, where: list[Scenario] = SMALL) -> Scenario:
    where.append(scenario)
    return scenario


E0, _ = ENTITIES
A, B, C = Reader("A"), Reader("B"), Reader("C")
A_TWICE = Reader("A", times=2)
A_FROM_SNAPSHOT = Reader("A", stores=False)
B_FROM_SNAPSHOT = Reader("B", stores=False)
W, X = Writer("W"), Writer("X")
W_TWICE = Writer("W", times=2)
TWO_ROWS_W = Writer("W", rows=(0, 1), locks=ENTITIES)
BULK_W, BULK_X = Writer("W", locks=(GENERATION,)), Writer("X", locks=(GENERATION,))
BOTH_W = Writer("W", locks=(E0, GENERATION))
WITH_REPLICAS = replace(SETTINGS, hold_off_s=2.0)
STRICT = replace(SETTINGS, on_lock_failure="raise")

# ------------------------------------------------------------------------------------------------------ nothing fails

ROW = small("a row is written", (A,), (W,))
TABLE = small("a table is written", (A,), (BULK_W,))
ROW_READ_TWICE = small("a row is written and read again", (A_TWICE,), (W,))
TABLE_READ_TWICE = small("a table is written and read again", (A_TWICE,), (BULK_W,))
ROW_AND_TABLE = small("one writes a row, another its table", (A,), (BULK_W,), (X,))
BOTH = small("one writes a row together with its table", (A,), (BOTH_W,))
FOREIGN = small("another program writes", (A_TWICE,), (Invalidator("I"),))
HERD = small("two tasks read", (A, B), (W,))
HERD_AND_TABLE = small("two tasks read a table", (A, B), (BULK_W,))
FLEET = small("two processes read", (A,), (B,), (W,))
FLEET_AND_TABLE = small("two processes read a table", (A,), (B,), (BULK_W,))
HERD_IN_FLEET = small("two tasks read, and another process", (A, B), (C,))
HURRY = small("one of two will not wait long", (Reader("A", hurries=True), B))
SNAPSHOT = small("one of two tasks reads from a snapshot", (A_FROM_SNAPSHOT, B), (W,))
SNAPSHOT_ELSEWHERE = small("one of two processes reads from a snapshot", (A_FROM_SNAPSHOT,), (B,), (W,), deaths=1)
OWN_WRITES = small("one of two tasks may not fill", (Reader("A", may_fill=False), B), (W,))
CROSSWISE = small("two rows, got in opposite orders", (Reader("A", rows=(0, 1)), Reader("B", rows=(1, 0))))
TWO_ROWS = small("two rows, and one of them is written", (Reader("A", rows=(0, 1)),), (W,))
REPLICA = note(Scenario("a row is read from a replica", ((A,), (W,)), Faults(), WITH_REPLICAS, replica=True))
TABLE_REPLICA = note(
    Scenario("a table is read from a replica", ((A,), (BULK_W,)), Faults(), WITH_REPLICAS, replica=True)
)
REPLICA_LOCK_LOST = note(
    Scenario(
        "a lock is lost before replicas have the row",
        ((A,), (W,)),
        Faults(lock_evictions=1),
        WITH_REPLICAS,
        replica=True,
    )
)
TABLE_REPLICA_LOCK_LOST = note(
    Scenario(
        "a lock of a table is lost before replicas have it",
        ((A,), (BULK_W,)),
        Faults(lock_evictions=1),
        WITH_REPLICAS,
        replica=True,
    )
)

# ------------------------------------------------------------------------------------------ the server loses or is slow

EVICTIONS = small("evictions", (A,), (W,), (X,), evictions=1)
TABLE_EVICTIONS = small("evictions and a table", (A,), (BULK_W,), (X,), evictions=1)
FORWARDS = note(Scenario("G is read after E", ((A,), (BULK_W,)), Faults(evictions=2), reads="forwards"))
BACKWARDS = note(Scenario("G is read before E", ((A,), (BULK_W,)), Faults(evictions=2), reads="backwards"))
LOCK_LOST = small("a lock is lost", (A_TWICE,), (W,), lock_evictions=1)
TABLE_LOCK_LOST = small("a lock of a table is lost", (A_TWICE,), (BULK_W,), lock_evictions=1)
RESTART = small("a restart", (A,), (B,), (W,), restarts=1)
TABLE_RESTART = small("a restart while a table is written", (A,), (BULK_W,), restarts=2)
SILENCE = small("the server is silent once", (A,), (W,), silences=1)
SILENCES = small("the server is silent twice", (A,), (W,), silences=2)
STRAY_CAS = large("a restart between two commits", (A,), (W_TWICE,), silences=1, calm_restarts=1, deaths=1)
SILENCE_AND_RESTART = small("the server is silent, then restarted", (A,), (W,), silences=1, restarts=1)

# --------------------------------------------------------------------------------------------------------- writers fail

CUT = small("a COMMIT is cut off", (A_TWICE,), (W,), cuts=1)
TABLE_CUT = small("a COMMIT of a table is cut off", (A,), (BULK_W,), cuts=1)
CUT_AND_LOCK_LOST = small("a COMMIT is cut off and its lock lost", (A,), (W,), cuts=1, lock_evictions=1)
DEATH = small("a process dies", (A,), (W,), deaths=1)
TABLE_DEATH = small("a process dies that writes a table", (A,), (BULK_W,), deaths=1)
SILENCE_AND_DEATH = small("the server is silent, and a process dies", (A,), (W,), silences=1, deaths=1)
DEATH_OF_ONE = small("one of two that write a row dies", (A,), (W,), (X,), deaths=1)
TABLE_DEATH_OF_ONE = small("one of two that write a table dies", (A,), (BULK_W,), (BULK_X,), deaths=1)
DEADLINES = small("locks of the dead", (W,), (X,), deaths=1, ticks=4)
UNLOCKABLE = small("a slot cannot be locked", (A,), (W,), lock_failures=1)
TABLE_UNLOCKABLE = small("a table cannot be locked", (A,), (BULK_W,), lock_failures=1)
UNLOCKABLE_AND_CUT = small("a slot cannot be locked, the COMMIT is cut off", (A,), (W,), lock_failures=1, cuts=1)
UNLOCKABLE_HERE = note(
    Scenario(
        "a slot cannot be locked, in its reader's process", ((A, W),), Faults(lock_failures=1, silences=1), warm=True
    )
)
OWED_BY_TABLE = note(
    Scenario(
        "there is no room to owe a second row",
        ((Reader("A", rows=(1,)), TWO_ROWS_W),),
        Faults(refusals=2),
        replace(SETTINGS, repairs_max=1),
        warm=True,
    )
)
OWED_BY_TABLE_ELSEWHERE = note(
    Scenario(
        "there is no room to owe a second row, and nobody asks",
        ((TWO_ROWS_W,),),
        Faults(refusals=3),
        replace(SETTINGS, repairs_max=1),
        warm=True,
    )
)
OWED_BY_TABLE_AND_CUT = note(
    Scenario(
        "there is no room to owe a second row, the COMMIT is cut off",
        ((Reader("A", rows=(1,)),), (TWO_ROWS_W,)),
        Faults(refusals=1, cuts=1),
        replace(SETTINGS, repairs_max=1),
    )
)
LOOK_LOST = note(
    Scenario(
        "a lock is lost, and the first look at it", ((A_TWICE,), (W,)), Faults(lock_evictions=1, silences=1), STRICT
    ),
    LARGE,
)
REFUSED = note(Scenario("a commit is refused", ((A,), (W,)), Faults(lock_failures=1, silences=1), STRICT))

# --------------------------------------------------------------------------------------------------------- readers fail

CANCEL = small("one of two tasks is cancelled", (A, B), cancels=1)
CANCEL_BESIDE_SNAPSHOT = small("one is cancelled beside one from a snapshot", (A_FROM_SNAPSHOT, B), cancels=1)

HERD_BEHIND_SNAPSHOTS = small("two of three tasks read from snapshots", (A_FROM_SNAPSHOT, B_FROM_SNAPSHOT, C))

# ------------------------------------------------------------------------------------------------------ secondary keys
# A writer locks the values that a row has from then on. Nothing is locked of those that it had before.

UA, UB = UNIQUES["a"], UNIQUES["b"]
TAKEN, CHANGED, BACK, SAME = ("", "a"), ("a", "b"), ("a", "", "a"), ("a", "a")
TAKES_A, TAKES_B = Writer("W", locks=(E0, UA)), Writer("W", locks=(E0, UB))
DELETES, RETURNS = Writer("D", locks=(E0,), after=0), Writer("I", locks=(E0, UA), after=1)

KEY_TAKEN = small("a key is taken", (Seeker("A", "a", TAKEN, times=2),), (TAKES_A,))
KEY_CHANGED = small("a key is changed", (Seeker("A", "a", CHANGED, times=2),), (TAKES_B,))
KEY_BACK = small("a row is deleted and back", (Seeker("A", "a", BACK),), (DELETES,), (RETURNS,))
KEY_BY_TABLE = small("keys are changed by table", (Seeker("B", "b", CHANGED, times=2),), (BULK_W,))
KEY_HERD = small("two tasks ask by a key", (Seeker("A", "a", SAME), Seeker("B", "a", SAME)), (W,))
KEY_LOCK_LOST = large("a key's lock is lost", (Seeker("A", "a", TAKEN, times=2),), (TAKES_A,), lock_evictions=1)
KEY_CUT = small("a COMMIT that takes a key is cut off", (Seeker("A", "a", TAKEN),), (TAKES_A,), cuts=1)
KEY_DEATH = small("a process dies that takes a key", (Seeker("A", "a", TAKEN),), (TAKES_A,), deaths=1)
KEY_SILENCE = small("a key is taken, the server is silent", (Seeker("A", "a", TAKEN),), (TAKES_A,), silences=1)
KEY_CANCEL = small(
    "one of two that ask by a key is cancelled", (Seeker("A", "a", SAME), Seeker("B", "a", SAME)), cancels=1
)
KEY_AND_ROW = note(
    Scenario(
        "a row is read by a key that it has no more",
        ((Seeker("A", "a", CHANGED),), (Reader("B", exists=True, after=1),), (TAKES_B,)),
        warm=True,
    )
)
KEY_BEFORE_AND_AFTER = large(
    "a row is asked for by the key that it has and the one that it gets",
    (Seeker("A", "a", CHANGED),),
    (Seeker("B", "b", CHANGED, times=2),),
    (TAKES_B,),
)
# --------------------------------------------------------------------------------------------------------------- larger

large("two tasks read, evictions", (A, B), (W,), evictions=1)
large("two tasks read a table, evictions", (A, B), (BULK_W,), evictions=1)
large("a restart between two writers", (A,), (W,), (X,), silences=1, calm_restarts=1, deaths=1)
large("three tasks read", (A, B, C), (W,))
large("two tasks read, twice", (A_TWICE, B), (W,))
large("two tasks read, one is cancelled", (A, B), (W,), cancels=1)
large("one of three tasks is cancelled", (A, B, C), cancels=1)
large("two tasks read, the server is silent", (A, B), (W,), silences=1)
large("two tasks read, a restart", (A, B), (W,), restarts=1)
large("two write a row that is read twice", (A_TWICE,), (W,), (X,))
large("two write a table that is read twice", (A_TWICE,), (BULK_W,), (BULK_X,))
large("one writes a row, another its table, evictions", (A,), (BULK_W,), (X,), evictions=2)
large("locks are lost, and a COMMIT cut off", (A,), (W,), (X,), lock_evictions=1, cuts=1)
large("two restarts", (A,), (B,), (BOTH_W,), restarts=2)
large("one of two that write dies, the server is silent", (A,), (W,), (X,), deaths=1, silences=1)
large("two rows, and their table is written", (Reader("A", rows=(0, 1)), Reader("B", rows=(1, 0))), (BULK_W,))
large("locks of the dead, of three writers", (W,), (X,), (Writer("Y"),), deaths=1, ticks=5)
large(
    "a row is read by a key and without",
    (Seeker("A", "a", CHANGED, times=2),),
    (Reader("B", exists=True, after=1),),
    (TAKES_B,),
)
large("two processes ask by a key", (Seeker("A", "a", CHANGED),), (Seeker("B", "a", CHANGED),), (TAKES_B,))
large("a row is deleted and back, read twice", (Seeker("A", "a", BACK, times=2),), (DELETES,), (RETURNS,))
large("two tasks ask by a key that is taken", (Seeker("A", "a", TAKEN), Seeker("B", "a", TAKEN)), (TAKES_A,))
large("a key is taken, evictions", (Seeker("A", "a", TAKEN, times=2),), (TAKES_A,), evictions=1)
large("a key is changed, evictions", (Seeker("A", "a", CHANGED, times=2),), (TAKES_B,), evictions=1)
large("a key is taken, a restart", (Seeker("A", "a", TAKEN, times=2),), (TAKES_A,), restarts=1)
large("a COMMIT that takes a key is cut off, read twice", (Seeker("A", "a", TAKEN, times=2),), (TAKES_A,), cuts=1)
