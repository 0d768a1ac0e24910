"""A comparison as one page to look at: results in, one HTML file out, which asks nothing of the network."""

from moetailor.comparison.stored import read_results
from moetailor.report.page import write_report

__all__ = ["read_results", "write_report"]
