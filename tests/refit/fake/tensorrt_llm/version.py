"""Of the contract that it follows."""

__version__ = "1.4.0"
