"""One client for equal settings in a process: one budget, one limit of concurrency, one set of connections.

A run makes several environments (training, evaluation, one per conversation), and they share clients. A judge and a
partner have one each, as their settings come under different names.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary, WeakValueDictionary

from ppg_gym.llm.client import ChatClient
from ppg_gym.llm.settings import ClientSettings

_lock = threading.Lock()
_clients: WeakValueDictionary[tuple[ClientSettings, str], ChatClient] = WeakValueDictionary()
_users: WeakKeyDictionary[ChatClient, int] = WeakKeyDictionary()


def lease(settings: ClientSettings) -> ChatClient:
    """Return the client of these settings, a new one if there is none; give it back with ``release``.

    Raises:
        CacheError: The folder of cached answers cannot be used.
        ModuleNotFoundError: The extra ``[llm]`` is not installed.
    """
    with _lock:
        client = _clients.get((settings, settings.whose))
        if client is None:
            client = _clients[settings, settings.whose] = ChatClient(settings)
        _users[client] = _users.get(client, 0) + 1
        return client


def release(client: ChatClient) -> None:
    """Give a client back; the last user closes its connections. Its counts, and so its budget, live on."""
    with _lock:
        _users[client] = max(0, _users.get(client, 0) - 1)
        if _users[client]:
            return
    client.close()
