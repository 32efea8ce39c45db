"""Training again without some of the examples, and what that says of scores that predict it."""
