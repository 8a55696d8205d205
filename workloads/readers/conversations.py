"""ShareGPT-style JSON: a list of {conversations: [{from, value}]}, each a session of user and assistant turns.

A message's tokens are its `tokens` (or `num_tokens`) where given, else ⌈words × tokens_per_word⌉.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from common.errors import TraceError
from workloads.config import File
from workloads.sessions import Turns

USER = ("human", "user")
ASSISTANT = ("gpt", "assistant", "chatgpt", "bing", "bard")


def read_conversations(handle: TextIO, file: str, config: File) -> Turns:
    try:
        data = json.load(handle)
    except ValueError as error:
        raise TraceError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(data, list):
        raise TraceError(f"{file}: a JSON {type(data).__name__}; expected a list of conversations")
    session: list[int] = []
    user: list[int] = []
    reply: list[int] = []
    num_sessions = 0
    for number, entry in enumerate(data, start=1):
        where = f"{file}, conversation {number}"
        turns = list(_turns(_messages(entry, where), config.tokens_per_word, where))
        for asked, answered in turns:
            session.append(num_sessions)
            user.append(asked)
            reply.append(answered)
        num_sessions += bool(turns)
    if not session:
        raise TraceError(f"{file}: no conversation has a user message followed by a reply")
    return Turns(np.array(session, np.int64), np.array(user, np.int64), np.array(reply, np.int64))


def _messages(entry: object, where: str) -> list[tuple[str, dict[str, Any]]]:
    """(speaker, message) pairs."""
    messages = entry.get("conversations", entry.get("messages")) if isinstance(entry, dict) else None
    if not isinstance(messages, list):
        raise TraceError(f"{where} has no list 'conversations'")
    pairs = []
    for message in messages:
        speaker = message.get("from", message.get("role")) if isinstance(message, dict) else None
        if not isinstance(speaker, str):
            raise TraceError(f"{where}: a message without 'from'")
        pairs.append((speaker, message))
    return pairs


def _turns(
    messages: list[tuple[str, dict[str, Any]]], tokens_per_word: float, where: str
) -> Iterator[tuple[int, int]]:
    """Everything said since the last reply belongs to the next prompt; a leading reply is left out."""
    waiting, asked = 0, False
    for speaker, message in messages:
        tokens = _tokens(message, tokens_per_word, where)
        if speaker in ASSISTANT:
            if asked:
                yield waiting, tokens
            waiting, asked = 0, False
        else:
            waiting += tokens
            asked = asked or speaker in USER


def _tokens(message: dict[str, Any], tokens_per_word: float, where: str) -> int:
    for key in ("tokens", "num_tokens"):
        if message.get(key) is not None:
            return _counted(message[key], f"{where}: {key}")
    text = message.get("value", message.get("content"))
    if isinstance(text, list):  # of parts, as multimodal chats have: those of text count
        text = " ".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
    if text is not None and not isinstance(text, str):
        raise TraceError(f"{where}: a message is {text!r}, not text")
    return math.ceil(len((text or "").split()) * tokens_per_word)


def _counted(tokens: object, what: str) -> int:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 <= tokens < 2**40:
        raise TraceError(f"{what} is {tokens!r}, not a number of tokens")
    return tokens
