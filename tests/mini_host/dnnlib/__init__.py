"""A host small enough for the tests, with the module names of the official code; written for this repository."""

from . import util
from .util import EasyDict

__all__ = ['EasyDict', 'util']
