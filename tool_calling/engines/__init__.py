"""What loads and computes models, by Unsloth or by Transformers and PEFT.

Importing it keeps the libraries' advice off the screen.
"""

import logging
import warnings

# Before any of them is imported: some give their advice while they are.
for name in ("bitsandbytes", "datasets", "peft", "trl", "torch.utils._pytree", "accelerate", "torchao"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=UserWarning)
warnings.filterwarnings("ignore", category=RuntimeWarning, module="peft")  # of ranks of experts, which it does set
