"""`python -m asynccache`: the command line, if what it needs is installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say how to install it."""
    try:
        from asynccache.cli import app  # noqa: PLC0415 (typer is optional)
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.stderr.write("The command line needs typer: pip install 'sqlalchemy-asynccache[cli]'\n")
        raise SystemExit(2) from None
    app(prog_name="python -m asynccache")


if __name__ == "__main__":
    main()
