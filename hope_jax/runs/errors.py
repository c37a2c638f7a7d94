"""Why a run cannot go on; commands print the message and exit with code 1."""


class Fault(RuntimeError):
  """A run cannot go on; the message is one line that says what to do."""


class Diverged(Fault):
  """The run cannot go on from where it is; its checkpoints are good."""


class NoData(Fault):
  """The input pipeline died or hangs."""


class SaveFailed(Fault):
  """A checkpoint could not be written; the older ones are intact."""
