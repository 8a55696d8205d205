"""Trace files: the format is found from the first characters and the header; `format` insists on one."""

from __future__ import annotations

import csv
import gzip
from functools import lru_cache
from pathlib import Path
from typing import TextIO, cast

import numpy as np

from common.errors import TraceError
from common.rng import stream
from workloads import arrivals, content, paths, sessions
from workloads.config import File
from workloads.readers.conversations import read_conversations
from workloads.readers.csvs import read_csv
from workloads.readers.jsonl import block_size, read_jsonl
from workloads.readers.rows import Rows, checked
from workloads.types import Ints, Workload, add_counts, no_counts

ORIGINS = {
    "azure": "Azure LLM inference trace (Azure/AzurePublicDataset, CC-BY-4.0)",
    "burstgpt": "BurstGPT (HPMLL/BurstGPT, CC-BY-4.0)",
    "mooncake": "Mooncake FAST'25 trace (kvcache-ai/Mooncake, Apache-2.0)",
    "bailian": "Qwen-Bailian trace (alibaba-edu/qwen-bailian-usagetraces-anon, Apache-2.0)",
    "llmservingsim": "ShareGPT as served by casys-kaist/LLMServingSim (MIT)",
    "sharegpt": "ShareGPT-style conversations; turn order kept, starts and think times ours",
    "plain": "a plain CSV file",
}


def read(config: File, seed: int) -> Workload:
    path = paths.find(config.path)
    file = config.path
    with open_text(path, file) as handle:
        family = _family(handle, file)
        _insist(file, config.format, family)
        try:
            if family == "json":
                turns = read_conversations(handle, file, config)
                return sessions.from_file(turns, config, seed, path.name, ORIGINS["sharegpt"])
            rows = read_jsonl(handle, file, config) if family == "jsonl" else read_csv(handle, file, config)
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise TraceError(f"{file}: not readable as text ({error})") from None
        except csv.Error as error:
            raise TraceError(f"{file}: not readable as CSV ({error})") from None
    if config.format not in ("auto", "plain", rows.format):
        raise TraceError(f"{file} looks like {rows.format}, not {config.format}; set workload.format=auto")
    rows, counts = checked(rows, config)
    return _workload(rows, counts, config, seed, path.name)


FAMILIES = {
    "azure": "csv", "burstgpt": "csv", "plain": "csv",
    "mooncake": "jsonl", "bailian": "jsonl", "llmservingsim": "jsonl", "sharegpt": "json",
}  # fmt: skip


def _insist(file: str, wanted: str, family: str) -> None:
    if wanted != "auto" and wanted not in FAMILIES:
        raise TraceError(f"workload.format={wanted} is unknown; choose auto, {', '.join(FAMILIES)}")
    if wanted != "auto" and FAMILIES[wanted] != family:
        raise TraceError(f"{file} is a {family} file, not {wanted}; set workload.format=auto")


def open_text(path: Path, file: str) -> TextIO:
    """The file as text, unpacked if it is gzip."""
    try:
        with open(path, "rb") as raw:
            magic = raw.read(2)
        if magic == b"\x1f\x8b":
            if path.name.endswith((".tar.gz", ".tgz")):
                raise TraceError(f"{file} is an archive of client rates; replay it with workload=servegen")
            return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
        return open(path, encoding="utf-8-sig", newline="")
    except OSError as error:
        raise TraceError(f"{file}: cannot be read ({error.strerror})") from None


def _family(handle: TextIO, file: str) -> str:
    try:
        start = handle.read(4096).lstrip()
        handle.seek(0)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise TraceError(f"{file}: not readable as text ({error})") from None
    if not start:
        raise TraceError(f"{file} is empty")
    return {"[": "json", "{": "jsonl"}.get(start[0], "csv")


def _workload(rows: Rows, counts: dict[str, int], config: File, seed: int, name: str) -> Workload:
    num = len(rows.prompt)
    times, why = rows.arrival_ns, ORIGINS[rows.format]
    if times is None:
        times = arrivals.constant(stream(seed, "workload.arrivals"), config.rate, 1.0, num, None)
        why += f"; it has no timestamps: Poisson at {config.rate:g}/s"
    pieces = None
    if rows.hashes is not None:
        pieces = content.from_hashes(rows.hashes, rows.prompt, block_size(rows, config))
    release: Ints | None = None
    think: Ints | None = None
    if config.causal:
        if rows.parent is None:
            raise TraceError(f"{rows.file} does not say which turn follows which; set workload.causal=false")
        release = rows.parent
        waits = arrivals.unit_gaps(stream(seed, "workload.think"), num, 1.0) * config.think_mean_s
        think = np.where(release >= 0, arrivals.to_ns(waits), 0)
        times = np.where(release >= 0, -1, times)
    all_counts = add_counts(no_counts(), **counts)
    return Workload(
        name, times, rows.prompt, rows.output, pieces, rows.session, release, think, None, all_counts,
        config.max_output_tokens, why,
    )  # fmt: skip


@lru_cache(maxsize=4)
def read_lengths(path: str) -> tuple[Ints, Ints]:
    """Prompt and output lengths of a trace, for `lengths: trace:PATH`; empty requests are left out."""
    trace = read(File(path=path, unordered="sort"), 0)
    usable = (trace.prompt_tokens > 0) & (trace.output_tokens > 0)
    prompt, output = trace.prompt_tokens[usable], trace.output_tokens[usable]
    prompt.setflags(write=False)
    output.setflags(write=False)
    return prompt, output
