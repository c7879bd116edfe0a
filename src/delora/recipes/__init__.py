"""The recipes in the package: TOML files to run by name, or to copy and change."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Recipe", "find", "shipped"]

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """A shipped file, with the texts of its table ``about``. ``command`` runs it.

    >>> next(recipe.command for recipe in shipped() if recipe.name == "robustness")
    'delora sweep robustness'
    """

    name: str
    file: Path
    command: str
    does: str
    needs: str
    takes: str


def shipped() -> list[Recipe]:
    """All shipped recipes, in the order of their names.

    >>> [recipe.name for recipe in shipped() if recipe.name == "quickstart"]
    ['quickstart']
    """
    recipes = []
    for file in sorted(HERE.glob("*.toml")):
        data = tomllib.loads(file.read_text("utf-8"))
        about = data["about"]
        command = f"delora {'sweep' if 'recipe' in data else 'train'} {file.stem}"
        recipes.append(Recipe(file.stem, file, command, about["does"], about["needs"], about["takes"]))
    return recipes


def find(recipe: Path | str) -> Path:
    """The file of a recipe, given its path or a shipped recipe's name. An existing file comes before a shipped one.

    >>> find("quickstart").name
    'quickstart.toml'
    """
    path, named = Path(recipe), HERE / f"{recipe}.toml"
    return named if not path.exists() and path.name == str(recipe) and named.is_file() else path
