"""The first look at the endpoints: does each answer, and does it serve the model?"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from ppg_gym.llm.chat import EndpointError
from ppg_gym.llm.endpoints import CallError, Endpoint
from ppg_gym.llm.settings import ClientSettings
from ppg_gym.nearest import did_you_mean

GLANCE = 10.0  # most seconds to wait for the list of models

_log = logging.getLogger("ppg_gym.llm")


async def look(endpoints: Sequence[Endpoint], settings: ClientSettings, retrying: Any) -> None:
    """Check every endpoint; one of several may be away.

    Args:
        endpoints: Those of the model.
        settings: The model's name, the timeout, and names for messages.
        retrying: Repeats a call that failed, for a while.

    Raises:
        EndpointError: None answers, one refuses, or one does not serve the model.
    """
    began = time.monotonic()
    seen = await asyncio.gather(*(_models(endpoint, settings, retrying.copy()) for endpoint in endpoints))
    failures = [models for models in seen if isinstance(models, CallError)]
    for failure in failures:
        if not failure.again:
            raise EndpointError(f"expected an endpoint that serves {settings.model!r}: {failure.reason}")
    if len(failures) == len(endpoints):
        listed = "; ".join(failure.reason for failure in failures)
        raise EndpointError(
            f"expected an endpoint that answers, got none within {time.monotonic() - began:.1f} s: {listed};"
            f" start the server or correct {settings.whose}['base_url']"
        )
    for failure in failures:
        _log.warning("%s; going on with the other endpoints", failure.reason)
    for endpoint, models in zip(endpoints, seen, strict=True):
        if isinstance(models, list) and models and settings.model not in models:
            hint = did_you_mean(settings.model, models, f"it serves {', '.join(models[:5])}")
            raise EndpointError(
                f"expected {endpoint.url} to serve {settings.whose}['model'] = {settings.model!r}, got no such"
                f" model{hint}"
            )


async def _models(endpoint: Endpoint, settings: ClientSettings, retrying: Any) -> list[str] | CallError | None:
    try:
        models: list[str] | None = await retrying(endpoint.models, min(settings.timeout, GLANCE))
    except CallError as failure:
        return failure
    return models
