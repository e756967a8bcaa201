"""The scheduler: the core that decides, what drives it, and the doors to it.

Core (no clock, no I/O)
    messages.py    events in, commands out: the whole vocabulary; outcomes.py: how a round ended, its receipt
    states.py      a round's life as tables; the record of a round in flight
    residency.py   which engine is believed to hold which prefix
    fleet.py       one engine's books: reservations, queue, windows -> EngineView
    tallies.py     what such a book is made of: windows, bytes owed, stall budgets, the prefill queue
    store_use.py   how full page stores are with KV of sessions that are expected back
    sessions.py    what is remembered of sessions between rounds
    books.py       fleet, sessions and residency in one place: views, reservations, beliefs
    receipts.py    a round's receipt, from its record
    standing.py    which engines and links can be counted on now: draining, suspect, shunned (breakers.py)
    attempts.py    what the core does with a round: decide, start, give up a try, end
    core.py        Scheduler.receive(event, now) -> commands; core_config.py is what it can be told
    corrections.py what the predictions for an engine are multiplied by; observer.py learns it from rounds,
                   clean_times.py says which of their times tell something
    answer_buffer.py  what was answered and is not read yet: a budget for all answers
    admission.py   whether a round is let in, or refused because it would only wait
    demand.py      work that rounds bring to each pool, counted while somebody re-plans the pools
    pool_looks.py  what a rule for the pools is shown of books and demand; repooling.py: the controller, an
                   engine's life between pools as a table
    what_if.py     what would be decided for a round, without a trace
    likely_home.py where a session's home probably is, when nobody can say
    checks.py      check_invariants(): do the books contradict each other
Drivers and state
    runtime.py     asyncio driver: commands -> engine and ledger calls, results -> events
    simulation.py  heap driver: the same core in simulated time, on closed-form engines
    simulated_flips.py     the same with engines that change pool
    simulated_sessions.py  its clients: what they send, when, and which pages their prompts share
    engine_calls.py  the calls on engines that answer once
    answering.py   the one that streams: relayed to its client, over all engines that it takes
    resume.py      how an answer that broke goes on elsewhere, and what of the rest its client has
    rounds.py      a round as the gateway sees it: its request, its stream to the client
    hints.py       what a client says of it and of what follows; hint_headers.py: in headers
    recorder.py    the driver's calls to the ledger: claim, move a home, record, publish reservations
    told.py        of which sessions the ledger knows all already
    explanation.py what would be decided of a round, asked of ledger and core without a trace
    drainer.py     moves the sessions of an engine that is to be stopped; drain_store.py: what the ledger
                   knows of that, drain_targets.py: where they go, drain_copy.py: their KV
    pool_keeper.py pools that follow the load, live: who leads, flips step by step; pool_store.py: what the
                   ledger knows of that
    discovery.py   engine registry and configuration -> EngineUp / EngineDown
    heartbeat.py   keeps this replica's leases alive
    ledger.py      Redis: claims, completions, residency, totals (data/*.lua)
    ledger_connection.py  one connection to it: deadlines, errors, names of keys
    lease_states.py       what may happen to a session's lease, as a table
    settling.py           claims that nobody waited for are given back
    rebuilding.py         who holds a prompt, asked of the engines where the ledger has lost it
    retries.py            calls that a client makes again are the same round; answers.py: what they were told
    ledger_answers.py     what its scripts answer, as our types
    ledger_views.py       reading it: sessions, receipts, counters
    session_store.py      beside it: whose conversation a request goes on with, and what was said of sessions
    session_documents.py  a session as its clients see it
    response_store.py      stored responses (`/v1/responses`), and the messages up to them
    token_log.py   beside it: what was said in each session, as ids and messages; conversation.py adds it up
    receipt_log.py the latest receipts of this replica
    round_log.py   `serve --record`: every round as a line of lengths and times
    known_prefixes.py      how much of a prompt was there before; recorded_facts.py: the fleet at that time
    valkey.py      the embedded Valkey
Doors
    gateway/       what speaks HTTP: it has a map of its own
    client/, langchain/    they install as antiphon.client and antiphon.langchain
    replica.py     one replica put together: its models, discovery, ledger
    models.py      which models that is; model_fleet.py: core, driver and recording of each
    serve.py       the process: from configuration to a clean end; uvicorn; stopping.py: how it ends
    config.py      antiphon.toml -> frozen config; access_config.py: who may come in, and how much each may do
    session_config.py  [session]; repool_config.py  [repool]
    api_keys.py    API keys, as digests: of the configuration, and of the ledger
    fleet_key.py   the key that scheduler and engines prove to each other
    engine_keys.py the keys that configured engines ask for
    metrics.py, logs.py, errors.py
    cli.py         the `antiphon` command; doctor.py proves an installation
    cli_evaluation.py      simulate, sweep, report, ...; cli_trace.py: antiphon trace ..
    cli_keys.py    antiphon keys ..; cli_drain.py: antiphon drain; cli_plan.py: plan
    cli_options.py options that several of them have
    sources.py     where its listings come from: gateway or ledger; tables.py shows them
"""
