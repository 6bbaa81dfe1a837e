"""Routing recorded: what every token asked for in every sparse layer, what it got, and files of it."""
