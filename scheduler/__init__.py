"""The scheduler: the core that decides, what drives it, and the doors to it.

Core (no clock, no I/O)
    messages.py    events in, commands out: the whole vocabulary
    states.py      transition table of a round
    residency.py   which engine is believed to hold which prefix
    fleet.py       engine books: reservations, queues, windows -> EngineView
    core.py        Scheduler.receive(event, now) -> commands; check_invariants()
Drivers and state
    runtime.py     asyncio driver: commands -> engine and ledger calls, results -> events
    rounds.py      what the driver keeps of a round in flight: its request, its stream to the client
    discovery.py   engine registry -> EngineUp / EngineDown
    ledger.py      Redis: claims, completions, residency, leases, engine registry (data/*.lua)
    valkey.py      the embedded Valkey
Doors
    gateway.py     ASGI app: OpenAI routes, health, metrics, receipts
    requests.py    checks of what clients send; OpenAI-shaped errors
    prompts.py     tokenizer and chat template
    serve.py       wiring of one replica; uvicorn
    config.py      antiphon.toml -> frozen config
    metrics.py, logs.py, errors.py
    cli.py         the `antiphon` command
"""
