"""What is made from the fleet key, so that the key itself proves nothing but itself to a directory.

Each purpose has a key of its own: who learns one of them learns neither the fleet key nor the others.
"""

from __future__ import annotations

import hmac

ENGINE_KEY_PREFIX = "ek-"


def engine_http_key(fleet_key: bytes) -> str:
    """What a scheduler presents to an engine's HTTP as `Authorization: Bearer`; one for the whole fleet."""
    return ENGINE_KEY_PREFIX + hmac.digest(fleet_key, b"antiphon engine http", "sha256").hex()


def record_signature(fleet_key: bytes, fleet: str, record: bytes) -> str:
    """Of an engine's record in the ledger, as its bytes stand there. They name engine and incarnation."""
    secret = hmac.digest(fleet_key, b"antiphon engine record", "sha256")
    name = fleet.encode()
    return hmac.digest(secret, len(name).to_bytes(4, "big") + name + record, "sha256").hex()


def is_signed(fleet_key: bytes, fleet: str, record: bytes, signature: str) -> bool:
    expected = record_signature(fleet_key, fleet, record)
    return hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace"))
