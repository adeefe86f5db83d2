from .analyse import AnalyseChats as AnalyseChats
from .ask import AskModel as AskModel
from .assemble import AssembleChats as AssembleChats
from .draft import DraftApologies as DraftApologies
from .redact import RedactChats as RedactChats
from .replay import OpenDeadLetters as OpenDeadLetters
from .respond import AskTexts as AskTexts
