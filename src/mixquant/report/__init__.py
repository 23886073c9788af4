"""Results files as one self-contained HTML page."""

from mixquant.report.page import page

__all__ = ["page"]
