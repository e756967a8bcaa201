"""Cluster files: those that ship, how they are found, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from antiphon.engines.cluster import ClusterError, load_cluster, resolve_engines
from antiphon.eval.cluster_files import bundled_clusters, find_cluster
from antiphon.eval.hardware import GPUS, device_tokens, shape_of

QWEN = shape_of(
    {
        "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 25600, "vocab_size": 151936,
    }
)  # fmt: skip
GROUP = """
[[engines]]
pool = "{pool}"
count = 2
profile = "tiny-cpu"
device_tokens = 1024
store_tokens = 2048
link_bytes_per_s = 1e9
"""
HEAD = 'name = "mine"\nslo = {ttft_s = 1.0, itl_s = 0.1}\n'


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_what_ships() -> None:
    """The clusters that the documentation names."""
    assert bundled_clusters() == [
        "2p2d-qwen3-32b-h200",
        "4p4d-qwen3-32b-h200",
        "ampd-32xh20",
        "mixed-h100-a100-qwen3-32b",
        "tiny-cpu",
    ]


@pytest.mark.parametrize("name", bundled_clusters())
def test_bundled_clusters_load(name: str) -> None:
    """Each loads under its own name, with engines of both pools that can send KV to each other."""
    path = find_cluster(name)
    cluster = load_cluster(path)
    specs = resolve_engines(cluster, path.parent)
    assert cluster.name == name and cluster.description
    assert {spec.group.pool for spec in specs} == {"prefill", "decode"}
    assert len({spec.latency.transfer.kv_bytes_per_token for spec in specs}) == 1
    for spec in specs:
        # the longest prompt fits the device; the store is the larger tier; chunks end at page boundaries
        assert cluster.window_tokens <= spec.group.device_tokens < spec.group.store_tokens
        assert spec.group.chunk_tokens % cluster.page_tokens == 0
        # policies predict with the profile's bandwidth, the simulator moves with the link's
        assert spec.group.link_bytes_per_s == spec.latency.transfer.bytes_per_s


@pytest.mark.parametrize("name", [name for name in bundled_clusters() if name != "tiny-cpu"])
def test_device_tokens_are_what_the_arithmetic_says(name: str) -> None:
    """GPUs x memory x 0.88 less the weights, in whole pages; every GPU has a price."""
    path = find_cluster(name)
    cluster = load_cluster(path)
    for spec in resolve_engines(cluster, path.parent):
        (gpu,) = (gpu for gpu in GPUS.values() if gpu.label == spec.latency.gpu)
        assert spec.group.device_tokens == device_tokens(QWEN, gpu, spec.latency.gpus, cluster.page_tokens)
        assert spec.group.price_per_gpu_hour


@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        ("2p2d-qwen3-32b-h200", {"H200 SXM 141 GB": 16}),
        ("4p4d-qwen3-32b-h200", {"H200 SXM 141 GB": 32}),
        ("ampd-32xh20", {"H20 96 GB": 32}),
        ("mixed-h100-a100-qwen3-32b", {"H100 SXM 80 GB": 8, "A100 SXM 80 GB": 16}),
    ],
)
def test_clusters_have_the_gpus_that_their_names_say(name: str, gpus: dict[str, int]) -> None:
    """Counted over engines and tensor parallelism."""
    path = find_cluster(name)
    counted: dict[str, int] = {}
    for spec in resolve_engines(load_cluster(path), path.parent):
        counted[spec.latency.gpu] = counted.get(spec.latency.gpu, 0) + spec.latency.gpus
    assert counted == gpus


def test_a_file_comes_before_a_bundled_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is taken as it is; what is neither names what there is."""
    path = written(tmp_path, HEAD + GROUP.format(pool="decode"))
    assert find_cluster(path) == path == find_cluster(str(path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-cpu").write_text("x")
    assert find_cluster("tiny-cpu") == Path("tiny-cpu")
    for unknown in ("3p1d", "../clusters/ampd-32xh20", "/ampd-32xh20"):
        with pytest.raises(ClusterError, match="neither a file nor one of 2p2d-qwen3-32b-h200, 4p4d"):
            find_cluster(unknown)


def test_engines_are_numbered_over_groups_of_one_name(tmp_path: Path) -> None:
    """Two groups of the decode pool go on counting; a name of one's own starts at 0."""
    named = GROUP.format(pool="decode") + 'name = "old"\n'
    path = written(tmp_path, HEAD + GROUP.format(pool="decode") * 2 + named)
    ids = [spec.engine_id for spec in resolve_engines(load_cluster(path), tmp_path)]
    assert ids == ["decode-0", "decode-1", "decode-2", "decode-3", "old-0", "old-1"]


def test_a_profile_beside_the_file_comes_first(tmp_path: Path) -> None:
    """A JSON file in the cluster's folder, by its file name."""
    (tmp_path / "own.json").write_text(
        '{"name": "own", "source": "here", "prefill": {"fixed_s": 1, "per_token_s": 2},'
        ' "decode": {"fixed_s": 3}, "transfer": {"fixed_s": 4, "bytes_per_s": 5, "kv_bytes_per_token": 6}}'
    )
    text = HEAD + GROUP.format(pool="decode").replace("tiny-cpu", "own.json")
    path = written(tmp_path, text)
    assert resolve_engines(load_cluster(path), tmp_path)[0].latency.name == "own"


EVENT = '[[events]]\nat_s = 1.0\nkind = "down"\nengine = "{}"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", r"mine\.toml"),
        (HEAD + GROUP.format(pool="decode") + "surprise = 1\n", "surprise"),
        (HEAD + GROUP.format(pool="both"), r"engines\[0\]\.pool"),
        (HEAD + GROUP.format(pool="prefill"), "no engine of the decode pool"),
        (HEAD + GROUP.format(pool="decode").replace("tiny-cpu", "gone"), "'gone' is neither bundled"),
        (HEAD + GROUP.format(pool="decode").replace("= 1024", "= 63"), "below one page"),
        (HEAD + GROUP.format(pool="decode").replace("1e9", "0.0"), "link_bytes_per_s"),
        (HEAD + GROUP.format(pool="decode") + EVENT.format("decode-2"), "no engine 'decode-2'; there are"),
    ],
)
def test_an_impossible_cluster_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """ClusterError says which key and what is wrong."""
    with pytest.raises(ClusterError, match=message):
        load_cluster(written(tmp_path, text))


def test_events_name_engines_that_there_are(tmp_path: Path) -> None:
    """A death of an engine of the file is accepted; a file that is not there is an error of its own."""
    path = written(tmp_path, HEAD + GROUP.format(pool="decode") + EVENT.format("decode-1"))
    assert [event.engine for event in load_cluster(path).events] == ["decode-1"]
    with pytest.raises(ClusterError, match="cannot be read"):
        load_cluster(tmp_path / "none.toml")
