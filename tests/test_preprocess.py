"""Pictures -> crops -> tokens -> places in the picture, and files -> frames with their real times."""

import math
import struct
import warnings
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

import preprocess
from preprocess import MediaError, ViewConfig

TINY = ViewConfig(crop_size=126, patch_size=14, margins=(1, 1), max_crops=4, max_frames=16)
RELEASED = ViewConfig()
LOPSIDED = ViewConfig(crop_size=126, patch_size=14, margins=(2, 1), max_crops=6)


def position_picture(height: int, width: int) -> np.ndarray:
    """A picture in which no two pixels are alike: (y, x) is written in the colour."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y // 256 * 16 + x // 256, y % 256, x % 256], axis=-1).astype(np.uint8)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def piece_counts(views: preprocess.Views) -> dict[str, int]:
    return {piece: views.layout.count(piece) for piece in views.layout}


# ---- crops and the patch map -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("config, rows, cols", [(TINY, 1, 1), (TINY, 2, 2), (TINY, 1, 3), (LOPSIDED, 3, 2),
                                                (RELEASED, 1, 1), (RELEASED, 3, 5)])
def test_every_place_is_read_once_and_holds_its_own_pixels(config, rows, cols):
    """Reading the patches of the pool windows at the places of their boxes rebuilds the picture, each pixel once."""
    P = config.patch_size
    height, width = ((n * config.stride + sum(config.margins)) * P for n in (rows, cols))
    image = position_picture(height, width)  # exactly the size of its tiling, so that resizing changes nothing
    assert preprocess.select_tiling(height, width, config) == (rows, cols)
    views = preprocess.image_views([image], config)
    flat = views.crops.reshape(-1, P, P, 3)
    rebuilt, reads = np.zeros_like(image), np.zeros((height, width), int)
    low = views.layout.index("<im_end>") - 1  # tokens of the whole-picture crop
    for patch in views.pooling[low:].ravel():
        if patch >= 0:
            _, x, y, w, h = views.patch_boxes[patch]
            assert (w, h) == (P, P)
            place = np.s_[round(y):round(y) + P, round(x):round(x) + P]
            rebuilt[place] = flat[patch]
            reads[place] += 1
    assert (reads == 1).all()
    assert np.array_equal(rebuilt, image)


def test_each_crop_patch_lies_where_its_box_says():
    """Also the patches of the overlaps, which are not read, carry the pixels of their box."""
    image = position_picture(224, 224)
    views = preprocess.image_views([image], TINY)
    assert views.crops.shape == (5, 81, 588) and views.crops.dtype == np.uint8
    for patch, (_, x, y, _, _) in zip(views.crops[1:].reshape(-1, 14, 14, 3), views.patch_boxes[81:]):
        assert np.array_equal(patch, image[round(y):round(y) + 14, round(x):round(x) + 14])


def test_overlaps_are_read_from_the_crop_that_sees_further():
    """At 378 px the seam between two crops is at patch 23: 22 is the last of the first, then patch 4 of the second."""
    ids = preprocess.patch_map((1, 2), RELEASED)
    assert ids.shape == (27, 46)
    assert ids[0, :23].tolist() == list(range(23))
    assert ids[0, 23:].tolist() == list(range(729 + 4, 729 + 27))
    assert np.array_equal(ids[1], ids[0] + 27)
    unequal = preprocess.patch_map((2, 1), LOPSIDED)[:, 0] // 9  # margins 2 above, 1 below: row 8 is the second's row 2
    assert unequal.tolist() == [*range(8), *range(9 + 2, 9 + 9)]


@pytest.mark.parametrize("config", [TINY, RELEASED, LOPSIDED])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 4000), (4000, 200), (97, 61), (1200, 1800)])
def test_boxes_tile_the_picture_at_any_size(config, height, width):
    """In the whole-picture crop and in the tiling, the boxes that are read cover the picture without gap or overlap."""
    views = preprocess.image_views([noise(height, width)], config)
    assert views.sizes == [(width, height)]
    low = views.layout.index("<im_end>") - 1
    for windows in (views.pooling[:low], views.pooling[low:]):
        number, x, y, w, h = views.patch_boxes[windows[windows >= 0]].T
        assert (number == 0).all() and np.isclose((w * h).sum(), height * width)
        columns, rows = round(width / w[0]), round(height / h[0])
        cells = set(zip((y / h).round().astype(int), (x / w).round().astype(int)))
        assert cells == {(r, c) for r in range(rows) for c in range(columns)} and len(cells) == len(x)
        assert np.isclose((x + w).max(), width) and np.isclose((y + h).max(), height) and x.min() == y.min() == 0


def test_tiling_agrees_with_its_definition():
    """The chosen tiling is the one that exhaustive comparison with exact fractions chooses: among those that enlarge the
    least enlarging, else the least shrinking; a side of the margins' length asks for nothing, a shorter one for less."""
    def by_definition(height, width, config):
        stride, margin = config.stride * config.patch_size, sum(config.margins) * config.patch_size
        tilings = [(rows, count // rows) for count in range(1, config.max_crops + 1)
                   for rows in range(1, count + 1) if count % rows == 0]
        def scale(tiling):
            return min(Fraction(n * stride, side - margin) if side != margin else math.inf
                       for n, side in zip(tiling, (height, width)))
        enlarging = [tiling for tiling in tilings if scale(tiling) >= 1]
        return min(enlarging, key=scale) if enlarging else max(tilings, key=scale)

    random = np.random.default_rng(1)
    sizes = (2 ** random.uniform(0, 12, (150, 2))).astype(int).tolist()
    sizes += [[112, 112], [112, 900], [1, 9999], [1, 1], [378, 378], [379, 378]]
    for config in (TINY, RELEASED, LOPSIDED, ViewConfig(max_crops=8)):
        for height, width in sizes:
            assert preprocess.select_tiling(height, width, config) == by_definition(height, width, config)


@pytest.mark.parametrize("size", [(9, 4), (3, 20), (1, 1), (5, 7)])
def test_resize_is_plain_bilinear(size):
    """Each value is, to rounding, the weighted mean of the four pixels around its centre, edges repeated."""
    image, (height, width) = noise(5, 7), size
    resized = preprocess.resize(image, size)
    assert resized.shape == (*size, 3) and resized.dtype == np.uint8
    for r in range(height):
        for c in range(width):
            y, x = max((r + 0.5) * 5 / height - 0.5, 0), max((c + 0.5) * 7 / width - 0.5, 0)
            top, left = int(y), int(x)
            bottom, right, dy, dx = min(top + 1, 4), min(left + 1, 6), y - top, x - left
            mean = ((1 - dy) * ((1 - dx) * image[top, left] + dx * image[top, right].astype(float))
                    + dy * ((1 - dx) * image[bottom, left] + dx * image[bottom, right].astype(float)))
            assert np.abs(resized[r, c] - mean).max() <= 0.5 + 1e-3


def test_windows_pad_the_smaller_half_before():
    """27 patches in pairs leave a last half-empty column, 27 in threes nothing, 9 in fours one before and two after."""
    ids = np.arange(27 * 27).reshape(27, 27)
    pairs, threes = preprocess.pool_windows(ids, 2), preprocess.pool_windows(ids, 3)
    assert pairs.shape == (14, 14, 4) and threes.shape == (9, 9, 9) and (threes >= 0).all()
    assert pairs[0, 0].tolist() == [0, 1, 27, 28] and threes[0, 1].tolist() == [3, 4, 5, 30, 31, 32, 57, 58, 59]
    assert pairs[0, -1].tolist() == [26, -1, 53, -1] and pairs[-1, 0].tolist() == [26 * 27, 26 * 27 + 1, -1, -1]
    assert (pairs[:-1, :-1] >= 0).all()
    fours = preprocess.pool_windows(np.arange(9)[None], 4)[0, :, 4:8]  # the only row is second in its window
    assert fours.tolist() == [[-1, 0, 1, 2], [3, 4, 5, 6], [7, 8, -1, -1]]


# ---- the layout of the tokens ----------------------------------------------------------------------------------------

def test_image_layout_counts_at_378():
    """A picture that tiles 2 x 3 has 46 x 65 patches: 196 tokens of the whole, 23 rows of 33 of the tiling."""
    views = preprocess.image_views([noise(534, 800)], RELEASED)
    assert piece_counts(views) == {"<low_res_im_start>": 1, "<im_low>": 196, "<im_end>": 2, "<im_start>": 1,
                                   "<im_patch>": 23 * 33, "<im_col>": 23}
    assert views.layout[:2] == ["<low_res_im_start>", "<im_low>"]
    assert views.layout[197:200] == ["<im_end>", "<im_start>", "<im_patch>"]
    assert views.layout[199 + 33] == "<im_col>" and views.layout[-2:] == ["<im_col>", "<im_end>"]
    assert views.crops.shape == (7, 729, 588) and views.pooling.shape == (196 + 759, 4) and views.times is None
    assert views.pooling[195].tolist() == [728, -1, -1, -1] and views.pooling[196].tolist() == [729, 730, 756, 757]
    assert not views.indexable[:196].any() and views.indexable[196:].all()
    small = preprocess.image_views([noise(100, 100)], RELEASED)
    assert piece_counts(small)["<im_patch>"] == 196 and piece_counts(small)["<im_col>"] == 14


def test_whole_picture_tokens_can_be_made_pointable():
    """With low_res_pointing the same tokens are written as <im_patch> and all of them can be pointed at."""
    views = preprocess.image_views([noise(90, 90)], ViewConfig(low_res_pointing=True))
    assert "<im_low>" not in views.layout and views.indexable.all()
    assert views.layout.count("<im_patch>") == len(views.pooling) == 392


def test_several_images_are_labelled_and_patch_ids_go_on():
    """The views of two images are those of each alone, the second's patch and picture numbers moved on."""
    images = [noise(192, 256, 1), noise(50, 300, 2)]
    one, two = (preprocess.image_views([image], TINY) for image in images)
    both = preprocess.image_views(images, TINY)
    assert both.layout == ["Image 1", *one.layout, "Image 2", *two.layout]
    assert np.array_equal(both.crops, np.concatenate([one.crops, two.crops]))
    moved = np.where(two.pooling < 0, -1, two.pooling + len(one.patch_boxes))
    assert np.array_equal(both.pooling, np.concatenate([one.pooling, moved]))
    assert np.array_equal(both.patch_boxes, np.concatenate([one.patch_boxes, two.patch_boxes + [1, 0, 0, 0, 0]]))
    assert both.sizes == [(256, 192), (300, 50)]


def test_several_images_share_out_their_crops():
    """One of several images is cut into eight crops at most, besides its whole; alone it may have all of them."""
    for image, crops in ((noise(1500, 1500), 4), (noise(1500, 3000), 8)):
        alone, several = preprocess.image_views([image], RELEASED), preprocess.image_views([image, noise(90, 90)], RELEASED)
        assert RELEASED.max_crops > 8 and len(alone.crops) > 9
        assert (several.patch_boxes[::729, 0] == 0).sum() == crops + 1


def test_video_layout():
    """Frames are one crop and 3x3 windows each, between their times with one decimal and one space apart."""
    views = preprocess.video_views([noise(36, 64, n) for n in range(3)], [0, 0.4667, 12.04], RELEASED)
    frame = ["<frame_start>"] + ["<im_patch>"] * 81 + ["<frame_end>"]
    assert views.layout == ["0.0 ", *frame, " 0.5 ", *frame, " 12.0 ", *frame]
    assert views.crops.shape == (3, 729, 588) and views.pooling.shape == (243, 9) and views.indexable.all()
    assert sorted(views.pooling.ravel()) == list(range(3 * 729))
    assert views.patch_boxes[729].tolist() == [1, 0, 0, 64 / 27, 36 / 27]
    assert views.times == [0.0, 0.4667, 12.04] and views.sizes == [(64, 36)] * 3


def test_tiny_setting_has_the_quirks_of_the_big_one():
    """9 x 9 patches: pairs pad to 5 x 5 windows, threes give 3 x 3 without padding."""
    image = preprocess.image_views([noise(192, 256)], TINY)
    assert piece_counts(image)["<im_low>"] == 25 and piece_counts(image)["<im_patch>"] == 64
    assert (image.pooling[:25] == -1).sum() == 2 * 10 - 1
    video = preprocess.video_views([noise(192, 256)], [0.0], TINY)
    assert video.pooling.shape == (9, 9) and (video.pooling >= 0).all()


@pytest.mark.parametrize("images", [[], [np.zeros((0, 5, 3), np.uint8)], [np.zeros((4, 4), np.uint8)],
                                    [np.zeros((4, 4, 4), np.uint8)], [np.zeros((4, 4, 3))]])
def test_arrays_that_are_no_pictures_are_refused(images):
    """Nothing, an empty side, grey, RGBA and float arrays each raise one line."""
    with pytest.raises(MediaError, match="^[^\n]+$"):
        preprocess.image_views(images, TINY)
    with pytest.raises(MediaError, match="^[^\n]+$"):
        preprocess.video_views(images, [0.0] * len(images), TINY)


def test_more_wrong_arguments_are_refused():
    """A time missing, crops of broken patches, and margins that leave no window raise a ValueError."""
    with pytest.raises(MediaError, match="2 frames came with 1 times"):
        preprocess.video_views([noise(4, 4)] * 2, [0.0], TINY)
    for wrong in (dict(crop_size=100), dict(margins=(13, 14))):
        with pytest.raises(ValueError, match="crops of"):
            ViewConfig(**wrong)


def test_read_only_arrays_are_taken_without_a_word():
    """Views neither warn about nor write to an array that cannot be written."""
    image = noise(20, 30)
    image.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preprocess.image_views([image[::-1]], TINY)


# ---- which frames ----------------------------------------------------------------------------------------------------

def test_sample_times():
    """Steps of 1/fps and the end while they fit, evenly spread times when not, both ends always there."""
    assert preprocess.sample_times(0, 2, 8) == [0]
    assert preprocess.sample_times(1.3, 2, 8) == [0, 0.5, 1.0, 1.3]
    assert preprocess.sample_times(1.5, 2, 4) == [0, 0.5, 1.0, 1.5]
    assert preprocess.sample_times(1.6, 2, 4) == pytest.approx([0, 1.6 / 3, 3.2 / 3, 1.6])
    assert preprocess.sample_times(100, 2, 1) == [0]
    for fps in (0.3, 1, 2, 7, 29.97):
        for duration in np.random.default_rng(0).uniform(0, 20, 50).tolist() + [n / fps for n in range(9)]:
            times = preprocess.sample_times(duration, fps, 8)
            assert len(times) <= 8 and times[0] == 0 and times[-1] == duration and times == sorted(times)
    for wrong in ((-1, 2, 8), (float("nan"), 2, 8), (1, 0, 8), (1, 2, 0)):
        with pytest.raises(ValueError, match="cannot sample"):
            preprocess.sample_times(*wrong)


def test_displayed_at():
    """The frame shown is the last that has started, also a hair before its rounded timestamp; the first if none has."""
    wanted = [0, 0.2, 0.49, 0.5 - 1e-9, 0.6, 1.99, 2, 9]
    assert preprocess.displayed_at([0.2, 0.5, 2.0], wanted) == [0, 0, 0, 1, 1, 1, 2, 2]


# ---- reading videos --------------------------------------------------------------------------------------------------

def write_clip(path, milliseconds, size=(48, 64), shade=lambda n: 6 * n, codec="libx264", muxer=None, encoder=None, **options):
    """A clip whose n-th frame has the grey value 6 n and is shown at the n-th of the given times."""
    with av.open(str(path), "w", format=muxer, options=options) as container:
        stream = container.add_stream(codec, rate=30, options=encoder or {})
        stream.height, stream.width = size
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        for number, time in enumerate(milliseconds):
            picture = np.broadcast_to(np.uint8(shade(number)), (*size, 3))
            frame = av.VideoFrame.from_ndarray(np.array(picture), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def check_sampling(path, milliseconds, fps, max_frames, slack=0.0015):
    """What read_video keeps is what a plain search for the last frame that has started finds."""
    seconds = [(time - milliseconds[0]) / 1000 for time in milliseconds]
    expected = []
    for wanted in preprocess.sample_times(seconds[-1], fps, max_frames):
        shown = max(n for n, start in enumerate(seconds) if start <= wanted + slack)
        expected += [shown] * (shown not in expected)
    frames, times = preprocess.read_video(path, fps, max_frames)
    assert times == pytest.approx([seconds[n] for n in expected], abs=slack)
    assert [frame.mean() for frame in frames] == pytest.approx([6 * n for n in expected], abs=2.5)


VARIABLE = [n * 1000 // 30 for n in range(30)] + [1000 * n for n in range(2, 12)]  # 30 frames in 1 s, then 1 a second


@pytest.mark.parametrize("ending, codec", [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9"),
                                           ("ts", "libx264")])
@pytest.mark.parametrize("offset", [0, 5000])
def test_real_times_rule_the_sampling(tmp_path, ending, codec, offset):
    """Variable frame rate and a start at 5 s, in containers that count frames and in those that do not."""
    times = [offset + time for time in VARIABLE]
    path = write_clip(tmp_path / f"clip.{ending}", times, codec=codec)
    check_sampling(path, times, fps=2, max_frames=128)
    check_sampling(path, times, fps=2, max_frames=5)


def test_streaming_gives_every_frame(tmp_path, monkeypatch):
    """frames_of yields all frames in order with the seconds since the first, also if the file is named like a URL."""
    write_clip(tmp_path / "12:30.mkv", [5000 + time for time in VARIABLE])
    monkeypatch.chdir(tmp_path)
    path = "12:30.mkv"
    seconds, frames = zip(*preprocess.frames_of(path))
    assert list(seconds) == pytest.approx([time / 1000 for time in VARIABLE], abs=0.0015)
    assert [frame.mean() for frame in frames] == pytest.approx([6 * n for n in range(40)], abs=2.5)
    assert all(frame.shape == (48, 64, 3) and frame.dtype == np.uint8 for frame in frames)


def test_one_frame(tmp_path):
    """A clip of one frame gives that frame at 0 s."""
    frames, times = preprocess.read_video(write_clip(tmp_path / "one.mp4", [0]), 2, 16)
    assert len(frames) == 1 and times == [0.0]


def test_frames_without_timestamps(tmp_path):
    """A raw stream has no times at all: its stated rate of 25 is used."""
    path = write_clip(tmp_path / "raw.h264", list(range(0, 1000, 33)))
    seconds = [time for time, _ in preprocess.frames_of(path)]
    assert seconds == pytest.approx([n / 25 for n in range(31)])


def test_change_of_resolution(tmp_path):
    """Frames of another size than the first come in the first one's size, streamed or sampled."""
    parts = [write_clip(tmp_path / f"{n}.h264", [0, 40, 80], size) for n, size in enumerate([(48, 64), (80, 32)])]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    streamed = [frame.shape for _, frame in preprocess.frames_of(path)]
    assert streamed == [(48, 64, 3)] * 6
    assert {frame.shape for frame in preprocess.read_video(path, 25, 16)[0]} == {(48, 64, 3)}


def test_times_that_jump_back_are_dropped(tmp_path):
    """Two recordings glued together, the second starting earlier: times still only rise."""
    parts = [write_clip(tmp_path / f"{start}.ts", [start + 40 * n for n in range(30)]) for start in (3000, 2000)]
    path = tmp_path / "glued.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    seconds = [time for time, _ in preprocess.frames_of(path)]
    assert len(seconds) >= 30 and seconds[0] == 0 and (np.diff(seconds) > 0).all()


@pytest.mark.parametrize("matrix, displayed", [
    ((0, 1, -1, 0), lambda stored: np.rot90(stored, -1)), ((-1, 0, 0, -1), lambda stored: np.rot90(stored, 2)),
    ((0, -1, 1, 0), lambda stored: np.rot90(stored, 1)), ((-1, 0, 0, 1), np.fliplr), ((1, 0, 0, -1), np.flipud),
    ((0, 1, 1, 0), lambda stored: stored.swapaxes(0, 1)), ((0, -1, -1, 0), lambda stored: np.rot90(stored, 2).swapaxes(0, 1))])
def test_a_recording_is_shown_as_it_says(tmp_path, matrix, displayed):
    """The display matrix of a phone's mp4 is applied, which may turn and mirror: column x, row y goes to ax + cy, bx + dy."""
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:24, :32] = 250  # the top left quarter
    path = tmp_path / "phone.mp4"
    preprocess.write_video(path, [stored] * 3, 10)
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd") + 44  # the 3x3 matrix of the track header, 16.16 fixed point
    a, b, c, d = (value * 0x10000 for value in matrix)
    data[header:header + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path.write_bytes(data)
    frames, times = preprocess.read_video(path, 2, 16)
    assert times == pytest.approx([0, 0.2]) and len(frames) == 2
    assert frames[0].shape == displayed(stored).shape and np.abs(frames[0].astype(int) - displayed(stored)).mean() < 3


def test_animated_pictures(tmp_path):
    """Each frame of a gif has its own delay; what is transparent shows white."""
    shades = [Image.new("L", (50, 40), value) for value in (0, 80, 160, 240)]
    shades[0].save(tmp_path / "delays.gif", save_all=True, append_images=shades[1:], duration=[100, 700, 50, 1000])
    frames, times = preprocess.read_video(tmp_path / "delays.gif", 2, 16)  # looks at 0, 0.5 and 0.85 s
    assert times == pytest.approx([0, 0.1, 0.85]) and [frame.mean() for frame in frames] == pytest.approx([0, 80, 240])
    clear = Image.new("RGBA", (50, 40), (0, 0, 0, 0))
    clear.paste((200, 0, 0, 255), (0, 0, 10, 10))
    turned = clear.transpose(Image.Transpose.ROTATE_180)
    clear.save(tmp_path / "clear.apng", "PNG", save_all=True, append_images=[turned])
    frame = preprocess.read_video(tmp_path / "clear.apng", 2, 16)[0][0]
    assert frame[30, 30].tolist() == [255, 255, 255] and frame[5, 5].tolist() == [200, 0, 0]


@pytest.mark.parametrize("ending, options", [("mp4", {"movflags": "faststart"}), ("mkv", {})])
def test_cut_off_file_gives_what_is_there(tmp_path, ending, options):
    """A file that ends too early gives the frames before that and one warning, whether its container tells or not."""
    path = write_clip(tmp_path / f"cut.{ending}", [33 * n for n in range(40)], size=(240, 320), **options)
    whole = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preprocess.read_video(path, 2, 16)
    path.write_bytes(whole[:len(whole) * 3 // 4])
    with pytest.warns(UserWarning, match="cut.*ends early") as caught:
        frames, times = preprocess.read_video(path, 2, 16)
    assert len(caught) == 1 and 0.3 < times[-1] < 1.1
    assert frames[-1].mean() == pytest.approx(6 * round(times[-1] / 0.033), abs=2.5)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts", "wmv", "avi", "mov"])
def test_a_whole_file_is_not_called_cut_wherever_its_clock_starts(tmp_path, ending):
    """Containers count their duration from the first frame or from 0; none of them is taken for a file that ends early."""
    path = write_clip(tmp_path / f"late.{ending}", [5000 + 100 * n for n in range(20)], size=(48, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert preprocess.read_video(path, 2, 16)[1][-1] == pytest.approx(1.9, abs=0.11)


def test_sound_that_goes_on_and_a_cover_picture_are_not_the_video(tmp_path):
    """Where sound outlasts the pictures the file does not end early; of two streams the larger one is the video, not the cover before it."""
    path = tmp_path / "loud.mkv"
    with av.open(str(path), "w") as container:
        cover, video, sound = container.add_stream("mjpeg", rate=10), container.add_stream("libx264", rate=10), container.add_stream("pcm_s16le", rate=8000)
        cover.height, cover.width, cover.pix_fmt, video.height, video.width, video.pix_fmt = 32, 32, "yuvj420p", 48, 64, "yuv420p"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        for n in range(20):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 6 * n, np.uint8), format="rgb24")))
        container.mux(video.encode(None)), container.mux(cover.encode(None))
        for n in range(10):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), format="s16", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = 8000, 4000 * n, Fraction(1, 8000)
            container.mux(sound.encode(samples))
        container.mux(sound.encode(None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames, times = preprocess.read_video(path, 2, 16)
    assert times == pytest.approx([0, 0.5, 1, 1.5, 1.9], abs=0.01) and frames[0].shape == (48, 64, 3)


@pytest.mark.parametrize("start", [0, 5000])
def test_a_file_that_stops_between_two_packets_is_noticed(tmp_path, start):
    """Nothing fails to decode there: only the header tells, wherever its clock starts."""
    path = write_clip(tmp_path / "cut.mp4", [start + 100 * n for n in range(40)], size=(48, 64), movflags="faststart")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preprocess.read_video(path, 2, 16)
    with av.open(str(path)) as container:
        packets = sorted((packet.pos, packet.size) for packet in container.demux(video=0) if packet.size)
    path.write_bytes(path.read_bytes()[:packets[19][0] + packets[19][1]])
    with pytest.warns(UserWarning, match="header promises 1.9 s more"):
        _, times = preprocess.read_video(path, 2, 16)
    assert times[-1] == pytest.approx(1.9, abs=0.01)


def test_sampling_stays_in_bounds(tmp_path, monkeypatch):
    """Too many frames, too large ones, and too much of both together are each refused in one line."""
    path = write_clip(tmp_path / "long.mp4", list(range(0, 1000, 100)))
    for name, limit, message in [("MAX_DECODED_FRAMES", 9, "more than 9 frames"), ("MAX_PIXELS", 3000, "64x48 pixels"),
                                 ("MAX_CLIP_PIXELS", 7000, "at most 2 frames")]:
        with monkeypatch.context() as patch:
            patch.setattr(preprocess, name, limit)
            with pytest.raises(MediaError, match=f"long.mp4: .*{message}"):
                preprocess.read_video(path, 2, 16)
    assert len(preprocess.read_video(path, 2, 16)[0]) == 3


# ---- reading videos quickly ------------------------------------------------------------------------------------------

SHORT = {"g": "10", "bf": "2"}  # a key frame every ten frames at most
OPEN = {"x264-params": "open-gop=1:bframes=3:b-pyramid=2:keyint=10:min-keyint=10:scenecut=0"}
ROLLING = {"x264-params": "intra-refresh=1:keyint=10"}  # no key frames after the first: the picture is renewed bit by bit
STEADY = [40 * n for n in range(42)]
STAMPED = [("variable.mp4", dict(times=VARIABLE)), ("late.mkv", dict(times=[5000 + time for time in VARIABLE], encoder=SHORT)),
           ("vp9.webm", dict(codec="libvpx-vp9", encoder={"g": "10"})), ("short.mp4", dict(encoder=SHORT)),
           ("open.mp4", dict(encoder=OPEN)), ("open.mkv", dict(encoder=OPEN)), ("rolling.mp4", dict(encoder=ROLLING)),
           ("pieces.mp4", dict(encoder=SHORT, movflags="frag_keyframe+empty_moov")),
           ("short.ts", dict(encoder=SHORT)), ("late.ts", dict(times=[5000 + time for time in VARIABLE], encoder=OPEN)),
           ("short.avi", dict(encoder=SHORT)), ("raw.h264", dict(encoder=SHORT))]


def trap(tmp_path, name):
    """A file that is awkward to read in the way its name says."""
    path = tmp_path / name
    source = write_clip(tmp_path / f"source{path.suffix}", STEADY, encoder=SHORT) if path.suffix != ".gif" else None
    whole = source.read_bytes() if source else b""
    if path.stem == "glued":
        path.write_bytes(b"".join(write_clip(tmp_path / f"{start}.ts", [start + time for time in STEADY]).read_bytes()
                                  for start in (3000, 2000)))
    elif path.stem == "resized":
        path.write_bytes(whole + write_clip(tmp_path / f"other{path.suffix}", [9000 + time for time in STEADY], (80, 32)).read_bytes())
    elif path.stem == "headless":  # begins amid the frames after a key frame
        path.write_bytes(whole[188 * 20:])
    elif path.stem == "rotated":
        matrix = whole.index(b"tkhd") + 44
        path.write_bytes(whole[:matrix] + struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30) + whole[matrix + 36:])
    elif path.stem == "trimmed":  # the frames before the cut are in the file but not shown
        with av.open(str(source)) as old, av.open(str(path), "w") as cut:
            stream = cut.add_stream_from_template(old.streams.video[0])
            packets = [packet for packet in old.demux(video=0) if packet.pts is not None]
            first = [number for number, packet in enumerate(packets) if packet.is_keyframe][1]
            late = packets[first + 5].pts
            for packet in packets[first:]:
                packet.stream, packet.pts, packet.dts = stream, packet.pts - late, packet.dts - late
                cut.mux(packet)
    elif path.suffix == ".gif":
        pictures = [Image.fromarray(noise(40, 50, 1)).convert("P")] * 30
        for n in range(1, 30):  # each adds to the one before
            pictures[n] = pictures[n - 1].copy()
            pictures[n].paste(n, (n, n, n + 9, n + 9))
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[100, 700, 50] * 10)
    return path


def outcome(read, *given):
    """What came of reading: the result or the error, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            frames, *rest = read(*given)
            return [(frame.shape, frame.tobytes()) for frame in frames], rest, [str(warning.message) for warning in caught]
        except MediaError as error:
            return str(error), [str(warning.message) for warning in caught]


CHOICES = [lambda times: preprocess.sample_frames(times, 3, 16),
           lambda times: [len(times) * 3 // 4], lambda times: []]


def check_ways_agree(path, choices=CHOICES):
    """What `read_video` and `frame_times` go by gives the same frames, times and warnings as decoding everything."""
    for choose in choices:
        assert outcome(preprocess._pick, path, choose) == outcome(preprocess._pick_slowly, path, choose)


@pytest.mark.parametrize("least", [1, 30])
@pytest.mark.parametrize("name, kind", STAMPED, ids=lambda value: value if isinstance(value, str) else "")
def test_quick_reading_equals_slow_reading(tmp_path, monkeypatch, name, kind, least):
    """Whatever the container, the clock and the key frames, and however eagerly it leaps."""
    monkeypatch.setattr(preprocess, "MIN_LEAP", least)
    kind = dict(kind)
    path = write_clip(tmp_path / name, kind.pop("times", STEADY), **kind)
    if name not in ("short.avi", "raw.h264"):  # whose packets have no times to go by
        assert len(preprocess._pick_listed(path, preprocess._list_frames(path), [0], leap=False)) == 1
    check_ways_agree(path)


@pytest.mark.parametrize("name", ["glued.ts", "resized.h264", "resized.ts", "headless.ts", "rotated.mp4", "trimmed.mp4",
                                  "adding.gif"])
def test_quick_reading_falls_into_no_trap(tmp_path, monkeypatch, name):
    """Two clocks, two sizes, a start in mid-stream, a display matrix, hidden frames, pictures that build on each other."""
    monkeypatch.setattr(preprocess, "MIN_LEAP", 1)
    check_ways_agree(trap(tmp_path, name))


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts", "webm", "h264"])
def test_quick_reading_of_damaged_files(tmp_path, ending):
    """Cut off anywhere, or with bits turned over anywhere: the same frames, times and warnings as decoding gives."""
    options = {"movflags": "faststart"} if ending == "mp4" else {}
    codec = "libvpx-vp9" if ending == "webm" else "libx264"
    whole = write_clip(tmp_path / f"whole.{ending}", STEADY, codec=codec, **options).read_bytes()
    random, path = np.random.default_rng(3), tmp_path / f"damaged.{ending}"
    for part in (0.1, 0.5, 0.8, 0.99):
        path.write_bytes(whole[:int(part * len(whole))])
        check_ways_agree(path, CHOICES[:1])
    for _ in range(5):
        data = bytearray(whole)
        for place in random.integers(len(whole), size=4):
            data[place] ^= 1 << random.integers(8)
        path.write_bytes(data)
        check_ways_agree(path, CHOICES[:1])


def test_frames_that_decode_in_part_are_left_to_slow_reading(tmp_path):
    """How the missing part is filled depends on what was decoded before, so quick reading hands over."""
    path = write_clip(tmp_path / "cut.ts", STEADY, size=(96, 128), shade=lambda n: noise(96, 128, n))
    path.write_bytes(path.read_bytes()[:188 * 1000])
    corrupt = [frame.is_corrupt for _, frame in preprocess._decode(path)]
    listed = preprocess._list_frames(path)
    assert corrupt[-1] and len(corrupt) == len(listed.times)
    with pytest.raises(preprocess._Unsure):
        preprocess._pick_listed(path, listed, [], leap=False)


class Counting:
    """A container that counts the frames it decodes."""
    frames = 0

    def __init__(self, container):
        self.container = container

    def __getattr__(self, name):
        return getattr(self.container, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.container.close()

    def decode(self, stream):
        for frame in self.container.decode(stream):
            Counting.frames += 1
            yield frame


@pytest.fixture
def counted(monkeypatch):
    """A function that reads and says how many frames were decoded and how many became pictures."""
    opened, picture, pictures = preprocess._open, preprocess._picture, []
    monkeypatch.setattr(preprocess, "_open", lambda path: Counting(opened(path)))
    monkeypatch.setattr(preprocess, "_picture", lambda *given: pictures.append(1) or picture(*given))

    def count(read, *given):
        Counting.frames, pictures[:] = 0, []
        read(*given)
        return Counting.frames, len(pictures)
    return count


def test_little_is_decoded_where_little_is_wanted(tmp_path, counted):
    """Of 600 frames with a key frame every 30: each at most once, only the wanted made pictures, and for a few of them no more than
    lie between a key frame and the frame after it that is looked at; the seconds of all come along."""
    path = write_clip(tmp_path / "long.mp4", [40 * n for n in range(600)], encoder={"g": "30", "sc_threshold": "0"}, shade=lambda n: n % 250)
    assert counted(preprocess.read_video, path, 25, 600) == (600, 600)
    decoded, pictures = counted(preprocess.read_video, path, 2, 5)  # 0, 149, 299, 449, 599
    assert pictures == 5 and decoded == 1 + 4 * 30
    assert counted(preprocess.read_video_and_times, path, 2, 1) == (1 + 30, 1)
    assert preprocess.read_video_and_times(path, 2, 1)[2] == preprocess.frame_times(path)
    one_run = write_clip(tmp_path / "one run.mp4", STEADY)  # nowhere to leap to
    assert counted(preprocess.read_video, one_run, 2, 5) == (42, 5)


@pytest.mark.parametrize("lie", ["one too few", "one too many", "one moved", "last left out", "one after the end"])
def test_wrong_lists_are_found_out(tmp_path, monkeypatch, counted, lie):
    """If the packets announce other frames than decode, everything is decoded, and the answer is as true as ever."""
    path = write_clip(tmp_path / "clip.mp4", STEADY, encoder=SHORT)
    truth, (start, *_) = preprocess.read_video(path, 5, 16), preprocess._list_frames(path).seconds
    seconds = [start + time / 1000 for time in STEADY]
    where = {"one too few": seconds.pop, "one moved": lambda n: seconds.insert(n, seconds.pop(n) + 0.001),
             "one too many": lambda n: seconds.insert(n, seconds[n] - 0.001), "last left out": lambda n: seconds.pop(),
             "one after the end": lambda n: seconds.append(seconds[-1] + 0.04)}
    where[lie](23)
    times = [second - start for second in seconds]
    monkeypatch.setattr(preprocess, "_list_frames", lambda path: preprocess._Listed(list(range(len(times))), seconds, times, [0]))
    assert counted(preprocess.read_video, path, 5, 16)[0] >= 2 * 42
    frames, found = preprocess.read_video(path, 5, 16)
    assert found == truth[1] and np.array_equal(frames, truth[0])


@pytest.mark.parametrize("landing", [0, -1])
def test_a_seek_that_misses(tmp_path, monkeypatch, counted, landing):
    """Where it lands before the key frame, what comes until then is dropped; where it lands behind, as it does in .ts, all
    is decoded from the start."""
    path = write_clip(tmp_path / "clip.mp4", STEADY, encoder=SHORT)
    monkeypatch.setattr(preprocess, "MIN_LEAP", 8)
    leaping, truth = counted(preprocess.read_video, path, 2, 3)[0], preprocess.read_video(path, 2, 3)
    assert leaping < 36
    listed = preprocess._list_frames(path)
    wrong = listed._replace(stamps=[listed.stamps[landing]] * 42)
    monkeypatch.setattr(preprocess, "_list_frames", lambda path: wrong)
    decoded = counted(preprocess.read_video, path, 2, 3)[0]
    assert 42 < decoded <= 42 + leaping if landing else 42 + leaping < decoded
    frames, times = preprocess.read_video(path, 2, 3)
    assert times == truth[1] and np.array_equal(frames, truth[0])


def test_what_packets_leave_open(tmp_path, counted):
    """Frames that an edit list hides are not listed, and the others decode once; there is no list where a packet has no
    time or is cut off."""
    path = trap(tmp_path, "trimmed.mp4")
    listed = preprocess._list_frames(path)
    assert counted(preprocess.read_video, path, 2, 3)[0] == len(listed.times) and listed.times == preprocess.frame_times(path)
    assert preprocess.read_video_and_times(path, 2, 3)[2] == listed.times
    assert preprocess._list_frames(write_clip(tmp_path / "raw.h264", STEADY)) is None
    path = write_clip(tmp_path / "cut.mp4", STEADY, movflags="faststart")
    path.write_bytes(path.read_bytes()[:-10])
    assert preprocess._list_frames(path) is None


def test_damage_in_a_part_leapt_over(tmp_path):
    """It goes unseen and the clip goes on behind it, as the documentation says; looked at, it ends the clip."""
    path = write_clip(tmp_path / "clip.mp4", [40 * n for n in range(160)], encoder={"g": "40", "bf": "0"}, shade=lambda n: n)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for pos, size in places[50:60]:
        data[pos:pos + size] = b"\xff" * size
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames, times = preprocess.read_video(path, 2, 2)
    assert times == pytest.approx([0, 159 * 0.04]) and frames[1].mean() == pytest.approx(159, abs=2.5)
    with pytest.warns(UserWarning, match="clip.mp4: ends early"):
        assert preprocess.read_video(path, 2, 16)[1][-1] < 60 * 0.04


def bad_video(tmp_path, case):
    """A file (or none) that is no usable video."""
    path = tmp_path / f"{case}.mp4"
    if case == "folder":
        path.mkdir()
    elif case == "empty":
        path.touch()
    elif case == "text":
        path.write_text("<html>not found</html>\n" * 50)
    elif case == "picture":
        Image.new("RGB", (8, 8)).save(path, "JPEG")
    elif case == "playlist":
        write_clip(tmp_path / "secret.ts", [0, 40])
        path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n")
    elif case == "no index":
        write_clip(path, list(range(0, 1000, 40)))
        path.write_bytes(path.read_bytes()[:-500])
    elif case == "no frames":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            container.start_encoding()
    elif case == "header only":
        write_clip(path, list(range(0, 1000, 40)), movflags="faststart")
        path.write_bytes(path.read_bytes()[:406])
    elif case == "audio":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=44100, layout="mono")
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 44100, 0
            container.mux(stream.encode(sound))
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("case, reason", [
    ("missing", "no such file"), ("folder", "is a folder"), ("empty", "empty file"), ("text", "cannot be read"),
    ("picture", "cannot be read"), ("playlist", "cannot be read"), ("no index", "cannot be read"),
    ("no frames", "cannot be read"), ("header only", "cannot be read"), ("audio", "no video stream")])
def test_bad_videos_are_named_in_one_line(tmp_path, case, reason):
    """Each raises MediaError, and nothing else, with the file and what was wrong on one line."""
    path = bad_video(tmp_path, case)
    for read in (lambda: preprocess.read_video(path, 2, 16), lambda: next(preprocess.frames_of(path))):
        with pytest.raises(MediaError) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)
        assert "\n" not in str(caught.value)


def test_nothing_is_fetched():
    """An address is looked for as a file, and not found."""
    for read in (preprocess.read_image, lambda path: preprocess.read_video(path, 2, 16)):
        with pytest.raises(MediaError, match="no such file"):
            read("http://127.0.0.1:9/clip.mp4")


def test_is_video_goes_by_the_ending():
    """Endings of videos, in any case, and no others."""
    assert all(map(preprocess.is_video, ["a.mp4", "b/c.MKV", "d.webm", "e.mov", "f.avi", "g.gif", "h.ts", "i.m4v"]))
    assert not any(map(preprocess.is_video, ["a.png", "mp4", "b.mp4/c.jpg", "d.jsonl"]))


# ---- reading images --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending, options", [("png", {}), ("bmp", {}), ("tiff", {}), ("ppm", {}),
                                             ("webp", {"lossless": True}), ("jpg", {"quality": 95, "subsampling": 0})])
def test_image_formats(tmp_path, ending, options):
    """A picture comes back from every allowed format, exactly or nearly so."""
    pixels = np.array(Image.fromarray(noise(4, 5)).resize((50, 40), Image.Resampling.BICUBIC))
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}", **options)
    error = np.abs(preprocess.read_image(tmp_path / f"a.{ending}").astype(int) - pixels)
    assert error.mean() < 3 if ending == "jpg" else error.max() == 0


@pytest.mark.parametrize("mode, ending", [("RGB", "png"), ("RGB", "tiff"), ("L", "tiff"), ("RGBA", "tiff"), ("CMYK", "tiff"), ("I;16", "tiff")])
@pytest.mark.parametrize("orientation, turns", [(6, -1), (3, 2), (8, 1)])
def test_orientation_of_a_phone_picture(tmp_path, mode, ending, orientation, turns):
    """EXIF orientation 6 turns the stored picture a quarter clockwise, 3 and 8 two and three quarters; a TIFF without compression,
    which Pillow may map into memory, too."""
    path, exif = tmp_path / f"phone.{ending}", Image.Exif()
    picture = Image.fromarray(noise(40, 60)).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    picture.save(tmp_path / f"plain.{ending}")
    exif[0x0112] = orientation
    picture.save(path, exif=exif)
    assert np.array_equal(preprocess.read_image(path), np.rot90(preprocess.read_image(tmp_path / f"plain.{ending}"), turns))


def test_deep_pixels_are_scaled_not_clipped(tmp_path):
    """16-bit and float pictures, whole numbers or fractions of one, become the same 8 bits."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.tiff")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "unit.tiff")
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(np.where(grey == 7, 1.02, grey / 255).astype(np.float32)).save(tmp_path / "over.tiff")  # as after a sharp filter
    assert abs(preprocess.read_image(tmp_path / "over.tiff")[:, :, 0].astype(int) - np.where(grey == 7, 255, grey)).max() == 0
    for name in ("deep.png", "deep.tiff", "unit.tiff", "float.tiff"):
        assert np.array_equal(preprocess.read_image(tmp_path / name), np.repeat(grey[:, :, None], 3, axis=2)), name


def test_transparency_is_white(tmp_path):
    """Transparent pixels are white and half-transparent black grey, from an alpha channel or a transparent colour."""
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[0, :, 3], rgba[1, :, 3] = 255, 127
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    assert preprocess.read_image(tmp_path / "alpha.png")[:3, 0, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P").save(tmp_path / "p.png", transparency=3)
    palette = preprocess.read_image(tmp_path / "p.png")
    assert palette[0, 3].tolist() == [255] * 3 and palette[0, 2].tolist() == [2] * 3
    Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 257).save(tmp_path / "deep.png", transparency=3 * 257)
    assert preprocess.read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 2, 255]


def test_other_kinds_of_pixels(tmp_path):
    """CMYK, palette, one-bit and multi-picture files are read as they look."""
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg")
    red.convert("P").save(tmp_path / "palette.gif")
    red.save(tmp_path / "two.mpo", save_all=True, append_images=[red])
    Image.new("1", (16, 16), 1).save(tmp_path / "bit.png")
    for name, colour in [("cmyk.jpg", (255, 0, 0)), ("palette.gif", (255, 0, 0)), ("two.mpo", (255, 0, 0)),
                         ("bit.png", (255, 255, 255))]:
        assert np.abs(preprocess.read_image(tmp_path / name).astype(int) - colour).max() <= 3, name


def bad_image(tmp_path, case):
    """A file (or none) that is no usable image."""
    path = tmp_path / f"{case}.png"
    if case == "folder":
        path.mkdir()
    elif case == "empty":
        path.touch()
    elif case == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif case == "postscript":
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    elif case == "cut":
        Image.fromarray(noise(64, 64)).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif case in ("huge", "enormous"):  # fewer pixels follow than the header says: refuse first
        Image.new("RGB", (8, 8)).save(path)
        data = bytearray(path.read_bytes())
        side = 9000 if case == "huge" else 60000
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        path.write_bytes(data)
    return path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case, reason", [
    ("missing", "no such file"), ("folder", "is a folder"), ("empty", "empty file"), ("text", "cannot be read"),
    ("postscript", "unknown format"), ("cut", "truncated"), ("huge", "9000x9000 pixels"), ("enormous", "pixels")])
def test_bad_images_are_named_in_one_line(tmp_path, case, reason):
    """Each raises MediaError, and nothing else, with the file and what was wrong on one line."""
    path = bad_image(tmp_path, case)
    with pytest.raises(MediaError) as caught:
        preprocess.read_image(path)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value) and "\n" not in str(caught.value)


# ---- writing videos --------------------------------------------------------------------------------------------------

def test_written_video_reads_back(tmp_path):
    """An odd-sized clip at 29.97 fps from a generator comes back a pixel larger, nearly the same, on time."""
    pictures = [np.full((35, 47, 3), 20 * n, np.uint8) for n in range(12)]
    preprocess.write_video(tmp_path / "clip.mp4", (picture for picture in pictures), 29.97)
    seconds, frames = zip(*preprocess.frames_of(tmp_path / "clip.mp4"))
    assert list(seconds) == pytest.approx([n / 29.97 for n in range(12)], abs=1e-4)
    assert {frame.shape for frame in frames} == {(36, 48, 3)}
    for frame, picture in zip(frames, pictures):
        assert np.abs(frame[:35, :47].astype(int) - picture).max() <= 4
        assert np.abs(frame[35, 47].astype(int) - picture[-1, -1]).max() <= 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip.mp4"]


def test_failed_writing_leaves_the_old_file(tmp_path):
    """When frames change size, stop with an error or are none, the old file stays and no half-written one."""
    def breaks_off():
        yield from [noise(8, 8)] * 100  # enough that the encoder has begun to write
        raise MediaError("source.mp4: is an empty file")

    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    for frames, fps, message in [([noise(8, 8), noise(8, 10)], 5, r"frame 1 is uint8 of shape \(8, 10, 3\)"),
                                 ([], 5, "no frames"), ([np.zeros((8, 8, 3))], 5, "float64"),
                                 ([noise(8, 8)], 0, "give 0.001"), (breaks_off(), 5, "^source.mp4")]:
        with pytest.raises(MediaError, match=message):
            preprocess.write_video(path, frames, fps)
        assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(MediaError, match="cannot be written"):
        preprocess.write_video(tmp_path / "no such folder" / "clip.mp4", [noise(8, 8)], 5)


def test_frames_before_an_image_have_crops_but_no_tokens():
    """Crop by crop, each right after the same crop of the frames before it, oldest first; windows, boxes and layout are
    those of the image alone."""
    frames = [noise(150, 190, n) for n in range(4)]
    alone, views = preprocess.image_views(frames[3:], TINY), preprocess.image_views(frames[3:], TINY, frames[:3])
    earlier = [preprocess.image_views([frame], TINY).crops for frame in frames[:3]]
    count = len(alone.crops)
    assert len(views.crops) == 4 * count > 4 and views.layout == alone.layout and views.sizes == alone.sizes
    assert views.n_past.tolist() == [0, 1, 2, 3] * count and alone.n_past.tolist() == [0] * count
    for crop in range(count):
        for past in range(3):
            assert np.array_equal(views.crops[4 * crop + past], earlier[past][crop])
        assert np.array_equal(views.crops[4 * crop + 3], alone.crops[crop])
    grid = TINY.grid**2
    read = lambda made: [made.crops.reshape(-1, made.crops.shape[-1])[made.pooling[made.pooling >= 0]], made.patch_boxes[made.pooling[made.pooling >= 0]]]
    assert all(np.array_equal(a, b) for a, b in zip(read(views), read(alone)))
    assert np.array_equal(views.pooling >= 0, alone.pooling >= 0) and len(views.patch_boxes) == 4 * count * grid
    with pytest.raises(preprocess.MediaError, match="picture 1 is float64"):
        preprocess.image_views(frames[3:], TINY, [frames[0] / 255])
    first = preprocess.image_views(frames[:1], TINY, [])
    assert first.n_past.tolist() == [0] * len(first.crops) and np.array_equal(first.crops, preprocess.image_views(frames[:1], TINY).crops)


def test_frames_of_a_video_are_numbered():
    """So that each finds those before it."""
    assert preprocess.video_views([noise(30, 40)] * 3, [0, 1, 2], TINY).n_past.tolist() == [0, 1, 2]


@pytest.mark.parametrize("images, before", [(1, [(30, 41)]), (2, [(30, 40)])])
def test_frames_before_must_fit(images, before):
    """They are of the image's size, and it is alone."""
    with pytest.raises(preprocess.MediaError, match="frames before an image must be of its size, and the image alone"):
        preprocess.image_views([noise(30, 40)] * images, TINY, [noise(*size) for size in before])


def test_a_missing_encoder_is_one_line(tmp_path, monkeypatch):
    """A copy of PyAV that cannot write H.264 says what to install, and no file appears."""
    monkeypatch.setattr(preprocess, "ENCODER", "no such encoder")
    with pytest.raises(preprocess.MediaError, match="has no no such encoder: pip install"):
        preprocess.write_video(tmp_path / "clip.mp4", np.zeros((2, 20, 20, 3), np.uint8), 4)
    assert not list(tmp_path.iterdir())
