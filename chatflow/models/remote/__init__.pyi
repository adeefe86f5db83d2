from .handler import RemoteLanguageModelHandler as RemoteLanguageModelHandler
from .calls import RemoteModel as RemoteModel
