"""What a network answers for an image."""

from typing import NamedTuple


class Prediction(NamedTuple):
    """The answer for an image.

    Attributes:
        image: its path; from Python, for an image that is no file, its number among those given, from 0.
        label: name of the class, or its number where classes have no names.
        confidence: its probability, 0 to 1.
        exit: number of the exit that answered, or 'ensemble'.
        description: of the class in words, for WordNet's ids.
    """

    image: int | str
    label: str
    confidence: float
    exit: int | str
    description: str | None
