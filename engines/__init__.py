"""Engines: what runs the model, and how KV pages move between them.

Ports
    base.py        the `Engine` protocol that the scheduler's driver speaks, and its values
    wire.py        frames of the directory protocol (scheduler <-> engine, engine <-> engine)
    page_hash.py   names of KV pages: SGLang's chained hashes
Adapters on the scheduler's side
    http.py        `HttpEngine`: SGLang's HTTP API and the directory, by aiohttp and asyncio streams
    directory_client.py  both clients of the directory: asyncio (scheduler) and blocking (linker)
Inside an engine
    linker.py      `AntiphonLinker`, SGLang's out-of-tree cache linker: one per rank
    page_store.py  registered host memory: slots, states, pins, parent links, eviction
    device_copy.py device pages <-> store slots, on a CPU and (pinned, with events) on a GPU
    nixl_agent.py  the one thread that owns NIXL
    directory.py   the engine's directory service, on threads of its own
    transfer.py    pulling pages from a peer: reserve, read, confirm, publish
Starting engines
    launcher.py    `antiphon engine`: one SGLang server with our linker, registered in the ledger
    cpu_shims.py   what SGLang 0.5.23 lacks on a machine without a GPU
    simulated.py   `antiphon engine --simulated`: the same protocols with virtual KV
    tiny_model.py  `antiphon tiny-model`: a small random checkpoint, same bytes for the same seed
"""
