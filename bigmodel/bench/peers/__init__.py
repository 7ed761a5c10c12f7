"""Other programs that run a checkpoint: one class each, with the settings that their own documents recommend."""
