"""High-throughput training of handwritten-Chinese-character recognisers in JAX."""

__version__ = "0.2.0"
