"""How long a test waits for what should take seconds."""

# A limit is there so that what hangs ends at last, never to say how fast something is: on a busy machine everything may
# take thirty times as long. The limit of a whole test, `timeout` in pyproject.toml, is larger.
PATIENCE = 1200.0
