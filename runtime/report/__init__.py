"""A run folder, or several to compare -> one offline page: curves, what looks unhealthy, samples token by token, and
the configuration.

Reads files alone, so a page can be made of any run, at any time, on any machine; what is missing or torn is left out
and said so. All text of a run is hostile, names included: it is escaped, its control characters are spelled out, and
the page may run no script but its own and load nothing.
"""

from runtime.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
