"""The commands of the command line, on top of everything else: one module ``<command>`` with ``add_command`` each."""
