"""The augmentation pipe, made as the networks are."""

from m2m_stylegan import snapshots

exec(compile(snapshots.embedded_source('augment'), __file__, 'exec'))
