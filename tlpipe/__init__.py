"""Point it at labelled images; get a classifier that is reproducible, measured and served.

The Python API is what ``__all__`` names; everything else may change. In a project that has run:

    >>> import tlpipe
    >>> project = tlpipe.Project(".")
    >>> bundle = tlpipe.load_bundle("digits@champion", project)
    >>> bundle.labels[:3]
    ('0', '1', '2')
    >>> predictor = tlpipe.Predictor(bundle)
    >>> answer = predictor.predict((project.path("examples") / "0.png").read_bytes())
    >>> answer.label in bundle.labels, 0 < answer.probability <= 1
    (True, True)
"""

import os
from typing import TYPE_CHECKING

# ONNX Runtime sends what it is used for to its maker, unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from tlpipe.predict import Predictor
    from tlpipe.project import Project
    from tlpipe.registry.versions import load_bundle

__all__ = ["Predictor", "Project", "load_bundle"]


def __getattr__(name: str) -> object:
    """Import a name of the API when it is asked for: a command needs little of it, or nothing."""
    if name == "Predictor":
        from tlpipe.predict import Predictor

        return Predictor
    if name == "Project":
        from tlpipe.project import Project

        return Project
    if name == "load_bundle":
        from tlpipe.registry.versions import load_bundle

        return load_bundle
    if name == "__version__":
        from importlib.metadata import version

        return version("tlpipe")
    raise AttributeError(f"module 'tlpipe' has no attribute {name!r}")
