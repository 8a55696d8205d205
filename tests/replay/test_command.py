"""`python -m bench.replay DIR`: what a run has left, whole or not, is held against the policy of today's code."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import report
import run as cli
from bench import replay
from common.config import compose
from common.log import LOG, PARTIAL, VERSION
from systems.registry import FACTORIES

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("workload=burst", "workload.duration_s=null", "workload.num_requests=60", "log.events=true",
         "run.figures=false", "run.trace=false")  # fmt: skip
ONE = {"vllm": {}, "kunserve": {"cluster.lost": "[[1,0]]"}, "mell": {}, "memserve": {"workload": "sessions"},
       "infinite_llm": {"cluster.message_faults": "{delay_ms: 5, loss: 0.02, duplicate: 0.02}"}}  # fmt: skip


def made(root: Path, *more: str) -> Path:
    return cli.execute(compose([*SMALL, f"run.results={root}", "run.name=r", *more]), quiet=True).folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overloaded instance of `vllm`, so that it has something to decide."""
    return made(tmp_path_factory.mktemp("replay"), "cluster.num_instances=2", "engine.kv_blocks=300",
                "engine.max_model_len=4096")  # fmt: skip


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "r"))


def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code, and the one line on stdout, or on stderr with code 2."""
    capsys.readouterr()
    code = replay.main([str(folder)])
    out, err = capsys.readouterr()
    [line] = (err if code == 2 else out).splitlines()
    assert not (out if code == 2 else err)
    return code, line


def lines_of(folder: Path) -> list[str]:
    return (folder / LOG).read_text().splitlines(keepends=True)


def become_partial(folder: Path, text: str) -> None:
    (folder / LOG).unlink()
    (folder / (LOG + PARTIAL)).write_text(text)


@pytest.mark.parametrize("system", sorted(FACTORIES))
def test_every_system_decides_the_same_again(
    system: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(tmp_path, f"system={system}", *(f"{key}={value}" for key, value in ONE.get(system, {}).items()))
    code, line = said(folder, capsys)
    assert code == 0 and line.endswith(" commands: identical")


def test_several_models_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ("cluster.models=[llama3-8b,qwen2.5-14b]", "workload.per_model={llama3-8b: {}, qwen2.5-14b: {}}")
    assert said(made(tmp_path, "system=mell", "workload=poisson", *models), capsys)[0] == 0


def test_as_a_command(original: Path) -> None:
    command = [sys.executable, "-m", "bench.replay", str(original)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = lines_of(original)
    events = sum(line.startswith('{"at"') for line in lines)
    commands = sum(line.startswith('{"command"') for line in lines)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{events:,} events, {commands:,} commands: identical\n" and commands > 60


# ---------------------------------------------------------------- another command


def test_another_policy_is_told_by_its_first_other_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["engine"]["max_num_batched_tokens"] = 1024
    path.write_text(yaml.safe_dump(tree))
    code, line = said(folder, capsys)
    assert code == 1 and "identical until event" in line and "token_budget = 1024, recorded 2048" in line


def test_another_record_is_told_by_what_it_has_and_what_is_said_now(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of(folder)
    at = next(index for index, line in enumerate(lines) if index > 50 and line.startswith('{"command":{"RunStep"'))
    lines[at] = '{"command":{"Interrupt":[99]}}\n'
    (folder / LOG).write_text("".join(lines))
    code, line = said(folder, capsys)
    events = sum(line.startswith('{"at"') for line in lines[:at])
    assert code == 1 and line.startswith(f"{events:,} events, {at - 1 - events:,} commands: identical until event ")
    assert "command 1 is RunStep(" in line and "recorded was Interrupt(lane=99)" in line


def test_a_policy_that_fails_is_a_difference(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails:
        def on_event(self, now_ns: int, event: object) -> list[object]:
            raise KeyError("lane\n7")

    monkeypatch.setitem(FACTORIES, "vllm", lambda *_: Fails())  # type: ignore[arg-type]
    code, line = said(folder, capsys)
    assert code == 1 and line.startswith("1 events, 0 commands: identical until event 1 (")
    assert "the policy fails (KeyError: " in line


# ---------------------------------------------------------------- a log cut short


def test_wherever_a_log_is_cut_it_replays_so_far(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between two lines, within one, or between an event and its commands: no more is asked for than is there."""
    text = (folder / LOG).read_text()
    head = text.index("\n") + 1
    cuts = [head, head + 1, *range(head + 7, len(text), len(text) // 40), text.rindex("\n", 0, -1) + 1]
    become_partial(folder, text)
    for cut in cuts:
        (folder / (LOG + PARTIAL)).write_text(text[:cut])
        code, line = said(folder, capsys)
        assert code == 0 and line.endswith("identical (the run did not complete: its log ends here)")


def test_an_interrupted_run_replays(tmp_path: Path) -> None:
    run = subprocess.Popen([sys.executable, "run.py", *SMALL, "workload.num_requests=300000", "log.events=true",
                            f"run.results={tmp_path}", "run.name=r"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                           stdout=subprocess.DEVNULL)  # fmt: skip
    assert run.stderr is not None and run.stderr.readline().startswith("simulating")
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=120)
    assert run.returncode == 130 and (tmp_path / "r" / "manifest.json").exists()
    found = replay.replay(tmp_path / "r")
    assert found.partial and found.difference is None and found.num_commands > 100


def test_a_killed_run_says_which_it_was_and_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL: the folder has its configuration and the log so far, `report.py` says both, and the log replays."""
    folder = tmp_path / "r"
    run = subprocess.Popen([sys.executable, "run.py", *SMALL, "workload.num_requests=300000", "system=kunserve",
                            f"run.results={tmp_path}", "run.name=r"], cwd=ROOT, stderr=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 60
    while not ((folder / (LOG + PARTIAL)).exists() and (folder / (LOG + PARTIAL)).stat().st_size > 200_000):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    run.kill()
    run.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", LOG + PARTIAL]
    assert report.main([str(folder), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert f"{folder}: the run did not complete (system=kunserve, runtime=sim, seed=0); events.jsonl.partial" in err
    assert f"python -m bench.replay {folder}" in err and len(err.splitlines()) == 1
    code, line = said(folder, capsys)
    assert code == 0 and "identical (the run did not complete" in line
    assert report.run_folders(tmp_path) == [folder]


# ---------------------------------------------------------------- nothing to replay


def test_no_folder_no_log_no_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(folder / "nowhere", capsys) == (2, f"error: {folder / 'nowhere'}: no such results folder")
    (folder / "config.yaml").rename(folder / "kept")
    code, line = said(folder, capsys)
    assert code == 2 and "config.yaml: cannot be read" in line
    (folder / LOG).unlink()
    code, line = said(folder, capsys)
    assert code == 2 and "no events.jsonl and no events.jsonl.partial in it" in line and "log.events=true" in line


@pytest.mark.parametrize(("change", "words"), [
    ({"system": {"name": "orca"}}, "system='orca' is unknown"),
    ({"system": {"name": "kunserve", "poll_ms": "often"}}, "system.poll_ms='often': give a number"),
    ({"engine": {"block_size": 16}}, "engine.kv_blocks is missing"),
    ({"cluster": {"num_instances": 0}}, "cluster.num_instances=0: give a whole number"),
    ({"cluster": {"num_instances": 2}}, "no configuration of this version"),
    ({"teapot": 1}, "teapot is unknown"),
    ({"runtime": {"name": "sim", "steam": 1}}, "runtime.steam is unknown"),
    ([], "not a mapping"),
    ("{", "config.yaml"),
])  # fmt: skip
def test_a_configuration_that_is_none_any_more(
    folder: Path, change: object, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "config.yaml"
    tree = {**yaml.safe_load(path.read_text()), **change} if isinstance(change, dict) else change
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    code, line = said(folder, capsys)
    assert code == 2 and words in line and line.startswith(f"error: {folder}")


@pytest.mark.parametrize(("head", "words"), [
    (None, "does not begin with its cluster: it is of another version"),
    (f'{{"log":{VERSION + 1},"cluster":null}}', "another version of this code (its lines are of version"),
    (f'{{"log":{VERSION},"cluster":{{"ClusterInfo":[[],16]}}}}', "ClusterInfo with 2 of 5 fields"),
    (f'{{"log":{VERSION},"cluster":{{"Interrupt":[0]}}}}', "does not begin with its cluster"),
    (f'{{"log":{VERSION}}}', "does not begin with its cluster"),
    ("{", "not JSON"),
])  # fmt: skip
def test_a_log_of_another_version(
    folder: Path, head: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of(folder)
    (folder / LOG).write_text("".join([*([] if head is None else [head + "\n"]), *lines[1:]]))
    code, line = said(folder, capsys)
    assert code == 2 and words in line and f"{LOG}:1: " in line


def test_lines_of_another_vocabulary_and_damage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(folder)
    for bad, words in (('{"command":{"Interrupt":[0,1]}}', "Interrupt with 2 of 1 fields (of another version"),
                       ('{"command":{"Teleport":[0]}}', "unknown type 'Teleport' (of another version"),
                       ('{"at":', "not JSON")):  # fmt: skip
        (folder / LOG).write_text("".join([*lines[:40], bad + "\n", *lines[41:]]))
        code, line = said(folder, capsys)
        assert code == 2 and words in line and f"{LOG}:41: " in line
    (folder / LOG).write_text("".join(lines[:40]))  # named as complete, and is not
    code, line = said(folder, capsys)
    assert code == 2 and "without its last line" in line
    become_partial(folder, lines[0][:30])
    code, line = said(folder, capsys)
    assert code == 2 and "ends within its first line" in line
