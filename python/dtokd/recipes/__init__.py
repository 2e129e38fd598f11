"""Recipes: YAML files of options, one per number of the paper's tables.

Those of classification (docs/recipes.md) are for `dtokd train`, those that begin with `coco_` (docs/detect.md) for
`dtokd detect`.

A recipe may say `extends: NAME` or `extends: [NAME, NAME]`: options of these come first, later ones win, its own last.
Names with a leading underscore are parts that others extend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..texts import parse_yaml

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """All recipes, without the parts they extend."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml") if not p.stem.startswith("_"))


def path(name: str) -> Path:
    """The file of a recipe.

    Raises:
        ValueError: there is none of that name.
    """
    found = FOLDER / f"{name}.yaml"
    if Path(name).name != name or not found.is_file():
        raise ValueError(f"recipe: there is no {name!r}; known are {', '.join(names())}")
    return found


def load(file: str | Path) -> dict[str, Any]:
    """The options of a YAML file, with what it extends.

    Args:
        file: of the package (see `path`) or the user's own. What it extends is looked for beside it, then here.

    Raises:
        ValueError: not a mapping, an extended file that is missing, or a circle.
    """
    return _load(Path(file), ())


def _load(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if file in above:
        raise ValueError(f"{file}: extends itself, through {' -> '.join(p.name for p in (*above, file))}")
    try:
        own = parse_yaml(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not YAML: {error}") from error
    own = {} if own is None else own
    if not isinstance(own, dict) or not all(isinstance(key, str) for key in own):
        raise ValueError(f"{file}: not a mapping of options; write one `name: value` per line")
    extended = own.pop("extends", None)
    names = extended if isinstance(extended, list) else [] if extended is None else [extended]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{file}: extends {extended!r}; expected a recipe's name, or a list of names")
    options: dict[str, Any] = {}
    for name in names:
        places = [folder / f"{name}.yaml" for folder in (file.parent, FOLDER)]
        found = next((p for p in places if p.is_file()), None)
        if found is None:
            raise ValueError(f"{file}: extends {name!r}, but there is no {places[0]}")
        options |= _load(found, (*above, file))
    return options | own
