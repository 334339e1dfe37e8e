import numpy as np
import pytest

from pallas_kernels.geometry import ChunkGeometry

# Relative positions of Dual Chunk Attention for chunk_size 8, local_size 2 and 20 tokens.
EIGHT_TWO = """
0
1 0
2 1 0
3 2 1 0
4 3 2 1 0
5 4 3 2 1 0
6 5 4 3 2 1 0
7 6 5 4 3 2 1 0
8 7 6 5 4 3 2 1 0
8 7 6 5 4 3 3 2 1 0
8 7 6 5 4 3 4 3 2 1 0
8 7 6 5 4 3 5 4 3 2 1 0
8 7 6 5 4 3 6 5 4 3 2 1 0
8 7 6 5 4 3 7 6 5 4 3 2 1 0
8 7 6 5 4 3 8 7 6 5 4 3 2 1 0
8 7 6 5 4 3 8 7 6 5 4 3 3 2 1 0
8 7 6 5 4 3 8 7 6 5 4 3 4 3 2 1 0
8 7 6 5 4 3 8 7 6 5 4 3 5 4 3 2 1 0
8 7 6 5 4 3 8 7 6 5 4 3 6 5 4 3 2 1 0
8 7 6 5 4 3 8 7 6 5 4 3 7 6 5 4 3 2 1 0
"""
# The positions at which the queries of the first example vote in sparse selection.
EIGHT_TWO_CRITICAL = """
0
1 0
2 1 0
3 2 1 0
4 3 2 1 0
5 4 3 2 1 0
6 5 4 3 2 1 0
7 6 5 4 3 2 1 0
8 7 6 5 4 3 2 1 0
9 8 7 6 5 4 3 2 1 0
10 9 8 7 6 5 4 3 2 1 0
11 10 9 8 7 6 5 4 3 2 1 0
8 7 6 5 4 3 6 5 4 3 2 1 0
9 8 7 6 5 4 7 6 5 4 3 2 1 0
10 9 8 7 6 5 8 7 6 5 4 3 2 1 0
11 10 9 8 7 6 9 8 7 6 5 4 3 2 1 0
12 11 10 9 8 7 10 9 8 7 6 5 4 3 2 1 0
13 12 11 10 9 8 11 10 9 8 7 6 5 4 3 2 1 0
8 7 6 5 4 3 8 7 6 5 4 3 6 5 4 3 2 1 0
9 8 7 6 5 4 9 8 7 6 5 4 7 6 5 4 3 2 1 0
"""
# The first example for chunk_size 8, local_size 3 and 15 tokens.
EIGHT_THREE = """
0
1 0
2 1 0
3 2 1 0
4 3 2 1 0
5 4 3 2 1 0
6 5 4 3 2 1 0
7 6 5 4 3 2 1 0
8 7 6 5 4 3 2 1 0
8 7 6 5 4 4 3 2 1 0
8 7 6 5 4 5 4 3 2 1 0
8 7 6 5 4 6 5 4 3 2 1 0
8 7 6 5 4 7 6 5 4 3 2 1 0
8 7 6 5 4 8 7 6 5 4 3 2 1 0
8 7 6 5 4 8 7 6 5 4 4 3 2 1 0
"""
# Pairs of the shipped geometry: query, key, relative position.
MILLION = [
    (253951, 0, 253951),
    (253952, 0, 253952),
    (253952, 253951, 1),
    (262144, 0, 262144),
    (262145, 0, 262144),
    (262145, 1, 262143),
    (300000, 253951, 8193),
    (507903, 253951, 8193),
    (507904, 253952, 253952),
    (507904, 0, 262144),
    (507904, 253951, 8193),
    (999999, 0, 262144),
    (999999, 507903, 8193),
    (999999, 507904, 262144),
    (999999, 761856, 238143),
]


def relative(geometry, q_pos, k_pos):
    view = geometry.view(q_pos, k_pos)
    return np.choose(view, geometry.query_positions(q_pos)) - geometry.key_position(k_pos)


@pytest.mark.parametrize(
    ("geometry", "table"),
    [(ChunkGeometry(8, 2), EIGHT_TWO), (ChunkGeometry(8, 3), EIGHT_THREE)],
    ids=["8/2", "8/3"],
)
def test_relative_positions_are_those_of_the_worked_examples(geometry, table):
    rows = [[int(cell) for cell in row.split()] for row in table.strip().splitlines()]
    for i, row in enumerate(rows):
        assert relative(geometry, np.full(i + 1, i), np.arange(i + 1)).tolist() == row


def test_votes_have_the_positions_of_the_worked_example():
    geometry = ChunkGeometry(8, 2)
    rows = [[int(cell) for cell in row.split()] for row in EIGHT_TWO_CRITICAL.split("\n")[1:-1]]
    for i, row in enumerate(rows):
        k_pos = np.arange(i + 1)
        offset = np.choose(geometry.view(np.full(i + 1, i), k_pos), geometry.critical_offsets)
        actual = geometry.key_position(i) + offset - geometry.key_position(k_pos)
        assert actual.tolist() == row


def test_relative_positions_of_the_million_token_geometry():
    q_pos, k_pos, expected = np.array(MILLION).T
    assert relative(ChunkGeometry(262144, 8192), q_pos, k_pos).tolist() == expected.tolist()


@pytest.mark.parametrize(("chunk_size", "local_size"), [(8, 2), (9, 4), (6, 1), (16, 12), (5, 4)])
def test_every_pair_stays_inside_the_trained_window(chunk_size, local_size):
    geometry = ChunkGeometry(chunk_size, local_size)
    q_pos, k_pos = np.tril_indices(5 * chunk_size)  # every causal pair of five chunks
    distance = relative(geometry, q_pos, k_pos)
    assert distance.min() >= 0
    assert distance.max() <= chunk_size
    near = q_pos - k_pos <= local_size
    if local_size < geometry.chunk_len:
        assert (distance == q_pos - k_pos)[near].all()


@pytest.mark.parametrize(("chunk_size", "local_size"), [(8, 0), (8, 8), (8, 9), (8, -1)])
def test_impossible_sizes_are_refused(chunk_size, local_size):
    with pytest.raises(ValueError, match="local_size must be in"):
        ChunkGeometry(chunk_size, local_size)
