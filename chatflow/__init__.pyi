__version__: str

# The records.
from .records import Analysis as Analysis
from .records import Chat as Chat
from .records import DeadLetter as DeadLetter
from .records import Draft as Draft
from .records import Event as Event
from .records import Message as Message
from .records import Response as Response
from .records import Sentiment as Sentiment
from .records import parse_record as parse_record

# The stages, in the order in which a chat passes them.
from .sources.read import ReadArrivals as ReadArrivals
from .sources.read import ReadLines as ReadLines
from .sources.read import ReadMessages as ReadMessages
from .sources.parse import ParseArrivals as ParseArrivals
from .stages.assemble import AssembleChats as AssembleChats
from .stages.analyse import AnalyseChats as AnalyseChats
from .stages.draft import DraftApologies as DraftApologies
from .stages.respond import AskTexts as AskTexts
from .stages.replay import OpenDeadLetters as OpenDeadLetters
from .sinks.write import WriteRecords as WriteRecords
from .dead_letters import DeadLettered as DeadLettered

# What they are given.
from .prompts.templates import load_folder as load_folder
from .prompts.templates import load_template as load_template
from .prompts.questions import AnalysisPrompt as AnalysisPrompt
from .prompts.questions import DraftPrompt as DraftPrompt
from .models.spec import Model as Model
from .models.spec import ModelSpec as ModelSpec
from .models.base import LanguageModel as LanguageModel
from .models.handlers import LanguageModelHandler as LanguageModelHandler
from .models.requests import Answer as Answer
from .models.requests import Failure as Failure
from .models.requests import Request as Request
from .models.scripted import ScriptedModelHandler as ScriptedModelHandler
from .options import Batching as Batching
from .options import Options as Options
from .options import RemoteSettings as RemoteSettings
from .options import Rules as Rules
from .options import SinkSettings as SinkSettings
from .options import WorkerSettings as WorkerSettings

# A run.
from .running.launch import launch as launch
from .running.launch import new_pipeline as new_pipeline
from .running.summary import Summary as Summary
from .errors import BadInputError as BadInputError
from .errors import ElementError as ElementError
from .errors import UsageError as UsageError
