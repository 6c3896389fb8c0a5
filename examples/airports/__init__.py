"""Airports and what people say of them: one application, served by FastAPI, Litestar and aiohttp.

    models.py       what is stored
    database.py     engine, cache and sessions, for as long as a program runs
    views.py        what clients send and get
    handlers.py     what the application does: functions of a session, whoever serves them
    app_fastapi.py  app_litestar.py  app_aiohttp.py
                    who serves them
    worker.py       works in the background
    tasks.py        the same work as plain functions, in processes that were forked
    load.py         a script: fills the tables

Run it from the folder `examples`. Without being told it takes SQLite in the file airports.db, and a cache in memory,
which is for one process. With several take DATABASE_URL=postgresql+asyncpg://me@localhost/airports and
CACHE_URL=memcached://localhost.

    pip install sqlalchemy-asynccache[sqlite,postgresql] airportsdata fastapi uvicorn
    python -m airports.load
    uvicorn airports.app_fastapi:app
    curl localhost:8000/airports/EDDF
"""
