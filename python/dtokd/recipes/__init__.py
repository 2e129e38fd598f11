"""Recipes: the options behind each number of the paper's tables, and the user's own files of options.

Tables hold them, YAML files of this folder: `imagenet`, `cifar100` and `dinov3` for `dtokd train` (docs/recipes.md),
`coco` and `coco_dinov3` for `dtokd detect` (docs/detect.md). A table has options in four parts:

- `base`: of all its recipes;
- `pairs`: of a teacher and a student, named TEACHER-STUDENT, or STUDENT where all students have the same teacher;
- `variants`: of a way to train;
- `alone`: of recipes that are in no pair, such as those that train the teachers.

The recipe `TABLE/PAIR/VARIANT` has the options of base, pair and variant, of which the later ones win; `{teacher}` and
`{student}` in them stand for the two names of the pair. `python -m dtokd.recipes` prints all recipes with the paper's
numbers, which the table's part `paper` holds, if there are any.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from ..texts import parse_yaml

#: Where the tables are, and how an option names one of their recipes.
FOLDER, PREFIX = Path(__file__).parent, "recipe:"


def tables() -> dict[str, dict[str, Any]]:
    """The tables by name, as the files hold them."""
    return {file.stem: parse_yaml(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.yaml"))}


def names() -> list[str]:
    """All recipes, such as `cifar100/resnet56-resnet20/dto`."""
    return [name for table, parts in tables().items() for name in _recipes(table, parts)]


def load(source: str | Path) -> dict[str, Any]:
    """The options of a recipe or of a file.

    Args:
        source: `recipe:NAME`, or the path of a YAML file: a mapping of options, in which `extends` may name recipes and
            other files, beside it and without their ending; their options come first, later ones win, its own last.

    Raises:
        ValueError: there is no such recipe, the file is no mapping, or it extends what is missing or itself.
    """
    return _load(str(source), ())


def markdown(table: str) -> str:
    """The recipes of a table and the paper's numbers: what `docs/recipes.md` and `docs/detect.md` show."""
    parts = tables()[table]
    paper, variants = parts.get("paper", {}), list(parts["variants"])
    lines = [
        f"| `{table}/` | " + " | ".join(f"`/{name}`" for name in variants) + " |",
        "|---" * (len(variants) + 1) + "|",
    ]
    for pair in parts["pairs"]:
        cells = [str(paper.get(pair, {}).get(name, "")) for name in variants]
        lines.append(f"| `{pair}` | " + " | ".join(cells) + " |")
    if "alone" in parts:
        lines += ["", "| recipe | paper |", "|---|---|"]
        lines += [f"| `{table}/{name}` | {paper.get(name, '')} |" for name in parts["alone"]]
    return "\n".join(lines) + "\n"


def _recipes(table: str, parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each recipe of a table."""
    found = {f"{table}/{name}": parts["base"] | own for name, own in parts.get("alone", {}).items()}
    for pair, of_pair in parts["pairs"].items():
        teacher, _, student = pair.rpartition("-")
        for variant, own in parts["variants"].items():
            options = parts["base"] | of_pair | own
            found[f"{table}/{pair}/{variant}"] = {
                key: value.format(teacher=teacher, student=student) if isinstance(value, str) else value
                for key, value in options.items()
            }
    return {name: {**options, "experiment": re.sub("[/-]", "_", name)} for name, options in found.items()}


def _load(source: str, above: tuple[str, ...]) -> dict[str, Any]:
    if source in above:
        raise ValueError(f"{source}: extends itself, through {' -> '.join((*above, source))}")
    if source.startswith(PREFIX):
        name = source.removeprefix(PREFIX)
        found = {recipe: own for table, parts in tables().items() for recipe, own in _recipes(table, parts).items()}
        if name not in found:
            close = "".join(f"{match} or " for match in difflib.get_close_matches(name, found, n=1))
            raise ValueError(f"recipe: there is no {name!r}; choose {close}one that `python -m dtokd.recipes` lists")
        return found[name]
    file = Path(source)
    try:
        own = parse_yaml(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not YAML: {error}") from error
    own = {} if own is None else own
    if not isinstance(own, dict) or not all(isinstance(key, str) for key in own):
        raise ValueError(f"{file}: not a mapping of options; write one `name: value` per line")
    extended = own.pop("extends", None)
    several = extended if isinstance(extended, list) else [] if extended is None else [extended]
    if not all(isinstance(name, str) and name for name in several):
        raise ValueError(
            f"{file}: extends {extended!r}; expected recipe:NAME or the name of a file, or a list of these"
        )
    options: dict[str, Any] = {}
    for name in several:
        other = name if name.startswith(PREFIX) else str(file.parent / f"{name}.yaml")
        if not name.startswith(PREFIX) and not Path(other).is_file():
            raise ValueError(f"{file}: extends {name!r}, but there is no {other}; one of the package's is {PREFIX}NAME")
        options |= _load(other, (*above, source))
    return options | own
