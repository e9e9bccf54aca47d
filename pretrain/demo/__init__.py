"""`internimage demo`: the whole way on the embedded set."""

from pretrain.demo.walk import walk

__all__ = ["walk"]
