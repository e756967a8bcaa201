"""Faults on the live stack: what `make faults` does, and its short form in the test suite (docs/faults.md).

The matrix
    cells.py         components, faults and phases; names, patterns, seeds
    trial.py         one run of one cell: sessions, the fault in its phase, the verdict
    results.py       what a run is given and what it shows
    conversation.py  what a session asks next, and the prompts that its request may rightly become
    client.py        a client with a deadline and one retry, at another replica
    watch.py         waits until the watched round is in the phase
    injury.py        what is done to a component, and undone
    history.py       the checker: lost, doubled, wrong, hung
    aftermath.py     what must be true afterwards: no leases, no rounds, no pins left; counters add up
    table.py         the result as JSON and as a table
    __main__.py      the command; real.py is its part on real engines
The stack
    fleet.py         Valkey, two gateways, three engines, each behind proxies; repaired between runs
    readiness.py     what is waited for before a run
    processes.py     start, kill -9, SIGSTOP and SIGCONT, by pid
    proxy.py         TCP that can be slow, cut and healed
The ledger's histories
    linearizability.py   replicas that play rounds at once, with delays, deaths and lost answers
    lease_model.py       the model that their answers are checked against
"""
