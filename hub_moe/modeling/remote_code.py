"""The code beside a checkpoint that lets `trust_remote_code=True` load it where hub_moe is not installed.

transformers copies such code into one flat folder and follows only imports from that folder, so `..errors` becomes
`.errors` on the way.
"""

import re
import sys
from pathlib import Path
from typing import Any

_SIBLING_IMPORT = re.compile(r"^ *from \.(\w+) import", re.MULTILINE)
_ERRORS_IMPORT = "from ..errors import"


def write_remote_code(model_class: type[Any], folder: Path) -> dict[str, str]:
    """Copy every module that `model_class` needs into `folder` and return the `auto_map` for its config.

    A user's own subclass is saved as the class of ours that it derives from: its code is not ours to copy.
    """
    model_class = next(base for base in model_class.__mro__ if hasattr(sys.modules[base.__module__], "AUTO_CLASSES"))
    entry = _source_file(model_class)
    todo, done = [entry.stem], set[str]()
    while todo:
        stem = todo.pop()
        if stem in done:
            continue
        done.add(stem)
        text = _module_path(entry.parent, stem).read_text(encoding="utf-8")
        text = text.replace(_ERRORS_IMPORT, "from .errors import")
        (folder / f"{stem}.py").write_text(text, encoding="utf-8")
        todo.extend(_SIBLING_IMPORT.findall(text))
    config_class = model_class.config_class
    auto_classes: dict[str, str] = sys.modules[model_class.__module__].AUTO_CLASSES
    return {
        "AutoConfig": f"{_source_file(config_class).stem}.{config_class.__name__}",
        **{auto: f"{entry.stem}.{name}" for auto, name in auto_classes.items()},
    }


def _module_path(package: Path, stem: str) -> Path:
    """`errors` lies one folder up in hub_moe, and beside the others in a checkpoint's flat copy."""
    path = package / f"{stem}.py"
    return path if path.exists() else package.parent / f"{stem}.py"


def _source_file(cls: type[Any]) -> Path:
    file = sys.modules[cls.__module__].__file__
    assert file is not None
    return Path(file)
