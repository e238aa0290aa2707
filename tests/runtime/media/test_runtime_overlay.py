"""The picture of kept tokens: kept in colour, dropped in dim grey, one panel a cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from edgeprune.errors import UsageError
from edgeprune.plan import View
from edgeprune.runtime.media.overlay import CACHES, MAX_PART_SIDE, MAX_ROW, MAX_SIDE, MIN_WIDTH, TokenCanvas, kept_token_panels
from edgeprune.runtime.media.sheet import join_panels

TOP, MARGIN = 84, 20  # where the panels' images begin
LEGEND = 42
RED = (200, 30, 40)


def draw_kept_tokens(canvas: TokenCanvas, kept: Sequence[tuple[str, np.ndarray]], caches: Sequence[np.ndarray] = ()) -> Image.Image:
    return join_panels(kept_token_panels(canvas, kept, caches))


def panel(sheet: Image.Image, number: int, size: tuple[int, int] = (384, 384)) -> np.ndarray:
    """Return the image of panel `number` as integers [height, width, 3]."""
    left = MARGIN + number * (max(size[0], MIN_WIDTH) + MARGIN)
    return np.asarray(sheet)[TOP : TOP + size[1], left : left + size[0]].astype(int)


def scene(width: int = 192, height: int = 192) -> TokenCanvas:
    return TokenCanvas.plain(Image.new("RGB", (width, height), RED), 12, 12)


def test_one_panel_more_than_cuts() -> None:
    kept = [("fastv @ layer 3", np.arange(72)), ("random @ layer 6", np.arange(36))]
    assert draw_kept_tokens(scene(), kept).size == (MARGIN + 3 * (384 + MARGIN), TOP + 384 + MARGIN + LEGEND)
    assert draw_kept_tokens(scene(), []).size == (384 + 2 * MARGIN, TOP + 384 + MARGIN)


def test_input_panel_is_the_image() -> None:
    assert (panel(draw_kept_tokens(scene(), [("all", np.arange(144))]), 0) == RED).all()


def test_kept_in_colour_and_dropped_in_dim_grey() -> None:
    kept = np.array([0, 13, 77, 143])
    picture = panel(draw_kept_tokens(scene(), [("some", kept)]), 1)
    for token in range(144):
        row, column = divmod(token, 12)
        middle = picture[32 * row + 16, 32 * column + 16]
        if token in kept:
            assert middle.tolist() == list(RED)
        else:
            assert np.ptp(middle) == 0
            assert middle[0] < 60


def test_outline_surrounds_the_region_not_each_token() -> None:
    picture = panel(draw_kept_tokens(scene(), [("block", np.array([0, 1, 12, 13]))]), 1)
    line = (picture == (255, 196, 0)).all(axis=-1)
    rim = np.zeros((384, 384), bool)
    rim[:64, :64] = True
    rim[2:62, 2:62] = False
    np.testing.assert_array_equal(line, rim)


def test_none_and_all_tokens() -> None:
    sheet = draw_kept_tokens(scene(), [("none", np.array([], np.int64)), ("all", np.arange(144))])
    assert np.ptp(panel(sheet, 1), axis=-1).max() == 0
    assert (panel(sheet, 2)[2:-2, 2:-2] == RED).all()


def test_order_and_repeats_do_not_matter() -> None:
    assert draw_kept_tokens(scene(), [("a", np.array([5, 3, 5]))]) == draw_kept_tokens(scene(), [("a", np.array([3, 5]))])


def test_captions_are_written_and_differ() -> None:
    def caption(sheet: Image.Image, number: int) -> np.ndarray:
        left = MARGIN + number * (MIN_WIDTH + MARGIN)
        return np.asarray(sheet)[:TOP, left : left + MIN_WIDTH]

    sheet = draw_kept_tokens(scene(), [("a", np.arange(3)), ("a", np.arange(4))])
    assert caption(sheet, 1).min() < 100
    assert (caption(sheet, 1) != caption(sheet, 2)).any()


@pytest.mark.parametrize("title", ["w" * 60, "w" * 500])
def test_long_title_stays_in_its_panel(title: str) -> None:
    pixels = np.asarray(draw_kept_tokens(scene(), [(title, np.arange(3)), ("b", np.arange(3))]))
    gap = MARGIN + 2 * (MIN_WIDTH + MARGIN) - MARGIN
    assert (pixels[:TOP, gap + 1 : gap + MARGIN] == pixels[0, 0]).all()
    assert pixels[:TOP, gap - 60 : gap].min() < 100


@pytest.mark.parametrize(
    ("size", "shown"),
    [((10, 10), (384, 384)), ((500, 300), (500, 300)), ((4000, 1000), (MAX_SIDE, 256)), ((28, 1000), (29, MAX_SIDE))],
)
def test_size_of_a_panel(size: tuple[int, int], shown: tuple[int, int]) -> None:
    sheet = draw_kept_tokens(scene(*size), [("a", np.arange(3))])
    width = max(shown[0], MIN_WIDTH) + MARGIN
    rows = 1 if 2 * width <= MAX_ROW + MARGIN else 2
    assert sheet.size == (MARGIN + 2 // rows * width, rows * (TOP - MARGIN + shown[1] + MARGIN) + MARGIN + LEGEND)
    assert (panel(sheet, 0, shown) == RED).all()


def test_image_is_not_changed() -> None:
    image = Image.new("RGB", (192, 192), RED)
    draw_kept_tokens(TokenCanvas.plain(image, 12, 12), [("a", np.arange(3))])
    assert image == Image.new("RGB", (192, 192), RED)


@pytest.mark.parametrize("indices", [np.array([144]), np.array([-1]), np.array([0.5]), np.ones(144, bool)])
def test_wrong_indices(indices: np.ndarray) -> None:
    with pytest.raises(UsageError, match="none of the image's 144"):
        draw_kept_tokens(scene(), [("a", indices)])


def test_all_cache_cuts_are_one_panel_after_the_others() -> None:
    caches = [np.array([[0, 1, 2, 3], [0, 1, 2, 4]])] * 28
    panels = kept_token_panels(scene(), [("fastv @ layer 1", np.arange(72))], caches)
    assert [panel.title for panel in panels] == ["input, 144 tokens", "fastv @ layer 1", CACHES]
    assert panels[-1].caption == "each KV head keeps 4 of 144 (3%)"
    assert draw_kept_tokens(scene(), [], caches).size == (MARGIN + 2 * (384 + MARGIN), TOP + 384 + MARGIN + LEGEND)


def test_caches_of_different_lengths_are_counted_as_a_range() -> None:
    caches = [np.arange(72).reshape(1, 72), np.zeros((1, 0), np.int64)]
    assert kept_token_panels(scene(), [], caches)[1].caption == "each KV head keeps 0 to 72 of 144 (25%)"


def test_a_token_is_as_bright_as_the_share_of_caches_that_keep_it() -> None:
    # Of four caches (two layers, two heads): token 0 in all, 1 in two, 2 in one, the others in none.
    caches = [np.array([[0, 1], [1, 0]]), np.array([[0, 2], [0, 7]])]
    picture = np.asarray(kept_token_panels(scene(), [], caches)[1].picture).astype(float)
    middles = np.stack([picture[16, 32 * token + 16] for token in (0, 1, 2, 3)])
    grey, colour = middles[3], middles[0]
    assert colour.tolist() == list(RED)
    assert np.ptp(grey) == 0 and grey[0] < 60
    np.testing.assert_allclose(middles[1], grey + 0.5 * (colour - grey), atol=1)
    np.testing.assert_allclose(middles[2], grey + 0.25 * (colour - grey), atol=1)


def test_the_order_of_ranks_does_not_matter_in_a_cache() -> None:
    ranked = [np.array([[5, 3, 9]])]
    assert kept_token_panels(scene(), [], ranked)[1] == kept_token_panels(scene(), [], [np.sort(ranked[0])])[1]


def test_wrong_indices_of_a_cache() -> None:
    with pytest.raises(UsageError, match="none of the image's 144"):
        kept_token_panels(scene(), [], [np.array([[0, 144]])])


def frames(count: int, views: int, size: tuple[int, int] = (192, 192)) -> TokenCanvas:
    """Return the canvas of a video whose frames grow brighter, with 2 x 2 tokens in each view."""
    pictures = [Image.new("RGB", size, (10 + 20 * number, 0, 0)) for number in range(count)]
    return TokenCanvas.of(pictures, size, [View(0, 0, size[1], size[0], 2, 2, time=time) for time in range(views)])


def test_many_frames_continue_in_rows() -> None:
    canvas = frames(8, 8)
    assert canvas.picture.width <= MAX_ROW and canvas.picture.height > 2 * 384
    assert len({box[1] for box in canvas.parts}) == 2 and canvas.shape == "8 frames"
    for number, (left, top, right, bottom) in enumerate(canvas.parts):
        colours = np.asarray(canvas.picture)[top:bottom, left:right].reshape(-1, 3)
        assert np.unique(colours, axis=0).tolist() == [[10 + 20 * number, 0, 0]]
        strip = np.asarray(canvas.picture)[top - 20 : top, left:right]
        assert strip.min() < 150 and strip.max() == 250  # a name on the background


def test_a_grid_lies_on_the_first_of_its_frames() -> None:
    pair = frames(4, 2)
    assert [np.asarray(pair.picture)[box[1] + 5, box[0] + 5, 0] for box in pair.parts] == [10, 50]
    # The names differ: "frames 1 to 2", "frames 3 to 4".
    first, second = (np.asarray(pair.picture)[:20, box[0] : box[2]] for box in pair.parts)
    assert not np.array_equal(first, second)


def test_names_stay_readable_where_tokens_are_dropped() -> None:
    canvas = frames(4, 4)
    panel = kept_token_panels(canvas, [("none", np.array([], np.int64))])[1]
    around = canvas.around
    np.testing.assert_array_equal(np.asarray(panel.picture)[around], np.asarray(canvas.picture)[around])
    assert np.asarray(panel.picture)[~around].max() < 60


def test_tiles_and_their_overview() -> None:
    tiles = [View(512 * row, 512 * column, 512, 512, 8, 8) for row in range(6) for column in range(8)]
    image = Image.new("RGB", (4096, 3072), RED)
    canvas = TokenCanvas.of([image], image.size, [*tiles, View(0, 0, 3072, 4096, 8, 8)])
    assert canvas.shape == "49 views" and len(canvas.parts) == 2
    assert max(right - left for left, _, right, _ in canvas.parts) == MAX_PART_SIDE
    overview = np.arange(48 * 64, 49 * 64)
    picture = np.asarray(kept_token_panels(canvas, [("overview", overview)])[1].picture)
    (left, top, right, bottom), tiled = canvas.parts[1], canvas.parts[0]
    assert (picture[top + 2 : bottom - 2, left + 2 : right - 2] == RED).all()
    assert np.ptp(picture[tiled[1] : tiled[3], tiled[0] : tiled[2]], axis=-1).max() == 0


@pytest.mark.parametrize(("cells", "width"), [(12, 2), (48, 1)])
def test_lines_are_thinner_around_small_cells(cells: int, width: int) -> None:
    canvas = TokenCanvas.plain(Image.new("RGB", (384, 384), RED), cells, cells)
    picture = np.asarray(kept_token_panels(canvas, [("first", np.array([0]))])[1].picture)
    assert (picture[384 // cells // 2] == (255, 196, 0)).all(axis=-1)[: 384 // cells].sum() == 2 * width


def test_panels_continue_in_rows_and_each_image_begins_one() -> None:
    panels = kept_token_panels(scene(), [(f"cut {number}", np.arange(9)) for number in range(5)])
    row = TOP - MARGIN + 384 + MARGIN
    assert join_panels(panels).size == (MARGIN + 4 * (384 + MARGIN), MARGIN + 2 * row + LEGEND)
    two = kept_token_panels(scene(), [("cut", np.arange(9))]) * 2
    assert join_panels(two, images=2).size == (MARGIN + 2 * (384 + MARGIN), MARGIN + 2 * row + LEGEND)


def test_question_and_answer_stand_above_the_panels() -> None:
    panels = kept_token_panels(scene(), [("cut", np.arange(9))])
    plain = join_panels(panels)
    asked = join_panels(panels, question="What is it?", answer="A cup.")
    added = asked.height - plain.height
    assert added == 2 * 28 + MARGIN and np.asarray(asked)[:added].min() < 60
    np.testing.assert_array_equal(np.asarray(asked)[added + MARGIN :], np.asarray(plain)[MARGIN:])
    assert join_panels(panels, question="What is it?", answer="A mug.") != asked
    long = join_panels(panels, answer="word " * 1000 + "\n" + "w" * 1000)
    assert long.width == plain.width and long.height == plain.height + 6 * 28 + MARGIN
    assert (np.asarray(long)[:, -MARGIN // 2 :] == np.asarray(plain)[0, 0]).all()


def test_the_legend_tells_of_brightness_only_where_caches_were_cut() -> None:
    def legend(sheet: Image.Image) -> np.ndarray:
        return np.asarray(sheet)[-LEGEND:]

    layer, caches = [("cut", np.arange(9))], [np.array([[0, 1], [1, 2]])]
    without, with_caches = (join_panels(kept_token_panels(scene(), layer, each)) for each in ([], caches))
    ink = [(legend(sheet) < 100).any(axis=(0, 2)) for sheet in (without, with_caches)]
    assert ink[0].any() and np.flatnonzero(ink[1])[-1] > np.flatnonzero(ink[0])[-1] + 200
