"""`torchrun -m mobizo_compiler.distributed ...` is `mobizo finetune ... --distributed` on every rank."""

from __future__ import annotations

import sys

from mobizo_compiler.__main__ import main

if __name__ == "__main__":
    sys.argv[1:] = ["finetune", "--distributed", *sys.argv[1:]]
    main()
