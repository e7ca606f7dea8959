"""Torch modules over `recfast.ops`."""

from recfast.nn.quantizer import ProductQuantizer

__all__ = ["ProductQuantizer"]
