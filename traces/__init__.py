"""Traces: recorded or generated agent sessions, and driving them against a gateway.

Sessions as data (pure, but for reading the file)
    recording.py   what `antiphon serve --record` wrote, joined into sessions
    schema.py      SessionTrace, RoundTrace; one JSON line per session; what makes a session sound
    readers.py     traces to sessions: finds a file's format by its content; says whose line is bad
    containers.py  what a trace lies in: a file, folder or archive, packed or not; its digest
    formats.py     what a format is; format_own.py, format_rounds.py: our own forms
    format_mooncake.py (sessions recovered), format_mooncake_sessions.py, format_azure.py,
    format_weka.py, format_aiperf.py, format_bailian.py, format_agentic.py
                   other tools' formats, one module each
    blocks.py      what a round kept, told by hashed blocks; shared_blocks.py: which sessions begin alike
    writers.py     sessions to files: our own form, Mooncake's, with sessions, agentic; losses.py: what
                   such a format cannot say
    shape.py       scale lengths, cap gaps, fit a window
    arrivals.py    when sessions start: Poisson or as recorded, with a bound on live sessions
    profiles.py    kinds of agents as data (data/profiles.toml); generate.py makes seeded sessions of them
    info.py        what a trace holds and lacks; plots.py shows it in a terminal
    output.py      a file that is there whole or not at all
    prompts.py     token ids from token counts, so that every round extends its session
Driving them over HTTP
    plan.py        what a replay is told and what it is going to send
    replay.py      `antiphon replay`: the driver
    gateway_client.py  what it says to a gateway; answers.py reads one streamed answer
    result_types.py        the result object "antiphon.result/1" and the record of a round, as data
    results.py     adds a run up; result_files.py reads and writes results and rounds
    display.py     progress and the closing table; provenance.py: commit and machine
data/demo.jsonl    a small agent trace that ships with the package
"""
