"""For all tests: one thread per process. Their arrays are small, and several test processes share the cores.

More threads than idle cores make every parallel region of torch wait for a thread that does not run.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
