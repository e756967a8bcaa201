"""Policies: one decision each, pure functions over immutable views.

base.py      RoundView, EngineView, ClusterView, Placement, Reject, and the protocols
latency.py   formulas and coefficients: prefill, decode step, transfer (data/*.json are profiles)
home.py      the shared default rule for choosing a home, and which engines a round can use
arms.py      what each arm costs a round on given engines
local.py     every round is prefilled on its home
remote.py    every round is prefilled in the prefill pool, which recomputes what it lacks
ampd.py      AMPD's Algorithm 1: three tiers over `local` and `remote_pull`
checked.py   what stands in when a policy or an ordering fails
fcfs.py      the default ordering of a prefill queue
registry.py  name -> policy; the only list
"""
