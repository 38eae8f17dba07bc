"""Functions executed by several processes at once, for test_distributed.py, and how to start them: gloo on the CPU, from a server that has
already imported everything."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import traceback
from pathlib import Path

FORKSERVER = multiprocessing.get_context('forkserver')
FORKSERVER.set_forkserver_preload(['ranks_preload'])


def _start_server():
    """With our search path: before Python 3.12.5 the server has only its own, and preloads nothing without saying so."""
    saved = os.environ.get('PYTHONPATH', '')
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, sys.path))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ['PYTHONPATH'] = saved


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def run(num, function, *args):
    """Call function(*args) in processes 0 to num - 1 in one session. Returns their exit codes, and the results of those that had any, by rank."""
    _start_server()
    port, processes, pipes = free_port(), [], []
    for rank in range(num):
        here, there = FORKSERVER.Pipe(duplex=False)
        processes.append(FORKSERVER.Process(target=_enter, args=(rank, num, port, there, function, args)))
        processes[-1].start()
        there.close()
        pipes.append(here)
    results = {}
    for rank, pipe in enumerate(pipes):
        with contextlib.suppress(EOFError):  # a process that was killed
            results[rank] = pipe.recv()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes], results


def _enter(rank, num, port, pipe, function, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num), MASTER_ADDR='localhost', MASTER_PORT=str(port))
    import torch

    from m2m_stylegan import distributed

    torch.set_num_threads(1)
    try:
        with distributed.session():
            pipe.send(function(*args))
    except Exception:
        pipe.send(traceback.format_exc())
        raise SystemExit(1) from None


def collectives():
    """What each function of `distributed` gives in this process."""
    import torch

    from m2m_stylegan import distributed

    rank = distributed.rank()
    tensors = [torch.full([2], float(rank)), torch.tensor(10.0 * rank), torch.tensor([float('nan') if rank else 1.0])]
    distributed.average_(tensors)
    total = torch.tensor([1.0, float(rank)])
    distributed.sum_(total)
    copied = torch.tensor(float(rank))
    distributed.copy_from_main_([copied])
    return {'from_main': distributed.from_main(lambda: f'of {rank}'), 'gather': distributed.gather({'rank': rank}),
            'max_each': distributed.max_each([rank, -rank]), 'average': [x.tolist() for x in tensors], 'sum': total.tolist(), 'copied': float(copied),
            'size': distributed.world_size()}


def gradients(phase_name, latents, real, seed):
    """Gradients of one phase on this process's share (every world_size-th item) of a batch, in float64, averaged over the processes."""
    from m2m_stylegan import distributed

    share = slice(distributed.rank(), None, distributed.world_size())
    return phase_gradients(phase_name, {k: v[share] for k, v in latents.items()}, {k: v[share] for k, v in real.items()}, seed + distributed.rank())


def phase_gradients(phase_name, latents, real, seed):
    """Gradients {parameter: list} of a phase in float64, on tiny networks whose D compares all images whose number leaves the same rest by 2."""
    import tiny
    import torch

    from m2m_stylegan import phases

    G, D = tiny.generator(8).double().train(), tiny.discriminator(8, epilogue_kwargs={'mbstd_group_size': 4}).double().train()
    options = phases.LossOptions(r1_gamma=1, style_mixing_prob=0)
    source = phases.LatentSource(G, 0, {'noise_mode': 'const', 'force_fp32': True})
    game = phases.Game(source, D, lambda img: img, options, lambda name, value: None, torch.device('cpu'))
    game.pl_mean = game.pl_mean.double()
    G_params, D_params = list(G.parameters()), list(D.parameters())
    phase = {phase.name: phase for phase in phases.make_phases(game, G_params, D_params, 0.0, 0.0)}[phase_name]
    torch.manual_seed(seed)
    phases.run_phase(phase, latents, real, len(latents['c']))
    names = [name for name, _ in (G if phase_name[0] == 'G' else D).named_parameters()]
    return {name: param.grad.numpy() for name, param in zip(names, phase.params, strict=True) if param.grad is not None}


def training(run_dir, data, changes, resume, kill_rank=None, kill_step=None):
    """A tiny run of several processes; process kill_rank dies by SIGKILL in step kill_step.

    Returns the reason to stop, the weights of the last G, ADA's p, the sign sums of this process and the mean signs that p was adjusted by.
    """
    import signal

    import tiny_run

    from m2m_stylegan import ada, distributed, phases
    from m2m_stylegan.datasets import ImageDataset

    calls, original, own_signs, sign_means = [0], phases.run_phase, [], []
    start, sum_, adjust_p = tiny_run.start, distributed.sum_, ada.adjust_p

    def start_near_zero(*args):
        state, *others = start(*args)
        state.D.b4.out.bias.data -= 0.25  # else all logits of these tiny networks have one sign
        return state, *others

    def sum_signs(tensor):
        if tensor.shape == (2,) and tensor.dtype.itemsize == 8:
            own_signs.append(tensor.tolist())
        sum_(tensor)

    def adjust(p, sign_mean, *args):
        sign_means.append(sign_mean)
        return adjust_p(p, sign_mean, *args)

    def run_phase(phase, *args):
        original(phase, *args)
        calls[0] += phase.name == 'Dmain'
        if distributed.rank() == kill_rank and calls[0] == kill_step + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    phases.run_phase, tiny_run.start, distributed.sum_, ada.adjust_p = run_phase, start_near_zero, sum_signs, adjust
    try:
        options = tiny_run.options_for('full', num_gpus=distributed.world_size(), **changes)
        state, reason = tiny_run.train(Path(run_dir), ImageDataset(data, use_labels=True), options, resume=resume)
    finally:
        phases.run_phase, tiny_run.start, distributed.sum_, ada.adjust_p = original, start, sum_, adjust_p
    return reason, {name: x.numpy() for name, x in state.G.named_parameters()}, float(state.augment_pipe.p), own_signs, sign_means


def stop_by_signal(run_dir, data):
    """A long run of several processes, of which one is told to stop."""
    import signal
    import threading

    from m2m_stylegan import checkpoint, distributed

    if distributed.rank() == 1:
        import time

        def send():
            while not checkpoint.files(Path(run_dir)):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=send, daemon=True).start()
    return training(run_dir, data, {'total_kimg': 1000, 'snapshot_ticks': 10**6}, False)[0]
