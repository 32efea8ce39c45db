"""The experiments of the papers, one file or a few each: ``diffopt reproduce``."""
