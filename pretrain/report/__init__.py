"""A run directory, or the stages of a chain of them, as one self-contained HTML page."""

from pretrain.report.stages import write_stages
from pretrain.report.write import write_report

__all__ = ["write_report", "write_stages"]
