"""Torture: processes that read and write the same rows through the cache while its servers, their network and the
processes themselves fail. Every read is checked against what was acknowledged before it began.

    python -m tests.torture --fault restart --fault cancel-commits --seconds 30

    mixes.py       which faults, in which failure mode, for how long; which mix catches which mutation
    rows.py        what is read and written
    ledger.py      what the processes tell each other, in shared memory: acknowledged versions, counts
    worker.py      one process: its cache, its databases, the proxies in its way
    readers.py  writers.py  auditor.py     what it does
    naive.py       get, set and delete: the cache that the same readers and writers use beside ours
    mutations.py   the library with a part of its protocol left out
    servers.py     what happens to memcached: restarted, frozen, filled up
    run.py         one run from beginning to end, and what it found
"""
