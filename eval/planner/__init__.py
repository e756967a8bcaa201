"""The planner: how many engines of which GPUs for which phase, and whether to split the phases at all.

plans.py         what is chosen: engine types, groups of engines, plans; their price and GPUs
ask.py           what is asked: model, GPUs, targets, load, what may vary
prices.py        prices, networks and host memory of GPUs: data/prices.toml or the user's own
engine_types.py  GPUs by tensor-parallel degrees: which engines an ask can have, and why not the others
workload.py      a trace in steady state: the sessions of a window of time, some of them under way
score.py         a plan, simulated on a workload: attainment and cost
pool.py          processes that score plans on windows of one workload
candidates.py    every plan within a budget
screen.py        orders thousands of plans without simulating any
neighbours.py    plans one step from a plan, in its fleet or its settings
search.py        the search: successive halving, refinement, a last rung on fresh windows
effort.py        how much of that is simulated, and on which windows
refinement.py    the plans that lead, varied one step at a time
lasting.py       whether those that lead in the end do so for long
tau.py           tau of AMPD's Eq. 5: how slow one engine is in one role, by load
curves.py        such tables, made by simulation
solver.py        a mixed-integer linear program for HiGHS
milp.py          AMPD's Eq. 5, alone and completed, as such a program
solve.py         the program's answer to an ask, and the constraints that bind it
brute.py         every plan of a budget simulated, for standard.py
standard.py      `make plan-eval`: plans against brute force; standard_ask.py says at which load,
                 standard_page.py shows what it found
plan.py          `antiphon plan`; read_sessions.py reads what it is for
planned.py       its answer; plan_table.py shows it on a terminal, plan_document.py is the JSON
around.py        an engine more or fewer, other settings, cheaper plans; the front
explain.py       `--explain`: what keeps a plan from being better or cheaper
cases.py         `--cases`: where co-location is said to win, tried with the ask's load
plan_files.py    a plan as cluster.toml, antiphon.toml and the engines' start lines
plan_plots.py    the front of attainment against cost, as PNG
plan_page.py     all of it as one HTML page
"""
