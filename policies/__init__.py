"""Policies: one decision each, pure functions over immutable views.

base.py      RoundView, EngineView, ClusterView, Placement, Reject, and the protocols
latency.py   formulas and coefficients: prefill, decode step, transfer (data/*.json are profiles)
home.py      the shared default rule for choosing a home, and which engines a round can use
arms.py      what each arm costs a round on given engines
adaptive.py  ours, the default: what is expected to lose the fewest SLOs; forecast.py predicts that for each
             choice, shortlists.py says which engines are looked at
choices.py   steps that several policies share
local.py     every round is prefilled on its home
remote.py    every round is prefilled in the prefill pool, which recomputes what it lacks
remote_pull_always.py  every round is prefilled in the prefill pool, which fetches what the home holds
first_remote.py        ConServe: a session's first round in the prefill pool, every later one on its home
threshold.py           llm-d: remote if the home lacks many tokens
threshold_queue.py     Dynamo, classic: remote if the home lacks many tokens and few rounds wait
isl_bounding.py        Dynamo, conditional disaggregation: local if the home lacks little of the prompt
ampd.py      AMPD's Algorithm 1: three tiers over `local` and `remote_pull`
ppd.py       PPD: a static table, computed from the latency model, of which rounds the home prefills
mooncake.py  Mooncake's Algorithm 1: least predicted TTFT, history from the best holder
deflect.py   prefill deflection: local where its chunks keep the ITL targets there and it is no slower
checked.py   what stands in when a policy or an ordering fails
pools.py     which engine should change pool: weighed by how full each pool is, or by Arrow's rule
leaving.py   what goes before a policy: sessions whose home is to be stopped move
fcfs.py      the default ordering of a prefill queue
edf.py, sjf.py, ampd_reorder.py   by deadline; shortest first with ageing; AMPD's permutations of a window
registry.py  name -> policy; the only list
"""
