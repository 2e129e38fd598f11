"""Objectives that a weighting gets by name or position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral


def check_primary(rule: str, primary: str | int, names: Sequence[str]) -> None:
    """Refuse a primary objective that is not among the losses.

    Raises:
        ValueError: it is not.
    """
    if primary not in (*names, *range(len(names))) or isinstance(primary, bool):
        raise ValueError(f"{rule}: primary is {primary!r}, but the losses are {list(names)}; choose one of them")


def position_of(rule: str, objective: str | int, names: Sequence[str], K: int) -> int:
    """The place of an objective among K.

    Args:
        rule: what error messages call the weighting.
        objective: its name or position.
        names: of the objectives; empty if nobody named them.
        K: how many there are.

    Raises:
        ValueError: there is no such objective.
    """
    if isinstance(objective, Integral) and not isinstance(objective, bool):  # numpy's too
        place = int(objective)
    else:
        place = names.index(objective) if objective in names else -1
    if not 0 <= place < K:
        have = list(names) or f"{K} without names: pass a position, or a dict of losses to an optimizer or to backward"
        raise ValueError(f"{rule}: primary is {objective!r}, but the objectives are {have}")
    return place


def ordered(
    rule: str, argument: str, values: Sequence[float] | Mapping[str, float], names: Sequence[str], K: int
) -> list[float]:
    """Numbers for K objectives, in the objectives' order.

    Args:
        rule: what error messages call the weighting.
        argument: and its argument.
        values: in that order already, or by name.
        names: of the objectives; empty if nobody named them.
        K: how many there are.

    Raises:
        ValueError: not one for each objective.
    """
    if isinstance(values, Mapping):
        if len(names) != K:
            raise ValueError(
                f"{rule}: {argument} has names, but the losses have none; pass a dict of losses to an optimizer or to "
                f"backward, or a list as {argument}"
            )
        if set(values) != set(names):
            raise ValueError(
                f"{rule}: {argument} are of {list(values)}, but the losses are {list(names)}; name the same"
            )
        return [values[name] for name in names]
    if len(values) != K:
        raise ValueError(
            f"{rule}: {argument} has {len(values)} numbers, but there are {K} losses"
            f"{f' {list(names)}' if names else ''}; give one each"
        )
    return list(values)
