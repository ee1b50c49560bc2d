"""Screens drawn by code: windows with menus, icons, fields, boxes to tick and buttons, with exact masks of all of them.

    +---------------------------+     looks      light or dark, flat or outlined, square or round, several sizes of type
    | Notes                 _ x |     asked for  by name       "Click on the Save button."
    | File  Edit  View          |                by function   "Where do I click to keep my work?"
    | [=] [o] [?]               |                by place      "Where is the button right of the Cancel button?"
    | Name   [____________]     |                all of a sort "Point to the ticked boxes."
    | [x] Sounds   [ ] Updates  |     read out     "Which buttons are there?" "Cancel, Save."
    |         [Cancel] [Save]   |
    +---------------------------+     A second window may lie on top: what it hides is not there to be clicked.

The role of MolmoPoint-GUISyn in small. `screen` gives a `synthetic.Scene` whose things are the elements; everything is a
pure function of (seed, index).
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from questions import NONE, Query, choose
from synthetic import Scene

CLICK_VISIBLE = 0.7  # the share of its box, and of the word beside it, that an element must show to be asked for

# What stands on an element -> what it is good for.
BUTTONS = {"Save": "keep my work", "Cancel": "leave without changes", "OK": "agree", "Help": "read the manual",
           "Print": "put it on paper", "Send": "mail it", "Next": "go on", "Back": "return", "Buy": "pay",
           "Sign in": "use my account", "Share": "show it to others", "Reset": "start over"}
MENUS = {"File": "open a document", "Edit": "undo something", "View": "change the zoom", "Tools": "run a macro",
         "Window": "arrange windows", "Insert": "add a picture"}
FIELDS = {"Name": "type my name", "Email": "type my address", "City": "type where I live", "Phone": "type my number",
          "Date": "type the day", "Search": "type what I look for"}
TICKS = {"Sounds": "mute it", "Updates": "get new versions", "Dark mode": "make it darker", "Remember me": "stay signed in",
         "Backup": "have a second copy", "Location": "tell where I am"}
ICONS = {"trash": "delete something", "gear": "change the settings", "lens": "search", "house": "go to the first page",
         "bell": "see what is new", "arrow": "go back a page", "plus": "add something", "disk": "store the file",
         "heart": "mark it as a favorite", "lock": "make it private"}
SORTS = {"button": "buttons", "menu": "menus", "field": "fields", "tick": "boxes to tick", "ticked": "ticked boxes", "icon": "icons"}
TITLES = ("Notes", "Mail", "Photos", "Maps", "Music", "Shop", "Setup", "Editor")
USES = {"button": BUTTONS, "menu": MENUS, "field": FIELDS, "tick": TICKS, "icon": ICONS}

BY_NAME = ("Click on {label}.", "Point to {label}.", "Press {label}.", "Where is {label}?")
BY_USE = ("Where do I click to {use}?", "I want to {use}.", "What do I press to {use}?")
BY_SORT = ("Point to the {label}.", "Where are the {label}?", "Mark all {label}.")
BY_COUNT = ("How many {label} are there?", "Count the {label}.")


@dataclass
class Element:
    """Something to click on: its sort, what it is called, and its box (left, top, right, bottom) in pixels."""

    sort: str
    word: str
    box: tuple[int, int, int, int]
    ticked: bool = False
    text: tuple[int, int, int, int] | None = None  # the box of its word, if that stands beside it
    hidden: bool = False                           # nothing of it shows, nor of a word beside it

    @property
    def name(self) -> str:
        if self.sort == "tick":
            return f"the box {self.word}"
        return f"the {self.word} {self.sort}"

    @property
    def middle(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


# ---------------------------------------------------------------------------------------------------------------------
# 1. Looks, and the pen


@dataclass
class Look:
    desk: tuple[int, ...]    # the colours of what lies behind,
    paper: tuple[int, ...]   # of windows,
    bar: tuple[int, ...]     # of title bars,
    ink: tuple[int, ...]     # of letters and lines,
    accent: tuple[int, ...]  # of what stands out
    letters: int             # their height in pixels
    corners: int             # their radius
    flat: bool               # filled buttons without an outline

    @classmethod
    def draw(cls, rng: np.random.Generator, scale: float) -> "Look":
        grey, dark = (lambda low, high: int(rng.integers(low, high))), rng.random() < 0.35
        tint = lambda value: tuple(int(np.clip(value + d, 0, 255)) for d in rng.integers(-8, 9, 3))
        paper, bar, ink = (grey(30, 60), grey(65, 95), grey(215, 250)) if dark else (grey(225, 255), grey(180, 215), grey(5, 50))
        accent = [(40, 110, 220), (30, 150, 90), (200, 70, 50), (130, 80, 190)][rng.integers(4)]
        return cls(tint(grey(70, 170)), tint(paper), tint(bar), tint(ink), accent, round(rng.uniform(10, 13) * scale),
                   round(rng.choice([0, 2, 4]) * scale), bool(rng.random() < 0.4))


def icon(pen: ImageDraw.ImageDraw, name: str, box: tuple[int, int, int, int], color: tuple[int, ...]) -> None:
    """One of ICONS, line drawn to fill the box."""
    left, top, right, bottom = box
    side = right - left
    at = lambda x, y: (left + x * side, top + y * (bottom - top))
    width = max(1, round(side / 9))
    line = lambda *points: pen.line([at(*p) for p in points], fill=color, width=width)
    match name:
        case "trash":
            line((0.2, 0.25), (0.3, 1), (0.7, 1), (0.8, 0.25)), line((0.1, 0.22), (0.9, 0.22)), line((0.4, 0.08), (0.6, 0.08))
        case "gear":
            pen.ellipse([at(0.2, 0.2), at(0.8, 0.8)], outline=color, width=width)
            for angle in np.arange(8) * np.pi / 4:
                c, s = np.cos(angle), np.sin(angle)
                line((0.5 + 0.3 * c, 0.5 + 0.3 * s), (0.5 + 0.5 * c, 0.5 + 0.5 * s))
        case "lens":
            pen.ellipse([at(0.05, 0.05), at(0.65, 0.65)], outline=color, width=width), line((0.57, 0.57), (0.98, 0.98))
        case "house":
            line((0, 0.5), (0.5, 0.05), (1, 0.5)), line((0.18, 0.45), (0.18, 0.98), (0.82, 0.98), (0.82, 0.45))
        case "bell":
            pen.pieslice([at(0.18, 0.05), at(0.82, 1.1)], 180, 360, fill=color), line((0.05, 0.72), (0.95, 0.72))
            pen.ellipse([at(0.42, 0.78), at(0.6, 0.98)], fill=color)
        case "arrow":
            line((0.45, 0.1), (0.05, 0.5), (0.45, 0.9)), line((0.05, 0.5), (1, 0.5))
        case "plus":
            line((0.5, 0.05), (0.5, 0.95)), line((0.05, 0.5), (0.95, 0.5))
        case "disk":
            pen.rectangle([at(0.05, 0.05), at(0.95, 0.95)], outline=color, width=width)
            pen.rectangle([at(0.28, 0.05), at(0.72, 0.38)], fill=color), pen.rectangle([at(0.25, 0.6), at(0.75, 0.95)], outline=color)
        case "heart":
            pen.polygon([at(*p) for p in ((0.5, 0.95), (0.02, 0.4), (0.12, 0.12), (0.38, 0.1), (0.5, 0.28), (0.62, 0.1),
                                          (0.88, 0.12), (0.98, 0.4))], fill=color)
        case "lock":
            pen.rectangle([at(0.12, 0.45), at(0.88, 0.98)], fill=color)
            pen.arc([at(0.25, 0.02), at(0.75, 0.85)], 180, 360, fill=color, width=width)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Windows


class Words:
    """The words that are still free: nothing is called the same twice on one screen."""

    def __init__(self, rng: np.random.Generator):
        self.left = {sort: [str(word) for word in rng.permutation(list(uses))] for sort, uses in USES.items()}

    def next(self, sort: str) -> str | None:
        return self.left[sort][-1] if self.left[sort] else None

    def take(self, sort: str) -> str:
        return self.left[sort].pop()


class Window:
    """A window that is drawn from the top down, row by row, until it is full. `elements` are what can be clicked."""

    def __init__(self, pen: ImageDraw.ImageDraw, rng: np.random.Generator, look: Look, box: tuple[int, int, int, int], words: Words):
        self.pen, self.rng, self.look, self.words = pen, rng, look, words
        self.left, self.top, self.right, self.bottom = box
        self.font, self.line, self.gap = ImageFont.load_default(look.letters), round(1.7 * look.letters), round(0.6 * look.letters)
        self.elements: list[Element] = []
        pen.rectangle(box, fill=look.paper, outline=look.ink)
        pen.rectangle((self.left + 1, self.top + 1, self.right - 1, self.top + self.line), fill=look.bar)
        self.write(self.left + self.gap, self.top + self.line // 2 + 1, str(rng.choice(TITLES)))
        self.y = self.top + self.line + 2
        if rng.random() < 0.6:
            self.menus()
        if rng.random() < 0.7:
            self.icons()
        while self.y + self.line < self.bottom - 2 * self.line and (self.field() if rng.random() < 1 / 3 else self.tick()):
            self.y += self.line + self.gap // 2
        self.buttons()

    def write(self, x: float, y: float, text: str, color=None, anchor: str = "lm") -> None:
        self.pen.text((x, y), text, fill=color or self.look.ink, font=self.font, anchor=anchor)

    def beside(self, made: Element, x: int) -> None:
        """Writes an element's word next to it."""
        self.write(x, self.y + self.line // 2, made.word)
        made.text = (x, self.y, x + round(self.font.getlength(made.word)), self.y + self.line)

    def place(self, sort: str, x: int, y: int, width: int, height: int, beside: int = 0) -> Element | None:
        """The next word of a sort at a place, if there is one and it fits with so many pixels to the right of it."""
        if x + width + beside > self.right - self.gap or y + height > self.bottom - 2 or self.words.next(sort) is None:
            return None
        ticked = sort == "tick" and bool(self.rng.random() < 0.5)
        self.elements.append(Element(sort, self.words.take(sort), (x, y, x + width, y + height), ticked))
        return self.elements[-1]

    def menus(self) -> None:
        x = self.left + self.gap
        while (word := self.words.next("menu")) and (made := self.place(
                "menu", x, self.y, round(self.font.getlength(word)) + self.gap, self.line)):
            self.write(x + self.gap // 2, self.y + self.line // 2, word)
            x = made.box[2] + self.gap // 2
        self.y += self.line + 2

    def icons(self) -> None:
        x, side = self.left + self.gap, round(1.5 * self.look.letters)
        for _ in range(self.rng.integers(2, 6)):
            if made := self.place("icon", x, self.y, side, side):
                icon(self.pen, made.word, made.box, self.look.ink)
            x += side + self.gap
        self.y += side + self.gap

    def field(self) -> Element | None:
        start = self.left + self.gap + round(4.2 * self.look.letters)
        made = self.place("field", start, self.y, max(self.right - 2 * self.gap - start, 2 * self.look.letters), self.line)
        if made:
            self.beside(made, self.left + self.gap)
            fill = tuple((c + 128) // 2 for c in self.look.paper)
            self.pen.rounded_rectangle(made.box, self.look.corners, fill=fill, outline=self.look.ink)
        return made

    def tick(self) -> Element | None:
        side, word = self.look.letters, self.words.next("tick") or ""
        if made := self.place("tick", self.left + self.gap, self.y + (self.line - side) // 2, side, side,
                              self.gap + round(self.font.getlength(word))):
            self.pen.rectangle(made.box, outline=self.look.ink, fill=self.look.accent if made.ticked else None)
            if made.ticked:
                a, b, c, d = made.box
                self.pen.line([(a + 2, (b + d) / 2), ((a + c) / 2, d - 2), (c - 2, b + 2)], fill="white", width=max(1, side // 6))
            self.beside(made, made.box[2] + self.gap)
        return made

    def buttons(self) -> None:
        x, y = self.left + self.gap, max(self.y, self.bottom - self.line - self.gap)
        while (word := self.words.next("button")) and (made := self.place(
                "button", x, y, round(self.font.getlength(word)) + 2 * self.gap, self.line)):
            first = x == self.left + self.gap
            self.pen.rounded_rectangle(made.box, self.look.corners, fill=self.look.accent if first else self.look.bar,
                                       outline=None if self.look.flat else self.look.ink)
            self.write((made.box[0] + made.box[2]) / 2, y + self.line // 2, word, "white" if first else self.look.ink, "mm")
            x = made.box[2] + self.gap
            if self.rng.random() < 0.2:
                break


def covered(box: tuple[int, int, int, int], by: tuple[int, int, int, int]) -> float:
    """The share of a box that lies under another."""
    width, height = (max(min(box[i + 2], by[i + 2]) - max(box[i], by[i]), 0) for i in (0, 1))
    return width * height / ((box[2] - box[0]) * (box[3] - box[1]))


def pixels(box: tuple[int, int, int, int]) -> tuple[slice, slice]:
    """Rows and columns of a box, which ends with its last pixels."""
    left, top, right, bottom = box
    return slice(top, bottom + 1), slice(left, right + 1)


def screen(seed: int, index: int, scale: float = 1.0) -> Scene:
    """One screen of 150 to 224 pixels a side (times `scale`) with one window, or two of which one lies on top. What
    shows too little of itself or of its word has no point. A pure function of its arguments, seed and index >= 0."""
    rng = np.random.default_rng([seed, index, 5])
    width, height = (int(rng.integers(150, 225) * scale) for _ in range(2))
    look, words = Look.draw(rng, scale), Words(rng)
    image = Image.new("RGB", (width, height), look.desk)
    pen = ImageDraw.Draw(image)
    margin = lambda side: int(rng.integers(0, 10) * side / 150)
    elements: list[Element] = []
    owner = np.full((height, width), -1, int)

    def show(box: tuple[int, int, int, int]) -> None:
        """A window over what is there, and its elements."""
        owner[pixels(box)] = -1
        for element in Window(pen, rng, look, box, words).elements:
            owner[pixels(element.box)] = len(elements)
            elements.append(element)

    show((margin(width), margin(height), width - 1 - margin(width), height - 1 - margin(height)))
    over, behind = None, len(elements)  # the second window, and how many elements lie behind it
    if rng.random() < 0.3:
        w, h = (int(side * rng.uniform(0.5, 0.7)) for side in (width, height))
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        over = (x, y, x + w, y + h)
        show(over)
    masks = owner == np.arange(len(elements))[:, None, None]
    points = np.full((1, len(elements), 2), np.nan, np.float32)
    for i, element in enumerate(elements):
        x, y = (v + 0.5 for v in element.middle)
        lost = covered(element.text, over) if over and element.text and i < behind else 0.0
        element.hidden = not masks[i].any() and (element.text is None or lost == 1)
        area = masks[i][pixels(element.box)].size
        if masks[i].sum() >= CLICK_VISIBLE * area and masks[i, int(y), int(x)] and lost <= 1 - CLICK_VISIBLE:
            points[0, i] = x, y
    return Scene(np.asarray(image)[None], np.zeros(1), elements, masks[None], points, "screen", False)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Instructions


# How often an instruction names its target in which way; "absent": by a name that the screen does not show.
ABOUT = {"name": 0.35, "use": 0.2, "place": 0.15, "sort": 0.18, "absent": 0.12}
# The same for questions whose answers are words: all of a sort; whether something is there; what stands beside it.
READING = {"read": 0.4, "exists": 0.35, "beside": 0.25}


def queries(scene: Scene, rng: np.random.Generator, n: int, more: dict[str, float] = {}, mixture: dict[str, float] = ABOUT) -> list[Query]:
    """n questions about one screen, nothing asked twice (fewer if there are no more); `more` as in `questions.queries`."""
    there = [i for i in range(len(scene.things)) if np.isfinite(scene.points[0, i, 0])]
    shares = np.array([share * more.get(about, 1) for about, share in mixture.items()])
    found: dict[tuple[str, str, str], Query] = {}
    for _ in range(20 * n):
        query = _ask(scene, there, rng, str(rng.choice(list(mixture), p=shares / shares.sum())))
        if query is not None:
            found.setdefault((query.task, query.about, query.label or query.question), query)
        if len(found) == n:
            break
    return list(found.values())


def _ask(scene: Scene, there: list[int], rng: np.random.Generator, about: str) -> Query | None:
    pick = partial(choose, rng)
    if about in READING:
        return _ask_to_read(scene, there, rng, about)
    if about == "absent":
        sort = pick(list(USES))
        shown = {thing.word for thing in scene.things}
        missing = [word for word in USES[sort] if word not in shown]
        if not missing:
            return None
        label = Element(sort, pick(missing), (0, 0, 0, 0)).name
        return Query("point", pick(BY_NAME).format(label=label), label, [], "", "none")
    if about == "sort":
        sort = pick(list(SORTS))
        meant = _all_of(scene, there, sort)
        if meant is None:
            return None
        task, wordings = ("point", BY_SORT) if rng.random() < 0.7 else ("point_count", BY_COUNT)
        return Query(task, pick(wordings).format(label=SORTS[sort]), SORTS[sort], meant, "", "sort" if meant else "none")
    i = pick(there)
    if i is None:
        return None
    thing = scene.things[i]
    if about == "name":
        return Query("point", pick(BY_NAME).format(label=thing.name), thing.name, [i], "", "name")
    if about == "use":
        return Query("point", pick(BY_USE).format(use=USES[thing.sort][thing.word]), thing.name, [i], "", "use")
    return _beside(scene, there, i, rng)


def _ask_to_read(scene: Scene, there: list[int], rng: np.random.Generator, about: str) -> Query | None:
    """As `_ask`, answered in words."""
    if about == "read":
        sort = str(rng.choice(list(SORTS)))
        meant = _all_of(scene, there, sort)
        line = None if meant is None else _in_order(scene, meant)
        if line is None:
            return None
        words = ", ".join(scene.things[i].word for i in line)
        return Query("qa", f"Which {SORTS[sort]} are there?", "", line, f"{words}." if line else NONE, about)
    if about == "exists":
        named = _ask(scene, there, rng, str(rng.choice(["name", "absent"])))
        return named and Query("qa", f"Is {named.label} there?", "", named.targets, "Yes." if named.targets else "No.", about)
    placed = _ask(scene, there, rng, "place")
    return placed and Query("qa", f"What is {placed.label}?", "", placed.targets, f"{scene.things[placed.targets[0]].word}.", about)


def _all_of(scene: Scene, there: list[int], sort: str) -> list[int] | None:
    """All elements of a sort; None if one of them is half in view: neither there nor not there."""
    alike = [i for i, thing in enumerate(scene.things) if thing.sort == sort or sort == "ticked" and thing.ticked]
    half_in_view = any(not scene.things[i].hidden for i in alike if i not in there)
    return None if half_in_view else [i for i in alike if i in there]


def _in_order(scene: Scene, meant: list[int]) -> list[int] | None:
    """As one reads: row by row from the top, each from the left. None if rows overlap and are not
    level, as they may in two windows side by side."""
    order = sorted(meant, key=lambda i: (scene.things[i].box[1], scene.things[i].box[0]))
    boxes = [scene.things[i].box for i in order]
    clear = all(b[1] > a[3] or b[1] == a[1] and b[0] > a[2] for a, b in zip(boxes, boxes[1:]))
    return order if clear else None


def _beside(scene: Scene, there: list[int], i: int, rng: np.random.Generator) -> Query | None:
    """A query for the element of the same sort that is next to element i on one side: right, left, below or above. It must be in
    line with i, and no other that only overlaps that line may be as near. None if no side has such a one, or if one of the sort is
    half in view."""
    thing, found = scene.things[i], []
    alike = _all_of(scene, there, thing.sort)
    if alike is None:
        return None
    for side, axis, sign in (("right of", 0, 1), ("left of", 0, -1), ("below", 1, 1), ("above", 1, -1)):
        away = lambda j, axis: scene.things[j].middle[axis] - thing.middle[axis]
        overlaps = lambda box: box[1 - axis] < thing.box[3 - axis] and thing.box[1 - axis] < box[3 - axis]
        ahead = {j: sign * away(j, axis) for j in alike if sign * away(j, axis) > 0}
        in_line = [j for j in ahead if abs(away(j, 1 - axis)) < (thing.box[3] - thing.box[1]) / 2]
        if in_line:
            target = min(in_line, key=ahead.get)
            if not any(j != target and ahead[j] <= ahead[target] and overlaps(scene.things[j].box) for j in ahead):
                found.append((f"{side} {thing.name}", target))
    chosen = choose(rng, found)
    if chosen is None:
        return None
    where, target = chosen
    label = f"the {'box' if thing.sort == 'tick' else thing.sort} {where}"
    return Query("point", choose(rng, BY_NAME).format(label=label), label, [target], "", "place")
