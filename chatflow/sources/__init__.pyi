from .parse import ParseArrivals as ParseArrivals
from .parse import parse_arrival as parse_arrival
from .puller import follow as follow
from .read import ReadArrivals as ReadArrivals
from .read import ReadLines as ReadLines
from .read import ReadMessages as ReadMessages
