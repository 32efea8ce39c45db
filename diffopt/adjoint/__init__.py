"""The backward pass: what an estimator is, and the exact one."""
