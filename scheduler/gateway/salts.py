"""What keeps the KV of tenants apart: page hashes, and SGLang's own radix keys, begin with a salt."""

from __future__ import annotations

import base64
import hmac


class CacheSalts:
    """Makes the `cache_salt` of rounds."""

    def __init__(self, fleet_key: bytes, *, apart: bool) -> None:
        """Not `apart`: there is one tenant, and the client's own salt is passed on as it is."""
        self._secret = hmac.digest(fleet_key, b"antiphon cache salt", "sha256")
        self._apart = apart

    def of(self, tenant: str, given: str | None) -> str | None:
        """The engine's `cache_salt`: nobody without the fleet key can make another tenant's."""
        if not self._apart:
            return given
        text = f"{tenant}\0{given or ''}".encode("utf-8", "surrogatepass")
        return base64.b64encode(hmac.digest(self._secret, text, "sha256")).decode()
