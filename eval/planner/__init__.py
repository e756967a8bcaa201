"""The planner: how many engines of which GPUs for which phase, and whether to split the phases at all.

plans.py         what is chosen: engine types, groups of engines, plans; their price and GPUs
ask.py           what is asked: model, GPUs, targets, load, what may vary
prices.py        prices, networks and host memory of GPUs: data/prices.toml or the user's own
engine_types.py  GPUs by tensor-parallel degrees: which engines an ask can have, and why not the others
workload.py      a trace in steady state: the sessions of a window of time, some of them under way
score.py         a plan, simulated on a workload: attainment and cost
"""
