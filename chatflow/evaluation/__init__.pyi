from .labels import Label as Label
from .labels import read_labels as read_labels
from .measures import compare as compare
from .measures import intervals as intervals
