"""Engines: what runs the model, and how KV pages move between them.

Ports
    base.py        the `Engine` protocol that the scheduler's driver speaks, and its values
    wire.py        frames of the directory protocol (scheduler <-> engine, engine <-> engine)
    page_hash.py   names of KV pages: SGLang's chained hashes
    prompt.py      the token ids of a prompt that grows from round to round
    registry.py    the fleet's list of engines in Redis: heartbeat and reader
    fleet_secrets.py     what is made from the fleet key: signatures of records, the key of engines' HTTP
    fleet_secrets.py what is made from the fleet key: signatures of records, the key of engines' HTTP
Adapters on the scheduler's side
    http.py        `HttpEngine`: SGLang's HTTP API and the directory
    http_events.py the events of a response, with their deadlines
    whole_answers.py     what comes in one piece: loads, the end of a prefill
    stream.py      one streamed answer: what we ask for beyond the client; sse.py parses its events
    directory_client.py  both clients of the directory: asyncio (scheduler) and blocking (linker)
    handshake.py   authentication of both sides, addresses, the fleet key
Inside an engine
    linker.py      `AntiphonLinker`, SGLang's out-of-tree cache linker: one per rank
    linker_config.py     what it is told on SGLang's command line
    device_pool.py SGLang's KV pool as pages; device_copy.py copies them, on a CPU or a GPU
    worker.py      a thread that works off a queue
    page_store.py  host memory of pages: slots, states, pins, eviction
    page_index.py  its books: which page is where, what to evict; page_memory.py is its bytes
    rank_service.py      one rank's store, NIXL agent, puller and directory, opened and closed together
    nixl_agent.py  the one thread that owns NIXL
    directory.py   the directory service, on threads of its own
    directory_backend.py what it answers from: store and puller
    transfer.py    pulling pages from a peer: reserve, read, confirm, publish
    breaker.py     leaves a failing peer alone for a while
    interfaces.py  network interfaces by name or address
Starting engines
    launcher.py    `antiphon engine`: one SGLang server with our linker, registered in the ledger
    launch_options.py    what it takes, checks, and turns into SGLang flags
    cpu_shims.py   what SGLang 0.5.23 lacks on a machine without a GPU
    tiny_model.py  `antiphon tiny-model`: a small random checkpoint, same bytes for the same seed
Simulated engines (the same protocols, virtual KV)
    simulated.py   `antiphon engine --simulated`, put together
    simulated_http.py    its routes; simulated_api.py is what they say,
                         simulated_logprobs.py and simulated_schema.py what a sampler would add
    simulated_gate.py    the key that its HTTP asks for
    simulated_loop.py    its batch loop; simulated_request.py one request in it
    virtual_kv.py  pages without bytes; virtual_directory.py serves them
    scripts.py, faults.py  what it answers, and what it does wrong, on command
    link_faults.py what READs do wrong on command, in real engines too
Simulated time (no process, no tokens, no clock: the scheduler's heap driver moves it)
    cluster.py     cluster files: engines, links, targets, prices
    chains.py      names of KV without hashes: branches and chains
    closed_form.py the batch loop of simulated_loop.py in closed form; closed_form_request.py one request
    decode_batch.py its running batch; decode_run.py the arithmetic of a run of decode steps
    closed_form_kv.py      its KV; tiers.py is one tier: device pool or page store; held.py a stretch in it
    links.py       pulls that share the links of their two ends
"""
