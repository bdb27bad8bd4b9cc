"""What pictures are scored in: GenEval's six categories (arXiv 2310.11513), and their titles on every page."""

CATEGORY_TITLES = {  # by GenEval's tag
    "single_object": "single object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colors",
    "position": "position",
    "color_attr": "attribute binding",
}


def category_title(tag: str) -> str:
    """Of a tag, with spaces or underscores between its words."""
    return CATEGORY_TITLES.get(tag.replace(" ", "_"), tag.replace("_", " "))
