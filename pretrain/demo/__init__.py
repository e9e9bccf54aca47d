"""`internimage demo`: the whole way on the embedded set."""

from pretrain.demo.walk import run

__all__ = ["run"]
