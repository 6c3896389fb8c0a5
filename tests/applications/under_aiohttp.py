"""The airports under aiohttp, where the tests say: `python -m ... HOST PORT [--cancelling]`.

--cancelling: a handler is cancelled when its client is gone.
"""

from __future__ import annotations

import sys

from aiohttp import web
from airports.app_aiohttp import app

if __name__ == "__main__":
    host, port, *options = sys.argv[1:]
    web.run_app(app, host=host, port=int(port), handler_cancellation="--cancelling" in options)
