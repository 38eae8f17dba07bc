"""Reading and writing network pickles, against Python's own pickle and torch's own reductions as oracles."""

import gzip
import io
import math
import pickle
import pickletools
import struct
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2m_stylegan import pickles
from m2m_stylegan.errors import UserError
from m2m_stylegan.pickles import EasyDict, Record, TFNetwork
from m2m_stylegan.pickles_globals import NAMES
from m2m_stylegan.pickles_tree import MAX_DEPTH, STORAGE_DTYPES
from tests_helpers import *  # placeholder
