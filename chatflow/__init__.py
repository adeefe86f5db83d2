"""chatflow: event-driven chat analytics on Apache Beam.

`chatflow run` runs the whole pipeline; `chatflow.pipeline` shows how it is put together.
For a pipeline of your own, import from `chatflow` what `__init__.pyi` lists; it is loaded when it
is first used.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", *__all__]
