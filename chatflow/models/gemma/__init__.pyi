from .handler import GemmaModelHandler as GemmaModelHandler
