"""Cutting a generator and a discriminator at a slice resolution r, and putting them together again.

Blocks with resolution <= r are low-res, the others high-res (docs: Mind2Mind, arXiv 1906.11613, whose g0/g1 and c0/c1 these are):
g_high(g_low(z)) equals G(z) and d_low(d_high(img)) equals D(img), bit for bit, at every r from 4 to the image resolution.
"""

import dataclasses
from collections.abc import Callable

import torch

from m2m_stylegan.errors import UserError

W_SLICE = 2  # The slice below 4 x 4: the low-res part of G is the mapping network alone, that of D is empty but for its mapping of labels.


def slice_resolutions(img_resolution: int) -> list[int]:
    """All resolutions at which a network for images of this size can be cut: 4, 8, ..., img_resolution."""
    return [2 ** i for i in range(2, img_resolution.bit_length())]


def slice_name(res: int) -> str:
    """What users call a slice: 'w', or its resolution."""
    return 'w' if res == W_SLICE else str(res)


def check_slice(res: int, img_resolution: int, lowest: int = 4) -> None:
    """Raise UserError unless `res` is a resolution at which both networks can be cut into two parts; lowest: W_SLICE or 4."""
    expected = [r for r in [*([W_SLICE] if img_resolution > 4 else []), *slice_resolutions(img_resolution)] if r >= lowest]
    if res not in expected:
        raise UserError(f'--slice={slice_name(res)}: expected one of {", ".join(map(slice_name, expected))} for a network of '
                        f'{img_resolution} x {img_resolution} pixels.')
    if res == img_resolution:
        raise UserError(f'--slice={res} is the image resolution: that leaves no high-res block to train.')


def is_low_res(name: str, res: int) -> bool:
    """Does the tensor or module of this official dotted name (of G or of D) belong to the low-res part at slice `res`? Mappings do."""
    for part in name.split('.'):
        if part[:1] == 'b' and part[1:].isdigit():
            return int(part[1:]) <= res
    return True


def g_low(G, ws: torch.Tensor, res: int, **block_kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Synthesis blocks b4 .. b{res}: ws [N, num_ws, w_dim] => x [N, C(res), res, res], img [N, img_channels, res, res] or None."""
    return G.synthesis.run(ws, None, None, [r for r in G.synthesis.block_resolutions if r <= res], **block_kwargs)


def g_high(G, x: torch.Tensor, img: torch.Tensor | None, ws: torch.Tensor, res: int, **block_kwargs) -> torch.Tensor:
    """Synthesis blocks b{2 res} .. b{R}: (x, img) of g_low and ws [N, num_ws, w_dim] => image [N, img_channels, R, R]."""
    return G.synthesis.run(ws, x, img, [r for r in G.synthesis.block_resolutions if r > res], **block_kwargs)[1]


def d_high(D, img: torch.Tensor, res: int, **block_kwargs) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Discriminator blocks b{R} .. b{2 res}: image [N, img_channels, R, R] => x [N, C(res), res, res] (None if res is R), img (architecture skip)."""
    return D.run(None, img, [r for r in D.block_resolutions if r > res], **block_kwargs)


def d_low(D, x: torch.Tensor | None, img: torch.Tensor | None, c: torch.Tensor | None, res: int, **block_kwargs) -> torch.Tensor:
    """Discriminator blocks b{res} .. b8 and the epilogue: what d_high returned => logits [N, 1]."""
    x, img = D.run(x, img, [r for r in D.block_resolutions if r <= res], **block_kwargs)
    return D.epilogue(x, img, c)


def tensor_names(net: torch.nn.Module, res: int | None, part: str) -> frozenset[str]:
    """Official names of the parameters and buffers of one part of G or D. part: 'all', 'high-res' or 'low-res'; 'all' needs no res."""
    names = [name for name, _ in [*net.named_parameters(), *net.named_buffers()]]
    return frozenset(name for name in names if part == 'all' or is_low_res(name, res) == (part == 'low-res'))


def freezed_names(D, num_layers: int) -> frozenset[str]:
    """Names of the tensors of D's first `num_layers` layers, counted from the pixels: FreezeD (2002.10964)."""
    layers = [f'b{res}.{layer}.' for res in D.block_resolutions for layer in ('fromrgb', 'conv0', 'conv1', 'skip')
              if hasattr(getattr(D, f'b{res}'), layer)]
    return frozenset(name for name in tensor_names(D, None, 'all') if name.startswith(tuple(layers[:num_layers])))


@dataclasses.dataclass(frozen=True)
class BlockRow:
    """One line of the table that is printed before training."""

    name: str  # e.g. 'G.b16'
    resolution: int | None
    num_params: int
    num_trained: int
    macs: int  # multiply-accumulates of one forward pass of one image, convolutions and fully connected layers
    idle: bool  # the block never runs during training: its output comes from the feature cache, or it is bypassed


@torch.no_grad()
def block_table(G, D, trained: set[int], idle: Callable[[str, int | None], bool]) -> list[BlockRow]:
    """One row per block of G and D in the order of execution.

    trained: ids of the parameters that the optimisers hold. idle(name, resolution): does a block, e.g. 'G.b16' (the mappings have no resolution),
    never run during training?
    MACs are counted by running one sample, so that they are those of the real path, whatever the architecture.
    """
    macs: dict[str, int] = {}
    _count_macs(G, 'G', macs, lambda: G(torch.zeros([1, G.z_dim], device=_device(G)), torch.zeros([1, G.c_dim], device=_device(G)), noise_mode='none',
                                        force_fp32=True))
    img = torch.zeros([1, D.img_channels, D.img_resolution, D.img_resolution], device=_device(D))
    _count_macs(D, 'D', macs, lambda: D(img, torch.zeros([1, D.c_dim], device=_device(D)), force_fp32=True))
    blocks = [('G.mapping', None, G.mapping)]
    blocks += [(f'G.b{r}', r, getattr(G.synthesis, f'b{r}')) for r in G.synthesis.block_resolutions]
    blocks += [(f'D.b{r}', r, getattr(D, f'b{r}')) for r in [*D.block_resolutions, 4]]
    if D.c_dim > 0:
        blocks.append(('D.mapping', None, D.mapping))
    rows = []
    for name, block_res, module in blocks:
        # Frozen FreezeD layers keep their weights among the buffers: they are parameters to the reader of the table.
        tensors = [*module.parameters(), *(b for n, b in module.named_buffers() if n.split('.')[-1] in ('weight', 'bias'))]
        rows.append(BlockRow(
            name, block_res, sum(t.numel() for t in tensors), sum(t.numel() for t in tensors if id(t) in trained), macs.get(name, 0),
            idle(name, block_res)))
    return rows


def _device(net: torch.nn.Module) -> torch.device:
    return next(net.parameters()).device


def _count_macs(net: torch.nn.Module, prefix: str, macs: dict[str, int], run) -> None:
    """Add the MACs of every block to `macs` while `run` executes, from the shapes that pass through its layers."""
    handles = []

    def owner(name: str) -> str:
        parts = [p for p in name.split('.') if p != 'synthesis']
        return f'{prefix}.{parts[0]}'

    def hook(name):
        def count(module, args, output):
            x = args[0]
            if x.ndim == 2:  # fully connected: weight [out, in]
                cost = module.weight.numel() * x.shape[0]
            else:  # convolution: each kernel at each position of the smaller side (transposed or strided, 1x1 skips included)
                positions = min(x.shape[2] * x.shape[3], output.shape[2] * output.shape[3]) if module.weight.ndim == 4 else 0
                cost = module.weight.numel() * positions * x.shape[0]
            macs[owner(name)] = macs.get(owner(name), 0) + cost
        return count

    try:
        for name, module in net.named_modules():
            if isinstance(getattr(module, 'weight', None), torch.Tensor):
                handles.append(module.register_forward_hook(hook(name)))
        training = net.training
        net.eval()  # In training mode the mapping would move w_avg.
        run()
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()


def format_table(rows: list[BlockRow]) -> str:
    """The table as text, with totals, for the console and log.txt."""
    lines = [f'{"block":<11}{"resolution":>11}{"parameters":>13}{"MMACs":>10}  state']
    for row in rows:
        state = 'idle' if row.idle else 'frozen' if row.num_trained == 0 else 'trained' if row.num_trained == row.num_params else 'partly trained'
        lines.append(f'{row.name:<11}{row.resolution or "-":>11}{row.num_params:>13,}{row.macs / 1e6:>10.2f}  {state}')
    total, trained = sum(row.num_params for row in rows), sum(row.num_trained for row in rows)
    running = sum(row.macs for row in rows if not row.idle) / max(sum(row.macs for row in rows), 1)
    lines.append(f'{"total":<11}{"":>11}{total:>13,}{sum(row.macs for row in rows) / 1e6:>10.2f}  '
                 f'{trained / max(total, 1):.0%} of the parameters trained, {running:.0%} of the forward MACs run')
    return '\n'.join(lines)
