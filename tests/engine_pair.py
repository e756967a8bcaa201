"""The fixture `engine_pair`, of either kind of engine: a pytest plugin, named in `pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.simulated_helpers import Pair, simulated_pair


@pytest.fixture(scope="session")
def simulated_engines() -> Iterator[Pair]:
    with simulated_pair() as pair:
        yield pair


@pytest.fixture(params=["simulated", pytest.param("sglang", marks=pytest.mark.engine)])
def engine_pair(request: pytest.FixtureRequest) -> Pair:
    """A prefill and a decode engine of one fleet, shared by all tests: prompts must be a test's own."""
    if request.param == "simulated":
        simulated: Pair = request.getfixturevalue("simulated_engines")
        return simulated
    engines = request.getfixturevalue("sglang_pair")
    return Pair(engines.prefill, engines.decode, request.getfixturevalue("fleet_key"))
