"""`python -m bench.comm`: what it makes of its numbers, and one short run of it."""

from __future__ import annotations

import pytest
import yaml

from bench.comm import between_workers, link, write_profile
from bench.worker_cost import CLOCK, Start, fit, fit_start
from bench.worker_cost import write_profile as worker_profile
from common.errors import ConfigError
from tests.dist.pool import own_hub_closed


def row(size: int, us: float) -> dict[str, float]:
    return {"bytes": size, "P5 (us)": us}


def test_a_link_is_a_latency_and_a_bandwidth() -> None:
    large = [row(1 << n, 50 + (1 << n) / 500) for n in (20, 22, 24)]
    rows = [row(64, 52.0), row(1 << 10, 50.0), row(1 << 16, 40.0), *large]
    assert link(rows) == (50_000, pytest.approx(500e6))


def test_links_go_into_a_hardware_file(tmp_path) -> None:
    base = tmp_path / "mine.yaml"
    base.write_text(yaml.safe_dump({"name": "mine", "nic_bandwidth": 1.0, "host_ns": 7, "provenance": "here"}))
    base.with_suffix(".npz").write_bytes(b"grid")
    path = write_profile(base, "linked", (40_000, 9e8), (90_000, 3e8), 180.0)
    values = yaml.safe_load(path.read_text())
    assert values["nic_bandwidth"] == values["nvlink_bandwidth"] == 3e8 and values["nic_latency_ns"] == 40_000
    assert values["host_ns"] == 180_007 and values["name"] == "linked"
    assert path.with_suffix(".npz").read_bytes() == b"grid" and values["grid"] == "linked", "found by its name"
    with pytest.raises(ConfigError, match="not a hardware file"):
        write_profile(tmp_path / "none.yaml", "linked", (1, 1.0), (1, 1.0), 1.0)


def test_host_times_are_what_operators_leave(tmp_path) -> None:
    rows = [{"requests": batch, "operators (ms)": 0.3 * batch, CLOCK: 0.3 * batch + 1.2 + 0.05 * batch}
            for batch in (1, 4, 16)]  # fmt: skip
    host = fit(rows)
    assert host == (pytest.approx(1.2e6), pytest.approx(5e4))
    assert all(row["with host time (ms)"] == pytest.approx(row[CLOCK]) for row in rows)
    base = tmp_path / "mine.yaml"
    base.write_text(yaml.safe_dump({"name": "mine", "host_ns": 7, "provenance": "here"}))
    values = yaml.safe_load(worker_profile(base, "workers", host, Start(3e5, 0.5, 2e6)).read_text())
    assert values["host_ns"] == pytest.approx(1.2e6, abs=1) and values["host_per_seq_ns"] == pytest.approx(5e4, abs=1)
    assert (values["host_per_chunk_ns"], values["wake_share"], values["wake_after_ns"]) == (300_000, 0.5, 2_000_000)
    assert values["name"] == "workers" and values["provenance"].endswith("bench.worker_cost")


def test_a_start_costs_what_is_left_and_what_a_pause_adds() -> None:
    prompts = [{"operators (ms)": 0.1 * n, CLOCK: 0.1 * n + 1.3 + extra, "longer": longer}
               for n, extra, longer in ((1, 0.1, 0.4), (4, 0.2, 0.5), (16, 0.9, 0.7))]  # fmt: skip
    pauses = [{"pause (ms)": pause, "longer": longer} for pause, longer in ((0, 0.0), (1, 0.1), (5, 0.3), (50, 0.5))]
    start = fit_start(prompts, pauses, (1.2e6, 1e5))
    assert start == (pytest.approx(2e5), 0.5, 1e6)
    quick = [{**row, CLOCK: 0.0, "longer": -0.1} for row in prompts]
    assert fit_start(quick, [{**row, "longer": 0.0} for row in pauses], (1.2e6, 1e5)) == (0.0, 0.0, 0.0)


def test_all_primitives_are_measured() -> None:
    own_hub_closed()
    found = between_workers("gloo", 8)
    assert len(found) == 7
    for rows in found.values():
        assert rows and all(value > 0 for one in rows for key, value in one.items() if "(us)" in key)
    sizes = [one["bytes"] for one in found["activation (send, receive)"]]
    assert sizes == sorted(sizes) and sizes[0] == 64 and sizes[-1] == 1 << 24
