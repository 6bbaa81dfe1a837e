"""Runs Python programs that nobody has read, in processes that may do as little as this machine can enforce.

`running` starts a program and hears how it ended; `isolation` finds out what this machine can enforce; `inside` and
`kernel` are what happens in the processes started.
"""
