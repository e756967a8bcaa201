"""One rank's share of KV exchange: page store, NIXL agent, puller, directory, opened and closed together."""

from __future__ import annotations

import msgspec

from antiphon.engines import wire
from antiphon.engines.directory import DirectoryServer
from antiphon.engines.directory_backend import StoreBackend
from antiphon.engines.handshake import split_address
from antiphon.engines.interfaces import find_interface, transport_environment
from antiphon.engines.link_faults import FaultyAgent
from antiphon.engines.nixl_agent import NixlAgent
from antiphon.engines.page_memory import PageMemory
from antiphon.engines.page_store import PageStore
from antiphon.engines.transfer import Puller


class RankService:
    """Serves `memory` to peers from construction to `close`. Knows nothing of SGLang."""

    def __init__(
        self,
        hello: wire.Hello,
        memory: PageMemory,
        key: bytes,
        *,
        on_gpu: bool = False,
        checksums: bool = False,
        fault_injection: bool = False,
    ) -> None:
        """`hello` says who this is and listens on its own entry of `kv_addresses`; what NIXL and the store
        know is filled in here. Raises ValueError, OSError or NixlError saying what to do."""
        host, port = split_address(hello.kv_addresses[hello.rank])
        environment = transport_environment(find_interface(host), on_gpu=on_gpu)
        name = f"{hello.engine_id}-{hello.incarnation}-{hello.rank}"
        self.store = PageStore(memory.n_pages, memory, checksums=checksums)
        self._agent = NixlAgent(name, memory.address, memory.n_pages * memory.page_bytes, environment)
        self.hello = msgspec.structs.replace(
            hello,
            transport="nixl",
            agent_name=name,
            agent_metadata=self._agent.metadata,
            store_address=memory.address,
            store_pages=memory.n_pages,
            page_bytes=memory.page_bytes,
        )
        faulty = FaultyAgent(self._agent, memory, memory.page_bytes) if fault_injection else None
        self.puller = Puller(self.hello, self.store, faulty or self._agent, key)
        backend = StoreBackend(self.hello, self.store, self.puller, faulty_agent=faulty)
        try:
            self._server = DirectoryServer(backend, key, host, port)
        except OSError:
            self._agent.close()
            raise
        self._server.start()

    def close(self) -> None:
        self._server.close()
        self.puller.close()
        self._agent.close()
