"""mar: multi-answer reinforcement learning of language models, from scratch in PyTorch."""

import signal
import sys

__version__ = "0.2.0"

# A command of ours is being loaded, for seconds: Ctrl-C leaves no traceback. Then `exit_code` takes
# over.
if sys.argv[:1] == ["-m"]:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
