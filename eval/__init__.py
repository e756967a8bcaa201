"""Evaluation: claims and how they are measured.

stack.py   start and stop a whole stack as child processes: Valkey, engines, gateway
verify.py  teacher-forced check of a result's tokens with transformers
demo.py    `make demo`: one command from nothing to a checked result
bench.py   `make bench`: ratios measured in one run
Latency profiles (`policies/data`) and clusters (`clusters/*.toml`)
    fit.py         coefficients from points: the command; least_squares.py is the arithmetic
    fit_points.py  points from a file, or from AIConfigurator; aiconfigurator_query.py runs in its Python
    hardware.py    GPUs and models by specification
    cluster_files.py     bundled clusters by name
    dynamo_replay.py     Dynamo's offline replay of the same sessions; dynamo_script.py runs in its Python
"""
