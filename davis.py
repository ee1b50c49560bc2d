"""Videos with masks and expressions in folders as DAVIS has them, read as records.

    FOLDER/JPEGImages/SEQUENCE/00000.jpg ...     the frames, in natural order (2 comes before 10)
    FOLDER/Annotations/SEQUENCE/00000.png ...    a mask for every frame: each pixel the number of its object, 0 = none
    FOLDER/meta_expressions.json                 {"videos": {SEQUENCE: {"expressions": {"0": {"exp": "a dog", "obj_id": "1"}},
                                                                        "frames": ["00000", ...]}}}

Ref-YouTube-VOS comes in this layout, and so does Refer-DAVIS-17 as converted for it (where a folder named after the
resolution, 480p, may lie between). MeViS has no Annotations: its expressions name several objects (a list of "anno_id"), whose
masks are in mask_dict.json, compressed run lengths for every frame. Without "frames" all frames of the folder are meant.

Nothing is ever written here.
"""

import json
import os
import re
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from preprocess import MAX_PIXELS, MediaError, ViewConfig, read_image
from records import Annotation, Object, Record, Runs, each, only, runs_of, take
from synthetic import inner

FPS = 6.0  # that of YouTube-VOS: the files do not say at what times the frames were taken


def natural(name: str) -> list:
    """A key by which frame2 comes before frame10."""
    parts = re.split(r"([0-9]+)", name)
    parts[1::2] = map(int, parts[1::2])
    return parts


def numbered(path: Path) -> np.ndarray:
    """A picture of object numbers -> (H, W) int. Raises MediaError."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise MediaError(f"{path}: {image.width}x{image.height} pixels are more than {MAX_PIXELS}")
            if image.mode not in ("P", "L", "1", "I;16", "I"):
                raise MediaError(f"{path}: colours ({image.mode}), not numbers of objects: give a PNG with a palette or in grey")
            return np.array(image).astype(int)
    except (MediaError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make a decoder raise nearly anything
        raise MediaError(f"{path}: cannot be read as a mask ({error})") from None


class Sequences:
    """All sequences that have expressions. ValueError, with the path, where something is missing or does not fit."""

    def __init__(self, folder: str | os.PathLike, expressions: str | os.PathLike | None = None):
        self.folder, self.file = Path(folder), Path(expressions or Path(folder) / "meta_expressions.json")
        values = self._json(self.file)
        try:
            self.videos = take(values, "videos", dict) if isinstance(values, dict) else {}
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}") from None
        if not self.videos:
            raise ValueError(f"{self.file}: names no videos")
        self.names = sorted(self.videos, key=natural)
        self.size = len(self.names)

    @staticmethod
    def _json(path: Path):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None

    @cached_property
    def runs(self) -> dict:
        """MeViS: annotation -> run lengths or None for every frame."""
        return self._json(self.folder / "mask_dict.json")

    def _files(self, kind: str, sequence: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
        """Stem -> file, in natural order."""
        places = [self.folder / kind / sequence, *sorted((self.folder / kind).glob(f"*/{sequence}"))]
        place = next((place for place in places if place.is_dir()), None)
        if place is None:
            raise ValueError(f"{self.folder / kind}: has no folder {sequence}")
        found = [path for path in place.iterdir() if path.suffix.lower() in suffixes]
        files = {path.stem: path for path in sorted(found, key=lambda path: natural(path.name))}
        if len(files) < len(found):
            raise ValueError(f"{place}: two files of one name that differ in their endings")
        return files

    def record(self, index: int, config: ViewConfig | None = None) -> Record:
        """A sequence with an annotation per expression; object numbers are the dataset's. All frames are read: `config`, which
        other sources of records (`records.Lines`) choose frames by, is not looked at."""
        sequence = self.names[index]
        try:
            return self._record(sequence)
        except ValueError as error:
            where = "" if str(error).startswith((str(self.folder), str(self.file))) else f"{self.file}: {sequence}: "
            raise ValueError(f"{where}{error}") from None

    def _record(self, sequence: str) -> Record:
        said = only(self.videos[sequence], "expressions", "frames", "vid_id")
        files = self._files("JPEGImages", sequence, (".jpg", ".jpeg", ".png"))
        names = each(said, "frames", str, []) or list(files)
        if missing := [name for name in names if name not in files]:
            raise ValueError(f"{self.folder}: {sequence} has no frame {missing[0]}")
        if not names:
            raise ValueError(f"{self.folder}: {sequence} has no frames")
        pictures = [read_image(files[name]) for name in names]
        for name, picture in zip(names, pictures):
            if picture.shape != pictures[0].shape:
                raise ValueError(f"{files[name]}: {picture.shape[1]}x{picture.shape[0]}, the frames before are "
                                 f"{pictures[0].shape[1]}x{pictures[0].shape[0]}")
        expressions, shape = take(said, "expressions", dict), pictures[0].shape[:2]
        annotations = {}
        for key in sorted(expressions, key=natural):
            one = only(expressions[key], "exp", "obj_id", "anno_id")
            label, numbers = take(one, "exp", str), one.get("anno_id", one.get("obj_id"))
            numbers = numbers if isinstance(numbers, list) else [numbers]
            if numbers in ([], [None]):
                raise ValueError(f"expression {key} names no object: this part of the set cannot be scored")
            if odd := [n for n in numbers if not re.fullmatch("[0-9]{1,9}", str(n))]:
                raise ValueError(f"expression {key}: {str(odd[0])[:40]!r} is not the number of an object")
            annotations[key] = Annotation("point", label, [int(n) for n in numbers], about=sequence)
        if any("anno_id" in one for one in expressions.values()):
            masks = self._listed({n for said in annotations.values() for n in said.objects}, len(names), shape)
        else:
            masks = self._drawn(sequence, names, shape)
        objects = {}
        for identity, found in masks.items():
            covered = {frame / FPS: runs for frame, runs in found.items()}
            objects[identity] = Object({moment: inner(runs.mask()) for moment, runs in covered.items()}, covered)
        for key, annotation in annotations.items():
            if unknown := [one for one in annotation.objects if one not in objects]:
                raise ValueError(f"expression {key}: no mask has an object {unknown[0]}")
        return Record(sequence, pictures, [n / FPS for n in range(len(names))], objects, list(annotations.values()))

    def _drawn(self, sequence: str, names: list[str], shape: tuple[int, int]) -> dict[int, dict[int, Runs]]:
        """Object -> frame -> mask, from pictures; frames that do not show it are left out."""
        files, found = self._files("Annotations", sequence, (".png",)), {}
        for frame, name in enumerate(names):
            if name not in files:
                raise ValueError(f"{self.folder}: {sequence} has no mask for frame {name}")
            numbers = numbered(files[name])
            if numbers.shape != shape:
                raise ValueError(f"{files[name]}: {numbers.shape[1]}x{numbers.shape[0]}, its frame is {shape[1]}x{shape[0]}")
            for identity in np.unique(numbers[(numbers > 0) & (numbers != 255)]).tolist():  # 255: nobody's, between two
                found.setdefault(identity, {})[frame] = Runs.of(numbers == identity)
        return found

    def _listed(self, wanted: set[int], length: int, shape: tuple[int, int]) -> dict[int, dict[int, Runs]]:
        """The same from run lengths."""
        found, path = {}, self.folder / "mask_dict.json"
        if not isinstance(self.runs, dict):
            raise ValueError(f"{path}: not an object in braces")
        for identity in sorted(wanted):
            try:
                listed = take(self.runs, str(identity), list)
                if len(listed) != length:
                    raise ValueError(f"{len(listed)} masks for {length} frames")
                masks = {frame: runs_of(only(runs, "size", "counts")) for frame, runs in enumerate(listed) if runs is not None}
                for runs in masks.values():
                    if runs.size != shape:
                        raise ValueError(f"a mask of {runs.size[1]}x{runs.size[0]}, its frame is {shape[1]}x{shape[0]}")
                found[identity] = {frame: runs for frame, runs in masks.items() if any(runs.counts[1::2])}
            except ValueError as error:
                raise ValueError(f"{path}: annotation {identity}: {error}") from None
        return found
