"""Evaluation by tasks: a model answers or ranks, a task marks.

  suite = Suite(settings, data)            # reads and checks all data
  result = suite.evaluate('boolq', model)

`answers` asks a model; `seqio_tasks`, `programs` and `bigbench_lite` mark; `suite` knows all names; `results` keeps what
was found; `tables` and `published` put it beside the paper's figures.
"""
