"""The airports, served by aiohttp: `python -m airports.app_aiohttp`, after `python -m airports.load`."""

from collections.abc import AsyncGenerator
from functools import partial

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from sqlalchemy.exc import NoResultFound

from airports import handlers
from airports.database import Sessions, open_sessions
from airports.views import NewReview
from asynccache import AsyncCachedSession

SESSIONS = web.AppKey("SESSIONS", Sessions)
SESSION = web.RequestKey("SESSION", AsyncCachedSession)
answer = partial(web.json_bytes_response, dumps=msgspec.json.encode)
routes = web.RouteTableDef()


async def sessions(app: web.Application) -> AsyncGenerator[None]:
    async with open_sessions() as app[SESSIONS]:
        yield


@web.middleware
async def one_session(request: web.Request, handler: Handler) -> web.StreamResponse:
    async with request.app[SESSIONS]() as request[SESSION]:
        try:
            return await handler(request)
        except NoResultFound:
            raise web.HTTPNotFound from None


@routes.get("/airports/{icao}")
async def read_airport(request: web.Request) -> web.Response:
    return answer(await handlers.read_airport(request[SESSION], request.match_info["icao"]))


@routes.put("/airports/{icao}/name")
async def rename_airport(request: web.Request) -> web.Response:
    return answer(await handlers.rename_airport(request[SESSION], request.match_info["icao"], request.query["name"]))


@routes.post("/countries/{country}/close")
async def close_airports(request: web.Request) -> web.Response:
    await handlers.close_airports(request[SESSION], request.match_info["country"])
    return web.Response(status=204)


@routes.get("/airports/{icao}/reviews")
async def latest_reviews(request: web.Request) -> web.Response:
    return answer(await handlers.latest_reviews(request[SESSION], request.match_info["icao"]))


@routes.post("/airports/{icao}/reviews")
async def add_review(request: web.Request) -> web.Response:
    new = msgspec.json.decode(await request.read(), type=NewReview)
    return answer(await handlers.add_review(request[SESSION], request.match_info["icao"], new), status=201)


@routes.get(r"/reviews/{id:\d+}")
async def read_review(request: web.Request) -> web.Response:
    return answer(await handlers.read_review(request[SESSION], int(request.match_info["id"])))


@routes.get("/health")
async def health(request: web.Request) -> web.Response:
    return answer(await handlers.health(request[SESSION]))


app = web.Application(middlewares=[one_session])
app.cleanup_ctx.append(sessions)
app.add_routes(routes)

if __name__ == "__main__":
    web.run_app(app, port=8000)
