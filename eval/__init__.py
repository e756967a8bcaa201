"""Evaluation: claims and how they are measured.

stack.py   start and stop a whole stack as child processes: Valkey, engines, gateway
verify.py  teacher-forced check of a result's tokens with transformers
demo.py    `make demo`: one command from nothing to a checked result
bench.py   `make bench`: ratios measured in one run; bench_decisions.py: cores that decide,
           bench_simulation.py: the simulator's speed, bench_append.py: rounds as histories grow
Fuzzing the core
    fuzz.py        `make fuzz`: episodes, and what they must have tried; fuzz_episode.py is one of them
    fuzz_world.py  makes the events; fuzz_driver.py follows the commands; fuzz_policy.py draws
    state_digest.py        whether anything in an object has changed
Simulating
    simulate.py    `antiphon simulate`; simulation_plan.py what it is told, simulation_result.py what it found
    load.py        engine-seconds of a session: `--load`, and what an idle fleet would attain
    sweep.py       `antiphon sweep`; sweep_spec.py is its grid
    standard.py    `make eval`; standard_grid.py is what it runs, standard_traces.py on which sessions,
                   standard_data.py reads what it found, standard_page.py shows it with standard_tables.py
                   and standard_plots.py
    drift.py       `make drift`: a day with a shifting mix, static splits against pools that follow the load;
                   drift_day.py makes the day, drift_types.py is what a run found, drift_page.py shows it
    report.py      `antiphon report`; report_data.py groups the results; report_tables.py, report_plots.py
                   show them, report_time.py shows rounds in time; report_style.py is the plots' look,
                   report_page.py makes the HTML of data/report.html.j2
    counterfactual.py      `antiphon counterfactual`; recorded_fleet.py makes a cluster of a recording
    cluster_toml.py        cluster files written
Planning
    planner/       `antiphon plan`: how many engines of which GPUs for which phase; its map is there
Fidelity
    calibrate.py   `antiphon calibrate`; probe.py times an engine, calibration.py fits what it measured
    fidelity.py    `make fidelity`: live against simulated; fidelity_live.py is its live half, gateway_cost.py
                   what an idle gateway costs a request
Latency profiles (`policies/data`) and clusters (`clusters/*.toml`)
    fit.py         coefficients from points: the command; least_squares.py is the arithmetic
    fit_points.py  points from a file, or from AIConfigurator; aiconfigurator_query.py runs in its Python
    profile_tables.py    writes docs/latency-profiles.md
    hardware.py    GPUs and models by specification; known_models.py the models that ship, with their profiles
    cluster_files.py     bundled clusters by name
    dynamo_replay.py     Dynamo's offline replay of the same sessions; dynamo_script.py runs in its Python
"""
