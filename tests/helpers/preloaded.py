"""What the server of tests/helpers/processes.py imports before it forks.

No program may be compiled here: a fork has none of the threads of XLA.
"""

import gc

from gemma_scope import pipeline  # noqa: F401
from gemma_scope.evaluation import batches
from gemma_scope.language_model import gemma, weights
from gemma_scope.runtime import objects
from launch import train  # noqa: F401
from tests.helpers import object_servers

objects.RETRIES = object_servers.SOON
# Controls of small SAEs need no more.
batches._SAMPLE_TOKENS = 1024
gemma.Gemma(weights.read_config('tiny'))  # imports the gemma package
# As in tests/conftest.py; what is imported is looked through in no fork.
gc.set_threshold(100_000, 20, 50)
gc.freeze()
