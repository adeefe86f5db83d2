from .handler import VllmModelHandler as VllmModelHandler
