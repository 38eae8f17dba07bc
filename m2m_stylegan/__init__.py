"""Adapt official StyleGAN2 networks to small image sets by training only part of their blocks on cached features."""

__version__ = '0.1.0'
