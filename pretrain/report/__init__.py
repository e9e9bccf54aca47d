"""A run directory as one self-contained HTML page."""

from pretrain.report.write import write_report

__all__ = ["write_report"]
