"""Lightning experiments for industrial defects, where defective pictures are few."""

__version__ = "0.1.0"
