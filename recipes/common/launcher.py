"""`accelerate launch` as a chain starts it: at Ctrl-C it ends after what it has started, and leaves it to the chain to say so."""

from __future__ import annotations

import psutil
from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.api import SignalException

from recipes.common.errors import STOPPED

if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, SignalException):  # Ctrl-C, as one process and as several have it
        psutil.wait_procs(psutil.Process().children(recursive=True))
        raise SystemExit(STOPPED) from None
