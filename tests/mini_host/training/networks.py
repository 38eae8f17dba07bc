"""The networks, made of this repository's own text as pickles carry it, on the host's operators."""

from m2m_stylegan import snapshots

exec(compile(snapshots.embedded_source('networks'), __file__, 'exec'))


def bias_act(*args, **kwargs):
    from torch_utils.ops import bias_act
    return bias_act.bias_act(*args, **kwargs)
