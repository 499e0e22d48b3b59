"""What the server promises when things go wrong, each as a command that prints its figures.

`python -m tests.promises.core_killed` runs the short form, also a test; `--full` the whole.
`make promises` runs all in full and writes their figures into docs/reliability.md.
"""
