"""The table of federated rules: a new one is a file with a pure function, and a line here."""

from lorank.federated.average import AVERAGE
from lorank.federated.best import BEST
from lorank.federated.fedsvd import FEDSVD
from lorank.federated.ffa import FFA
from lorank.federated.flora import FLORA
from lorank.federated.rule import Rule
from lorank.fields import unknown

RULES: dict[str, Rule] = {rule.name: rule for rule in (AVERAGE, FLORA, FFA, FEDSVD, BEST)}


def register(rule: Rule) -> Rule:
    """Let a rule of yours be found by its name in this process.

    Raises:
        ValueError: its name belongs to another rule.
    """
    if RULES.setdefault(rule.name, rule) is not rule:
        raise ValueError(f"the rule name {rule.name!r} is already in use; choose another name")
    return rule


def find(name: str) -> Rule:
    """The rule of a name; ValueError that lists the known names if there is none, or says where FedPGP is."""
    if name == "fedpgp" and name not in RULES:
        raise ValueError(
            "fedpgp trains a prompt, of which a part stays with each client, and no factors; use the functions of "
            "lorank.federated.fedpgp in a loop of yours"
        )
    if name not in RULES:
        raise ValueError(unknown("rule", name, [*RULES]))
    return RULES[name]
