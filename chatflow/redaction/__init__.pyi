from .kinds import KINDS as KINDS
from .redactor import Redactor as Redactor
