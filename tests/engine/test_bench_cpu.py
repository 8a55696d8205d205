"""The scripts that compare the engine with transformers and with its own books, at toy size. No time is asserted."""

import json
from dataclasses import replace

import pytest
import torch

from bench import cpu_engine, memory_engine
from bench.peers import Load
from bench.stopwatch import Stopwatch
from common.engine.spec import DecoderSpec

SPEC = DecoderSpec(
    name="toy", family="llama", num_layers=2, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2,
    head_dim=32, vocab_size=2000, tied=True, max_position=256,
)  # fmt: skip


def test_all_engines_say_the_same_and_the_report_is_whole(tmp_path, capsys):
    torch.set_num_threads(1)
    load = Load(num=6, prompt=37, output=5)
    cpu_engine.measure(SPEC, load, 2, 1, ((64, None),), tmp_path)
    tables = json.loads((tmp_path / "cpu.json").read_text())["tables"]
    assert [row["identical in all rounds"] for row in tables["Tokens, compared with generate"]] == [6, 6, 6]
    speed = {row["engine"]: row for row in tables["Speed"]}
    own = speed[cpu_engine.OURS]
    assert own["times ours (median)"] == own["min to min"] == 1.0
    assert own["tokens/s (median)"] == pytest.approx(30 / own["median (s)"])
    assert all(row["from"] <= row["times ours (median)"] <= row["to"] for row in speed.values())
    parts = tables["Where the engine's time goes (one run under a stopwatch)"]
    products = tables["Matrix products alone"]
    assert sum(row["percent"] for row in parts) == pytest.approx(100)
    layer = 64 * (128 + 2 * 64) + 128 * 64 + 3 * 64 * 96
    half = 64 * 256  # of a layer: what its keys, values and queries take
    prefill = 2 * (6 * 37 * (layer + half) + 6 * (layer - half))
    decode, head = 2 * 6 * 4 * 2 * layer, 2 * 6 * 5 * 64 * 2000
    assert [row["GFLOP"] * 1e9 for row in products] == pytest.approx([prefill, decode, head, prefill + decode + head])
    assert "times ours (median)" in capsys.readouterr().out


def test_a_reply_that_differs_is_counted_with_its_gap(tmp_path):
    cpu_engine.folder_of(SPEC, 3, tmp_path)
    load = Load(num=2, prompt=8, output=3)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]]
    theirs = cpu_engine.Theirs(tmp_path, load, prompts)
    right = theirs.static()
    wrong = [right[0], [right[1][0], (right[1][1] + 1) % 2000, right[1][2]]]
    found = {cpu_engine.STATIC: [cpu_engine.Timing(1, 1, right)], "other": [cpu_engine.Timing(1, 1, wrong)]}
    same, other = cpu_engine.token_table(found, prompts, theirs)
    assert same["identical in all rounds"] == 2 and same["widest gap of two logits where it differs"] == "-"
    assert other["identical in all rounds"] == 1
    assert float(other["widest gap of two logits where it differs"]) > 1e-3


def test_a_stopwatch_charges_callees_apart():
    class Thing:
        def outer(self):
            return self.inner() + 1

        def inner(self):
            return 1

    thing, watch = Thing(), Stopwatch()
    watch.watch(thing, "outer", "outer")
    watch.watch(thing, "inner", "inner")
    with watch.under("rest"):
        assert thing.outer() == 2
    watch.restore()
    assert set(watch.seconds) == {"rest", "outer", "inner"} and min(watch.seconds.values()) > 0
    before = dict(watch.seconds)
    assert thing.outer() == 2 and dict(watch.seconds) == before


def test_resident_memory_is_what_the_books_say():
    spec = replace(SPEC, name="small", num_layers=4, hidden_size=512, intermediate_size=1408, num_heads=8,
                   num_kv_heads=8, head_dim=64, vocab_size=16000)  # fmt: skip
    one = memory_engine.measure(spec, Load(8, 96, 16), None)
    assert one.parts["parameters (slabs)"] > 40 << 20
    assert one.taken == pytest.approx(one.accounted, rel=0.1)
    assert one.taken != pytest.approx(one.accounted - one.parts["host copy of the source"], rel=0.1)  # it can fail
