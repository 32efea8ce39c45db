"""What the library is measured against. One file per way of working; each takes a ``Problem``, returns the gradient."""
