"""BIG-bench's JSON tasks (Srivastava et al. 2022), BIG-bench-Lite above all, without the `bigbench` package.

  tasks = lite.read_lite('bigbench-1.0.0.tar.gz')
  report = lite.evaluate(tasks, respond, shots=3)

`respond` gets a list of `requests.Choose` and `requests.Generate` and returns the answers in the same order; nothing
here knows of models. `reading` reads task files, `prompting` makes prompts with worked examples, `requests` asks and
marks, `metrics` has the formulas, `lite` the 24 tasks and their aggregate.

The data stay outside this package: `pip download bigbench==1.0.0 --no-deps --no-binary :all:` fetches the source
distribution (358 MB, Apache-2.0), which is read as it is.
"""
