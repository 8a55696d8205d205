"""Laws of placements, block pools and cell ranges, on random sequences of calls."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ContractError
from common.kv import plane
from common.kv.blocks import BlockPool, CellRange
from common.types import Span

LAYERS, TOKENS, BLOCK = 8, 48, 4
CUT = st.tuples(st.sampled_from(("layers", "tokens")), st.integers(0, TOKENS))
RECTANGLE = st.tuples(
    st.just("move"),
    st.tuples(st.integers(0, LAYERS - 1), st.integers(1, LAYERS)),
    st.tuples(st.integers(0, TOKENS), st.one_of(st.none(), st.integers(1, TOKENS))),
    st.integers(0, 3),
)


def owners(placement, num_tokens):
    """The plane, cell by cell: which instance holds (layer, token)."""
    return {
        (layer, token): span.instance
        for span in placement
        for layer in range(*span.layers)
        for token in range(span.token_start, num_tokens if span.token_end is None else span.token_end)
    }


def apply(placement, step):
    """One cut or move; also the cells that should have changed hands."""
    if step[0] == "layers":
        return plane.cut_layers(placement, step[1] % (LAYERS + 1)), {}
    if step[0] == "tokens":
        return plane.cut_tokens(placement, step[1]), {}
    _, (low, count), (start, end), instance = step
    high = min(LAYERS, low + count)
    if end is not None and end <= start:
        end = None
    moved = plane.move(placement, plane.Rectangle((low, high), start, end), instance)
    tokens = range(start, TOKENS if end is None else end)
    return moved, {(layer, token): instance for layer in range(low, high) for token in tokens}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(CUT, RECTANGLE), max_size=12))
def test_cuts_and_moves_keep_an_exact_tiling(steps):
    """Every cell keeps its one owner, except those that a move names; one span per layer stays open."""
    placement = (Span(0, (0, LAYERS), 0, None),)
    for step in steps:
        before = owners(placement, TOKENS)
        placement, changed = apply(placement, step)
        plane.validate(placement, LAYERS, TOKENS)
        assert owners(placement, TOKENS) == before | changed
        assert sum(high - low for _, (low, high), *_ in plane.open_spans(placement)) == LAYERS
    merged = plane.merge(placement)
    plane.validate(merged, LAYERS, TOKENS)
    assert owners(merged, TOKENS) == owners(placement, TOKENS)
    assert len(merged) <= len(placement)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(CUT, RECTANGLE), max_size=10), st.integers(TOKENS, TOKENS + 9))
def test_cells_are_counted_consistently(steps, num_tokens):
    """Cells over instances cover the plane, with less than one block a span and layer too many; tokens agree."""
    placement = (Span(0, (0, LAYERS), 0, None),)
    for step in steps:
        placement, _ = apply(placement, step)
    counts = [plane.cells_at(placement, instance, BLOCK, num_tokens) for instance in range(4)]
    rows = sum(high - low for _, (low, high), *_ in placement)
    assert LAYERS * num_tokens <= sum(counts) * BLOCK <= LAYERS * num_tokens + (BLOCK - 1) * rows
    held = owners(placement, num_tokens)
    for instance in range(4):
        assert plane.cells_at(placement, instance, 1, num_tokens) == sum(o == instance for o in held.values())
        for layer in range(LAYERS):
            ranges = plane.tokens_at(placement, instance, layer)
            found = [t for a, b in ranges for t in range(a, num_tokens if b is None else b)]
            assert found == [t for t in range(num_tokens) if held[layer, t] == instance]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(CUT, RECTANGLE), max_size=6), st.integers(0, 99), st.integers(0, 2))
def test_every_spoilt_tiling_is_named(steps, pick, kind):
    """A span lost, doubled or shifted is found, and the message says gap, overlap or outside."""
    placement = (Span(0, (0, LAYERS), 0, None),)
    for step in steps:
        placement, _ = apply(placement, step)
    at = pick % len(placement)
    span = placement[at]
    rest = placement[:at] + placement[at + 1 :]
    if kind == 0 and span.token_start == TOKENS:
        return  # an empty open span is not missed
    spoilt = (rest, (*placement, span), (*rest, span._replace(layers=(span.layers[0] + 1, LAYERS + 1))))[kind]
    assert not plane.tiles_exactly(spoilt, LAYERS, TOKENS)
    with pytest.raises(ContractError, match=("gap", "overlap", "outside")[kind]):
        plane.validate(spoilt, LAYERS, TOKENS)


def test_two_open_spans_of_one_layer_overlap_even_when_one_is_empty():
    """The next token would be appended twice."""
    twice = (Span(0, (0, LAYERS), 0, None), Span(1, (2, 3), TOKENS, None))
    with pytest.raises(ContractError, match=r"overlap: layers \[2, 3\) from token 48"):
        plane.validate(twice, LAYERS, TOKENS)
    handed_on = (Span(0, (0, LAYERS), 0, TOKENS), Span(1, (0, LAYERS), TOKENS, None))
    assert plane.tiles_exactly(handed_on, LAYERS, TOKENS)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 40), st.lists(st.tuples(st.sampled_from("asf"), st.integers(0, 50)), max_size=40))
def test_block_pool_against_counts(num_blocks, steps):
    """Held + free = all; refcounts as a plain counter has them; refused calls leave no trace."""
    pool, refs = BlockPool(num_blocks), {}
    for action, num in steps:
        held = sorted(refs)
        if action == "a":
            if not pool.can_allocate(num):
                with pytest.raises(ContractError):
                    pool.allocate(num)
            else:
                ids = pool.allocate(num)
                assert len(ids) == num and not refs.keys() & ids
                refs |= dict.fromkeys(ids, 1)
        elif action == "s":
            pool.share(held[: num % 5])
            for block in held[: num % 5]:
                refs[block] += 1
        else:
            ids = held[num % 3 :: 2]
            with pytest.raises(ContractError):
                pool.free([*ids, num_blocks])
            pool.check()
            assert pool.free(ids) == [block for block in ids if refs[block] == 1]
            for block in ids:
                refs[block] -= 1
            refs = {block: num for block, num in refs.items() if num}
        pool.check()
        assert (pool.num_held, pool.num_free) == (len(refs), num_blocks - len(refs))


def memory_after(memory, moves, num_cells):
    """Make the moves on real memory, in order, as memmove would."""
    for src, dst, num in moves:
        memory[dst : dst + num] = memory[src : src + num]
    return memory[:num_cells]


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(0, 120), st.integers(1, 60))
def test_cell_range_conserves_cells_and_their_bytes(seed, num_cells, num_steps):
    """Runs never overlap; free + held = all, wasted among the free; after shrinking each run has its bytes."""
    rng = random.Random(seed)
    cells = CellRange(num_cells)
    memory, tags = [0] * num_cells, {}
    for step in range(1, num_steps):
        run = rng.randint(1, 9)
        action = rng.choice("aaaffsgh")
        if action == "a":
            num = min(rng.randint(0, 6), cells.free_runs(run))
            for start in cells.allocate(run, num):
                tags[start] = run, step
        elif action == "f" and tags:
            starts = rng.sample(sorted(tags), rng.randint(1, min(4, len(tags))))
            cells.free(starts)
            for start in starts:
                del tags[start]
        elif action == "s" and tags:
            start = rng.choice(sorted(tags))
            length, _ = tags[start]
            first = rng.randint(1, length)
            for part in cells.split(start, [n for n in (first, length - first) if n]):
                tags[part] = (first if part == start else length - first), step
        elif action == "g":
            memory += [0] * (grown := rng.randint(0, 12))
            cells.grow(cells.num_cells + grown)
        elif action == "h":
            memory, tags = shrunk(cells, memory, tags, rng.randint(0, cells.num_cells))
        for start, (length, tag) in tags.items():
            memory[start : start + length] = [tag] * length
        cells.check()
        assert cells.runs() == sorted((start, length) for start, (length, _) in tags.items())
        assert cells.free_runs(run) * run + cells.wasted_cells(run) + cells.held_cells == cells.num_cells
        assert not cells.can_allocate(run, cells.free_runs(run) + 1)


def shrunk(cells, memory, tags, target):
    if cells.held_cells > target:
        with pytest.raises(ContractError):
            cells.shrink(target)
        return memory, tags
    moves = cells.shrink(target)
    memory = memory_after(memory, moves, target)
    for src, dst, _ in moves:
        tags[dst] = tags.pop(src)
    assert len(memory) == cells.num_cells == target
    for start, (length, tag) in tags.items():
        assert memory[start : start + length] == [tag] * length
    return memory, tags


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 20), st.integers(0, 30), st.data())
def test_recut_for_equal_slices_gives_g_times_the_blocks_plus_the_extension(slices, per_slice, full, extra, data):
    """KunServe's drop: g equal bands make g*P + E blocks of P, held ones keep their band in place, none moves."""
    layers = slices * per_slice
    cells = CellRange(full * layers)
    held = cells.allocate(layers, data.draw(st.integers(0, full)))
    band = data.draw(st.integers(0, slices - 1))
    cells.grow(full * layers + extra * per_slice)
    for start in held:
        parts = cells.split(start, [per_slice] * slices)
        cells.free([part for at, part in enumerate(parts) if at != band])
    cells.check()
    assert cells.free_runs(per_slice) + len(held) == slices * full + extra
    assert cells.wasted_cells(per_slice) == 0
    for start, _ in cells.runs():
        assert start % layers == band * per_slice


def test_layers_that_do_not_divide_waste_cells_unless_neighbours_merge():
    """Runs of 7 re-cut in runs of 3 waste 7 mod 3 each; three neighbours that are free together waste none."""
    cells = CellRange(28)
    starts = cells.allocate(7, 4)
    cells.free([starts[0], starts[2]])
    assert (cells.free_runs(3), cells.wasted_cells(3)) == (4, 2)
    cells.free([starts[1]])
    assert (cells.free_runs(3), cells.wasted_cells(3)) == (7, 0)
    cells.check()
