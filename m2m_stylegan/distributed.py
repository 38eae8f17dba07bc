"""Several processes that train one network, one per GPU, on one machine or many: started by torchrun, or by `launch`.

Tensors on GPUs are exchanged by NCCL, all else by gloo. A process that is alone may call every function here; it then costs nothing.
"""

import contextlib
import ctypes
import datetime
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from m2m_stylegan.errors import UserError

T = TypeVar('T')
_LAUNCHER = 'M2M_LAUNCHER_PID'
_PR_SET_PDEATHSIG = 1  # of prctl(2)
# All wait while process 0 trains an encoder or evaluates, which can take hours. A process that ends is noticed at once: its sockets close.
PATIENCE = datetime.timedelta(days=1)
PEERS_LOST = 75  # exit status of a process that ended because another one did; the message of that one is the cause


class PeersLost(Exception):
    """An exchange with the other processes failed: one of them has ended."""


def launched() -> bool:
    """Was this process started as one of several, by torchrun or alike?"""
    return 'RANK' in os.environ and int(os.environ.get('WORLD_SIZE', '1')) > 1


def local_rank() -> int:
    """Number of this process on its machine, and of its GPU."""
    return int(os.environ.get('LOCAL_RANK', '0')) if launched() else 0


def rank() -> int:
    """Number of this process among all of them; 0 writes the files."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if _joined() else 1


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Join the processes that were started together with this one, if any; address and numbers come from torchrun's environment variables.

    An exception that leaves the block is handed to torchrun as the cause of the failure and ends this process without further words, so that
    it is told once, not by every process.
    """
    if not launched():
        yield
        return
    _end_with_launcher()
    dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo', timeout=PATIENCE)
    try:
        yield
    except PeersLost:
        sys.exit(PEERS_LOST)
    except Exception as err:
        if 'TORCHELASTIC_ERROR_FILE' not in os.environ:  # started by something else than torchrun: nobody would report it
            raise
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(err)
        sys.exit(1)
    dist.destroy_process_group()


def _end_with_launcher() -> None:
    """If torchrun or `launch` is killed, this process is, too (on Linux).

    They start their processes in sessions of their own, which no signal to a process group reaches: after a `kill -9` these would train on unseen.
    """
    if sys.platform == 'linux' and 'TORCHELASTIC_RUN_ID' in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.environ.get(_LAUNCHER, str(os.getppid())) != str(os.getppid()):  # It has died before it could be seen to.
            sys.exit(PEERS_LOST)


@contextlib.contextmanager
def exchange() -> Iterator[None]:
    """Marks an exchange between the processes. Raises PeersLost if it fails because one of them has ended."""
    try:
        yield
    except RuntimeError as err:  # gloo's own, and NCCL's DistBackendError
        if world_size() == 1:
            raise
        raise PeersLost(str(err)) from err


def from_main(function: Callable[..., T], *args) -> T:
    """Value of function(*args), computed by process 0 alone, in all processes."""
    value = [function(*args) if rank() == 0 else None]
    if world_size() > 1:
        with exchange():
            dist.broadcast_object_list(value)
    return value[0]


def gather(value: Any) -> list:
    """The values of all processes, in the order of their ranks, in all processes."""
    values = [value] * world_size()
    if world_size() > 1:
        with exchange():
            dist.all_gather_object(values, value)
    return values


def max_each(numbers: list[int]) -> list[int]:
    """The largest of all processes' values, number by number. Goes over the CPU: it does not wait for a GPU."""
    if world_size() == 1:
        return numbers
    tensor = torch.tensor(numbers)
    with exchange():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def sum_(tensor: torch.Tensor) -> None:
    """Replace a tensor by its sum over all processes."""
    if world_size() > 1:
        with exchange():
            dist.all_reduce(tensor)


def average_(tensors: Iterable[torch.Tensor]) -> None:
    """Replace tensors of one dtype and device by their means over all processes, in one exchange."""
    tensors = list(tensors)
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    sum_(flat)
    flat /= world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def copy_from_main_(tensors: Iterable[torch.Tensor]) -> None:
    """Replace tensors by those of process 0."""
    if world_size() > 1:
        with exchange():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def launch(num_processes: int, command: list[str]) -> None:
    """Run `command` (an executable and its arguments) as so many processes on this machine, with torchrun's launcher, until all have ended.

    SIGTERM, SIGINT and SIGUSR1 are passed on; the processes then have 30 s to save. If one fails, the others are ended, and UserError says
    which one it was and why.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)  # what went wrong is said once, below
    os.environ[_LAUNCHER] = str(os.getpid())
    os.environ.setdefault('OMP_NUM_THREADS', str(max((os.cpu_count() or 1) // num_processes, 1)))
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=num_processes, run_id='m2m', rdzv_backend='c10d', rdzv_endpoint='localhost:0',
                          local_addr='localhost', max_restarts=0, monitor_interval=0.1)
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))  # the launcher does not know SIGUSR1
    try:
        elastic_launch(config, command[0])(*command[1:])
    except SignalException:
        pass  # The processes have saved and said so.
    except ChildFailedError as err:
        raise UserError(_cause(err.failures, num_processes)) from None
    finally:
        signal.signal(signal.SIGUSR1, previous)


def _cause(failures: dict, num_processes: int) -> str:
    """The message of the process that failed by itself, before those that it took with it."""
    number, failure = min(failures.items(), key=lambda item: (item[1].exitcode == PEERS_LOST, item[1].timestamp))
    told = failure.message
    if isinstance(told, dict):  # recorded by `session`
        told, trace = told['message'], told['extraInfo']['py_callstack']
        told = told.removeprefix('UserError: ') if told.startswith('UserError: ') else trace
    elif failure.exitcode > 0:
        told = f'it ended with exit status {failure.exitcode}'
    return f'Process {number} of {num_processes} failed, and the others were ended with it:\n{told}'


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
