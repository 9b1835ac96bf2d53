"""Memory and communication of a run on a machine that is not attached."""
