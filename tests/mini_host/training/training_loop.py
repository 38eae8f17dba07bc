"""A few steps with everything that breaks on today's PyTorch or without a GPU."""

import copy
import os
import pickle

import dnnlib
import legacy
import psutil
import torch
from torch_utils import misc
from torch_utils.ops import conv2d_gradfix, grid_sample_gradfix


def training_loop(run_dir, images, batch, steps, resume, rank):
    device = torch.device('cuda', rank)
    with dnnlib.util.open_url(resume) as f:
        data = legacy.load_network_pkl(f)
    G = copy.deepcopy(data['G']).train().requires_grad_(True).to(device)
    D = copy.deepcopy(data['D']).train().requires_grad_(True).to(device)
    G_ema = copy.deepcopy(G).eval()
    misc.copy_params_and_buffers(data['G_ema'], G_ema)
    uninitialised = torch.full([batch, G.z_dim], float('nan'), device=device)
    misc.print_module_summary(G, [uninitialised, torch.zeros([batch, 0], device=device)])
    opts = [dnnlib.util.construct_class_by_name(params=list(net.parameters()), class_name='torch.optim.Adam', lr=0.002, betas=[0, 0.99])
            for net in (G, D)]
    loader = iter(torch.utils.data.DataLoader(images, sampler=misc.InfiniteSampler(images), batch_size=batch))
    grid = torch.nn.functional.affine_grid(torch.eye(2, 3).repeat(batch, 1, 1), [batch, 3, *images.shape[2:]], align_corners=False).to(device)
    for _ in range(steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(torch.cuda.current_stream(device))
        real = next(loader).pin_memory().to(device).requires_grad_()
        fake = G(torch.randn([batch, G.z_dim], device=device), torch.zeros([batch, 0], device=device))
        blurred = conv2d_gradfix.conv2d(grid_sample_gradfix.grid_sample(real, grid), torch.eye(3, device=device)[:, :, None, None])
        logits = D(blurred, torch.zeros([batch, 0], device=device))
        r1, = torch.autograd.grad(logits.sum(), real, create_graph=True)
        loss = torch.nn.functional.softplus(-logits).mean() + r1.square().mean() + fake.square().mean()
        for opt in opts:
            opt.zero_grad()
        loss.backward()
        for opt in opts:
            opt.step()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        assert start.elapsed_time(end) > 0
    torch.cuda.reset_peak_memory_stats()
    line = f'{steps} steps, {psutil.Process(os.getpid()).memory_info().rss >> 20} MiB, rank {rank}\n'
    os.write(1, line.encode())  # in one piece: the processes share standard output
    if rank == 0:
        nets = {name: net.eval().requires_grad_(False).cpu() for name, net in [('G', G), ('D', D), ('G_ema', G_ema)]}
        with open(os.path.join(run_dir, 'network-snapshot-000000.pkl'), 'wb') as f:
            pickle.dump({**nets, 'augment_pipe': None, 'training_set_kwargs': None}, f)
