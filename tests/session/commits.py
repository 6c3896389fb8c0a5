"""What several test modules commit, and how."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from tests.conftest import Sessions
from tests.models import Author


async def rename(session: AsyncSession, name: str = "Eve") -> None:
    (await session.get_one(Author, 1)).name = name


async def by_commit(sessions: Sessions) -> None:
    async with sessions() as session:
        await rename(session)
        await session.commit()


async def by_the_maker_s_begin(sessions: Sessions) -> None:
    async with sessions.begin() as session:
        await rename(session)
