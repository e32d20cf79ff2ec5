"""Scorers of one's own for the tests of `diffpo score`: what they were asked is kept in ``CALLS``."""

import numpy as np

CALLS = []  # (prompt, brightness) of every picture that was scored
STOP = []  # after so many pictures the run is interrupted, once


def brightness(image):
    return float(np.asarray(image.convert("L"), np.float64).mean())


class Mean:
    """The brightness; prompts are not read."""

    names = ("mean",)
    reads_prompt = False

    def score(self, images, prompts):
        found = [brightness(image) for image in images]
        CALLS.extend(zip(prompts, found, strict=True))
        if STOP and len(CALLS) > STOP[0]:
            STOP.clear()
            raise KeyboardInterrupt
        return {"mean": np.array(found)}


class Long:
    """Brightness and the length of the prompt; NaN for black pictures."""

    names = ("long.sum", "long.prompt")

    def score(self, images, prompts):
        light = np.array([brightness(image) for image in images])
        length = np.array([len(prompt) for prompt in prompts], float)
        return {"long.sum": np.where(light > 0, light + length, np.nan), "long.prompt": length}


class Failing:
    """It runs into an error of its own."""

    names = ("failing",)

    def score(self, images, prompts):
        return {"failing": [1 / 0 for _ in images]}


class Change:
    """How much brighter a picture is than the one that it is an edit of."""

    names = ("change",)

    def score(self, images, prompts):
        pairs = zip(images, prompts, strict=True)
        return {"change": np.array([brightness(image) - brightness(prompt.open()) for image, prompt in pairs])}


class Second:
    """How much brighter a picture is than the second one that it is made of."""

    names = ("second",)

    def score(self, images, prompts):
        pairs = zip(images, prompts, strict=True)
        return {"second": np.array([brightness(image) - brightness(prompt.pictures()[1]) for image, prompt in pairs])}
