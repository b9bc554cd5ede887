"""Several gloo processes that are forked after one import of torch, which takes longer than most of what they check."""

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def together(function: Callable[[], Any], processes: int, timeout: int = 240, killed: int = 0) -> list[Any]:
    """What a function returns in each of that many processes, of which the last ones may be killed. RuntimeError with the traceback of
    one that failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def run(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        try:
            queue.put((rank, function(), None))
        except BaseException:
            queue.put((rank, None, traceback.format_exc()))
            queue.close()
            queue.join_thread()
            os._exit(1)  # the others may wait for this one
        dist.destroy_process_group()

    all_of_them = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(processes)]
    gc.freeze()  # what is collected in a fork is copied
    for process in all_of_them:
        process.start()
    gc.unfreeze()
    try:
        found = {}
        for _ in all_of_them[killed:]:
            rank, value, error = queue.get(timeout=timeout)
            if error is not None:
                raise RuntimeError(f"process {rank}:\n{error}")
            found[rank] = value
    finally:
        for process in all_of_them:
            process.join(5)
            process.kill()
    return [found[rank] for rank in range(processes - killed)]
