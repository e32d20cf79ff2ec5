"""Words by their class, for captions that say something else (`captions.perturbed`). Lists of our own, no tagger."""

from __future__ import annotations

# a word is replaced by another one of its line
CLASSES: dict[str, tuple[str, ...]] = {
    "colour": tuple("red green blue yellow purple cyan orange pink brown black white gray golden silver".split()),
    "shape": tuple("circle square triangle cube sphere cylinder cone ring star".split()),
    "number": tuple("two three four five six seven eight nine ten".split()),
    "size": tuple("tiny small little large big huge giant tall short long narrow wide".split()),
    "side": ("left", "right"),
    "height": ("above", "below"),
    "place of one thing": tuple("under behind beside inside near".split()),
    "material": tuple("wooden metal glass stone plastic leather paper marble ceramic golden".split()),
    "animal": tuple("cat dog horse bird fish lion tiger bear fox wolf rabbit elephant owl snake dragon".split()),
    "person": tuple("man woman boy girl child king queen knight soldier wizard astronaut robot".split()),
    "place": tuple("city village forest desert beach mountain lake river castle street garden kitchen bedroom".split()),
    "vehicle": tuple("car truck bus train boat ship plane bicycle motorcycle".split()),
    "food": tuple("apple banana bread cake pizza burger soup salad cheese orange".split()),
    "thing": tuple("table chair lamp book clock vase bottle cup sword hat umbrella mirror guitar".split()),
    "light": tuple("sunrise sunset day night morning evening dusk dawn".split()),
    "weather": tuple("rain snow storm fog sunshine wind".split()),
    "season": tuple("spring summer autumn winter".split()),
    "doing": tuple("sitting standing running walking sleeping jumping flying swimming dancing reading eating".split()),
    "mood": tuple("happy sad angry calm scared smiling crying laughing".split()),
    "age": tuple("old young ancient modern new futuristic medieval".split()),
    "quality": tuple("bright dark clean dirty smooth rough soft hard wet dry hot cold".split()),
    "style": tuple("photograph painting drawing sketch cartoon watercolor sculpture".split()),
}


def of(word: str) -> tuple[str, ...]:
    """The other words that may take the place of ``word``, in lower case; empty if no list has it."""
    return tuple(dict.fromkeys(other for own in CLASSES.values() if word in own for other in own if other != word))
