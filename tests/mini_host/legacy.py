"""Opening pickles, as a module and as a script."""

import pickle

import click
import dnnlib
import torch


def load_network_pkl(f, force_fp16=False):
    data = _LegacyUnpickler(f).load()
    assert all(isinstance(data[name], torch.nn.Module) for name in ('G', 'D', 'G_ema'))
    return {'training_set_kwargs': None, 'augment_pipe': None, **data}


class _LegacyUnpickler(pickle.Unpickler):
    pass


@click.command()
@click.option('--source', required=True)
@click.option('--dest', required=True)
def convert_network_pickle(source, dest):
    with dnnlib.util.open_url(source) as f:
        data = load_network_pkl(f)
    with open(dest, 'wb') as f:
        pickle.dump(data, f)
    print('Done.')


if __name__ == '__main__':
    convert_network_pickle()
