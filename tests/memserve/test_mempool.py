"""The nine calls of the MemPool: what each does, that a refusal leaves no trace, and the ledger under random calls."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ContractError
from common.types import CopySpan, FreeSpan, InstanceInfo, Status, SwapSpan, Tier
from systems.memserve.mempool import MemPool
from systems.memserve.node import ORDERS
from tests.laws.strategies import law

HBM, DRAM = Tier.HBM, Tier.DRAM
DOC = (("doc", 0, 64),)


def pool(blocks=8, host=4, instance=0, order="lru"):
    ids = itertools.count(1000 * instance + 1)
    return MemPool(InstanceInfo(instance, 4, blocks * 4, 4096, 0, host_cells=host * 4), blocks, 16, lambda: next(ids),
                   order)  # fmt: skip


def state(p):
    return dict(p.free), dict(p.active), dict(p.moving), dict(p.tree.cached), p.tree.num_leases


def fill(p, content, tokens, out):
    """A request computed `tokens` and ends: its blocks become historical."""
    found = p.match(content, tokens)
    lease = p.pin(content, found.hbm)
    blocks = p.blocks(tokens) - found.hbm // 16
    assert p.take(blocks, out)
    p.retire(1, content, (found.hbm, tokens), blocks, lease, out)
    p.unpin(lease)


def test_alloc_and_free():
    p = pool()
    out = []
    addresses = p.alloc_mem(10, out, None)
    assert [(one.instance, one.tier, one.num_blocks) for one in addresses] == [(0, HBM, 8), (0, DRAM, 2)]
    before = state(p)
    assert p.alloc_mem(1, out) is None and p.alloc_mem(3, out, DRAM) is None and state(p) == before
    p.free_mem(addresses)
    with pytest.raises(ContractError):
        p.free_mem(addresses)
    assert p.free == p.total and not out
    p.check()


def test_insert_copies_nothing_and_match_sees_full_blocks_only():
    p, out = pool(), []
    fill(p, DOC, 50, out)
    assert out == [FreeSpan(0, 1, tokens=(0, 48), retain=3), FreeSpan(0, 1)]
    assert p.match(DOC, 64) == (48, 48) and p.match(DOC, 47).hbm == 32
    assert (p.free[HBM], p.active[HBM], p.tree.cached[HBM]) == (5, 0, 3)
    p.check()


def test_matched_blocks_are_pinned():
    p, out = pool(), []
    fill(p, DOC, 64, out)
    lease = p.pin(DOC, 32)
    assert p.can(6) and not p.can(7) and p.alloc_mem(7, out) is None
    assert p.alloc_mem(6, out) is not None and p.match(DOC, 64).hbm == 32
    p.unpin(lease)
    p.check()


def test_eviction_is_lru_by_leaf_and_named():
    p, out = pool(), []
    other = (("doc", 0, 32), ("other", 0, 32))
    fill(p, DOC, 64, out)
    fill(p, other, 64, out)
    out.clear()
    p.evict(1, out)
    assert out == [FreeSpan(0, None, tokens=(48, 64), cached_blocks=1, content=DOC)]
    assert p.match(other, 64).hbm == 64 and p.match(DOC, 64).hbm == 48


def test_orders_of_eviction():
    """Three documents: a of 1 block is the oldest, b of 3 blocks is read often, c of 2 blocks was read last."""
    sizes = {"a": 16, "b": 48, "c": 32}
    for order, first in (("lru", "b"), ("fifo", "a"), ("lfu", "c"), ("largest", "b")):
        p, out = pool(order=order), []
        for name, tokens in sizes.items():
            fill(p, ((name, 0, tokens),), tokens, out)
        for name in "bbbaac":
            p.unpin(p.pin(((name, 0, sizes[name]),), sizes[name]))
        out.clear()
        p.evict(1, out)
        assert out[0].content[0][0] == first, order
        p.check()


def test_ttl_in_another_order_than_time():
    p, out = pool(order="largest"), []
    fill(p, (("small", 0, 16),), 16, out)
    p.tree.tick = 10
    fill(p, (("large", 0, 48),), 48, out)
    p.expire(10, out)
    assert (p.match((("small", 0, 16),), 16).hbm, p.match((("large", 0, 48),), 48).hbm) == (0, 48)
    p.check()


def test_delete_stops_at_what_others_share():
    p, out = pool(), []
    other = (("doc", 0, 32), ("other", 0, 32))
    fill(p, DOC, 64, out)
    fill(p, other, 64, out)
    assert p.delete(DOC, out) == 2 and p.match(DOC, 64).hbm == 32 and p.match(other, 64).hbm == 64
    lease = p.pin(other, 64)
    assert p.delete(other, out) == 0
    p.unpin(lease)
    assert p.delete(other, out) == 4 and p.free == p.total
    p.check()


def test_swap_out_and_in():
    p, out = pool(), []
    fill(p, DOC, 64, out)
    out.clear()
    assert p.swap_out(2, out) == 2
    (swap,) = out
    assert swap == SwapSpan(swap.command_id, -1, 0, (0, 4), (32, 64), True, DOC)
    assert p.match(DOC, 64) == (32, 32), "on its way: nobody reads it"
    p.check()
    p.swap_done(swap.command_id, Status.OK)
    assert p.match(DOC, 64) == (32, 64) and p.free == {HBM: 6, DRAM: 2}
    out.clear()
    back = p.swap_in(DOC, p.match(DOC, 64), out)
    assert back is not None and out[-1].out is False and p.match(DOC, 64) == (32, 32)
    p.swap_done(back.command_id, Status.OK)
    assert p.match(DOC, 64) == (64, 64) and p.free == {HBM: 4, DRAM: 4} and not p.can(5)
    p.unpin(back.lease)
    p.check()


def test_swap_in_without_room_leaves_no_trace():
    p, out = pool(), []
    fill(p, DOC, 64, out)
    p.swap_out(2, out)
    p.swap_done(out[-1].command_id, Status.OK)
    lease = p.pin(DOC, 32)
    assert p.alloc_mem(6, out) is not None
    before = state(p)
    assert p.swap_in(DOC, p.match(DOC, 64), out) is None and state(p) == before
    p.unpin(lease)


@pytest.mark.parametrize("order", ORDERS)
def test_a_swap_is_nobodys_use_of_the_blocks(order):
    """Moved to DRAM, or not for want of room there, blocks keep their age and their place in the order of eviction."""
    p, out = pool(host=1, order=order), []
    for tick, name in ((0, "old"), (10, "new")):
        p.tree.tick = tick
        fill(p, ((name, 0, 16),), 16, out)
    p.tree.tick = 20

    def standing():
        return {node.key[0][0]: (node.used, node.tick, node.releases) for node in p.tree.nodes()}

    before = standing()
    assert p.swap_out(1, out) == 1
    p.swap_done(out[-1].command_id, Status.OK)
    assert standing() == before and p.tree.cached[DRAM] == 1
    lease = p.pin((("old", 0, 16),), 16)
    assert p.swap_out(1, out) == 0, "DRAM is full of what is read"
    p.unpin(lease, read=False)
    assert standing() == before
    p.expire(15, out)
    assert p.free == p.total, "what was last read at 10 is older than 15, whenever it was moved"
    p.check()


def test_recomputed_blocks_drop_their_copy_in_dram():
    p, out = pool(), []
    fill(p, DOC, 64, out)
    p.swap_out(2, out)
    p.swap_done(out[-1].command_id, Status.OK)
    out.clear()
    fill(p, DOC, 64, out)
    assert out[0] == FreeSpan(0, None, tokens=(32, 64), cached_blocks=2, tier=DRAM, content=DOC)
    assert p.match(DOC, 64) == (64, 64) and p.free[DRAM] == 4
    p.check()


def test_transfer_pays_at_the_receiver_and_insert_waits_for_the_data():
    src, dst, out = pool(), pool(instance=1), []
    assert src.take(4, out)
    lease = dst.pin(DOC, 0)
    move = src.transfer_with_insert(dst, 1, DOC, (0, 64), out, lease=lease, num_calls=8, private="sampling")
    assert isinstance(out[-1], CopySpan) and dst.moving[HBM] == 4 and move.private == "sampling"
    assert dst.match(DOC, 64).hbm == 0, "not before its data is there"
    assert dst.arrived(move, Status.OK, out)
    dst.retire(1, move.insert, move.tokens, move.blocks, move.lease, out)
    dst.unpin(move.lease)
    assert dst.match(DOC, 64).hbm == 64
    dst.check()


def test_transfer_refused_or_failed_leaves_no_trace():
    src, dst, out = pool(), pool(instance=1), []
    src.take(4, out)
    before = state(dst)
    assert src.transfer(dst, 1, (0, 64), out, reserve=5) is None and state(dst) == before
    move = src.transfer(dst, 1, (0, 64), out, lease=dst.pin(DOC, 0))
    assert not dst.arrived(move, Status.FAILED, out) and state(dst) == before
    with pytest.raises(ContractError):
        src.transfer(dst, 1, (0, 64), out, addresses=dst.alloc_mem(3, out))
    given = dst.alloc_mem(4, out)
    assert src.transfer(dst, 1, (0, 64), out, addresses=given) is not None and dst.moving[HBM] == 4
    dst.check()


def test_ttl():
    p, out = pool(), []
    fill(p, DOC, 32, out)
    p.tree.tick = 10
    fill(p, (("new", 0, 32),), 32, out)
    p.expire(10, out)
    assert p.match(DOC, 32).hbm == 0 and p.match((("new", 0, 32),), 32).hbm == 32
    p.check()


CONTENTS = [(("doc", 0, 16 * a), (f"x{b}", 0, 16 * c)) for a in (1, 3) for b in (0, 1) for c in (1, 4)]
CALLS = st.lists(st.tuples(st.sampled_from(("fill", "pin", "unpin", "out", "in", "done", "delete", "alloc", "free")),
                           st.integers(0, 7), st.integers(0, 7)), max_size=40)  # fmt: skip


@law(200)
@given(CALLS, st.sampled_from(list(ORDERS)))
def test_any_calls_keep_the_ledger(calls, order):
    """And no block of a live match is ever evicted, in any order of eviction."""
    p, out, leases, swaps, held = pool(10, 6, order=order), [], [], [], []
    for call, a, b in calls:
        content = CONTENTS[a]
        total = sum(piece[2] for piece in content)
        if call == "fill" and p.can(p.blocks(total)):
            fill(p, content, total, out)
        elif call == "pin":
            leases.append((content, p.pin(content, p.match(content, total).hbm)))
        elif call == "unpin" and leases:
            p.unpin(leases.pop(b % len(leases))[1])
        elif call == "out":
            before = len(out)
            p.swap_out(b, out)
            swaps += [one.command_id for one in out[before:] if isinstance(one, SwapSpan)]
        elif call == "in" and (found := p.match(content, total)).total > found.hbm:
            swap = p.swap_in(content, found, out)
            if swap is not None:
                swaps.append(swap.command_id)
                held.append(swap)
        elif call == "done" and swaps:
            done = p.swap_done(swaps.pop(b % len(swaps)), Status.OK)
            if done in held:
                p.unpin(done.lease)
        elif call == "delete":
            p.delete(content, out)
        elif call in ("alloc", "free"):
            addresses = p.alloc_mem(b, out, (HBM, DRAM, None)[a % 3])
            if addresses is not None:
                p.check()
                p.free_mem(addresses)
        p.check()
        for pinned, lease in leases:
            assert p.match(pinned, lease.tokens).hbm == lease.tokens, "a pinned block is gone"
