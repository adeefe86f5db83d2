from .app import Server as Server
from .outbox import replies_to as replies_to
from .people import People as People
from .people import read_users as read_users
from .site import Console as Console
