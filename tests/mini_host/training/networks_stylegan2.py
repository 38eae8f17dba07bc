"""As stylegan3 has them: options of the synthesis network are options of the generator."""

from m2m_stylegan import snapshots

exec(compile(snapshots.embedded_source('networks'), __file__, 'exec'))
from torch_utils.persistence import persistent_class  # noqa: E402

_Nested = Generator  # noqa: F821


class Generator(_Nested):
    def __init__(self, z_dim, c_dim, w_dim, img_resolution, img_channels, mapping_kwargs=None, **synthesis_kwargs):
        super().__init__(z_dim, c_dim, w_dim, img_resolution, img_channels, mapping_kwargs=mapping_kwargs or {}, synthesis_kwargs=synthesis_kwargs)


Generator = persistent_class(Generator)
