"""Multi-query associative recall: the memories against their twins."""
