"""Real servers for the tests: no docker, as root or not, on free loopback ports, set up on a fresh machine."""

from tests.servers.memcached import Memcached
from tests.servers.postgres import Postgres
from tests.servers.proxy import FaultProxy

__all__ = ["FaultProxy", "Memcached", "Postgres"]
