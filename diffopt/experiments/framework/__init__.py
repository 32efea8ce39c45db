"""What every experiment is made of: its units, its run and its folder, its claims, tables and pictures."""
