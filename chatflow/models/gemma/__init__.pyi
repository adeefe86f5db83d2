from .handler import GemmaModelHandler as GemmaModelHandler
from .tuner import Schedule as Schedule
from .tuner import Tuner as Tuner
