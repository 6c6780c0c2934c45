"""Imports timm, also where torchvision was built for another torch than is here: a CPU torch has none of its own.

Such a torchvision cannot load its compiled operators and then fails to import, because it describes operators that
nobody has defined. Their schemas are enough for timm, whose models call none of them.
"""

import importlib
import sys

_kept = []


def import_timm():
    """The module.

    Raises:
        ImportError: timm, or what it needs, is not there or does not work.
    """
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise ImportError(f"timm does not work here: {error}") from error
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)  # they vanish with it
    for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
        del sys.modules[name]  # half imported
    return importlib.import_module("timm")


def why_not():
    """One sentence that says why there is no timm, or None."""
    try:
        import_timm()
    except ImportError as error:
        return f"timm cannot be imported: {error}"
    return None
