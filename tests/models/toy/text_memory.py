"""What is known of a text depends on the picture: nothing is remembered."""

from sprint.models.teacher import NoMemory, TextMemory
from tests.models.toy.blocks import ToyTransformer


def text_memory(network: ToyTransformer) -> TextMemory:
    return NoMemory()
