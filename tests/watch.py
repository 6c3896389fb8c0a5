"""What a backend told of its servers, and a way to wait for it."""

from __future__ import annotations

import asyncio

from asynccache import Backend, NodeChanged, NodeState


class Watch(list[NodeChanged]):
    """The changes of a backend's servers, in order."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._changed = asyncio.Event()
        backend.observe(self._note)

    @property
    def states(self) -> list[NodeState]:
        return [change.state for change in self]

    async def until(self, state: NodeState) -> None:
        """Wait until the last change was to this state."""
        while not self or self[-1].state is not state:
            self._changed.clear()
            await self._changed.wait()

    async def until_used(self) -> None:
        """Wait until no server is known to be away, if one ever was."""
        if self:
            await self.until(NodeState.CLOSED)

    def _note(self, change: NodeChanged) -> None:
        self.append(change)
        self._changed.set()
