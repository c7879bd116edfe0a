"""The recipes that travel with the package: TOML files to run by their name, or to copy and change."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Recipe", "find", "shipped"]

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """A shipped file, and what its table ``about`` tells. ``command`` runs it."""

    name: str
    file: Path
    command: str
    does: str
    needs: str
    takes: str


def shipped() -> list[Recipe]:
    """Every recipe that is shipped, by name.

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
    """The file that a recipe's path or a shipped recipe's name stands for. A file in the way comes first.

    >>> find("quickstart").name
    'quickstart.toml'
    """
    path, named = Path(recipe), HERE / f"{recipe}.toml"
    return named if not path.exists() and path.name == str(recipe) and named.is_file() else path
