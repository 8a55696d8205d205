"""`InstanceCost`: exact prefix sums, its own tables, sanity of order, speed, and the committed grids."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from common.cost.engine import EngineTraits, engine_traits
from common.cost.grids import FOLDER, load_grid, pack, unpack
from common.cost.interpolate import shape_weights
from common.cost.model import InstanceCost
from common.cost.operators import Operators
from common.cost.specs import load_hardware, load_model
from common.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CARDS = sorted(p.stem for p in (ROOT / "conf" / "hardware").glob("*.yaml"))


def cost(model: str = "llama3.1-8b", card: str = "rtx4090", tp: int = 1, **kwargs: object) -> InstanceCost:
    read = lambda kind, name: yaml.safe_load((ROOT / "conf" / kind / f"{name}.yaml").read_text())  # noqa: E731
    return InstanceCost(load_model(read("model", model)), load_hardware(read("hardware", card)), tp, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    ("model", "tp"), [("llama3.1-8b", 1), ("llama2-70b", 8), ("qwen2.5-14b", 2), ("tiny_qwen3", 1)]
)
def test_every_card_runs_every_kind_of_model(card: str, model: str, tp: int) -> None:
    one = cost(model, card, tp)
    assert 0 < one.decode_ns(1, 100) <= one.decode_ns(64, 4000)
    assert one.iteration_ns([(512, 0)], 0, 0, 1) < one.iteration_ns([(2048, 0)], 8, 900, 9)


@pytest.mark.parametrize("batch", [1, 3, 33, 256, 700])
def test_prefix_sums_are_exact(batch: int) -> None:
    one = cost()
    prefix = one.decode_prefix(batch, 3000)
    assert len(prefix) > 3000 and prefix[0] == 0
    assert all(prefix[c + 1] - prefix[c] == one.decode_ns(batch, c) for c in range(3000))
    longer = one.decode_prefix(batch, 70_000)
    assert longer[:3001] == prefix[:3001]
    assert all(longer[c + 1] - longer[c] == one.decode_ns(batch, c) for c in range(60_000, 70_000, 37))


def test_decode_is_an_iteration() -> None:
    one = cost()
    for batch, context in [(1, 1), (7, 333), (256, 2048), (1024, 100)]:
        assert one.decode_ns(batch, context) == one.iteration_ns((), batch, context, batch)


def test_very_long_contexts_and_batches() -> None:
    one = cost("llama2-7b", "a100-80g")
    assert one.decode_ns(1, 2_000_000) > 100 * one.decode_ns(1, 100)
    assert one.decode_ns(2000, 8000) > one.decode_ns(1000, 8000)
    assert one.iteration_ns([(8192, 1_500_000)], 4, 1_000_000, 5) > one.iteration_ns([(8192, 0)], 4, 1_000_000, 5)


def test_a_step_is_the_sum_of_its_measured_parts() -> None:
    """Decode of one request on RTX 4090: layers x in-engine times at one token, plus attention, head and sampler."""
    one = cost(engine=EngineTraits(host_ns=0, host_per_seq_ns=0))
    layer = 126.766 + 247.292 + 38.1313 + 54.898 + 2.592 + 2 * 1.85083 + 2.17567
    once = 2.837 + 1.94167 + 1096.93 + 25.001
    attention = 9.428  # one decode over 64 tokens
    assert one.decode_ns(1, 64) / 1e3 == pytest.approx(32 * (layer + attention) + once, rel=2e-3)


def test_context_never_makes_decode_faster() -> None:
    for card in ("rtxpro6000", "h100-80g"):
        one = cost(card=card)
        for batch in (1, 8, 100):
            times = [one.decode_ns(batch, context) for context in (1024, 4096, 16384, 65536, 262144)]
            assert times == sorted(times)


def test_stages_add_up_to_the_whole() -> None:
    bare = EngineTraits(host_ns=0, host_per_seq_ns=0)
    whole = cost(engine=bare)
    first = cost(engine=bare, num_layers=16, last=False)
    last = cost(engine=bare, num_layers=16, first=False)
    parts = first.iteration_ns([(512, 0)], 8, 700, 9) + last.iteration_ns([(512, 0)], 8, 700, 9)
    assert parts == pytest.approx(whole.iteration_ns([(512, 0)], 8, 700, 9), rel=1e-3)


def test_several_short_prompts_cost_less_attention_than_one_long() -> None:
    for card in ("rtx4090", "h100-80g"):
        one = cost(card=card)
        assert one.attention_ns([(256, 0)] * 8, 0, 0) < one.attention_ns([(2048, 0)], 0, 0)


def test_host_time_is_hidden_or_added() -> None:
    hidden, added = cost(engine=engine_traits("vllm-async")), cost(engine=engine_traits("vllm-sync"))
    host = added.engine.host_time_ns(8, 1)
    assert added.decode_ns(8, 500) == hidden.decode_ns(8, 500) + host
    tiny = cost("tiny_llama", "h100-80g")
    assert tiny.decode_ns(64, 10) == tiny.engine.host_time_ns(64, 1)  # host-bound
    with pytest.raises(ConfigError, match="vllm-async"):
        engine_traits("orca")


def test_graphs_pad() -> None:
    traits = EngineTraits()
    assert [traits.padded(t) for t in (1, 2, 3, 4, 5, 33, 256, 257, 512, 513)] == [
        1,
        2,
        4,
        4,
        8,
        40,
        256,
        272,
        512,
        513,
    ]
    assert cost().decode_ns(33, 0) - cost().decode_ns(34, 0) < 10_000  # one graph, a row more of attention and head


def test_skew_is_what_the_profile_says_and_else_nothing() -> None:
    assert cost(card="rtx4090").skew_alphas == () == cost(card="a100-80g").skew_alphas
    known = load_grid("rtxpro6000").meta["skew"]
    assert cost(card="rtxpro6000").skew_alphas == (known["1"],)
    assert 0.05 < known["1"] < known["2"] < 0.07


def test_remote_attention() -> None:
    one = cost()
    assert one.partial_attention_ns(0, 10) == one.partial_attention_ns(4, 0) == 0
    assert one.partial_attention_ns(4, 8000) * one.num_layers == pytest.approx(one.attention_ns((), 4, 8000), rel=0.01)
    assert 0 < one.merge_ns(1) <= one.merge_ns(512)


def test_derived_cards_scale_memory_and_compute_apart() -> None:
    h100, h200 = cost(card="h100-80g"), cost(card="h200-141g")
    assert 0.7 < h200.decode_ns(8, 2000) / h100.decode_ns(8, 2000) < 0.78  # 3350 / 4800 = 0.698, and launch floors
    assert 0.95 < h200.iteration_ns([(4096, 0)], 0, 0, 1) / h100.iteration_ns([(4096, 0)], 0, 0, 1) <= 1.0
    a100, a800 = cost("llama2-70b", "a100-80g", 4), cost("llama2-70b", "a800-80g", 4)
    assert a800.iteration_ns([(2048, 0)], 0, 0, 1) > a100.iteration_ns([(2048, 0)], 0, 0, 1)


def test_grids_are_small_and_attributed() -> None:
    assert sum(p.stat().st_size for p in FOLDER.glob("*.npz")) < 600_000
    for path in FOLDER.glob("*.npz"):
        grid = load_grid(path.stem)
        assert any(licence in grid.meta["source"] for licence in ("Apache-2.0", "MIT"))
        assert path.stem in (FOLDER / "README.md").read_text()
    with pytest.raises(ConfigError, match="rtx4090"):
        load_grid("b200")


def test_packing_rounds_by_less_than_a_thousandth() -> None:
    times = np.geomspace(10.0, 2e8, 999)
    assert np.max(np.abs(unpack(pack(times)) / times - 1)) < 4e-4
    assert np.isnan(unpack(pack(np.array([np.nan]))))[0]


def test_shape_interpolation_is_exact_at_shapes() -> None:
    shapes = load_grid("a100_sxm").knots("gemm_nk")
    rows, weights = shape_weights(shapes, 4096, 8192)
    assert shapes[rows].tolist() == [[4096, 8192]] and weights.tolist() == [1.0]
    rows, weights = shape_weights(shapes, 4500, 9000)
    assert len(rows) == 4 and weights.sum() == pytest.approx(1.0)


def test_operators_never_return_nan() -> None:
    for path in FOLDER.glob("*.npz"):
        grid = load_grid(path.stem)
        for name, values in grid.arrays.items():
            if values.dtype == np.uint16:
                assert np.all(values > 0), (path.stem, name)


def test_the_hot_path_is_fast() -> None:
    one = cost()
    one.iteration_ns([(300, 0)], 20, 1000, 21)
    start = time.process_time()
    for i in range(3000):
        one.iteration_ns([(300 + i % 500, i % 1000)], 20, 1000, 21)
        one.decode_ns(20, 1000 + i % 50)
    assert (time.process_time() - start) / 3000 < 60e-6  # about 5 us on a quiet core


def test_import_is_light() -> None:
    code = "import sys, common.cost.model, common.cost.transfer, common.cost.vidur_tables; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "pandas", "hydra", "yaml", "asyncio"):
        assert heavy not in out.split()


def test_operators_are_shared() -> None:
    one = cost()
    other = cost(operators=Operators(one.hardware))
    assert other.decode_ns(5, 500) == one.decode_ns(5, 500)


def test_every_layer_has_two_all_reduces_and_the_head_gathers_its_logits() -> None:
    """Sharded layers reduce after attention and after the MLP; the embedding reduces once more."""
    one, other = cost(tp=2, num_layers=10, last=False), cost(tp=2, num_layers=20, last=False)
    reduce = float(one.operators.all_reduce(2, np.array([64.0 * one.model.hidden_size * 2]))[0])
    counted: list[float] = []
    original = one.operators.all_reduce

    def counting(tp: int, num_bytes: object) -> object:
        counted.append(1.0)
        return original(tp, num_bytes) * 0.0  # type: ignore[arg-type]

    silent = cost(tp=2, num_layers=10, last=False)
    silent.operators.all_reduce = counting  # type: ignore[method-assign, assignment]
    assert one._dense_ns(64) - silent._dense_ns(64) == pytest.approx((2 * 10 + 1) * reduce, rel=1e-3)
    assert counted and other._dense_ns(64) > one._dense_ns(64)
    head = cost(tp=2)
    quiet = cost(tp=2)
    quiet.operators.all_reduce = counting  # type: ignore[method-assign, assignment]
    assert head._head_ns(64) > quiet._head_ns(64)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("card", ["a100-80g", "a100-80g-2024", "h100-80g", "l40s", "rtx4090", "rtxpro6000"])
def test_no_single_operator_beats_the_speed_of_light(card: str, tp: int) -> None:
    """Whole iterations hide an operator behind the others: each alone must hold."""
    ops = cost(card=card).operators
    tokens = np.array([1.0, 8.0, 64.0, 128.0, 512.0, 2048.0, 8192.0])
    for n, k in ((4096, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (128256, 4096), (512, 8192)):
        assert np.all(ops.linear(n, k, tokens) >= np.asarray(ops.roof.linear(tokens, n, k)) * (1 - 1e-9))
    for batch in (1, 8, 64, 256):
        instance = cost(card=card, tp=tp)
        row = instance._row(batch)
        for context in (128, 2048, 16384, 65536, 164_000, 1_000_000):
            light = batch * context * instance.model.kv_bytes_per_token / tp / instance.hardware.mem_bandwidth * 1e9
            assert row.attention_ns(context) >= light * (1 - 1e-6), (batch, context)


@pytest.mark.parametrize("name", ["a100-80g", "h100-80g", "l40s", "rtx4090", "h200-141g"])
def test_an_all_reduce_of_fewer_bytes_never_takes_longer(name) -> None:
    """One measured point of A100, 4 KB over 8 GPUs, took more than twice what its neighbours take."""
    sizes = np.geomspace(256, 1 << 28, 200)
    operators = cost(card=name).operators
    for gpus in (2, 3, 4, 8):
        assert np.all(np.diff(operators.all_reduce(gpus, sizes)) >= 0)


@pytest.mark.parametrize(("name", "heads"), [("a100-80g", (32, 4)), ("h100-80g", (8, 1)), ("l40s", (16, 4))])
def test_fewer_requests_or_shorter_contexts_never_decode_longer(name, heads) -> None:
    """Nor do fewer prompts of one length. One measured decode of A100 took 3.6 times what its neighbours take."""
    operators = cost(card=name).operators
    decode, several = operators.decode(*heads, 128).time_ns, operators.several(*heads, 128).time_ns
    assert np.all(np.diff(decode, axis=0) >= 0) and np.all(np.diff(decode, axis=1) >= 0)
    assert np.all(np.diff(several, axis=0) >= 0)


@pytest.mark.parametrize("card", ["a100-80g", "h100-80g", "l40s"])
def test_more_kv_heads_than_were_measured_decode_like_more_requests(card) -> None:
    """Kernels launch per request and KV head. Without it a 120K-token request of Llama-2-7B took 11 times its reads."""
    operators = cost(card=card).operators
    context = np.array([1024.0, 8192.0, 131072.0])
    measured, wide = operators.decode(8, 8, 128), operators.decode(32, 32, 128)
    for batch in (1.0, 4.0, 16.0):
        many, few = wide.at(np.array([batch]), context), measured.at(np.array([4 * batch]), context)
        assert many == pytest.approx(few, rel=0.03), batch


def test_the_card_of_2024_adds_what_its_engine_launched_apart_and_shares_no_table_with_the_newer_one() -> None:
    then, now = cost("llama2-70b", "a100-80g-2024", 2), cost("llama2-70b", "a100-80g", 2)
    chunk, decodes = then.attention_ns([(512, 512)], 0, 0), then.attention_ns((), 9, 1200)
    assert then.attention_ns([(512, 512)], 9, 1200) == pytest.approx(chunk + decodes, rel=1e-6)
    assert then.operators.grid.meta["source"] != now.operators.grid.meta["source"]
    assert not {"pre", "dec", "mix", "samp_axis"} & set(then.operators.grid.arrays)
    for table in ("gemm", "mix_pre", "mix_dec", "elem", "ar", "sr"):
        assert then.operators.grid.has(table)
    # slower where its tables say so: products of many tokens, prefill attention, all-reduce of a decode batch
    assert then.attention_ns([(2048, 0)], 0, 0) > 2 * now.attention_ns([(2048, 0)], 0, 0)
    assert then._dense_ns(2048) > 1.2 * now._dense_ns(2048)


def test_a_dense_table_is_read_across_batches_as_measured() -> None:
    """Ten decodes of 1,344 tokens were faster than nine in 2024: that kernel splits KV by the batch."""
    one = cost("llama2-70b", "a100-80g-2024", 2)
    assert one.attention_ns((), 10, 1344) < 0.8 * one.attention_ns((), 9, 1344)
    assert np.all(np.diff(one.operators.decode(32, 4, 128).time_ns, axis=1) >= 0)
