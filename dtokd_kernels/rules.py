"""The update rules: which state and which hyper-parameters each has, in the order that everything uses.

`csrc/include/dtokd/update_rules.h` has the same lists, with the formula; `reference.UPDATES` has the formula in torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
        name: as in `reference.UPDATES`.
        states: what a parameter's state holds, in torch's names; each with the hyper-parameter that has to be other
            than 0 for it, or None if it is always there. At most the last is optional.
        numbers: the hyper-parameters, `lr` first.
        counts_steps: whether a parameter's state also counts its steps, under "step".
    """

    name: str
    states: dict[str, str | None]
    numbers: tuple[str, ...]
    counts_steps: bool

    @property
    def index(self) -> int:
        """The rule's number in the operations."""
        return list(RULES).index(self.name)

    @property
    def slots(self) -> dict[str, int]:
        """From a name in the state to its bit in `held` of the operation `prepare`."""
        slots = {name: i for i, name in enumerate(self.states)}
        return slots | ({"step": STEP_SLOT} if self.counts_steps else {}) | {"master": STEP_SLOT + 1}


#: As many states as a rule may have: kMaxStates of update_rules.h.
STEP_SLOT = 3

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "adamw",
            {"exp_avg": None, "exp_avg_sq": None, "max_exp_avg_sq": "amsgrad"},
            ("lr", "beta1", "beta2", "weight_decay", "eps", "maximize", "amsgrad"),
            counts_steps=True,
        ),
        Rule(
            "sgd",
            {"momentum_buffer": "momentum"},
            ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "first"),
            counts_steps=False,
        ),
        Rule("lion", {"exp_avg": None}, ("lr", "beta1", "beta2", "weight_decay", "maximize"), counts_steps=False),
    )
}
