"""Which gateway, by arguments or by the environment; the same for both clients."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import httpx

from antiphon.client.wire import checked_base_url

BASE_URL_VARIABLE, API_KEY_VARIABLE = "ANTIPHON_BASE_URL", "ANTIPHON_API_KEY"
DEFAULT_BASE_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 600.0
"""Without a byte: as long as a round may wait and run."""
CONNECT_DEADLINE_S = 10.0
MAX_RETRIES = 2


def http_settings(base_url: str | None, api_key: str | None, timeout_s: float) -> Mapping[str, Any]:
    """Arguments of `httpx.Client` and `httpx.AsyncClient`. Raises ValueError for a URL that is none."""
    url = base_url or os.environ.get(BASE_URL_VARIABLE) or DEFAULT_BASE_URL
    key = api_key or os.environ.get(API_KEY_VARIABLE) or "none"
    return {
        "base_url": checked_base_url(url),
        "headers": {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        "timeout": httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_DEADLINE_S)),
    }
