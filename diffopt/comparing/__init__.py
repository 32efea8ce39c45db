"""``diffopt.compare``: estimators side by side on one problem."""
