"""Commands of two processes, in tests: one that is killed leaves the others, and those to come, nothing to wait for."""

import os
import signal

from launched import launch
from tqdm import tqdm


def hold() -> None:
    with tqdm.get_lock():
        os.kill(os.getpid(), signal.SIGKILL)


def draw() -> None:
    tqdm(range(2), disable=False).close()


def end(command) -> list[int | None]:
    """What the two end with, of whom none waits for long."""
    processes = launch(command).processes
    for each in processes:
        each.join(60)
    codes = [each.exitcode for each in processes]
    for each in processes:
        each.kill()
    return codes


def test_a_process_that_is_killed_while_it_draws_a_bar():
    tqdm.get_lock()  # as a bar of this process has made it
    assert end(hold) == [-signal.SIGKILL] * 2
    assert end(draw) == [0, 0]
