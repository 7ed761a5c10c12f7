"""Text in and out of a model that was loaded."""
