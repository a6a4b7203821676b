"""Pictures to ask about, with questions and short answers: drawn scenes, and handwritten digits.

A scene has one to three shapes in the quarters of a picture, each with a colour; noise, sizes and places
vary. The digits are those of scikit-learn (UCI's "Optical recognition of handwritten digits", CC BY 4.0), in
a colour.
No picture of the held-out set is in the training set: digits are split by image, scenes by their seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIDE = 32
CELL = SIDE // 2
COLOURS = {
    "red": (220, 50, 50), "green": (50, 190, 70), "blue": (60, 90, 230), "yellow": (230, 210, 50),
    "purple": (160, 60, 190), "orange": (240, 140, 40),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = ("count", "there", "place", "describe", "digit")
"""Of the questions."""


@dataclass(frozen=True)
class Thing:
    """A shape in a quarter of the picture."""

    shape: str
    colour: str
    place: int

    def __str__(self) -> str:
        return f"{self.colour} {self.shape} {PLACES[self.place]}"


def scene(rng: random.Random) -> list[Thing]:
    """One to three shapes, no two of one kind or colour."""
    count = rng.randint(1, 3)
    shapes, colours = rng.sample(SHAPES, count), rng.sample(sorted(COLOURS), count)
    places = sorted(rng.sample(range(4), count))
    return [Thing(*one) for one in zip(shapes, colours, places, strict=True)]


def background(rng: random.Random) -> Image.Image:
    """Grey with a little noise."""
    shade, noise = rng.randint(0, 40), np.random.default_rng(rng.randrange(2**32))
    pixels = noise.normal(shade, 8, (SIDE, SIDE, 3)).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def draw(things: list[Thing], rng: random.Random) -> Image.Image:
    """The scene as a picture."""
    picture = background(rng)
    pen = ImageDraw.Draw(picture)
    for thing in things:
        size = rng.randint(10, 13)
        row, column = divmod(thing.place, 2)
        left = column * CELL + rng.randint(1, CELL - size - 1)
        top = row * CELL + rng.randint(1, CELL - size - 1)
        right, bottom, colour = left + size, top + size, tinted(COLOURS[thing.colour], rng)
        if thing.shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=colour)
        elif thing.shape == "square":
            pen.rectangle((left, top, right, bottom), fill=colour)
        elif thing.shape == "triangle":
            pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=colour)
        else:
            pen.line((left, top, right, bottom), fill=colour, width=3)
            pen.line((left, bottom, right, top), fill=colour, width=3)
    return picture


def tinted(colour: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    """Nearly the colour."""
    return tuple(max(0, min(255, value + rng.randint(-15, 15))) for value in colour)


def digit(pixels: Any, rng: random.Random) -> Image.Image:
    """A digit of 8 x 8 values from 0 to 16 in a colour, as large as the picture nearly."""
    picture = background(rng)
    ink = Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).resize((28, 28), Image.Resampling.BILINEAR)
    colour = tinted(COLOURS[rng.choice(sorted(COLOURS))], rng)
    picture.paste(colour, (rng.randint(0, 4), rng.randint(0, 4)), ink)
    return picture


def question(kind: str, things: list[Thing], rng: random.Random) -> tuple[str, str]:
    """A question of a kind about a scene, and its answer."""
    thing, place = rng.choice(things), rng.randrange(4)
    there = [f"{one.colour} {one.shape}" for one in things if one.place == place]
    return {
        "count": ("how many shapes are there ?", NUMBERS[len(things)]),
        "there": (f"what is {PLACES[place]} ?", there[0] if there else "nothing"),
        "place": (f"where is the {thing.shape} ?", PLACES[thing.place]),
        "describe": ("describe the picture .", " and ".join(map(str, things)) + " ."),
    }[kind]


def rows(count: int, seed: int, digits: list[tuple[Any, int]]) -> Iterator[tuple[str, Image.Image, str, str]]:
    """Kind of the question, picture, question and answer; the kinds take turns."""
    rng = random.Random(seed)
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        if kind == "digit":
            pixels, label = digits[index // len(KINDS) % len(digits)]
            yield kind, digit(pixels, rng), "which digit is this ?", NUMBERS[label]
        else:
            things = scene(rng)
            yield kind, draw(things, rng), *question(kind, things, rng)


def words() -> list[str]:
    """Every word of the questions and answers."""
    fixed = "how many shapes are there ? what is where the describe picture . which digit this and nothing"
    parts = (fixed, *SHAPES, *COLOURS, *PLACES, *NUMBERS)
    return list(dict.fromkeys(word for part in parts for word in part.split()))


def write(folder: Path, sizes: dict[str, int]) -> None:
    """Write a JSONL file of each name with its number of rows, and the pictures beside it.

    Args:
        folder: gets NAME.jsonl and NAME/00000.png.
        sizes: rows by name; "eval" has digits that the others do not.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    every = list(zip(data.images, data.target.tolist(), strict=True))
    random.Random(0).shuffle(every)
    for number, (name, count) in enumerate(sizes.items()):
        known = every[:300] if name == "eval" else every[300:]
        (folder / name).mkdir(parents=True, exist_ok=True)
        lines = []
        for index, (kind, picture, asked, answer) in enumerate(rows(count, 1000 + number, known)):
            file = f"{name}/{index:05}.png"
            picture.save(folder / file)
            row = {"prompt": f"<image>{asked}", "images": [file], "response": answer, "kind": kind}
            lines.append(json.dumps(row))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
