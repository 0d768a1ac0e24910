"""A comparison as one page to look at: results in, one HTML file out, which asks nothing of the network."""

from moetailor.report.page import write_report

__all__ = ["write_report"]
