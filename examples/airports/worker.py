"""Computes ratings in the background, as arq or Celery would; its queue is a table: `python -m airports.worker`."""

import asyncio
import signal
from contextlib import suppress

from sqlalchemy import func, select

from airports.database import Sessions, open_sessions
from airports.models import Airport, Job, Review
from asynccache import AsyncCachedSession


async def rate_airport(session: AsyncCachedSession, icao: str) -> None:
    """The mean of its reviews, computed by one worker at a time."""
    airport = await session.get_one(Airport, icao, with_for_update=True)
    airport.rating = await session.scalar(select(func.avg(Review.stars)).where(Review.airport_icao == icao))


async def do_one_job(sessions: Sessions) -> bool:
    """Do the oldest job that no other worker does. Gives False if there is none."""
    async with sessions.begin() as session:
        job = await session.scalar(select(Job).order_by(Job.id).limit(1).with_for_update(skip_locked=True))
        if job is None:
            return False
        await rate_airport(session, job.airport_icao)
        await session.delete(job)
    return True


async def main() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with open_sessions() as sessions:
        while not stop.is_set():
            if not await do_one_job(sessions):
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), timeout=0.5)


if __name__ == "__main__":
    asyncio.run(main())
