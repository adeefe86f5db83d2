from .calls import RemoteModel as RemoteModel
from .handler import RemoteLanguageModelHandler as RemoteLanguageModelHandler
