"""Measures, and the command that prints them.

    python evaluate.py --checkpoint assets/tiny            # fresh scenes, stills and clips

A predicted point is a hit if it lies inside the visible mask of the object it was matched to; predictions and objects are
matched one to one by least total distance (Hungarian). Per question P = hits / predicted, R = hits / true, and F1; the
figures are means over questions. Scenes come from seeds that training never uses.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import synthetic
import weights
from model import Molmo, generate
from packing import collate
from pointing import Point
from preprocess import Views
from synthetic import Query, Scene
from tokenizer import Tokenizer

HOME = Path(__file__).resolve().parent
EVALUATION_SEED = 2_000_000  # training seeds lie below
FAR = 1e6                    # pixels: the distance to an object that is not in that picture


def hungarian(cost: np.ndarray) -> list[tuple[int, int]]:
    """Least-cost one-to-one pairs (row, column) of a cost matrix, min(rows, columns) of them.

    Rows enter one by one; each time the cheapest augmenting path is found under potentials u, v (Kuhn-Munkres, O(n^3)).
    """
    if cost.shape[0] > cost.shape[1]:
        return sorted((row, column) for column, row in hungarian(cost.T))
    rows, columns = cost.shape
    u, v = np.zeros(rows), np.zeros(columns + 1)
    owner = np.full(columns + 1, -1)  # the row of each column; the extra column holds the row that looks for a place
    for row in range(rows):
        owner[-1], column = row, columns
        best, came_from = np.full(columns, np.inf), np.full(columns, columns)
        seen = np.zeros(columns + 1, bool)
        while owner[column] >= 0:
            seen[column] = True
            slack = cost[owner[column]] - u[owner[column]] - v[:-1]
            better = ~seen[:-1] & (slack < best)
            best[better], came_from[better] = slack[better], column
            nearest = int(np.where(seen[:-1], np.inf, best).argmin())
            step = best[nearest]
            u[owner[seen]] += step
            v[seen] -= step
            best[~seen[:-1]] -= step
            column = nearest
        while column != columns:
            owner[column], column = owner[came_from[column]], came_from[column]
        owner[-1] = -1
    return sorted((int(row), column) for column, row in enumerate(owner[:-1]) if row >= 0)


def hits(points: list[Point], scene: Scene, targets: list[int]) -> int:
    """How many predicted points lie in the visible mask of the target they are matched to, in the picture they name."""
    if not points or not targets:
        return 0
    truth = scene.points[[p.picture for p in points]][:, targets]       # (points, targets, 2), NaN = not visible there
    distance = np.linalg.norm(truth - np.array([[p.x, p.y] for p in points])[:, None], axis=-1)
    pairs = hungarian(np.nan_to_num(distance, nan=FAR))
    _, _, height, width = scene.masks.shape
    inside = lambda p, thing: scene.masks[p.picture, thing, min(int(p.y), height - 1), min(int(p.x), width - 1)]
    return sum(bool(inside(points[row], targets[column])) for row, column in pairs)


def precision_recall_f1(hit: int, predicted: int, true: int) -> tuple[float, float, float]:
    """Nothing true: 1 if nothing was predicted, else 0."""
    if true == 0:
        return (1.0, 1.0, 1.0) if predicted == 0 else (0.0, 0.0, 0.0)
    return hit / max(predicted, 1), hit / true, 2 * hit / (predicted + true)


@dataclass
class Asked:
    """A question put to the model, and what came back."""

    scene: Scene
    query: Query
    views: Views
    text: str = ""
    points: list[Point] = None


def ask(model: Molmo, tokenizer: Tokenizer, asked: list[Asked], max_new_tokens: int = 96) -> None:
    """Answers a batch of questions in place."""
    device = next(model.parameters()).device
    batch = collate([data.prompt(tokenizer, a.views, a.query.question) for a in asked]).to(device)
    for a, answer in zip(asked, generate(model, batch, data.spelling(tokenizer), max_new_tokens)):
        a.text, a.points = data.read_answer(answer, tokenizer, a.views)


def questions(model: Molmo, seed: int, scenes: int, videos: bool, per_scene: int = 3):
    """Fresh scenes, a few questions each."""
    for index in range(scenes):
        scene = (synthetic.clip if videos else synthetic.still)(seed, index)
        views = data.scene_views(scene, model.config)
        for query in synthetic.queries(scene, np.random.default_rng([seed, index, 2]), per_scene):
            yield Asked(scene, query, views)


def summarize(asked: list[Asked]) -> dict[str, float]:
    """The table: pointing P/R/F1 where there is something to point at; share of `none` questions answered without points;
    counting questions whose number of distinct ids is exact; exact match of captions and answers."""
    rows = {name: [] for name in ("precision", "recall", "f1", "none recognised", "count exact", "text exact")}
    for a in asked:
        if a.query.task not in ("point", "count"):
            rows["text exact"].append(a.text == a.query.answer)
        elif not a.query.targets:
            rows["none recognised"].append(not a.points)
        else:
            scores = precision_recall_f1(hits(a.points, a.scene, a.query.targets), len(a.points), len(a.query.targets))
            for name, score in zip(("precision", "recall", "f1"), scores):
                rows[name].append(score)
            if a.query.task == "count":
                rows["count exact"].append(len({p.id for p in a.points}) == len(a.query.targets))
    return {name: float(np.mean(values)) for name, values in rows.items() if values} | {"questions": len(asked)}


def evaluate(model: Molmo, tokenizer: Tokenizer, videos: bool, scenes: int, seed: int = EVALUATION_SEED, batch: int = 24,
             quiet: bool = False) -> tuple[dict[str, float], list[Asked]]:
    """Asks about `scenes` fresh scenes; -> the figures and every answer."""
    asked = list(questions(model, seed, scenes, videos))
    training = model.training
    model.eval()
    for start in tqdm(range(0, len(asked), batch), desc="clips" if videos else "stills", disable=quiet, leave=False):
        ask(model, tokenizer, asked[start:start + batch])
    model.train(training)
    return summarize(asked), asked


def by_kind_of_question(asked: list[Asked]) -> dict[str, float]:
    """Mean F1 (exact match for text) per way of asking: where does the model fail?"""
    kinds = sorted({(a.query.task, a.query.about) for a in asked})
    table = {}
    for kind in kinds:
        figures = summarize([a for a in asked if (a.query.task, a.query.about) == kind])
        table["/".join(kind)] = next(iter(figures.values()))
    return table


def main():
    with data.one_line("evaluate.py"):
        parser = data.Parser(prog="evaluate.py", description=__doc__.split("\n")[0])
        parser.add_argument("--checkpoint", default=HOME / "assets/tiny", help="a folder written by train.py")
        parser.add_argument("--scenes", type=data.number(int, 1, 10**6), default=300,
                            help="fresh scenes of each sort, three questions each")
        parser.add_argument("--seed", type=data.number(int, 0, 2**32), default=EVALUATION_SEED)
        parser.add_argument("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu")
        args = parser.parse_args()
        model, tokenizer = weights.load(args.checkpoint, args.device)
        for name, videos in (("stills", False), ("clips", True)):
            figures, asked = evaluate(model, tokenizer, videos, args.scenes, args.seed)
            print(f"{name}, {figures.pop('questions')} questions")
            for title, table in (("all", figures), ("by question", by_kind_of_question(asked))):
                line = f"{title}: " + ", ".join(f"{key} {value:.3f}" for key, value in table.items())
                print(textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="    "))


if __name__ == "__main__":
    main()
