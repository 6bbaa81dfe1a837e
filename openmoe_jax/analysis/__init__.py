"""What can be said about a model or a run without training it, and what its logs show."""
