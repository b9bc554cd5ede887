"""The rules by the names that groups give them; each file shows its equation."""

from lorank.optim.adafactor import Adafactor
from lorank.optim.adamw_8bit import AdamW8bit
from lorank.optim.muon import Muon
from lorank.optim.rule import AdamW, Rule

RULES: dict[str, Rule] = {"adamw": AdamW(), "adamw-8bit": AdamW8bit(), "adafactor": Adafactor(), "muon": Muon()}
