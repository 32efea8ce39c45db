"""The experiments behind ``diffopt reproduce``, and the frame that runs them; how to add one: see ``contract``."""
