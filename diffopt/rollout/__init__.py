"""The forward pass: one inner problem, its steps, and what is kept of them."""
