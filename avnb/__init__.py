"""avnb: learning what sounds look like."""
__version__ = "0.0.1"
