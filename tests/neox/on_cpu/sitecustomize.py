"""Lets scripts of GPT-NeoX run on CPU, as its launcher starts them: put this folder on PYTHONPATH.

The ranks believe that the machine has a GPU for each of them, whose functions do nothing.
"""

import os
import sys

SCRIPTS = {"train.py", "eval.py", "generate.py"}

if SCRIPTS & {os.path.basename(word) for word in sys.orig_argv[1:4]}:
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import cpu_only  # noqa: F401
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: int(os.environ["LOCAL_SIZE"])
    torch.cuda.set_device = lambda _device: None
