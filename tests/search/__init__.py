"""An exhaustive search over the interleavings of the read path and the write path, as they are.

The promises of a cache under concurrency are of the form "whatever happens in whatever order". Tests that hold calls
at gates try one order each. Here all of them are tried, of small worlds: a few readers and writers of one or two rows,
in one or two processes, with a server that loses slots, is restarted, or does not answer, and COMMITs whose outcome
nobody hears of.

Nothing of the protocol is described a second time. What runs is `ReadPath`, `WritePath`, `Repairs`, `Transaction`,
`Store` and `Background` themselves, on an event loop that does nothing by itself:

    loop.py        an event loop without a clock or sockets
    freeze.py      what a process is in the middle of, as a value that can be compared
    liveness.py    which local variables matter for that
    process.py     one process: the library, and the sessions of an application
    automaton.py   all that one process can do, each step run once
    slots.py       slots as values
    world.py       processes, a cache server, a database and their faults: all that can happen next, and what must hold
    explore.py     the search
    scenarios.py   the worlds that are searched
    mutations.py   the mistakes that must be found

What makes it quick is that processes know of each other only by what they read from the server and the database. So
the steps of a process are a function: of what it is in the middle of, and of the answer that it gets. Each is run once,
by replaying what led there, and the product of the processes is searched without running anything.

The technique is that of stateful model checking of real code (Godefroid, "Model checking for programming languages
using VeriSoft", POPL 1997; Musuvathi et al., "CMC", OSDI 2002). The state is finite since ids are only compared for
equality, so that worlds that differ in them alone are the same (Ip and Dill, "Better verification through symmetry",
1993).

What it does not see: what another task of the same process does between two awaits that end at once (`sleep(0)`); and
what a suspended function keeps on its stack and in no variable, such as the iterator of a `for` around an `await`. The
library has one, over the batches of what is owed, and in these worlds one batch is all. Nothing is given up there: no
`ttl` passes. And `lock_ttl` passes for the debts of a process only while none of its COMMITs is under way.
"""
