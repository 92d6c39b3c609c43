"""Programs that show the compiler at work."""

import logging

# On import these two tell every user of a machine without CUDA about libraries that only CUDA needs.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
