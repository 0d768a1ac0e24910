"""From a model and a machine to a result that its engine serves."""

from moetailor.serving import engines as engines
from moetailor.serving.choices import Choice, Offered, offered
from moetailor.serving.engine import ENGINES, HOST, PORT, Engine, Room, Served, find_engine

__all__ = ["ENGINES", "HOST", "PORT", "Choice", "Engine", "Offered", "Room", "Served", "find_engine", "offered"]
