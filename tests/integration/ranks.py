"""Several processes for tests: ranks that wait for work, with torch's gloo between them.

A rank is forked from a server that has imported the package, so that it starts in milliseconds and no thread of the
test's own process is copied. It ends with its test process, and by itself after `LIFE` seconds whatever happens.
"""

import faulthandler
import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist


# Seconds after which a rank that does not answer is stuck, and after which one ends in any case.
PATIENCE, LIFE = 120, 900


class Ranks:
    """Processes 0 to `count - 1` of one group.

    Args:
        count (`int`): how many.
    """

    def __init__(self, count: int):
        self.count, self.processes, self.lines = count, [], []

    def start(self) -> None:
        """Starts the processes."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", "engram_transformers.training", "tests.tiny"])
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        for rank in range(self.count):
            line, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, rank, self.count, self.folder.name), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.lines.append(line)

    def run(self, function, *arguments) -> list:
        """What `function(*arguments)`, a function of a module, returns on every rank.

        Raises:
            `RuntimeError`: with the first traceback, if a rank raised or did not answer; the next work is for new ones.
        """
        if not self.lines:
            self.start()
        for line in self.lines:
            line.send((function, arguments))
        answers, waiting, end = {}, list(self.lines), time.monotonic() + PATIENCE
        problem = None
        while waiting and problem is None:
            ready = wait(waiting, timeout=max(0, end - time.monotonic()))
            if not ready:
                problem = f"no answer from ranks {[self.lines.index(line) for line in waiting]} in {PATIENCE} s"
            for line in ready:
                try:
                    went_well, answer = line.recv()
                except EOFError:
                    went_well, answer = False, "the process ended"
                if not went_well:
                    problem = problem or f"rank {self.lines.index(line)}: {answer}"
                answers[self.lines.index(line)] = answer
                waiting.remove(line)
        if problem is not None:
            self.end()
            raise RuntimeError(problem)
        return [answers[rank] for rank in range(self.count)]

    def end(self) -> None:
        """Ends all ranks."""
        for process in self.processes:
            process.kill()
            process.join()
        for line in self.lines:
            line.close()
        if self.lines:
            self.folder.cleanup()
        self.processes, self.lines = [], []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        self.end()


def work(line, rank: int, count: int, folder: str) -> None:
    """A rank's life: takes functions in, gives answers out."""
    faulthandler.dump_traceback_later(LIFE, exit=True)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count))
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=PATIENCE // 2))
    while True:
        try:
            function, arguments = line.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        line.send(answer)
