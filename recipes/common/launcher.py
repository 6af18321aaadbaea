"""`accelerate launch` as a chain starts it: asked to end while several processes are at work, it shows no traceback of that."""

from __future__ import annotations

from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.api import SignalException

from recipes.common.errors import STOPPED

if __name__ == "__main__":
    try:
        main()
    except SignalException:
        raise SystemExit(STOPPED) from None
