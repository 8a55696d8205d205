"""Reading, fitting and validating measured tables, on small made-up ones; and the real data where it is at hand."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.cost import fit, validate
from common.cost.filling import between, blend, concat, fill, fill_times, lattice, same_blocks
from common.cost.fit import thinned
from common.cost.grids import load_grid
from common.cost.interpolate import head_weights, nearest_heads
from common.cost.sources import SOURCES
from common.cost.table import Table
from common.cost.tables import read_tables
from common.cost.vidur_tables import PER_TOKEN, VidurTables
from common.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("KVPLANE_DATA") or ROOT.parent / "shared" / "data")
needs_data = pytest.mark.skipif(not (DATA / "profiles").is_dir(), reason="measured tables are not here (KVPLANE_DATA)")


def table(keys: list[list[int]], times: list[float], columns: tuple[str, ...] = ("x", "y")) -> Table:
    return Table("any", columns, np.array(keys, dtype=np.int64), np.array(times))


def test_holes_are_filled_by_ratio() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0])
    roof = 100.0 * x[:, None] * x[None, :]
    times = 2.0 * roof
    times[1, 2] = times[3, 3] = np.nan
    filled = fill_times(times, roof, [x, x])
    assert not np.isnan(filled).any() and filled[1, 2] == pytest.approx(2 * roof[1, 2], rel=0.1)
    assert np.isnan(fill(np.full((2, 2), np.nan), [x[:2], x[:2]])).all()


def test_versions_are_averaged_unless_one_was_disturbed() -> None:
    merged = concat([table([[1, 1], [2, 1]], [100.0, 100.0]), table([[1, 1], [2, 1]], [121.0, 300.0])])
    assert merged is not None
    assert merged.time_ns.tolist() == pytest.approx([110.0, 100.0])
    assert np.isnan(lattice(merged, [np.array([1.0, 2.0]), np.array([1.0, 5.0])])[:, 1]).all()


def aiconfigurator(folder: Path, scale: float = 1.0) -> None:
    """A100-like GEMMs at `scale` times the speed of light."""
    folder.mkdir(parents=True)
    rows = [
        {
            "gemm_dtype": "bfloat16",
            "m": m,
            "n": n,
            "k": 4096,
            "latency": scale * 1e3 * max(2 * m * n * 4096 / 312e12, 2 * n * 4096 / 2039e9),
        }
        for m in (1, 64, 4096)
        for n in (4096, 8192)
    ]
    pd.DataFrame([*rows, {**rows[0], "gemm_dtype": "fp8", "latency": 99.0}]).to_parquet(folder / "gemm_perf.parquet")
    pd.DataFrame(
        {
            "op_name": ["all_reduce", "alltoall"],
            "nccl_dtype": ["half", "half"],
            "num_gpus": [2, 2],
            "message_size": [1024, 1024],
            "latency": [0.01, 9.0],
        }
    ).to_csv(folder / "nccl_perf.csv", index=False)


def test_reading_any_folder(tmp_path: Path) -> None:
    aiconfigurator(tmp_path / "deep" / "down")
    tables = read_tables(tmp_path)
    assert [t.family for t in tables] == ["linear", "all_reduce"]
    assert len(tables[0].time_ns) == 6  # the fp8 row is not ours
    assert tables[1].column("bytes").tolist() == [2048]  # message sizes count elements
    with pytest.raises(ConfigError, match="no such folder"):
        read_tables(tmp_path / "nowhere")


def test_validate_prints_a_line_per_family_and_regime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aiconfigurator(tmp_path / "a", scale=1.5)
    assert validate.main([str(tmp_path), "--hardware", "a100-80g"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {"linear", "all_reduce"} == {row["family"] for row in rows}
    for row in rows:
        assert {"family", "regime", "count", "median", "p95"} <= set(row)
        assert row["regime"] in ("memory", "compute", "latency")


def test_validate_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main([str(tmp_path), "--hardware", "a100-80g"]) == 2
    assert validate.main([str(tmp_path), "--hardware", "b300"]) == 2
    (tmp_path / "gemm_perf.csv").write_text("m,n\n1,2\n")
    assert validate.main([str(tmp_path), "--hardware", "a100-80g"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "b300" in lines[1] and "'k'" in lines[2]


def test_what_vidur_predicted_is_not_taken_for_measured(tmp_path: Path) -> None:
    aiconfigurator(tmp_path / "measured")
    (tmp_path / "predictions").mkdir()
    vidur_folder(tmp_path / "predictions")
    assert [t.family for t in read_tables(tmp_path)] == ["linear", "all_reduce"]
    assert read_tables(tmp_path, "vidur") == []


def test_in_engine_tables_are_found_by_model_name(tmp_path: Path) -> None:
    folder = tmp_path / "CARD" / "Llama-3.1-8B" / "tp2"
    folder.mkdir(parents=True)
    (folder / "dense.csv").write_text("layer,tokens,time_us\nqkv_proj,1,40\nlayernorm,1,2\n")
    (folder / "attention.csv").write_text("prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,1,16,8\n")
    found = {t.family: t for t in read_tables(tmp_path, "vllm")}
    assert found["linear"].keys.tolist() == [[1, 3072, 4096]] and found["linear"].get("tp") == 2
    assert found["attention"].time_ns.tolist() == [8000.0]


def vidur_folder(folder: Path) -> Path:
    for name in (*PER_TOKEN, "all_reduce"):
        rows = "".join(f"{t},{t / 1000}\n" for t in range(8, 65, 8))
        (folder / f"{name}.csv").write_text("num_tokens,prediction\n" + rows)
    keys = [(n, kv) for n in (1, 2) for kv in (0, 64, 128)]
    rows = "".join(f"{n},{kv},{n * kv / 1000}\n" for n, kv in keys)
    (folder / "attn_decode.csv").write_text("batch_size,kv_cache_size,prediction\n" + rows)
    with gzip.open(folder / "attn_prefill.csv.gz", "wt") as file:
        file.write("kv_cache_size,prefill_chunk_size_squared,prediction\n0,25,0.5\n64,25,0.7\n")
    return folder


def test_vidurs_formula(tmp_path: Path) -> None:
    vidur = VidurTables(vidur_folder(tmp_path), num_layers=10)
    dense = 11 * 0.008 + 2 * (0.02) + 0.008  # ten per-token tables and two all-reduces, at 8 tokens
    assert vidur.decode_ns(2, 65) == round(1e7 * (dense + 0.256 * 1.1))
    assert vidur.iteration_ns([(3, 0), (4, 0)], 0, 0, 2) == round(1e7 * (dense + 0.5 * 1.1))
    assert vidur.iteration_ns([(5, 60)], 1, 64, 1) == round(1e7 * (dense + 0.7 + 0.064))
    prefix = vidur.decode_prefix(1, 300)
    assert all(prefix[c + 1] - prefix[c] == vidur.decode_ns(1, min(c, 128)) for c in range(300))
    with pytest.raises(ConfigError, match="no decode attention prediction"):
        vidur.decode_ns(9, 64)
    with pytest.raises(ConfigError, match="missing"):
        VidurTables(tmp_path / "nowhere")


@needs_data
def test_vidurs_lone_requests_are_reproduced() -> None:
    vidur = VidurTables(DATA / "vidur" / "predictions_llama2-70b_tp2_a100")
    decode = [vidur.decode_ns(1, 91 + 1 + step) for step in range(15)]
    total = vidur.iteration_ns([(91, 0)], 0, 0, 1) + sum(decode)
    assert total / 1e9 == pytest.approx(0.952693105622383, rel=1e-6)  # request 3 of conv2k_q2_round_robin_sarathi


@needs_data
def test_committed_grids_are_the_fit_of_the_data(tmp_path: Path) -> None:
    source = next(s for s in SOURCES if s.name == "rtx4090")
    tables, alpha = fit.read_source(source, DATA)
    fresh = fit.fit_tables(source, tables, alpha)
    committed = load_grid("rtx4090")
    assert fresh.meta == committed.meta
    assert all(np.array_equal(fresh.arrays[name], values) for name, values in committed.arrays.items())


def test_blend_trusts_the_axis_that_predicts() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    smooth, rough = np.log(x), np.array([0.0, 1.0, 0.0, 1.0, 0.0])
    values = smooth[:, None] + rough[None, :]
    known = values[2, 2]
    values[2, 2] = np.nan
    filled = blend(values, [between(values, 0, x), between(values, 1, x)], np.zeros_like(values))
    assert filled[2, 2] == pytest.approx(known, abs=1e-3)
    assert np.array_equal(filled[~np.isnan(values)], values[~np.isnan(values)])  # what was measured stays


def test_same_blocks_are_looked_up_across_heads() -> None:
    axes = [np.array([1.0, 2.0]), np.array([5.0]), np.array([2.0, 4.0]), np.array([1.0, 2.0])]
    values = np.arange(8.0).reshape(2, 1, 2, 2)
    other = same_blocks(values, axes, 2.0)
    assert other[0, 0, 1, 1] == values[1, 0, 0, 0] and np.isnan(other).sum() == 7


def test_heads_are_interpolated_between_equal_kv_heads() -> None:
    heads = np.array([[8, 1], [16, 2], [32, 2], [32, 8]])
    rows, weights = head_weights(heads, 16, 2)
    assert rows.tolist() == [1] and weights.tolist() == [1.0]
    rows, weights = head_weights(heads, 24, 2)
    assert rows.tolist() == [1, 2] and weights.sum() == pytest.approx(1.0) and weights[1] > 0.5
    assert head_weights(heads, 64, 8)[0].tolist() == [nearest_heads(heads, 64, 8)[0]]


def vidur(folder: Path) -> None:
    folder.mkdir(parents=True)
    times = {"attn_pre_proj": 0.1, "attn_post_proj": 0.1, "mlp_up_proj": 0.4, "mlp_down_proj": 0.2, "emb": 0.01,
             "input_layernorm": 0.006, "post_attention_layernorm": 0.008, "add": 0.003, "mlp_act": 0.01,
             "attn_rope": 0.004}  # fmt: skip
    shape = {"n_head": 64, "n_kv_head": 8, "n_embd": 8192, "n_expanded_embd": 28672, "num_tensor_parallel_workers": 2}
    row = {f"time_stats.{name}.median": ms for name, ms in times.items()}
    pd.DataFrame([{**row, **shape, "num_tokens": m} for m in (1, 64)]).to_csv(folder / "mlp.csv", index=False)


def test_a_norm_of_vidur_comes_with_its_residual_add(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vidur(tmp_path / "Llama-2-70b-hf")
    norm = next(t for t in read_tables(tmp_path, "vidur") if t.get("layer") == "layernorm")
    assert norm.time_ns.tolist() == pytest.approx([10_000.0, 10_000.0])  # (6 + 8) / 2 + 3 us
    assert validate.main([str(tmp_path), "--hardware", "a100-80g-2024", "--format", "vidur"]) == 0
    assert {"linear", "elementwise"} == {json.loads(x)["family"] for x in capsys.readouterr().out.splitlines()}


def test_many_noisy_message_sizes_are_thinned_and_few_are_not() -> None:
    sizes = np.arange(2048, 65536, 256)
    keys = np.stack([np.full_like(sizes, 2), sizes], axis=1)
    noisy = np.where(np.arange(len(sizes)) % 5 == 0, 60e3, 10e3)
    many = Table("all_reduce", ("gpus", "bytes"), keys, noisy)
    thin = thinned(many)
    assert 10 < len(thin.time_ns) < 25 and set(thin.time_ns.tolist()) <= {10e3, 60e3, 35e3}
    assert np.mean(thin.time_ns == 10e3) > 0.7
    few = many.take(np.isin(sizes, (2048, 4096, 8192)))
    assert thinned(few) is few
