"""`sprint recipes`: which there are, and one to edit."""

import argparse

from sprint.cli.shared import add_verb

RECIPES = """\
List the recipes that `sprint distill NAME` knows, or print one, comments included, to edit.
A path wins over a file in ./recipes, and that over a built-in recipe of the same name.

  sprint recipes                          name, pixels a side, and what it is
  sprint recipes tiny                     print one: its first lines say what it needs
  sprint recipes 0.6b > mine.yaml         a copy to edit, then: sprint distill mine.yaml --dry-run
  sprint recipes tiny > recipes/mine.yaml  the same by name: sprint distill mine
"""


def add_recipes(verbs) -> None:
    verb = add_verb(verbs, "recipes", "list the built-in recipes, or print one to edit", RECIPES)
    verb.add_argument("recipe", nargs="?", help="print this one (default: list them all)")
    verb.set_defaults(verb=recipes)


def recipes(args: argparse.Namespace) -> None:
    from sprint.base.door import read_text
    from sprint.recipe.find import RECIPE_BYTES, SHIPPED, find_recipe, known_recipes, summary

    if args.recipe is not None:
        print(read_text(find_recipe(args.recipe), RECIPE_BYTES), end="")
        return
    for name, file in known_recipes().items():
        size, what = summary(file)
        own = f" ({file})" if file.parent.resolve() != SHIPPED.resolve() else ""
        print(f"{name:12} {size!s:>5} px  {what}{own}")
    print("\nsprint recipes NAME prints one; sprint distill NAME --dry-run tells what it needs")
