import pytest

from pallas_kernels.dispatch.tiles import of_page, split


@pytest.mark.parametrize("total", [1, 7, 512, 513, 1999, 2048])
def test_equal_tiles_cover_the_whole_and_little_more(total):
    for most in (1, 64, 512):
        count, size = split(total, most)
        assert size <= most
        assert total <= count * size < total + count


@pytest.mark.parametrize(
    ("page", "most", "tile"), [(1024, 512, 512), (896, 512, 448), (1021, 512, 1021), (6, 512, 6)]
)
def test_a_tile_divides_its_page(page, most, tile):
    assert of_page(page, most) == tile
