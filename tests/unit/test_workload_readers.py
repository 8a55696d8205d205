"""Trace readers on rows written here: every format, and one clear line for every kind of bad row."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import TraceError
from workloads import Workload, build, from_mapping
from workloads.content import num_tokens

PLAIN = "arrival_s,prompt_tokens,output_tokens\n0.5,100,10\n1.25,200,20\n"


@pytest.fixture
def read(tmp_path: Path):
    def read(text: str, name: str = "trace.csv", **keys: object) -> Workload:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return build(from_mapping({"kind": "file", "path": str(path)} | keys), 0)

    return read


def lines(*records: dict[str, object]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_plain(read) -> None:
    trace = read(PLAIN)
    assert trace.arrival_ns.tolist() == [500_000_000, 1_250_000_000]
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([100, 200], [10, 20])
    assert trace.content is None and not any(trace.counts.values())


@pytest.mark.parametrize(
    "header",
    ["arrived_at,num_prefill_tokens,num_decode_tokens", "Timestamp,Prompt Length,Output Length", "time,isl,osl"],
)
def test_plain_headers(read, header: str) -> None:
    assert read(f"{header}\n0.5,100.0,10\n").arrival_ns.tolist() == [500_000_000]


@pytest.mark.parametrize(("unit", "value"), [("s", "2.5"), ("ms", "2500"), ("us", "2500000"), ("ns", "2500000000")])
def test_units_from_the_header_or_the_config(read, unit: str, value: str) -> None:
    assert read(f"arrival_{unit},prompt,output\n{value},1,1\n").arrival_ns.tolist() == [2_500_000_000]
    assert read(f"arrival,prompt,output\n{value},1,1\n", time_unit=unit).arrival_ns.tolist() == [2_500_000_000]


def test_no_timestamps_means_poisson(read) -> None:
    trace = read("num_prefill_tokens,num_decode_tokens\n100,10\n" + "5,5\n" * 999, rate=4.0)
    assert trace.arrival_ns[-1] / 1e9 == pytest.approx(250, rel=0.15)
    assert "Poisson" in trace.provenance


def test_azure_2023_and_2024(read) -> None:
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    old = read(header + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n")
    new = read(header + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:00.017335+00:00,2399,6\n")
    assert old.arrival_ns.tolist() == [0, 4_314_579_000]
    assert new.arrival_ns.tolist() == [0, 7_405_000]
    moved = read(header + "2024-05-10 00:00:00+00:00,1,5\n2024-05-10 02:00:01+02:00,2,6\n2024-05-10 00:00:02Z,2,6\n")
    assert moved.arrival_ns.tolist() == [0, 1_000_000_000, 2_000_000_000]


def test_burstgpt_six_and_eight_columns(read) -> None:
    six = read(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,0,0,0,API log\n118,GPT-4,417,276,693,Conversation log\n"
    )
    eight = read(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,a,1.5,ChatGPT,472,18,490,Conversation log\n7,,0.2,GPT-4,3,9,12,API log\n"
        "9,a,2,GPT-4,417,276,693,Conversation log\n"
    )
    assert six.arrival_ns.tolist() == [5_000_000_000, 118_000_000_000]
    assert six.counts["dropped_failures"] == 1 and six.counts["rejected_zero"] == 0
    assert eight.session is not None and eight.session.tolist() == [0, 1, 0]


def test_mooncake_blocks_become_shared_pieces(read) -> None:
    text = lines(
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 3000, "input_length": 1300, "output_length": 5, "hash_ids": [0, 1, 3]},
        {"timestamp": 3001, "input_length": 600, "output_length": 5, "hash_ids": [0, 9]},
    )
    trace = read(text, "trace.jsonl")
    assert trace.content == (
        (("h:0", 0, 512), ("h:1", 0, 512), ("h:2", 0, 76)),
        (("h:0", 0, 512), ("h:1", 0, 512), ("h:3", 0, 276)),
        (("h:0", 0, 512), ("h:9", 0, 88)),
    )
    assert trace.arrival_ns.tolist() == [0, 3_000_000_000, 3_001_000_000]


def test_blocks_that_only_occur_together_are_one_piece(read) -> None:
    text = lines(
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 9, "input_length": 1300, "output_length": 5, "hash_ids": [0, 1, 3]},
    )
    content = read(text, "trace.jsonl").content
    assert content == ((("h:0", 0, 1024), ("h:2", 0, 76)), (("h:0", 0, 1024), ("h:3", 0, 276)))


def test_tokens_without_a_hash_id_are_unique(read) -> None:
    row = {"timestamp_ns": 7, "input_length": 40, "output_length": 5, "hash_ids": [4, 5]}
    trace = read(lines(row, row | {"timestamp_ns": 8}), "trace.jsonl")
    assert trace.arrival_ns.tolist() == [7, 8]
    assert trace.content == ((("h:4", 0, 32), ("u:0", 0, 8)), (("h:4", 0, 32), ("u:1", 0, 8)))


def test_ids_that_are_not_chained_stay_single_blocks(read) -> None:
    text = lines(
        {"timestamp": 0, "input_length": 32, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 1, "input_length": 32, "output_length": 5, "hash_ids": [2, 1]},
    )
    content = read(text, "trace.jsonl", block_size=16).content
    assert content == ((("h:1", 0, 16), ("h:2", 0, 16)), (("h:2", 0, 16), ("h:1", 0, 16)))


BAILIAN = lines(
    {"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 20, "output_length": 5, "type": "text",
     "turn": 1, "hash_ids": [7, 8]},
    {"chat_id": 2, "parent_chat_id": -1, "timestamp": 1.0, "input_length": 16, "output_length": 5, "type": "text",
     "turn": 1, "hash_ids": [9]},
    {"chat_id": 3, "parent_chat_id": 1, "timestamp": 61.114, "input_length": 33, "output_length": 5, "type": "text",
     "turn": 2, "hash_ids": [7, 10, 11]},
)  # fmt: skip


def test_bailian(read) -> None:
    trace = read(BAILIAN, "trace.jsonl")
    assert trace.arrival_ns.tolist() == [500_000_000, 1_000_000_000, 61_114_000_000]
    assert trace.session is not None and trace.session.tolist() == [0, 1, 0]
    assert trace.release_after is None
    causal = read(BAILIAN, "trace.jsonl", causal=True)
    assert causal.release_after is not None and causal.release_after.tolist() == [-1, -1, 0]
    assert causal.arrival_ns.tolist() == [500_000_000, 1_000_000_000, -1]
    assert causal.think_ns is not None and causal.think_ns[2] > 0


def test_conversations(read) -> None:
    chat = [
        {"from": "gpt", "value": "left out"},
        {"from": "human", "value": "one two three"},
        {"from": "gpt", "value": "four five six seven eight nine"},
        {"from": "human", "value": "ten", "tokens": 11},
        {"from": "gpt", "value": "eleven"},
        {"from": "human", "value": "no answer"},
    ]
    trace = read(json.dumps([{"conversations": chat}, {"conversations": []}]), "chat.json")
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([4, 4 + 8 + 11], [8, 2])
    assert trace.content == ((("s:0", 0, 4),), (("s:0", 0, 4), ("gen:0", 0, 8), ("s:0", 4, 11)))
    assert trace.release_after is not None and trace.release_after.tolist() == [-1, 0]
    assert trace.arrival_ns[0] >= 0 and trace.arrival_ns[1] == -1


def test_messages_without_text_and_in_parts(read) -> None:
    parts = [{"type": "text", "text": "one two three"}, {"type": "image_url", "image_url": {"url": "a b"}}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    trace = read(json.dumps([{"messages": chat}]), "chat.json", zero_tokens="clip")
    assert (trace.prompt_tokens.tolist(), trace.counts["clipped_zero"]) == ([4], 1)


def test_gzip_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + PLAIN.encode()))
    assert build(from_mapping({"kind": "file", "path": str(path)}), 0).num_requests == 2


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "traces" / "azure").mkdir(parents=True)
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n"
    (tmp_path / "traces/azure/AzureLLMInferenceTrace_conv.csv").write_text(header)
    (tmp_path / "here.csv").write_text(PLAIN)
    monkeypatch.setenv("KVPLANE_DATA", str(tmp_path))
    for name, num in (("azure_conv", 1), ("traces/azure/AzureLLMInferenceTrace_conv.csv", 1), ("here.csv", 2)):
        assert build(from_mapping({"kind": "file", "path": name}), 0).num_requests == num
    with pytest.raises(TraceError, match=r"mooncake_conversation.*KVPLANE_DATA.*kvcache-ai/Mooncake"):
        build(from_mapping({"kind": "file", "path": "mooncake_conversation"}), 0)


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
HEAD = "arrival_s,prompt_tokens,output_tokens\n"
CHAT = '[{"conversations": [{"from": "human", %s}, {"from": "gpt", %s}]}]'
GOOD = {"timestamp": 0, "input_length": 4, "output_length": 5, "hash_ids": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (HEAD, "no rows"),
        ("a,b,c\n1,2,3\n", r"row 1: no column for prompt tokens and output tokens among \[a, b, c\]"),
        (HEAD + "0,1,1\n-0.5,1,1\n", "row 3 has a negative timestamp"),
        (HEAD + "3,1,1\n2,1,1\n", "row 3 is earlier than the row before it; set workload.unordered=sort"),
        (HEAD + "0,1,1\n\n1,x,1\n", "row 4: prompt_tokens is 'x'"),
        (HEAD + "0,1,1.5\n", "row 2: output_tokens is '1.5'"),
        (HEAD + "soon,1,1\n", "row 2: arrival_s is 'soon'"),
        (HEAD + "nan,1,1\n", "row 2: arrival_s is 'nan'"),
        (HEAD + "1e300,1,1\n", "row 2: arrival_s is '1e300'"),
        (HEAD + "0,1e30,1\n", "row 2: prompt_tokens is '1e30'"),
        (HEAD + "0,1\n", "row 2 has 2 columns where the header has 3"),
        (HEAD + "0,4,1,\n0,4,1,7\n", "row 3 has 4 columns where the header has 3"),
        (HEAD + "0,-4,1\n", "row 2 has a negative number of tokens"),
        (AZURE + "2023-11-16 18:00:00,1,1\n2023-99-16 18:00:00,1,1\n", "row 3: TIMESTAMP is '2023-99-16 18:00:00'"),
        (AZURE + "2024-05-10 00:00:00+00:00,1,1\n2024-05-10 00:01,1,1\n", "row 3: TIMESTAMP is '2024-05-10 00:01'"),
        (AZURE + "2023-11-16 18:00:00,1,1\n,1,1\n", "row 3: TIMESTAMP is '', not a date"),
        (AZURE + "2023-11-16 18:00:00,1,1\ntoday,1,1\n", "row 3: TIMESTAMP is 'today', not a date"),
        (AZURE + "2023-11-16 18:00:00,1,1\n9999-11-16,1,1\n", "row 3: TIMESTAMP is '9999-11-16', not a date"),
        (AZURE + "1-2,1,1\n", "row 2: TIMESTAMP is '1-2', not a date"),
        (AZURE + "1700000000000,1,1\n1700000000001,1,1\n", "row 2: .* not a time in s; workload.time_unit"),
        (lines(GOOD) + "{oops\n", "row 2: not a JSON object"),
        (lines(GOOD) + "[1]\n", "row 2: not a JSON object but list"),
        (lines(GOOD, {"timestamp": 0, "input_length": 4}), "row 2 has no 'output_length'"),
        (lines(GOOD | {"hash_ids": ["a"]}), "row 1: hash_ids is not a list of whole numbers"),
        (lines(GOOD | {"input_length": 4.5}), "row 1: input_length is 4.5"),
        (lines(GOOD | {"input_length": True}), "row 1: input_length is True"),
        (lines(GOOD | {"chat_id": [1]}), r"row 1: chat_id is \[1\], not an id"),
        (lines(GOOD | {"chat_id": 1, "parent_chat_id": {}}), "row 1: parent_chat_id is {}, not an id"),
        (lines(GOOD | {"timestamp": 10**400}), "row 1: timestamp"),
        (lines(GOOD | {"input_length": 5000}), "no block size explains its hash_ids; set workload.block_size"),
        (lines({"input_length": 4, "output_length": 5}), "no column for arrival times"),
        ('[{"x": 1}]', "conversation 1 has no list 'conversations'"),
        (CHAT % ('"tokens": -5', '"tokens": 3'), "conversation 1: tokens is -5, not a number of tokens"),
        (CHAT % ('"tokens": 3', '"num_tokens": 1e30'), "conversation 1: num_tokens is 1e[+]30"),
        (CHAT % ('"tokens": 3', '"tokens": true'), "conversation 1: tokens is True"),
        (CHAT % ('"value": "a"', '"value": 7'), "conversation 1: a message is 7, not text"),
        ("[1,", "not readable as JSON"),
        ("[]", "no conversation has a user message"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_naming_file_and_row(read, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message) as error:
        read(text)
    assert "trace.csv" in str(error.value) and "\n" not in str(error.value)


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(TraceError, match="not readable as text"):
        build(from_mapping({"kind": "file", "path": str(path)}), 0)
    with pytest.raises(TraceError, match="is a folder"):
        build(from_mapping({"kind": "file", "path": str(tmp_path)}), 0)


def test_insisting_on_a_format(read) -> None:
    assert read(PLAIN, format="plain").num_requests == 2
    with pytest.raises(TraceError, match="looks like plain, not azure"):
        read(PLAIN, format="azure")
    with pytest.raises(TraceError, match="is a csv file, not mooncake"):
        read(PLAIN, format="mooncake")
    with pytest.raises(TraceError, match=r"workload.format=parquet is unknown"):
        read(PLAIN, format="parquet")


def test_unordered_rows_can_be_sorted(read) -> None:
    trace = read(HEAD + "3,1,1\n2,2,2\n4,3,3\n", unordered="sort")
    assert trace.prompt_tokens.tolist() == [2, 1, 3] and trace.counts["sorted_rows"] == 1


def test_zero_tokens(read) -> None:
    text = HEAD + "0,5,5\n1,0,7\n2,8,0\n"
    rejected, clipped = read(text), read(text, zero_tokens="clip")
    assert rejected.num_requests == 1 and rejected.counts["rejected_zero"] == 2
    assert clipped.prompt_tokens.tolist() == [5, 1, 8] and clipped.output_tokens.tolist() == [5, 7, 1]
    assert clipped.counts["clipped_zero"] == 2
    with pytest.raises(TraceError, match=r"row 3 has no prompt or no output tokens; set workload.zero_tokens"):
        read(text, zero_tokens="error")


def test_overlong(read) -> None:
    text = HEAD + "0,5,5\n1,500,7\n2,99999999999,9\n"
    assert read(text).counts["rejected_overlong"] == 1
    assert read(text, max_prompt_tokens=100).counts["rejected_overlong"] == 2
    clipped = read(text, max_prompt_tokens=100, overlong="clip")
    assert clipped.prompt_tokens.tolist() == [5, 100, 100] and clipped.counts["clipped_overlong"] == 2
    with pytest.raises(TraceError, match="row 3 has 500 prompt tokens, more than 100"):
        read(text, max_prompt_tokens=100, overlong="error")


def test_outputs_stop_at_what_policies_are_told(read) -> None:
    trace = read(PLAIN, max_output_tokens=15)
    assert trace.output_tokens.tolist() == [10, 15] and trace.counts["clipped_output"] == 1
    assert trace.max_output_tokens == 15


def test_jitter_spreads_quanta_and_keeps_bodies(read) -> None:
    text = lines(*({"timestamp": 3000 * (i // 10), "input_length": i + 1, "output_length": 5} for i in range(100)))
    plain, spread = read(text, "trace.jsonl"), read(text, "trace.jsonl", jitter_s=3.0)
    assert spread.prompt_tokens.tolist() == plain.prompt_tokens.tolist()
    assert np.all(np.diff(spread.arrival_ns) > 0)
    shift = spread.arrival_ns - plain.arrival_ns
    assert shift.min() >= 0 and shift.max() < 3_000_000_000
    assert np.array_equal(spread.arrival_ns, read(text, "trace.jsonl", jitter_s=3.0).arrival_ns)


def test_window_of_a_file_with_content(read) -> None:
    trace = read(BAILIAN, "trace.jsonl", causal=True, window_s=[0.0, 0.75])
    assert trace.num_requests == 2 and trace.release_after is not None and trace.content is not None
    assert trace.release_after.tolist() == [-1, 0]
    assert [num_tokens(pieces) for pieces in trace.content] == trace.prompt_tokens.tolist()
