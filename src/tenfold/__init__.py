"""tenfold: ten published research systems in one library and one command."""

__version__ = "0.1.0"
