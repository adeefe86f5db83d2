from .webhooks import read_keys as read_keys
from .webhooks import signed as signed
from .write import WriteRecords as WriteRecords
from .write import split_destinations as split_destinations
