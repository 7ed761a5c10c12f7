"""The ``bigmodel`` command."""

from bigmodel.cli.app import app, main

__all__ = ["app", "main"]
