"""The command line: what works, and one clear line with exit status 2 for what a user can mend."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import run as cli
from common.console import refusals

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["workload=poisson", "workload.num_requests=40", "run.figures=false", "run.trace=false"]


def call(tmp_path: Path, *arguments: str) -> int:
    return cli.main([*QUICK, f"run.results={tmp_path}", "run.name=r", *arguments])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["workload.rte=3"], ["workload.rte", "workload.rate"]),
        (["system=nope"], ["system=nope", "vllm"]),
        (["model=nope"], ["model=nope", "llama2-7b"]),
        (["engine.schedular=chunked"], ["engine.schedular", "engine.scheduler"]),
        (["engine.scheduler=fast"], ["engine.scheduler", "chunked"]),
        (["+engine.extra=1"], ["engine.extra"]),
        (["+extra=1"], ["extra"]),
        (["slo.ttft_ms=0"], ["slo.ttft_ms"]),
        (["slo.tpot_ms=-1"], ["slo.tpot_ms"]),
        (["model=llama2-70b", "hardware=rtx4090"], ["Llama-2-70B", "rtx4090", "bytes"]),
        (["cluster.tp=16"], ["cluster.tp", "gpus_per_node"]),
        (["cluster.num_instances=0"], ["cluster.num_instances"]),
        (["seed=-1"], ["seed"]),
        (["system.dispatch=nope"], ["system.dispatch", "round_robin"]),
        (["workload=file", "workload.path=missing.csv"], ["missing.csv"]),
        (["run.results=/proc/nowhere"], ["/proc/nowhere"]),
        (["engine.max_num_batched_tokens=8", "engine.max_num_seqs=64"], ["max_num_batched_tokens", "max_num_seqs"]),
        (["engine.kv_blocks=0"], ["engine.kv_blocks"]),
        (["cost.source=vidur", "model=llama2-7b"], ["cost.source"]),
        (["workload.num_requests=0"], ["num_requests"]),
        (["engine.watermark=inf"], ["engine.watermark"]),
        (["engine.watermark=2"], ["engine.watermark"]),
        (["run.sample_ms=nan"], ["run.sample_ms"]),
        (["run.sample_ms=0"], ["run.sample_ms"]),
        (["run.sample_ms=abc"], ["run.sample_ms"]),
        (["run.figures=abc"], ["run.figures"]),
        (["log.events=abc"], ["log.events"]),
        (["cluster.lost=5"], ["cluster.lost"]),
        (["cluster.lost=[[a,0]]"], ["cluster.lost"]),
        (["cluster.lost=[[nan,0]]"], ["cluster.lost"]),
        (["cluster.lost=[[1,99]]"], ["cluster.lost"]),
        (["cluster.lost_agents=[[1,manager]]"], ["cluster.lost_agents", "seconds until it is back"]),
        (["cluster.lost_agents=[[1,'',5]]"], ["cluster.lost_agents"]),
        (["cluster.lost_agents=[[1,manager,-5]]"], ["cluster.lost_agents"]),
        (["cluster.message_faults={lost:1}"], ["cluster.message_faults", "loss"]),
        (["cluster.message_faults={loss:2}"], ["cluster.message_faults.loss"]),
        (["cluster.message_faults=0.1"], ["cluster.message_faults"]),
        (["cluster.control_ms=inf"], ["cluster.control_ms"]),
        (["cluster.remap_ms=-1"], ["cluster.remap_ms"]),
        (["cluster.host_memory_gb=-1"], ["cluster.host_memory_gb"]),
        (["cluster.num_instances=1000000000"], ["cluster.num_instances"]),
        (["cluster.models=[llama2-7b]"], ["cluster.models", "two or more"]),
        (["cluster.models=[llama2-7b,nope]"], ["cluster.models", "nope", "llama2-13b"]),
        (["cluster.models=[llama2-7b,llama2-13b]"], ["system=vllm", "one model", "mell"]),
        (["system=mell", "cluster.models=[llama2-7b,llama2-13b]"], ["workload.per_model", "llama2-7b"]),
        (["workload.per_model={a: {}, b: {}}"], ["workload.per_model", "cluster.models"]),
        (["engine=null"], ["engine"]),
        (["experiment=nope"], ["experiment=nope", "kunserve/burst"]),
        (["experiment=harness/nope"], ["experiment=harness/nope", "harness/azure_conv"]),
        (["+cluster.extra=1"], ["cluster.extra", "num_instances"]),
        (["+system.dispach=round_robin"], ["system.dispach", "system.dispatch"]),
        (["+logger.extra=1"], ["logger.extra"]),
        (["model.num_layers=1.5"], ["model.num_layers=1.5"]),
        (["model.num_layers=null"], ["model.num_layers=None"]),
        (["~slo"], ["slo", "missing"]),
        (["~system"], ["system", "missing"]),
        (["~seed"], ["seed", "missing"]),
        (["~hardware"], ["hardware", "missing"]),
        (["~cluster.tp"], ["cluster.tp", "missing"]),
        (["~runtime.name"], ["runtime.name", "missing"]),
        (["~engine.block_size"], ["engine.block_size", "missing"]),
        (["engine.gpu_memory_utilization=0"], ["engine.gpu_memory_utilization"]),
        (["workload=diurnal", "workload.num_requests=null", "workload.duration_s=1e12"], ["duration_s"]),
        (["workload=burst", "workload.num_requests=null", "workload.duration_s=1e12"], ["duration_s"]),
        (["workload=burst", "workload.num_requests=null", "workload.duration_s=1e8"], ["requests"]),
        (["workload=burst", "workload.dwell_mean_s=1e-9", "workload.quiet_mean_s=1e-9", "workload.num_requests=null",
          "workload.rate=1e-3", "workload.duration_s=1e6"], ["duration_s", "times"]),
        (["workload=burst", "workload.duration_s=null", "workload.rate=1e-9"], ["rate"]),
        (["workload=diurnal", "workload.duration_s=null", "workload.rate=1e-9"], ["rate"]),
        (["workload=long_context", "workload.max_context=1"], ["workload.max_context"]),
        (["model.hf_config=5"], ["5"]),
        (["workload.rate=1e-300"], ["rate"]),
        (["workload.rate=1e9", "workload.num_requests=null", "workload.duration_s=1e6"], ["requests"]),
    ],
)
def test_one_line_for_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], names: list[str]
) -> None:
    base = [part for part in QUICK if not (arguments[0] == "workload=file" and part.startswith("workload"))]
    options = [] if any(part.startswith("run.results") for part in arguments) else [f"run.results={tmp_path}"]
    assert cli.main([*base, *options, "run.name=r", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and "Traceback" not in error
    for name in names:
        assert name in error, f"{name!r} is not named in: {error}"


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ("arrival,prompt\n0,5\n", ["trace.csv"]),
        ("arrival,prompt,output\n0,10,5\n-1,10,5\n", ["trace.csv", "3"]),
        ("arrival,prompt,output\n5,10,5\n1,10,5\n", ["trace.csv", "3"]),
        ("arrival,prompt,output\n0,ten,5\n", ["trace.csv", "2"]),
        ("", ["trace.csv"]),
    ],
)
def test_broken_traces_name_file_and_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str, names: list[str]
) -> None:
    (tmp_path / "trace.csv").write_text(rows)
    arguments = ["workload=file", f"workload.path={tmp_path}/trace.csv", "run.figures=false", "run.trace=false"]
    assert cli.main([*arguments, f"run.results={tmp_path}", "run.name=r"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and all(name in error for name in names), error


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ("[]", ["JSON object"]),
        ('{"architectures": ["GPT2LMHeadModel"]}', ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ('{"architectures": ["LlamaForCausalLM"], "hidden_size": "x", "num_attention_heads": 8}', ["config.json"]),
        ('{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 0}', ["config.json"]),
        ('{"architectures": ["LlamaForCausalLM"], "quantization_config": {"bits": 4}}', ["quantization_config"]),
        ('{"architectures": ["LlamaForCausalLM"], "num_local_experts": 8}', ["num_local_experts", "dense"]),
        ('{"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": true}', ["use_sliding_window"]),
        ('{"architectures": ["Qwen3ForCausalLM"], "layer_types": ["sliding_attention"]}', ["layer_types"]),
        (
            '{"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "hidden_size": 64, '
            '"num_attention_heads": 4}',
            ["float32"],
        ),
    ],
)
def test_bad_model_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, names: list[str]) -> None:
    (tmp_path / "config.json").write_text(config)
    assert call(tmp_path, f"model.hf_config={tmp_path}/config.json") == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and all(name in error for name in names), error


def test_numeric_run_names_and_small_budgets_work(tmp_path: Path) -> None:
    assert call(tmp_path, "run.name=20261121", "engine.max_num_batched_tokens=512") == 0
    assert (tmp_path / "20261121" / "manifest.json").exists()


def test_outputs_stop_at_the_context_window(tmp_path: Path) -> None:
    lengths = ["workload.lengths=fixed", "workload.prompt_tokens=4000", "workload.output_tokens=500"]
    assert call(tmp_path, "model=llama2-7b", *lengths) == 0
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert (summary["completed"], summary["workload_clipped_output"]) == (40, 40)
    assert call(tmp_path, "model=llama2-7b", *lengths, "workload.max_output_tokens=300") == 0  # cut twice, counted once
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["workload_clipped_output"] == 40


def test_a_cluster_that_is_lost_altogether_leaves_partial_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, "cluster.num_instances=1", "cluster.lost=[[1,0]]") == 1
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert manifest["partial"] and "live" in manifest["stopped"]
    assert "Traceback" not in capsys.readouterr().err


def test_overlong_and_empty_requests_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.csv").write_text("arrival,prompt,output\n0,10,5\n1,0,5\n2,900000,5\n3,20,7\n")
    arguments = ["workload=file", f"workload.path={tmp_path}/trace.csv", "workload.max_prompt_tokens=100000",
                 "run.figures=false", "run.trace=false", f"run.results={tmp_path}", "run.name=r"]  # fmt: skip
    assert cli.main(arguments) == 0
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert (summary["completed"], summary["workload_rejected_zero"], summary["workload_rejected_overlong"]) == (2, 1, 1)
    assert "1 rejected zero, 1 rejected overlong" in capsys.readouterr().out


def test_prompts_beyond_the_context_window_are_rejected_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, "workload.lengths=fixed", "workload.prompt_tokens=5000", "model=llama2-13b") == 0
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert (summary["completed"], summary["rejected"]) == (0, 40)
    assert "rejected: 40 × prompt of 5000 tokens exceeds max_model_len 4096" in capsys.readouterr().out


@pytest.mark.parametrize(("policy", "status"), [("clip", 0), ("error", 2)])
def test_prompts_beyond_the_context_window_are_cut_or_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str, status: int
) -> None:
    (tmp_path / "trace.csv").write_text("arrival,prompt,output\n0,10,5\n1,99999999,5\n2,4096,5\n")
    arguments = ["workload=file", f"workload.path={tmp_path}/trace.csv", "run.figures=false", "run.trace=false"]
    assert cli.main([*arguments, "model=llama2-7b", f"workload.overlong={policy}", f"run.results={tmp_path}",
                     "run.name=r"]) == status  # fmt: skip
    if policy == "error":
        assert "row 3 has 99999999 prompt tokens, more than 4095" in capsys.readouterr().err
        return
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert (summary["completed"], summary["rejected"], summary["workload_clipped_overlong"]) == (3, 0, 2)


def test_refusals_are_told_by_kind() -> None:
    reasons = [f"prompt of {num} tokens is too long" for num in range(5)] + ["no instance"] * 2 + ["a", "b"]
    assert refusals(reasons) == ["rejected: 5 × prompt of 0 tokens is too long", "rejected: 2 × no instance",
                                 "rejected: 1 × a",
                                 "rejected: 1 for other reasons (requests.parquet: reject_reason)"]  # fmt: skip
    assert refusals([]) == []


def test_a_run_leaves_what_the_contract_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet as pq

    assert call(tmp_path, "slo.ttft_ms=500", "log.events=true", "log.segments=true") == 0
    folder = tmp_path / "r"
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "manifest.json", "requests.parquet", "timeline.parquet", "summary.json", "events.jsonl",
            "segments.parquet"} <= names  # fmt: skip
    columns = pq.read_table(folder / "requests.parquet").column_names
    assert {"request_id", "arrival_s", "first_token_s", "finish_s", "prompt_tokens", "output_tokens", "status",
            "num_preemptions"} <= set(columns)  # fmt: skip
    assert "simulated" in capsys.readouterr().out
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["seed"] == 0 and manifest["runtime"] == "sim" and manifest["wall_seconds"] > 0


def test_every_group_entry_composes(tmp_path: Path) -> None:
    from common.config import available, compose

    for group in ("system", "workload", "model", "hardware", "experiment"):
        for name in available(group):
            extra = ["workload.path=azure_conv"] if (group, name) == ("workload", "file") else []
            assert compose([f"{group}={name}", *extra]).seed == 0


def test_help_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("vllm", "burst", "closed_loop", "llama2-70b", "h200-141g", "rtx4090"):
        assert f"  {name} " in text


def test_starts_without_torch_in_about_a_second(tmp_path: Path) -> None:
    code = ("import sys, time; begin = time.process_time(); import run; from common.config import compose; "
            "compose(['workload=poisson']); import common.build, common.executors.sim, workloads.build; "
            "print(time.process_time() - begin, 'torch' in sys.modules, 'pandas' in sys.modules)")  # fmt: skip
    best = 9.0
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        seconds, torch, pandas = out.split()
        assert (torch, pandas) == ("False", "False")
        best = min(best, float(seconds))
    assert best < 2.0  # CPU seconds: under one on an idle machine; twice that under load


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_readable_and_marked(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "run.py", "workload=poisson", "workload.num_requests=400000", "workload.rate=40",
               "run.figures=false", "run.trace=false", f"run.results={tmp_path}", "run.name=r"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and process.stderr.readline().startswith("simulating")  # it is under way
    process.send_signal(how)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert manifest["partial"] is True and summary["completed"] > 0 and summary["live_at_end"] >= 0


def test_a_signal_before_the_run_is_one_line(tmp_path: Path) -> None:
    """SIGTERM ends as Ctrl-C does while a trace is read; the trace is a pipe, which holds its reader until then."""
    trace = tmp_path / "trace.csv"
    os.mkfifo(trace)
    script = "import run, sys, workloads.paths as p; p.find = p.Path; sys.exit(run.main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "workload=file", f"workload.path={trace}", f"run.results={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with trace.open("w"):  # blocks until the reader is there
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.strip() == "interrupted: nothing further is written"


def test_help_may_be_cut_short() -> None:
    process = subprocess.Popen([sys.executable, "run.py", "--help"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and process.stderr.read() == ""


def test_a_system_that_names_another_is_run_and_drawn_beside_it(tmp_path: Path) -> None:
    """The first command of the README's systems: `system=kunserve` says `against: vllm`."""
    command = [sys.executable, "run.py", "system=kunserve", "workload=burst", "workload.duration_s=3", "run.name=k",
               "run.trace=false", f"run.results={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "k-vllm" in done.stdout and (tmp_path / "k-vllm" / "summary.json").exists()
    drawn = {path.name for path in (tmp_path / "k" / "beside-vllm").glob("*.png")}
    assert drawn == {"compare_cdf.png", "compare_over_time.png", "compare_bars.png"}


def test_a_sweep_runs_each_job_in_its_own_folder(tmp_path: Path) -> None:
    command = [sys.executable, "run.py", "-m", "seed=0,1", *QUICK, f"run.results={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("sweep/*/manifest.json"))) == 2


def test_a_sweep_over_an_unknown_key_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "run.py", "-m", "engine.blok=1,2", *QUICK, f"run.results={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "engine.blok" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_sweep_with_a_bad_job_says_so_and_runs_the_others(tmp_path: Path) -> None:
    command = [sys.executable, "run.py", "-m", "engine.block_size=0,16", "run.name=s", *QUICK,
               f"run.results={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "engine.block_size" in done.stderr
    assert len(list(tmp_path.glob("s/*/manifest.json"))) == 1
