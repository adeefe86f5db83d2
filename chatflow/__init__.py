"""chatflow: event-driven chat analytics on Apache Beam.

`chatflow run` runs the whole pipeline, which `chatflow.pipeline` builds. For a pipeline of your
own, import from `chatflow` what `__init__.pyi` lists; each name is loaded at its first use.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", *__all__]
