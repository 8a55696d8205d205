"""The global scheduler (MemServe 5.3, 6): where a request is prefilled and where it is decoded.

Its prompt trees, one per instance, learn from responses only and forget by TTL. They never hear of local evictions, so
they are stale by design: a false hit costs recomputation. Its load table is its own book of what it sent where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from common.kv.content import length
from common.kv.index import PrefixIndex
from common.types import Content
from systems.memserve.channel import Inbox
from systems.memserve.config import Options


class Decision(NamedTuple):
    """`fetch`: an instance whose longer prefix Eq. 2 says to bring over (-1: none). `cached`: what was expected."""

    prefill: int
    decode: int
    fetch: int = -1
    cached: int = 0


class GlobalScheduler:
    """See the module docstring. `roles`: by instance; `token_bytes`: KV of one token."""

    def __init__(self, options: Options, roles: list[str], block_size: int, token_bytes: int) -> None:
        self.options = options
        self.planner = options.planner
        self.roles = roles
        self.token_bytes = token_bytes
        self.block_size = block_size
        self.members: dict[int, int] = {}  # instance -> its how manieth start this is
        self.trees: dict[int, PrefixIndex] = {}
        self.queue: dict[int, dict[int, int]] = {}  # instance -> prefills sent there and not answered: estimated ns
        self.decodes: dict[int, dict[int, int]] = {}  # instance -> requests decoding there (or to come): tokens
        self.inboxes: dict[int, Inbox] = {}
        self.sessions: dict[int, int] = {}
        self.dispatched: dict[int, int] = {}  # instance -> prefills sent there in all
        self.guarded = 0
        self._turn = 0
        self._rules: dict[str, Callable[[Content, int, int, list[int]], tuple[int, int]]] = {
            "round_robin": self._round_robin,
            "least_load": self._least_load,
            "session": self._session,
            "prompt_tree_longest": self._longest,
            "prompt_tree_cost": self._cost,
            "mooncake": self._mooncake,
            "sglang_router": self._router,
        }

    # ------------------------------------------------------------ membership

    def join(self, instance: int, start: int) -> None:
        """A member from now on, with an empty tree."""
        self.members[instance] = start
        self.trees[instance] = PrefixIndex(self.block_size)
        self.queue.setdefault(instance, {})
        self.decodes.setdefault(instance, {})
        self.inboxes[instance] = Inbox()

    def leave(self, instance: int) -> None:
        """It is gone, with what it had cached; what it had not answered is expected nowhere."""
        for request_id in self.queue.get(instance, ()):
            for decodes in self.decodes.values():
                decodes.pop(request_id, None)
        for book in (self.members, self.trees, self.queue, self.decodes, self.inboxes):
            book.pop(instance, None)  # type: ignore[attr-defined]
        self.sessions = {key: home for key, home in self.sessions.items() if home != instance}

    def able(self, *roles: str) -> list[int]:
        """Members of these roles."""
        return [instance for instance in self.members if self.roles[instance] in roles]

    def prefillers(self) -> list[int]:
        """Members that take prompts: decode instances where no other is left."""
        return self.able("prefill", "both") or list(self.members)

    # ------------------------------------------------------------ what it learns

    def hears(self, instance: int, start: int, number: int, base: int) -> bool:
        """Is this message of an instance one to heed? Not twice, and not of a start that is not its member's."""
        return self.members.get(instance) == start and self.inboxes[instance].hear(number, base)

    def responded(self, now_ns: int, instance: int, content: Content, tokens: int) -> None:
        """A response says that an instance has computed these tokens: presumably they are cached there."""
        tree = self.trees.get(instance)
        if tree is not None and tokens:
            tree.tick = max(tree.tick, now_ns)
            lease = tree.acquire((), 0)
            tree.extend(lease, content, min(tokens, length(content)))
            tree.release(lease)

    def prefilled(self, instance: int, request_id: int) -> None:
        """Its prefill is answered."""
        self.queue.get(instance, {}).pop(request_id, None)

    def ended(self, instance: int, request_id: int) -> None:
        """Its decode is over."""
        self.decodes.get(instance, {}).pop(request_id, None)

    def matched(self, now_ns: int, instance: int, content: Content, tokens: int) -> int:
        """Tokens that the tree believes cached there; the last prompt token is always computed."""
        tree = self.trees[instance]
        oldest = now_ns - int(self.options.tree_ttl_s * 1e9)
        if oldest > 0:
            tree.expire(oldest)
        return tree.match(content, tokens - 1)

    # ------------------------------------------------------------ decisions

    def route(self, now_ns: int, request_id: int, content: Content, tokens: int, session: int) -> Decision | None:
        """Where to prefill and decode, in one place where a role has died out; None while there is no member."""
        able = self.prefillers()
        if not able:
            return None
        self._now = now_ns
        able = self._guard(able)
        prefill, fetch = self._rules[self.options.policy](content, tokens, session, able)
        decode = self.pick_decode(now_ns, content, tokens) if self.roles[prefill] == "prefill" else prefill
        decode = prefill if decode < 0 else decode
        cached = self.matched(now_ns, prefill, content, tokens)
        if fetch < 0 and self.options.fetch and self.options.policy in ("prompt_tree_longest", "prompt_tree_cost"):
            fetch = self._fetch(content, tokens, prefill, cached)
        self.queue[prefill][request_id] = self.planner.exec_ns(tokens, cached)
        self.decodes[decode][request_id] = tokens
        self.dispatched[prefill] = self.dispatched.get(prefill, 0) + 1
        return Decision(prefill, decode, fetch, cached)

    def pick_decode(self, now_ns: int, content: Content, tokens: int) -> int:
        """Ours (the paper leaves it open): the longest match among those whose load is near the least. -1: none."""
        able = self.able("decode")
        if not able:
            return -1
        loads = {instance: len(self.decodes[instance]) for instance in able}
        near = [instance for instance in able if loads[instance] <= min(loads.values()) + self.options.decode_slack]
        return min(near, key=lambda instance: (-self.matched(now_ns, instance, content, tokens), loads[instance]))

    def load_ns(self, instance: int) -> int:
        """Eq. 1's sum over the queue."""
        return sum(self.queue[instance].values())

    def _outstanding(self, instance: int) -> int:
        return len(self.queue[instance]) + len(self.decodes[instance])

    def _ties(self, instance: int) -> tuple[int, int]:
        return self._outstanding(instance), self.dispatched.get(instance, 0)

    def _guard(self, able: list[int]) -> list[int]:
        """Ours, against hot spots: nobody whose queue is `guard_s` longer than the shortest is asked."""
        if self.options.guard_s is None:
            return able
        bound = min(self.load_ns(instance) for instance in able) + int(self.options.guard_s * 1e9)
        kept = [instance for instance in able if self.load_ns(instance) <= bound]
        self.guarded += len(kept) < len(able)
        return kept

    def _matches(self, content: Content, tokens: int, able: list[int]) -> dict[int, int]:
        return {instance: self.matched(self._now, instance, content, tokens) for instance in able}

    def _fetch(self, content: Content, tokens: int, prefill: int, cached: int) -> int:
        """Eq. 2: bring the longer prefix of another instance if that is faster than computing it."""
        best, gain = -1, 0
        for other, match in self._matches(content, tokens, self.prefillers()).items():
            if other == prefill or match <= cached:
                continue
            saved = self.planner.exec_ns(tokens, cached) - self.planner.exec_ns(tokens, match)
            cost = self.planner.send_ns((match - cached) * self.token_bytes)
            if saved - cost > gain:
                best, gain = other, saved - cost
        return best

    # ------------------------------------------------------------ rules

    def _round_robin(self, content: Content, tokens: int, session: int, able: list[int]) -> tuple[int, int]:
        self._turn += 1
        return able[self._turn % len(able)], -1

    def _least_load(self, content: Content, tokens: int, session: int, able: list[int]) -> tuple[int, int]:
        self._turn += 1  # ties go round
        order = able[self._turn % len(able) :] + able[: self._turn % len(able)]
        return min(order, key=self._outstanding), -1

    def _session(self, content: Content, tokens: int, session: int, able: list[int]) -> tuple[int, int]:
        home = self.sessions.get(session, -1)
        if home not in able:
            home = self._least_load(content, tokens, session, able)[0]
        if session >= 0:
            self.sessions[session] = home
        return home, -1

    def _longest(self, content: Content, tokens: int, session: int, able: list[int]) -> tuple[int, int]:
        """Section 6: the longest common prefix; where it is equal, the least loaded."""
        matches = self._matches(content, tokens, able)
        best = max(matches.values())
        return self._least_load(content, tokens, session, [one for one in able if matches[one] == best])

    def _cost(self, content: Content, tokens: int, session: int, able: list[int]) -> tuple[int, int]:
        """Section 5.3, Eq. 1: queue plus own prefill; where it is equal, the least loaded."""
        matches = self._matches(content, tokens, able)
        costs = {one: self.load_ns(one) + self.planner.exec_ns(tokens, matches[one]) for one in able}
        best = min(costs.values())
        return self._least_load(content, tokens, session, [one for one in able if costs[one] == best])

    def _mooncake(self, content: Content, tokens: int, session: int, able: list[int]) -> tuple[int, int]:
        """Mooncake, Alg. 1: argmin of queue + prefill, where the best prefix may be fetched once it is longer than the
        local one by the balancing threshold. (Without its rejections by SLO.)"""
        matches = self._matches(content, tokens, able)
        best = max(able, key=lambda one: matches[one])
        ways = []
        for one in able:
            far = matches[best] > self.options.balancing_threshold * matches[one]
            if far and one != best:
                wire = self.planner.send_ns((matches[best] - matches[one]) * self.token_bytes)
                cost = self.load_ns(one) + wire + self.planner.exec_ns(tokens, matches[best])
                ways.append((cost, self._ties(one), one, best))
            else:
                ways.append((self.load_ns(one) + self.planner.exec_ns(tokens, matches[one]), self._ties(one), one, -1))
        *_, prefill, fetch = min(ways)
        return prefill, fetch

    def _router(self, content: Content, tokens: int, session: int, able: list[int]) -> tuple[int, int]:
        """SGLang's router: shortest queue when unbalanced, else the best match, else the smallest tree."""
        loads = {one: self._outstanding(one) for one in able}
        low, high = min(loads.values()), max(loads.values())
        if high - low > self.options.router_abs and high > self.options.router_rel * low:
            return min(able, key=lambda one: loads[one]), -1
        matches = self._matches(content, tokens, able)
        best = max(able, key=lambda one: matches[one])
        if matches[best] > self.options.router_match * tokens:
            return best, -1
        return min(able, key=lambda one: (self.trees[one].cached_blocks, loads[one])), -1
