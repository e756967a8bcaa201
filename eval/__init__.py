"""Evaluation: claims and how they are measured.

stack.py   start and stop a whole stack as child processes: Valkey, engines, gateway
verify.py  teacher-forced check of a result's tokens with transformers
demo.py    `make demo`: one command from nothing to a checked result
bench.py   `make bench`: ratios measured in one run
"""
