"""A peer for transfer tests: one rank's KV exchange in a process of its own, driven by lines on stdin.

`python -m tests.kv_peer` prints its address, then obeys: `put SEED COUNT` stores a chain of pages, `clock S`
moves the store's clock, `quit` ends. Every command is answered by a line.
"""

from __future__ import annotations

import hashlib
import json
import sys
import uuid

from antiphon.engines.launch_options import find_free_ports
from antiphon.engines.page_memory import PageMemory
from antiphon.engines.page_store import PageStore
from antiphon.engines.rank_service import RankService
from antiphon.engines.wire import Hello

KEY = b"kv-tests-fleet-key-0123456789"
PAGE_BYTES = 4096


def make_chain(seed: str, count: int) -> tuple[bytes, ...]:
    """Page hashes of a made-up chain."""
    hashes = []
    prior = b""
    for number in range(count):
        prior = hashlib.sha256(prior + f"{seed}/{number}".encode()).digest()
        hashes.append(prior)
    return tuple(hashes)


def page_content(page_hash: bytes, page_bytes: int = PAGE_BYTES) -> bytes:
    """What the page with this name must contain, so that every copy of it can be checked."""
    return (page_hash * (page_bytes // len(page_hash) + 1))[:page_bytes]


def fill_store(store: PageStore, hashes: tuple[bytes, ...], parent: bytes = b"") -> None:
    """Store pages with their proper content; fails if there is no room."""
    slots = store.allocate(len(hashes))
    assert len(slots) == len(hashes)
    assert store.memory is not None
    for slot, page_hash in zip(slots, hashes, strict=True):
        store.memory.view(slot)[:] = page_content(page_hash, store.memory.page_bytes)
    store.publish(parent, hashes, slots)


def free_port() -> int:
    """Outside the range from which outgoing connections get theirs: nobody takes it before it is bound."""
    return find_free_ports("127.0.0.1", 1)


def make_hello(engine_id: str, port: int, **changes: object) -> Hello:
    fields: dict[str, object] = {
        "engine_id": engine_id,
        "incarnation": uuid.uuid4().hex,
        "model_id": "tiny",
        "model_revision": "r1",
        "dtype": "float32",
        "page_size_tokens": 16,
        "page_bytes": PAGE_BYTES,
        "layout": "test",
        "pool_tokens": 1024,
        "store_pages": 0,
        "rank": 0,
        "world_size": 1,
        "kv_addresses": (f"127.0.0.1:{port}",),
        "transport": "nixl",
    }
    return Hello(**(fields | changes))  # type: ignore[arg-type]


def main() -> None:
    options = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    port = options.get("port") or free_port()
    page_bytes = options.get("page_bytes", PAGE_BYTES)
    service = RankService(
        make_hello(options.get("engine_id", "peer"), port, **options.get("hello", {})),
        PageMemory(options.get("pages", 256), page_bytes),
        KEY,
        checksums=options.get("checksums", False),
        fault_injection=True,
    )
    print(json.dumps({"address": f"127.0.0.1:{port}", "incarnation": service.hello.incarnation}), flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "put":
            fill_store(service.store, make_chain(arguments[0], int(arguments[1])))
        elif command == "begin-offload":
            service.store.begin_offload()
        elif command == "end-offload":
            service.store.end_offload()
        elif command == "counts":
            counts = service.store.counts()
            print(json.dumps({"free": counts.free, "pins": counts.pins}), flush=True)
            continue
        elif command == "quit":
            break
        print("ok", flush=True)
    service.close()


if __name__ == "__main__":
    main()
