"""Settings of recipes as earlier versions of lorank wrote them, under today's names and with today's meaning."""

from collections.abc import Mapping
from typing import Any

import yaml

from lorank.train.shipped import recipes_folder

WRITTEN = {"checkpoint_every", "log_every", "keep"}
"""The recipe of a run names every setting, these too."""
_EGG_HAD = (("method", "eggroll"), ("optimizer", "adamw"))


def as_today(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a recipe. One of a run of lorank 0.3 or earlier has `eval_tokens`, which were not for the last evaluation."""
    if "eval_all_at_end" not in settings and settings.keys() >= WRITTEN:
        settings = {**settings, "eval_all_at_end": True}
    return _egg(settings) if settings.get("model") == "egg" else settings


def _egg(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """``model: egg`` on top of today's recipe: its shape was among the options, and its lr was either lr or, above 1, how
    fast that falls."""
    recipe = yaml.safe_load((recipes_folder() / "egg.yaml").read_text(encoding="utf-8"))
    given = {name: value for name, value in settings.items() if name not in ("model", "lr", "options")}
    given = {name: value for name, value in given.items() if (name, value) not in _EGG_HAD}
    options = dict(settings.get("options", {}))
    shape = {name: options.pop(name) for name in recipe["shape"] if name in options}
    if (rate := settings.get("lr")) is not None:
        falls = float(rate) > 1
        given["lr"] = 1.0 if falls else rate
        recipe["optimizer"] = {"votes": {"fall": rate if falls else 0.0}}
    [(gradient, population)] = recipe["gradient"].items()
    return {
        **recipe,
        "shape": {**recipe["shape"], **shape},
        "gradient": {gradient: {**population, **options}},
        **given,
    }
