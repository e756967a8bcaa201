"""What a planner is told of hardware: GPUs and models by name, the profiles of each, prices."""

from __future__ import annotations

import tomllib
from itertools import pairwise
from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.engines.cluster import load_cluster, resolve_engines
from antiphon.eval.cluster_files import bundled_clusters, find_cluster
from antiphon.eval.hardware import GPUS, device_tokens, gpu_name, gpu_named, shape_of
from antiphon.eval.known_models import (
    MODELS,
    KnownModel,
    degrees_for,
    model_named,
    profile_for,
    profile_name,
    read_models,
)
from antiphon.eval.planner.prices import PRICES, GpuPrice, price_of, read_prices
from antiphon.eval.profile_tables import (
    DEGREES,
    LEAST_TOKENS,
    entries_of,
    kv_tokens,
    page,
    slower_with_more,
)
from antiphon.policies.latency import LatencyModel, bundled_profiles, load_latency_model

PAGE = Path(__file__).parent.parent / "docs" / "latency-profiles.md"
KNOWN = read_models()
CONFIGS = {
    "qwen3-8b": {
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
    },
    "qwen3-32b": {
        "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 25600, "vocab_size": 151936,
    },
    "llama-3.1-70b": {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 28672, "vocab_size": 128256,
    },
    "qwen3-30b-a3b": {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "moe_intermediate_size": 768, "vocab_size": 151936, "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "mixtral-8x7b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip
"""What the published config.json of each says of its shape."""
FITTED = [name for name in bundled_profiles() if name != "tiny-cpu"]


def mine(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def of(error: pytest.ExceptionInfo[ValueError]) -> str:
    return str(error.value)


# ---------------------------------------------------------------- GPUs


@given(st.sampled_from(list(GPUS)), st.randoms(use_true_random=False))
def test_a_gpu_is_found_by_either_name_in_any_case(system: str, random: Random) -> None:
    """h100, H100_SXM: every mixture of cases of the two names is the same GPU."""
    for name in (system, gpu_name(system)):
        mixed = "".join(random.choice((c.upper(), c)) for c in name)
        assert gpu_named(f" {mixed} ") == (system, GPUS[system])


@pytest.mark.parametrize("name", ["", "h1", "h100_", "sxm", "v100"])
def test_an_unknown_gpu_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match="no GPU") as caught:
        gpu_named(name)
    assert all(gpu_name(system) in of(caught) for system in GPUS)


def test_gpus_have_names_and_labels_of_their_own() -> None:
    """Short names and labels tell them apart; what is scaled is scaled from one that is measured."""
    assert (
        len({gpu_name(system) for system in GPUS}) == len({gpu.label for gpu in GPUS.values()}) == len(GPUS)
    )
    assert all(not GPUS[gpu.scaled_from].scaled_from for gpu in GPUS.values() if gpu.scaled_from)


# ---------------------------------------------------------------- models


def test_the_models_that_ship_are_what_their_config_says() -> None:
    """models.toml holds the numbers that `shape_of` makes of each config.json."""
    assert set(KNOWN) == set(CONFIGS)
    for short, model in KNOWN.items():
        shape = shape_of(CONFIGS[short])
        fields = shape.__struct_fields__
        assert [getattr(model, name) for name in fields] == [getattr(shape, name) for name in fields], short
        assert profile_name(model.model, "h100_sxm", 1) == f"{short}-h100-tp1"


@pytest.mark.parametrize("name", [name for name in bundled_clusters() if name != "tiny-cpu"])
def test_clusters_models_and_prices_agree(name: str) -> None:
    """The cluster files' tokens, windows, links, host memory and prices are those of the data files."""
    path = find_cluster(name)
    cluster = load_cluster(path)
    prices = read_prices()
    for spec in resolve_engines(cluster, path.parent):
        _, model = model_named(spec.latency.model, KNOWN)
        (system,) = (system for system, gpu in GPUS.items() if gpu.label == spec.latency.gpu)
        price, gpus = price_of(system, prices), spec.latency.gpus
        kv_bytes = model.kv_bytes_per_token(gpus)
        assert kv_bytes == spec.latency.transfer.kv_bytes_per_token
        assert spec.group.device_tokens == device_tokens(model, GPUS[system], gpus, cluster.page_tokens)
        assert spec.group.store_tokens == price.store_tokens(gpus, kv_bytes, cluster.page_tokens)
        assert spec.group.link_bytes_per_s == price.nic_bytes_per_s
        assert spec.group.price_per_gpu_hour == price.price_per_gpu_hour
        assert cluster.window_tokens == model.window_tokens


@pytest.mark.parametrize("name", ["qwen3-32b", "QWEN3-32B", "Qwen/Qwen3-32B", " qwen/qwen3-32b "])
def test_a_model_is_found_by_either_name(name: str) -> None:
    assert model_named(name, KNOWN) == ("qwen3-32b", KNOWN["qwen3-32b"])


@pytest.mark.parametrize("name", ["", "qwen3", "Qwen3-32B-FP8"])
def test_an_unknown_model_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match="no model") as caught:
        model_named(name, KNOWN)
    assert all(short in of(caught) for short in KNOWN)


OWN = """
[small]
model = "me/Small"
layers = 2
kv_heads = 2
head_dim = 16
parameters = 1_000_000
active_parameters = 1_000_000
window_tokens = 4096
source = "here"
"""


def test_a_file_of_ones_own_adds_models(tmp_path: Path) -> None:
    """Beside those that ship; one of the same name replaces it; its profiles come first."""
    own = load_latency_model("qwen3-32b-h100-tp4")
    slower = msgspec.structs.replace(own, name="own", model="me/Small")
    (tmp_path / "own.json").write_bytes(msgspec.json.encode(slower))
    models = read_models(mine(tmp_path, OWN + 'profiles = ["own.json"]\n'))
    assert list(models) == [*KNOWN, "small"]
    small = models["small"]
    assert small.kv_bytes_per_token(1) == 2 * 2 * 2 * 16 * 2 and small.window_tokens == 4096
    assert profile_for(small, "h100", 4) == slower
    assert profile_for(small, "h100", 2) is None and profile_for(small, "h200", 4) is None
    assert degrees_for(small, "h100") == (4,) and degrees_for(small, "a100") == ()
    replaced = read_models(mine(tmp_path, OWN.replace("[small]", "[qwen3-8b]")))
    assert list(replaced) == list(KNOWN) and replaced["qwen3-8b"].model == "me/Small"


def test_a_file_of_models_that_ships_may_be_copied(tmp_path: Path) -> None:
    assert read_models(mine(tmp_path, MODELS.read_text())) == KNOWN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[small", "mine.toml"),
        (OWN + "surprise = 1", "surprise"),
        (OWN.replace("layers = 2", "layers = 0"), "layers"),
        (OWN.replace("layers = 2\n", ""), "layers"),
        (OWN + "expert_missed = 1.0", "expert_missed"),
        (OWN.replace("4096", '"4096"'), "window_tokens"),
    ],
)
def test_a_bad_file_of_models_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """File and key."""
    with pytest.raises(ValueError, match=message) as caught:
        read_models(mine(tmp_path, text))
    assert "mine.toml" in of(caught) and ("[small]: " in of(caught) or text == "[small")


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    for read in (read_models, read_prices):
        with pytest.raises(ValueError, match=r"none\.toml: cannot be read"):
            read(tmp_path / "none.toml")
    models = read_models(mine(tmp_path, OWN + 'profiles = ["gone.json"]\n'))
    with pytest.raises(ValueError, match=r"gone\.json"):
        profile_for(models["small"], "h100", 4)


# ---------------------------------------------------------------- profiles


@pytest.mark.parametrize("name", FITTED)
def test_a_bundled_profile_is_of_what_its_name_says(name: str) -> None:
    """Found by model, GPU and degree; errors of all points, small enough; scaled ones say so."""
    base, tp = name.rsplit("-tp", 1)
    short, gpu = base.rsplit("-", 1)
    model, (system, described) = KNOWN[short], gpu_named(gpu)
    found = profile_for(model, gpu, int(tp))
    assert found == load_latency_model(name) and found is not None and found.name == name
    assert (found.model, found.gpu, found.gpus) == (model.model, described.label, int(tp))
    assert found.transfer.kv_bytes_per_token == model.kv_bytes_per_token(int(tp))
    assert found.transfer.bytes_per_s == described.nic_bytes_per_s
    assert found.load is not None and found.load.bytes_per_s == described.host_bytes_per_s * int(tp)
    assert found.decode.expert_missed == model.expert_missed
    assert "aiconfigurator-core 0.12.0" in found.source and "fitted 20" in found.source
    assert bool(GPUS[system].scaled_from) == found.source.startswith("scaled, not measured")
    assert found.prefill_error is not None and found.decode_error is not None
    assert (found.prefill_error.points, found.decode_error.points) == (72, 63)
    for error in (found.prefill_error, found.decode_error):
        # 10.1 %: Llama on two H20, scaled from a fit that is off by 6.5 %
        assert 0 < error.mean < (0.105 if GPUS[system].scaled_from else 0.1)
        assert error.mean < error.p95 <= error.max < 0.4


NO_DATA = {"qwen3-30b-a3b-a100-tp8"}
"""Of them the database has no points."""


def test_every_engine_that_has_room_has_a_profile() -> None:
    """Where the weights leave 40,960 tokens of KV there is one; where they do not there is none."""
    wanted = {
        f"{short}-{gpu_name(system)}-tp{tp}"
        for short, model in KNOWN.items()
        for system in GPUS
        for tp in DEGREES
        if kv_tokens(model, system, tp) >= LEAST_TOKENS
    }
    assert set(FITTED) == wanted - NO_DATA
    assert wanted > NO_DATA


def by_degree(model: KnownModel, gpu: str) -> list[LatencyModel]:
    found = (profile_for(model, gpu, tp) for tp in degrees_for(model, gpu))
    return [profile for profile in found if profile is not None]


@pytest.mark.parametrize("short", list(KNOWN))
@pytest.mark.parametrize("gpu", [gpu_name(system) for system in GPUS if system != "l40s"])
def test_more_gpus_are_faster(short: str, gpu: str) -> None:
    """A prefill of 8,192 tokens and a decode step of 32 x 8,192 take less with each degree, and not less than
    the GPUs' share: twice the GPUs are at most twice as fast, within the errors of the fits."""
    profiles = by_degree(KNOWN[short], gpu)
    assert len(profiles) >= 2
    for fewer, more in pairwise(profiles):
        for before_s, after_s in (
            (fewer.prefill_s(8192, 0), more.prefill_s(8192, 0)),
            (fewer.decode_step_s(32, 32 * 8192), more.decode_step_s(32, 32 * 8192)),
        ):
            assert before_s / 2.2 < after_s < before_s, (fewer.name, more.name)


def test_gpus_without_nvlink_prefill_slower_by_four() -> None:
    """L40S: the database's all-reduce over PCIe costs more from four GPUs on than their arithmetic saves."""
    profiles = {profile.gpus: profile.prefill_s(8192, 0) for profile in by_degree(KNOWN["qwen3-8b"], "l40s")}
    assert profiles[2] < profiles[1] < profiles[4] < profiles[8]


def test_the_page_of_profiles_is_what_is_made_of_them() -> None:
    """docs/latency-profiles.md as `python -m antiphon.eval.profile_tables` writes it."""
    assert PAGE.read_text() == page(KNOWN)


def test_the_page_says_where_more_gpus_lose() -> None:
    """Only where they do."""
    entries, left = entries_of(KNOWN["qwen3-32b"])
    assert [said.split()[0] for said in slower_with_more(entries)][:2] == ["l40s-tp4", "l40s-tp8"]
    assert left.too_small == ["h100-tp1", "a100-tp1", "l40s-tp1"] and not left.no_data
    assert not slower_with_more(entry for entry in entries if entry.gpu != "l40s")


# ---------------------------------------------------------------- prices

PRICE = """
[{gpu}]
price_per_gpu_hour = 2.0
gpus_per_node = 8
nic_bytes_per_s = 50e9
store_bytes_per_gpu = 1_000_000
"""


def test_every_gpu_has_a_price() -> None:
    """The file that ships is in the form of one that a user may copy, and names every GPU."""
    prices = read_prices()
    assert set(prices) == {gpu_name(system) for system in GPUS}
    assert read_prices(PRICES) == prices
    for system, gpu in GPUS.items():
        assert price_of(system, prices).nic_bytes_per_s == gpu.nic_bytes_per_s
    assert set(tomllib.loads(PRICES.read_text())["h100"]) == set(GpuPrice.__struct_fields__)


def test_a_file_of_prices_stands_alone(tmp_path: Path) -> None:
    """Any name of a GPU will do in it; one that it lacks has no price, whatever the bundled file says."""
    prices = read_prices(mine(tmp_path, PRICE.format(gpu="H100_SXM")))
    assert list(prices) == ["h100"] and price_of("H100", prices).price_per_gpu_hour == 2.0
    with pytest.raises(ValueError, match="no price for a100; the file of prices has h100"):
        price_of("a100", prices)


def test_page_stores_hold_whole_pages() -> None:
    """2 GPUs x 1 MB at 100 bytes a token: 20,000 tokens, in pages of 64 19,968."""
    assert GpuPrice(1.0, 8, 1e9, 1_000_000).store_tokens(2, 100) == 19_968


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h100 = 1", r"\[h100\]: Expected `object`"),
        ("price_per_gpu_hour = 2.0", r"\[price_per_gpu_hour\]: Expected `object`"),
        ("= 1", r"mine\.toml"),
        (PRICE.format(gpu="v100"), "no GPU 'v100'"),
        (PRICE.format(gpu="h100") + PRICE.format(gpu="h100_sxm"), "h100 is there twice"),
        (PRICE.format(gpu="h100") + "currency = 'EUR'", "currency"),
        (PRICE.format(gpu="h100").replace("2.0", "-2.0"), "price_per_gpu_hour"),
        (PRICE.format(gpu="h100").replace("= 8", "= 0"), "gpus_per_node"),
        (PRICE.format(gpu="h100").replace("50e9", "0.0"), "nic_bytes_per_s"),
        (PRICE.format(gpu="h100").replace("nic_bytes_per_s = 50e9\n", ""), "nic_bytes_per_s"),
    ],
)
def test_bad_prices_are_refused(tmp_path: Path, text: str, message: str) -> None:
    """File and key."""
    with pytest.raises(ValueError, match=message) as caught:
        read_prices(mine(tmp_path, text))
    assert "mine.toml" in of(caught)
