"""Where trace files are: `$KVPLANE_DATA`, else `../shared/data` beside the repository; short names for known ones."""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import TraceError

SHORT_NAMES = {
    "azure_conv": "traces/azure/AzureLLMInferenceTrace_conv.csv",
    "azure_code": "traces/azure/AzureLLMInferenceTrace_code.csv",
    "mooncake_conversation": "traces/mooncake/conversation_trace.jsonl",
    "sharegpt_300": "traces/sharegpt/sharegpt-llama-3.1-8b-300-sps10.hash16.jsonl",
    "servegen": "traces/servegen/language_traces.tar.gz",
    "arxiv_summarization": "traces/arxiv_summarization/lengths.csv",
    "vidur_conv2k": "vidur/conv2k_q2.csv",
    "vidur_fixed": "vidur/fixed1024x128_2k_q2.csv",
}
ORIGINS = {
    "azure_conv": "github.com/Azure/AzurePublicDataset",
    "azure_code": "github.com/Azure/AzurePublicDataset",
    "mooncake_conversation": "github.com/kvcache-ai/Mooncake (FAST25-release/traces)",
    "sharegpt_300": "github.com/casys-kaist/LLMServingSim",
    "servegen": "github.com/alibaba/ServeGen",
    "arxiv_summarization": "github.com/microsoft/vidur",
    "vidur_conv2k": "made with github.com/microsoft/vidur",
    "vidur_fixed": "made with github.com/microsoft/vidur",
}


def data_root() -> Path:
    """The data folder; it need not exist."""
    given = os.environ.get("KVPLANE_DATA")
    return Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"


def find(path: str) -> Path:
    """`path` as given (absolute or from here), in the data folder, or a short name; else a TraceError."""
    wanted = SHORT_NAMES.get(path, path)
    for candidate in (Path(wanted).expanduser(), data_root() / wanted):
        if candidate.is_file():
            return candidate
    if Path(wanted).is_dir():
        raise TraceError(f"workload.path={path} is a folder; give one trace file")
    origin = f"; the original is at {ORIGINS[path]}" if path in ORIGINS else ""
    raise TraceError(
        f"workload.path={path}: no such file here or in the data folder; "
        f"set KVPLANE_DATA or give a path (docs/workloads.md says where traces come from){origin}"
    )
