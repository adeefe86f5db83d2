from .launch import execute as execute
from .launch import launch as launch
from .launch import new_pipeline as new_pipeline
from .summary import Summary as Summary
