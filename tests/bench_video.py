"""bench.py video: how long it takes to get from a file to crops, side by side: decode everything to pictures, sample, cut; or
read_video. Also an image of 1800 x 1200 to its 9 crops. The best of some rounds, in ms.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import preprocess  # noqa: E402
from preprocess import ViewConfig, Views  # noqa: E402

ROUNDS = 5
MINUTE = 1800  # frames


def best(*ways: Callable) -> list[float]:
    """Milliseconds each way takes, in turns, so that what else the machine does meets all of them."""
    taken = [[] for _ in ways]
    for _ in range(ROUNDS):
        for way, times in zip(ways, taken):
            start = time.perf_counter()
            way()
            times.append(1000 * (time.perf_counter() - start))
    return [min(times) for times in taken]


def everything(path: str, config: ViewConfig) -> Views:
    """The plain way: all frames become pictures, of which some are cut."""
    with av.open(path) as container:
        container.streams.video[0].thread_type = "SLICE"  # as in preprocess
        seconds, pictures = zip(*((frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)))
    times = [second - seconds[0] for second in seconds]
    wanted = preprocess.sample_frames(times, config.fps, config.max_frames)
    return preprocess.video_views([pictures[n] for n in wanted], [times[n] for n in wanted], config)


def ours(path: str, config: ViewConfig) -> Views:
    return preprocess.video_views(*preprocess.read_video(path, config.fps, config.max_frames), config)


def film(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """The camera wanders over a picture, and a square runs through it."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    ground = np.asarray(Image.fromarray(coarse).resize((2 * width, 2 * height), Image.Resampling.BICUBIC))
    for n in range(count):
        y, x = (int(side / 2 * (1 + np.sin(n / period))) for side, period in ((height, 150), (width, 210)))
        frame = ground[y:y + height, x:x + width].copy()
        frame[(2 * n) % height:][:40, (3 * n) % width:][:, :40] = (255, 0, 0)
        yield frame


def bench_video(path: str) -> None:
    for most in (16, 128):
        config = ViewConfig(max_frames=most)
        same = np.array_equal(everything(path, config).crops, (views := ours(path, config)).crops)
        plain, quick = best(lambda: everything(path, config), lambda: ours(path, config))
        print(f"{Path(path).name}, {len(views.times)} frames: everything {plain:.0f} ms, read_video {quick:.0f} ms: "
              f"{plain / quick:.2f} times as fast, {'the same crops' if same else 'OTHER CROPS'}")
        if len(views.times) < most:  # more will not come
            break


def bench_image() -> None:
    config, image = ViewConfig(max_crops=8), next(film(1, 1200, 1800))
    took, = best(lambda: preprocess.image_views([image], config))
    print(f"image 1800x1200, {len(preprocess.image_views([image], config).crops)} crops: {took:.1f} ms")


def run(path: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = f"{folder}/minute.mp4"
            preprocess.write_video(path, film(MINUTE, 360, 640), fps=30)
        bench_video(path)
    bench_image()
