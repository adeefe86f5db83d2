from .handler import TorchModelHandler as TorchModelHandler
