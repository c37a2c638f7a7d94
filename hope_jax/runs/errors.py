"""Why a run ends; commands print the message and exit with code 1."""


class Fault(RuntimeError):
  """A run has to end; the message is one line with the remedy."""


class Diverged(Fault):
  """The parameters of a run are no longer usable; its checkpoints are."""


class NoData(Fault):
  """The input pipeline failed or hangs."""


class SaveFailed(Fault):
  """A checkpoint could not be written; the older ones are intact."""
