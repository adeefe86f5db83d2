"""The contract of models, for all but the real Gemma, which `gemma/test_gemma.py` has loaded."""

from contract import *  # noqa: F403
