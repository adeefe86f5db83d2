from .objects import ALL as ALL
from .objects import FORMATS as FORMATS
from .objects import as_ours as as_ours
