"""What binds a chat client to one event loop of one process."""

from __future__ import annotations

import asyncio
import os
import weakref

from ppg_gym.llm import background
from ppg_gym.llm.cache import AnswerCache, Flights
from ppg_gym.llm.endpoints import Pool
from ppg_gym.llm.settings import ClientSettings


class Bound:
    """The part of a client that belongs to one event loop of one process: connections and calls under way.

    Connections cannot move to another loop, and a forked child must not use (or close) those of its parent. So a
    client makes a new one of these wherever it finds itself.
    """

    def __init__(self, client: object, settings: ClientSettings, cache: AnswerCache | None) -> None:
        """Belong to the running loop until the client is gone."""
        self.pid = os.getpid()
        self.loop = asyncio.get_running_loop()
        self.flights = Flights()
        self._settings = settings
        self._cache = cache
        self._pool: Pool | None = None
        self.forget = weakref.finalize(client, background.close_on, self.loop, self.pid, self)
        self.forget.atexit = False
        background.adopt(self)

    @property
    def pool(self) -> Pool:
        """The endpoints; made for the first call."""
        if self._pool is None:
            self._pool = Pool(self._settings)
        return self._pool

    async def aclose(self) -> None:
        """Close the connections to the endpoints and to the cache."""
        self.forget.detach()
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.aclose()
        if self._cache is not None:
            self._cache.close()
