from .connections import Database as Database
from .upserts import upsert as upsert
