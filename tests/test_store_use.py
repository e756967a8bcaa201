"""How full stores are with KV that will be asked for again: worked by hand, and against a plain model."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from antiphon.scheduler.store_use import FORGET_AT, Returns, StoreUse

A, B = ("t", "a"), ("t", "b")


def test_the_horizon_is_where_as_many_return_as_end() -> None:
    """10 sessions with 5 gaps of up to 4 s, 5 of up to 16 s, 5 of up to 64 s: from 16 s on 10 came back."""
    returns = Returns()
    assert returns.horizon_s == 65536.0
    for _ in range(10):
        returns.began()
    for gap_s in (3.0, 10.0, 60.0) * 5:
        returns.came_back(gap_s)
    assert returns.horizon_s == 32.0  # twice the bucket in which the tenth longest gap lies


def test_sessions_of_one_round_leave_no_horizon() -> None:
    """Nobody ever comes back but one, at once: whoever is idle for more than a second is gone."""
    returns = Returns()
    for _ in range(100):
        returns.began()
    assert returns.came_back(0.5) and returns.horizon_s == 1.0
    assert not returns.came_back(0.5)


def test_old_rounds_are_forgotten() -> None:
    """After 20,000 short gaps and again as many long ones the long ones decide."""
    returns = Returns()
    for number in range(2 * FORGET_AT):
        if number % 10 == 0:
            returns.began()
        returns.came_back(1.0 if number < FORGET_AT else 500.0)
    assert returns.horizon_s == 1024.0


def away(horizon_s: float) -> Returns:
    """Where whoever is idle for longer is not expected back."""
    returns = Returns()
    returns.horizon_s = horizon_s
    return returns


def test_idle_sessions_count_until_the_horizon() -> None:
    """A works, B has been idle since 10 s: at 15 s both count for a horizon of 5 s, a moment later only A."""
    store = StoreUse(away(5.0))
    store.use(A, 1000)
    store.use(B, 500)
    store.leave(B, 10.0)
    assert (store.live_tokens(15.0), store.expires_s(15.0)) == (1500, 15.0)
    assert (store.live_tokens(15.01), store.expires_s(15.01)) == (1000, float("inf"))
    assert store.live_tokens(15.0) == 1500, "asking has changed something"
    store.leave(B, 20.0)  # it is not at work here: nothing happens
    store.use(A, 200)  # shorter than before, after a compaction: what is there stays
    assert store.live_tokens(99.0) == 1000


EVENTS = st.lists(
    st.tuples(st.sampled_from(["use", "leave", "look"]), st.integers(0, 4), st.integers(0, 100)), max_size=60
)


@settings(max_examples=200, deadline=None)
@given(EVENTS, st.sampled_from([1.0, 7.0, 100.0]))
def test_a_plain_model(events: list[tuple[str, int, int]], horizon_s: float) -> None:
    """Whatever comes, what counts is the sum over sessions at work and those idle within the horizon."""
    store, working, idle, now = (
        StoreUse(away(horizon_s)),
        dict[int, int](),
        dict[int, tuple[int, float]](),
        0.0,
    )
    for deed, who, amount in events:
        now += amount / 20
        session = ("t", str(who))
        if deed == "use":
            store.use(session, amount)
            before = working.pop(who, 0) or idle.pop(who, (0, 0.0))[0]
            working[who] = max(amount, before)
        elif deed == "leave":
            store.leave(session, now)
            if who in working:
                idle[who] = working.pop(who), now
                idle = {one: (tokens, at) for one, (tokens, at) in idle.items() if at + horizon_s >= now}
        else:
            live = [tokens for tokens, at in idle.values() if at + horizon_s >= now]
            assert store.live_tokens(now) == sum(working.values()) + sum(live)
        store.check_invariants()
