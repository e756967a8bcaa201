"""Traces: recorded or generated agent sessions, and driving them against a gateway.

schema.py    SessionTrace, RoundTrace; one JSON line per session
readers.py   files to sessions, by content: our own form and the normalised `rounds` form
shape.py     pure changes of a trace: scale lengths, cap gaps, fit a window
arrivals.py  when sessions start: Poisson or as recorded, with a bound on live sessions
prompts.py   token ids from token counts, so that every round extends its session
replay.py    `antiphon replay`: the open-loop driver over HTTP
results.py   result file "antiphon.result/1", percentiles, the closing table
data/        small traces that ship with the package
"""
