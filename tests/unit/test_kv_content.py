"""Names of tokens: every function against the tokens themselves."""

from hypothesis import given
from hypothesis import strategies as st

from common.kv import content as named
from common.kv.hash_index import block_hashes

PIECE = st.tuples(st.sampled_from(("a", "b")), st.integers(0, 6), st.integers(0, 6))
CONTENT = st.lists(PIECE, max_size=6).map(tuple)


def expand(content):
    return [(source, start + i) for source, start, num in content for i in range(num)]


@given(CONTENT)
def test_the_normal_form_names_the_same_tokens_once_and_for_all(content):
    """Normalising keeps the tokens, is idempotent, and gives equal names to equal tokens."""
    normal = named.normalise(content)
    assert expand(normal) == expand(content)
    assert named.normalise(normal) is normal
    assert named.length(content) == len(expand(content)) == named.length(normal)
    assert named.normalise(tuple((s, t, 1) for s, t in expand(content))) == normal


@given(CONTENT, st.integers(0, 40), st.integers(0, 40))
def test_slice_and_locate(content, start, end):
    """A slice names the tokens that slicing them would give, and is normal when the content is."""
    size = named.length(content)
    start, end = sorted((min(start, size), min(end, size)))
    assert expand(named.slice(content, start, end)) == expand(content)[start:end]
    part = named.slice(named.normalise(content), start, end)
    assert named.normalise(part) is part
    index, offset = named.locate(content, start)
    assert sum(piece[2] for piece in content[:index]) + offset == start


@given(CONTENT, CONTENT, CONTENT)
def test_common_prefix_ignores_how_pieces_are_cut(trunk, left, right):
    """As many tokens as the expanded lists share."""
    one, other = (*trunk, *left), named.concat(trunk, right)
    shared = 0
    for a, b in zip(expand(one), expand(other), strict=False):
        if a != b:
            break
        shared += 1
    assert named.common_prefix(one, other) == named.common_prefix(other, one) == shared
    assert expand(named.concat(trunk, left, right)) == expand(trunk) + expand(left) + expand(right)


@given(CONTENT, CONTENT)
def test_block_hashes_agree_exactly_as_far_as_the_contents_do(left, right):
    """Chained digests of two contents are equal up to the common prefix in whole blocks, and nowhere after it."""
    pairs = list(zip(block_hashes(left, 2), block_hashes(right, 2), strict=False))
    equal = [a[0] == b[0] for a, b in pairs]
    same = named.common_prefix(left, right) // 2
    assert equal == [at < same for at in range(len(pairs))]
    assert sum(1 for _ in block_hashes(left, 2)) == named.length(left) // 2
