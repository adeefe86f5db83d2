__version__: str

# The records.
from .dead_letters import DeadLettered as DeadLettered
from .errors import BadInputError as BadInputError
from .errors import ElementError as ElementError
from .errors import UsageError as UsageError
from .models.base import LanguageModel as LanguageModel
from .models.handlers import LanguageModelHandler as LanguageModelHandler
from .models.requests import Answer as Answer
from .models.requests import Failure as Failure
from .models.requests import Request as Request
from .models.scripted import ScriptedModelHandler as ScriptedModelHandler
from .models.spec import Model as Model
from .models.spec import ModelSpec as ModelSpec
from .options import Batching as Batching
from .options import Options as Options
from .options import RemoteSettings as RemoteSettings
from .options import Rules as Rules
from .options import SinkSettings as SinkSettings
from .options import WorkerSettings as WorkerSettings
from .prompts.questions import AnalysisPrompt as AnalysisPrompt
from .prompts.questions import DraftPrompt as DraftPrompt

# What they are given.
from .prompts.templates import load_folder as load_folder
from .prompts.templates import load_template as load_template
from .records import Analysis as Analysis
from .records import Chat as Chat
from .records import DeadLetter as DeadLetter
from .records import Draft as Draft
from .records import Event as Event
from .records import Message as Message
from .records import Record as Record
from .records import Response as Response
from .records import Sentiment as Sentiment
from .records import parse_record as parse_record
from .redaction.redactor import Redactor as Redactor

# A run.
from .running.launch import launch as launch
from .running.launch import new_pipeline as new_pipeline
from .running.summary import Summary as Summary
from .sinks.write import WriteRecords as WriteRecords
from .sources.parse import ParseArrivals as ParseArrivals

# The stages, in the order in which a chat passes them.
from .sources.read import ReadArrivals as ReadArrivals
from .sources.read import ReadLines as ReadLines
from .sources.read import ReadMessages as ReadMessages
from .stages.analyse import AnalyseChats as AnalyseChats
from .stages.assemble import AssembleChats as AssembleChats
from .stages.draft import DraftApologies as DraftApologies
from .stages.redact import RedactChats as RedactChats
from .stages.replay import OpenDeadLetters as OpenDeadLetters
from .stages.respond import AskTexts as AskTexts
