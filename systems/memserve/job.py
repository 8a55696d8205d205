"""A request on its way through the cluster."""

from __future__ import annotations

from common.types import Content
from systems.memserve.mempool import Transfer
from systems.memserve.tree import Lease


class Job:
    """Tokens known = prompt and generated so far. The lease pins what it reads at the instance where it is."""

    __slots__ = (
        "computed",
        "content",
        "copy",
        "decode_at",
        "decoding",
        "had",
        "known",
        "lease",
        "leaves",
        "max_output",
        "offset",
        "owned",
        "prefill_at",
        "prompt",
        "ready",
        "request_id",
        "session",
        "shared",
        "stored",
        "target",
    )  # fmt: skip

    def __init__(self, request_id: int, prompt: int, max_output: int, content: Content | None, session: int) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.known = prompt
        self.max_output = max_output
        self.content: Content = content or ((f"p:{request_id}", 0, prompt),)
        self.session = session
        self.prefill_at = self.decode_at = -1  # instances
        self.leaves = False  # its prefill is handed over to another instance
        self.computed = 0  # tokens whose KV is there when it joins (cached or held)
        self.target = 0
        self.had = 0  # of `target`, when its prefill was admitted: neither computed there nor here before
        self.shared = 0  # leading tokens of them that it reads from the cache
        self.owned = 0  # active blocks it pays for outside a lane
        self.stored = 0
        self.offset = 0
        self.decoding = False
        self.ready = False  # decode: its KV is here, it only has to join
        self.lease: Lease | None = None
        self.copy: Transfer | None = None

    def restart(self) -> None:
        """Its KV is gone: it is to be computed anew, but for what it has said."""
        self.lease = self.copy = None
        self.shared = self.computed = self.owned = self.stored = 0
        self.ready = self.decoding = False

    def text(self, tokens: int) -> Content:
        """Content of the first `tokens` tokens: the prompt, then the request's own output."""
        if tokens <= self.prompt:
            return self.content
        return (*self.content, (f"gen:{self.request_id}", 0, tokens - self.prompt))
