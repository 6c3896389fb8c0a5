"""SQLAlchemy's own tests as a judge of this library: they run unchanged, with our sessions in the place of its own.

`nox -s conformance` fetches them and compares; `python -m tests.conformance --help` does so with a copy that is there.
"""
