"""Environments of other people's worlds; each needs a package of its own (see README.md here)."""
