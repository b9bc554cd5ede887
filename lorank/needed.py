"""A file next to saved weights that asks for lorank, for models whose layers run only there.

config.json names it under `auto_map`. With ``trust_remote_code=True`` transformers runs the file, which imports lorank or says
how to install it. If config.json named no file, transformers would advise an upgrade of itself, which does not help.
"""

from pathlib import Path
from typing import Any

from lorank.whole import made_whole

FILE = "needs_lorank.py"
TEXT = '''"""The layers of this model are in the Python package lorank, which this file imports."""

try:
    from lorank.auto import real_config
except ModuleNotFoundError as missing:
    if missing.name != "lorank":
        raise
    raise ImportError(
        "this model ({kind}) needs lorank, which is not installed. Install it: `pip install .` in a clone of lorank, or `pip install` "
        "with its git address or a wheel. Then load the model again, after `import lorank` or with trust_remote_code=True."
    ) from None

{name} = real_config("{model_type}")
'''


def write_needs(config: Any, folder: str | Path) -> None:
    """Write the file into `folder`, and its name into the configuration of the model that is saved there."""
    method = (getattr(config, "lorank", None) or {}).get("method")
    kind = config.model_type + (f", method {method}" if method else "")
    name = type(config).__name__
    config.auto_map = {"AutoConfig": f"{Path(FILE).stem}.{name}"}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with made_whole(Path(folder) / FILE) as half:
        half.write_text(TEXT.format(kind=kind, name=name, model_type=config.model_type), encoding="utf-8")


def not_copied(cls: Any, auto_class: str = "AutoConfig") -> None:
    """``register_for_auto_class`` of configurations that the file gave transformers, which calls it: lorank's code is not copied into
    folders in which they are saved."""
